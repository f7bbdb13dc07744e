import pytest
import torch

from chestct.config.schema import AugmentConfig
from chestct.data.augment import make_views

OFF = dict.fromkeys(("flip", "rotate", "shift", "zoom", "shear", "window", "gamma", "blur", "noise"), 0.0)
NAMES = ["a", "b", "c"]


@pytest.fixture
def slices():
    return torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def test_view_0_is_the_slice_itself(slices):
    assert make_views(slices, NAMES, [0, 0, 0], 0, AugmentConfig()) is slices


def test_a_view_depends_on_seed_view_and_content_but_not_on_the_batch(slices):
    whole = make_views(slices, NAMES, [1, 2, 1], 7, AugmentConfig())
    alone = make_views(slices[2:], NAMES[2:], [1], 7, AugmentConfig())
    assert torch.equal(whole[2:], alone)
    assert not torch.equal(alone, make_views(slices[2:], NAMES[2:], [2], 7, AugmentConfig()))
    assert not torch.equal(alone, make_views(slices[2:], NAMES[2:], [1], 8, AugmentConfig()))
    assert not torch.equal(alone, make_views(slices[2:], ["other"], [1], 7, AugmentConfig()))


def test_views_stay_in_range(slices):
    strong = AugmentConfig(1.0, 40, 0.3, 0.5, 30, 0.5, 1.0, 0.1, 0.5)
    for view in range(1, 10):
        out = make_views(slices, NAMES, [view] * 3, 0, strong)
        assert out.min() >= 0
        assert out.max() <= 1


def test_all_switched_off_changes_nothing(slices):
    assert torch.allclose(make_views(slices, NAMES, [1] * 3, 0, AugmentConfig(**OFF)), slices, atol=1e-6)


def test_flip_mirrors_left_and_right(slices):
    out = make_views(slices, NAMES, [1] * 3, 0, AugmentConfig(**OFF | {"flip": 1.0}))
    assert torch.allclose(out, slices.flip(3), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OFF if name != "flip"])
def test_each_change_changes_something(slices, name):
    out = make_views(slices, NAMES, [1] * 3, 0, AugmentConfig(**OFF | {name: 0.3 if name != "rotate" else 20.0}))
    assert not torch.allclose(out, slices, atol=1e-3)


def test_blur_is_a_gaussian_of_at_most_the_width_asked_for():
    point = torch.zeros(1, 1, 65, 65)
    point[..., 32, 32] = 1
    axis = torch.arange(65.0) - 32
    widths = []
    for view in range(1, 60):
        out = make_views(point, ["point"], [view], 0, AugmentConfig(**OFF | {"blur": 0.05}))[0, 0]
        assert out.sum() == pytest.approx(1, abs=1e-4)
        widths.append(float((out.sum(0) * axis**2).sum().sqrt()))
    assert 0.9 * 0.05 * 65 < max(widths) < 1.01 * 0.05 * 65
    assert min(widths) < 0.5


def test_rotation_goes_as_far_as_asked_and_not_further():
    # A bar through the centre; its direction is measured by its second moments.
    bar = torch.zeros(1, 1, 65, 65)
    bar[..., 31:34, 4:61] = 1
    y, x = torch.meshgrid(torch.arange(65.0) - 32, torch.arange(65.0) - 32, indexing="ij")
    angles = []
    for view in range(1, 200):
        out = make_views(bar, ["bar"], [view], 0, AugmentConfig(**OFF | {"rotate": 20.0}))[0, 0]
        moments = [(out * m).sum() for m in (x * x, y * y, x * y)]
        angles.append(0.5 * torch.atan2(2 * moments[2], moments[0] - moments[1]).rad2deg())
    angles = torch.stack(angles)
    assert angles.abs().max() < 21
    assert angles.max() > 17
    assert angles.min() < -17
