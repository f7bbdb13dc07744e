import numpy as np
import pytest

from chestct.data.registration import (
    IDENTITY,
    Level,
    correlation,
    find_image,
    make_levels,
    normalise,
    pack,
    register,
    take,
    warp,
)

SIDE = 56


def texture(seed: int, n: int = 1) -> np.ndarray:
    """Smooth random images in a black frame: float32 [n, SIDE, SIDE], 0 to 255."""
    rng = np.random.default_rng(seed)
    axis = np.arange(SIDE) / SIDE
    waves = np.exp(-(((axis[:, None] - np.linspace(0, 1, 15)) / 0.05) ** 2))
    image = 120 + 50 * waves @ rng.normal(size=(n, 15, 15)) @ waves.T
    image[:, :4] = image[:, -4:] = 0
    return np.clip(image, 0, 255).astype(np.float32)


def make_level(image: np.ndarray, side: int, sigma: float) -> Level:
    (level,) = make_levels(image, [side], sigma)
    return level


def test_several_sides_at_once_are_what_each_is_alone_smallest_first() -> None:
    image = texture(6, n=2).astype(np.uint8)
    for level, side in zip(make_levels(image, (14, 28), 0.2), (14, 28), strict=True):
        for together, alone in zip(level, make_level(image, side, 0.2), strict=True):
            assert together.shape == (2, side, side)
            assert together == pytest.approx(alone, abs=1e-3)


def test_eight_bits_are_enough_for_a_level() -> None:
    level = make_level(texture(7, n=3).astype(np.uint8), 28, 0.2)
    image, weight = take(pack(level), np.array([2, 0]))
    assert image == pytest.approx(level[0][[2, 0]], abs=0.013)
    assert weight == pytest.approx(level[1][[2, 0]], abs=0.003)
    assert image.dtype == weight.dtype == np.float32


def test_shading_and_contrast_drop_out() -> None:
    image, weight = texture(0), np.ones((1, SIDE, SIDE), np.float32)
    shaded = (image * np.linspace(0.3, 1.2, SIDE) + 40).astype(np.float32)
    inner = np.s_[:, 8:-8, 4:-4]
    plain, changed = normalise(image, weight, 1 / 28)[inner], normalise(shaded, weight, 1 / 28)[inner]
    assert np.corrcoef(plain.ravel(), changed.ravel())[0, 1] > 0.98
    # Local mean alone would leave the contrast of the dark side smaller.
    left, right = (np.abs(part).mean() for part in np.split(changed, 2, axis=2))
    before_left, before_right = (np.abs(part).mean() for part in np.split(plain, 2, axis=2))
    assert left / right == pytest.approx(before_left / before_right, rel=0.25)


def test_register_finds_the_pose_of_a_warped_copy() -> None:
    image = texture(1, n=5).astype(np.uint8)
    rng = np.random.default_rng(0)
    pose = rng.uniform([0.93, -0.04, 0.93, -0.04], [1.07, 0.04, 1.07, 0.04], (5, 4))
    moved = np.uint8(np.clip(warp(image.astype(np.float32), pose), 0, 255))
    estimate = np.tile(IDENTITY, (5, 1))
    for side, sigma in ((14, 0.2), (28, 0.2), (56, 1 / 28)):
        fixed, moving = make_level(moved, side, sigma), make_level(image, side, sigma)
        estimate = register(fixed, moving, estimate, steps=8, stiffness=1e-3)
    assert estimate == pytest.approx(pose, abs=0.01)
    assert (correlation(fixed, moving, estimate) > 0.93).all()
    assert correlation(fixed, moving, np.tile(IDENTITY, (5, 1))).mean() < 0.6


def test_stiffness_holds_the_pose_back() -> None:
    image = texture(2).astype(np.uint8)
    fixed, moving = make_level(image, 28, 0.2), make_level(np.roll(image, 2, axis=2), 28, 0.2)
    free = register(fixed, moving, IDENTITY[None], steps=8, stiffness=1e-3)
    held = register(fixed, moving, IDENTITY[None], steps=8, stiffness=1.0)
    assert free[0, 3] == pytest.approx(2 / SIDE, abs=0.005)
    assert 0 < held[0, 3] < 0.75 * free[0, 3]


def test_bars_and_a_white_border_within_them_are_not_image() -> None:
    image = texture(3).astype(np.uint8)
    image[:, :8] = image[:, -8:] = 0
    image[:, 8:12] = image[:, -12:-8] = image[:, 8:-8, :4] = image[:, 8:-8, -4:] = 255
    for turned in (image, image.transpose(0, 2, 1)):
        counts = [np.count_nonzero(find_image(turned)[0].any(axis)) for axis in (0, 1)]
        assert sorted(counts) == [SIDE - 26, SIDE - 10]


def test_little_overlap_counts_as_no_likeness() -> None:
    level = make_level(texture(4).astype(np.uint8), 28, 0.2)
    away = np.array([[1.0, 0.0, 1.0, 0.5]])
    assert correlation(level, level, IDENTITY[None]) == pytest.approx(1, abs=1e-3)
    assert correlation(level, level, away) == 0


def test_a_step_solves_the_weighted_least_squares_problem() -> None:
    """One Gauss-Newton step against the plain formula: a column of derivatives for each of the four parameters."""
    side = 14
    images = texture(5, n=2).astype(np.uint8)
    fixed, moving = make_level(images, side, 0.2), make_level(np.roll(images, (1, 1), (1, 2)), side, 0.2)
    pose = np.tile([1.01, 0.005, 0.99, -0.005], (2, 1))
    estimate = register(fixed, moving, pose, steps=1, stiffness=0.0)
    place = (np.arange(side) - (side - 1) / 2) / side
    for i in range(2):
        seen, weight = (warp(part[i : i + 1], pose[:1])[0].astype(float) for part in moving)
        weight = (weight * fixed[1][i]).ravel()
        by_row, by_column = np.gradient((fixed[0][i] + seen) / 2 * side)
        by_row, by_column = by_row / pose[0, 0], by_column / pose[0, 2]
        slope = np.stack([by_row * place[:, None], by_row, by_column * place, by_column]).reshape(4, -1)
        hold = np.eye(4) * 1e-3
        force = slope @ (weight * (fixed[0][i] - seen).ravel()) - hold @ (pose[0] - IDENTITY)
        step = np.linalg.solve((slope * weight) @ slope.T + hold, force)
        assert estimate[i] - pose[i] == pytest.approx(np.clip(step, -0.05, 0.05), abs=1e-4)
        assert np.abs(step).max() < 0.05  # else clipping hides a wrong step
