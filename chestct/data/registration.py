"""Registers small images of slices to each other by zoom and shift, and says how well their detail then agrees.

Grey levels are first normalised over a neighbourhood, so that brightness, window and gamma drop out; zoom and shift
separate into one small matrix per axis, so that whole batches are warped by matrix products alone.

A level is a batch at one resolution: normalised images and their weights, both float32 [n, side, side], with weights
in [0, 1] that are 0 outside the image. A pose is float [n, 4]: zoom and shift along rows, zoom and shift along
columns, shifts in units of the side; a point x of the fixed image lies at zoom * x + shift in the moving one, both
counted from the centre.
"""

from collections.abc import Sequence

import numpy as np

IDENTITY = np.array([1.0, 0.0, 1.0, 0.0])  # the pose that changes nothing
CLIP = 3  # largest normalised level, in local standard deviations

Level = tuple[np.ndarray, np.ndarray]


def find_image(thumbs: np.ndarray) -> np.ndarray:
    """True within the image, False on letterbox bars and on borders of one colour: bool, as thumbs.

    thumbs: uint8 [n, side, side]. One pixel more is left off on each side, for it mixes image and border.
    """
    inside = np.ones(thumbs.shape, bool)
    for axis in (2, 1, 2, 1):  # twice: a coloured border within a letterbox shows only once the bars are off
        spread = np.where(inside, thumbs, 0).max(axis).astype(int) - np.where(inside, thumbs, 255).min(axis)
        live = spread > 10  # grey levels; JPEG noise on a black border stays below
        span = np.maximum.accumulate(live, 1) & np.maximum.accumulate(live[:, ::-1], 1)[:, ::-1]
        inside &= np.expand_dims(span, axis)
    core = np.zeros(thumbs.shape, bool)
    core[:, 1:-1, 1:-1] = inside[:, 2:, 1:-1] & inside[:, :-2, 1:-1] & inside[:, 1:-1, 2:] & inside[:, 1:-1, :-2]
    return core


def make_levels(thumbs: np.ndarray, sides: Sequence[int], sigma: float) -> list[Level]:
    """Thumbnails, uint8 [n, S, S], shrunk to each of the sides, which divide S, and normalised (see `normalise`)."""
    inside = find_image(thumbs)
    levels = []
    for side in sides:
        step = thumbs.shape[-1] // side
        image, weight = (
            np.ascontiguousarray(array.reshape(len(array), side, step, side, step).mean((2, 4), dtype=np.float32))
            for array in (thumbs, inside)
        )  # matrix products of arrays in another order are ten times slower
        levels.append((_rounded(normalise(image, weight, sigma), 127 / CLIP), _rounded(weight, 255)))
    return levels


def _rounded(values: np.ndarray, steps: float) -> np.ndarray:
    """To so many steps a unit: the last bits of a float differ between machines, and groups must not."""
    return np.rint(values * np.float32(steps)) * np.float32(1 / steps)


def normalise(image: np.ndarray, weight: np.ndarray, sigma: float) -> np.ndarray:
    """Local mean off and local contrast made equal: a change of window, brightness or gamma is locally linear.

    image, weight: float32 [n, side, side]; sigma: standard deviation of the neighbourhood in units of the side; small
    ones keep only fine detail, by which slices of different patients differ most. Returns float32 within CLIP, clipped
    so that a scribble or a label burnt into one copy counts for little.
    """
    blur = blur_matrix(image.shape[-1], sigma)
    mass = blur @ weight @ blur + 1e-6
    detail = (image - blur @ (image * weight) @ blur / mass) * weight
    power = detail * detail
    local = np.sqrt(np.maximum(blur @ power @ blur / mass, 0))
    overall = np.sqrt(power.sum((1, 2), keepdims=True) / (weight.sum((1, 2), keepdims=True) + 1e-6))
    return np.clip(detail / (local + 0.3 * overall + 1e-6), -CLIP, CLIP)


def blur_matrix(side: int, sigma: float) -> np.ndarray:
    """Gaussian blur along one axis as a symmetric matrix, float32 [side, side]; sigma in units of the side."""
    offset = (np.arange(side)[:, None] - np.arange(side)) / (sigma * side)
    weight = np.exp(-0.5 * offset**2) * (np.abs(offset) < 6)  # numbers near the smallest float are slow to multiply
    return (weight / (sigma * side * np.sqrt(2 * np.pi))).astype(np.float32)


