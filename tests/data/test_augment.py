import pytest
import torch
from torchvision.transforms import v2

from chestct.config.schema import AugmentConfig
from chestct.data.augment import Blur, change_batch, draw_changes, make_views

OFF = dict.fromkeys(("flip", "rotate", "shift", "zoom", "shear", "window", "gamma", "blur", "noise"), 0.0)
NAMES = ["a", "b", "c"]


@pytest.fixture
def slices():
    return torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def test_view_0_is_the_slice_itself(slices):
    assert make_views(slices, NAMES, 0, 0, AugmentConfig()) is slices


def test_a_view_depends_on_seed_view_and_content_but_not_on_the_batch(slices):
    alone = make_views(slices[2:], NAMES[2:], 1, 7, AugmentConfig())
    assert torch.equal(make_views(slices, NAMES, 1, 7, AugmentConfig())[2:], alone)
    for name, view, seed in (("c", 2, 7), ("c", 1, 8), ("other", 1, 7)):
        assert not torch.equal(alone, make_views(slices[2:], [name], view, seed, AugmentConfig()))


def test_views_stay_in_range(slices):
    strong = AugmentConfig(1.0, 40, 0.3, 0.5, 30, 0.5, 1.0, 0.1, 0.5)
    for view in range(1, 10):
        out = make_views(slices, NAMES, view, 0, strong)
        assert out.min() >= 0
        assert out.max() <= 1


def test_all_switched_off_changes_nothing_and_flip_alone_mirrors_left_and_right(slices):
    assert torch.allclose(make_views(slices, NAMES, 1, 0, AugmentConfig(**OFF)), slices, atol=1e-6)
    out = make_views(slices, NAMES, 1, 0, AugmentConfig(**OFF | {"flip": 1.0}))
    assert torch.allclose(out, slices.flip(3), atol=1e-5)


def test_masks_are_turned_and_shifted_with_their_slices_and_stay_masks():
    masks = torch.zeros(3, 1, 32, 32, dtype=torch.bool)
    masks[:, :, 8:20, 4:14] = True
    images = masks.float() * 0.8
    moves = AugmentConfig(**OFF | {"flip": 0.5, "rotate": 30, "shift": 0.1, "zoom": 0.2})
    for view in range(1, 5):
        moved = masks.clone()
        out = make_views(images, NAMES, view, 0, moves, moved)
        torch.testing.assert_close(out, make_views(images, NAMES, view, 0, moves))
        assert ((out > 0.4) == moved).float().mean() > 0.97
    strong = make_views(images, NAMES, 1, 0, AugmentConfig(**OFF | {"noise": 1.0, "gamma": 1.0, "window": 0.5}), masks)
    assert not torch.equal(strong, images)
    assert masks.sum() == 3 * 12 * 10


@pytest.mark.parametrize("sigma", [1e-3, 0.7, 3.0])
def test_blur_in_two_passes_is_that_of_torchvision(slices, sigma):
    blur, whole = (kind((21, 13), (sigma, sigma)) for kind in (Blur, v2.GaussianBlur))
    torch.testing.assert_close(blur(slices), whole(slices), rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", [name for name in OFF if name != "flip"])
def test_each_change_changes_something(slices, name):
    out = make_views(slices, NAMES, 1, 0, AugmentConfig(**OFF | {name: 0.3 if name != "rotate" else 20.0}))
    assert not torch.allclose(out, slices, atol=1e-3)


@pytest.mark.parametrize("name", ["all", *(name for name in OFF if name != "noise")])
def test_whole_batches_are_changed_as_single_slices_are(slices, name):
    strong = dict(zip(OFF, (0.5, 40.0, 0.2, 0.3, 20.0, 0.5, 0.5, 0.05, 0.0), strict=True))
    cfg = AugmentConfig(**OFF | (strong if name == "all" else {name: strong[name]}))
    for view in range(1, 6):
        changes, seeds = draw_changes([*NAMES, "d"], [view, view, view, 0], 7, cfg, 32)
        out = change_batch(torch.cat([slices, slices[:1]]), changes, seeds, cfg)
        torch.testing.assert_close(out[:3], make_views(slices, NAMES, view, 7, cfg), rtol=0, atol=2e-4)
        assert torch.equal(out[3], slices[0])


def test_noise_of_whole_batches_is_spread_like_that_of_single_slices_and_belongs_to_its_slice():
    grey, names = torch.full((200, 1, 32, 32), 0.5), [str(i) for i in range(200)]
    cfg = AugmentConfig(**OFF | {"noise": 0.1})
    changes, seeds = draw_changes(names, [1] * 200, 0, cfg, 32)
    out = change_batch(grey, changes, seeds, cfg)
    single = make_views(grey, names, 1, 0, cfg)
    torch.testing.assert_close(out.std((1, 2, 3)), single.std((1, 2, 3)), rtol=0.15, atol=1e-4)
    assert torch.equal(change_batch(grey[5:6], changes[5:6], seeds[5:6], cfg), out[5:6])
    assert out[0, 0, 0, 0] != out[1, 0, 0, 0]