def warp(images: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Moving images float32 [n, side, side] as seen from the fixed ones: bilinear, 0 outside."""
    side = images.shape[-1]
    grid = np.arange(side, dtype=np.float32)
    centre = np.float32((side - 1) / 2)
    zoom, shift = pose[:, ::2].astype(np.float32), (pose[:, 1::2] * side).astype(np.float32)
    at = zoom[:, :, None] * (grid - centre) + shift[:, :, None] + centre
    weight = np.maximum(1 - np.abs(at[..., None] - grid), 0)
    return weight[:, 0] @ images @ weight[:, 1].transpose(0, 2, 1)


def register(fixed: Level, moving: Level, pose: np.ndarray, steps: int, stiffness: float) -> np.ndarray:
    """The pose under which moving looks like fixed: so many Gauss-Newton steps from a pose (Lucas and Kanade 1981).

    The derivative is that of the mean of both images at the start (Malis 2004), computed once for all steps.
    stiffness pulls the pose back towards IDENTITY, relative to the curvature of the error; where the two images show
    different things, as a slice and the mean slice do, it keeps the pose from running away.
    """
    n, side, _ = moving[0].shape
    seen, weight = warp(moving[0], pose), warp(moving[1], pose) * fixed[1]
    by_row, by_column = np.gradient((fixed[0] + seen) * np.float32(side / 2), axis=(1, 2))
    by_row /= pose[:, 0, None, None].astype(np.float32)
    by_column /= pose[:, 2, None, None].astype(np.float32)
    place = (np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2)) / side
    slope = np.stack([by_row * place[:, None], by_row, by_column * place, by_column], 1).reshape(n, 4, side * side)
    pull = slope * weight.reshape(n, 1, side * side)
    curvature = pull @ slope.transpose(0, 2, 1)
    hold = stiffness * np.diagonal(curvature, axis1=1, axis2=2) + 1e-3
    inverse = np.linalg.inv(curvature + np.eye(4) * hold[:, None])
    for _ in range(steps):
        rest = (fixed[0] - warp(moving[0], pose)).reshape(n, side * side)
        force = np.einsum("nki,ni->nk", pull, rest) - hold * (pose - IDENTITY)
        change = np.einsum("nij,nj->ni", inverse, force)
        pose = np.clip(pose + np.clip(change, -0.05, 0.05), IDENTITY - 0.3, IDENTITY + 0.3)
    return pose


def correlation(fixed: Level, moving: Level, pose: np.ndarray) -> np.ndarray:
    """Weighted correlation under the pose, float [n] in [-1, 1]; 0 where less than 60 % of the smaller one overlap."""
    a, b, weight = fixed[0], warp(moving[0], pose), warp(moving[1], pose) * fixed[1]
    total = weight.sum((1, 2), keepdims=True) + 1e-6
    a, b = (image - (weight * image).sum((1, 2), keepdims=True) / total for image in (a, b))
    power = (weight * a * a).sum((1, 2)) * (weight * b * b).sum((1, 2))
    value = (weight * a * b).sum((1, 2)) / np.sqrt(power + 1e-6)
    enough = total[:, 0, 0] > 0.6 * np.minimum(fixed[1].sum((1, 2)), moving[1].sum((1, 2)))
    return np.where(enough, np.clip(value, -1, 1), 0)


def align(pyramid: list[Level], mean: list[Level]) -> np.ndarray:
    """The pose of every slice relative to the mean slice, float [n, 4]."""
    pose = np.tile(IDENTITY, (len(pyramid[0][0]), 1))
    for fixed, moving in zip(mean, pyramid, strict=True):
        pose = register(fixed, moving, pose, steps=5, stiffness=0.3)
    return pose


def mean_slice(pyramid: list[Level]) -> list[Level]:
    """The mean of the slices after they were registered to the mean, twice."""
    pose = np.tile(IDENTITY, (len(pyramid[0][0]), 1))
    for turn in range(3):
        images = [warp(image, pose).mean(0, keepdims=True) for image, _ in pyramid]
        mean = [(image, np.ones_like(image)) for image in images]
        if turn < 2:
            pose = align(pyramid, mean)
            pose += IDENTITY - pose.mean(0)
    return mean
