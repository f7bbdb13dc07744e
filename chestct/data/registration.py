"""Registers small images of slices to each other by zoom and shift, and says how well their detail then agrees.

Grey levels are first normalised over a neighbourhood, so that brightness, window and gamma drop out; zoom and shift
separate into one small matrix per axis, so that whole batches are warped by matrix products alone.

A level is a batch at one resolution: normalised images and their weights, both float32 [n, side, side], with weights
in [0, 1] that are 0 outside the image. A pose is float [n, 4]: zoom and shift along rows, zoom and shift along
columns, shifts in units of the side; a point x of the fixed image lies at zoom * x + shift in the moving one, both
counted from the centre.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce

import numpy as np

IDENTITY = np.array([1.0, 0.0, 1.0, 0.0])
"""The pose that changes nothing."""

CLIP = 3
"""Largest normalised level, in local standard deviations."""

Level = tuple[np.ndarray, np.ndarray]


def find_image(thumbs: np.ndarray) -> np.ndarray:
    """True within the image, False on letterbox bars and on borders of one colour: bool, as thumbs.

    thumbs: uint8 [n, side, side]. One pixel more is left off on each side, for it mixes image and border.
    """
    inside = np.full(thumbs.shape, 255, np.uint8)
    side = thumbs.shape[-1]
    index = np.arange(side)
    for axis in (2, 1, 2, 1):  # twice: a coloured border within a letterbox shows only once the bars are off
        spread = (thumbs & inside).max(axis) - (thumbs | ~inside).min(axis).astype(np.int16)
        live = spread > 10  # grey levels; JPEG noise on a black border stays below
        low, high = live.argmax(1), side - 1 - live[:, ::-1].argmax(1)
        span = (index >= low[:, None]) & (index <= high[:, None]) & live.any(1)[:, None]
        inside &= np.expand_dims(np.where(span, np.uint8(255), np.uint8(0)), axis)
    core = np.zeros(thumbs.shape, dtype=bool)
    inner = inside[:, 2:, 1:-1] & inside[:, :-2, 1:-1] & inside[:, 1:-1, 2:] & inside[:, 1:-1, :-2]
    core[:, 1:-1, 1:-1] = inner > 0
    return core


def make_levels(thumbs: np.ndarray, sides: Sequence[int], sigma: float) -> list[Level]:
    """Thumbnails, uint8 [n, S, S], shrunk to sides that divide S and normalised (see `normalise`), smallest first."""
    image, weight = thumbs.astype(np.float32), find_image(thumbs).astype(np.float32)
    result = []
    for side in sorted(sides, reverse=True):
        image, weight = _shrink(image, side), _shrink(weight, side)
        result.append((normalise(image, weight, sigma), weight))
    return result[::-1]


def _shrink(images: np.ndarray, side: int) -> np.ndarray:
    scale = images.shape[-1] // side
    rows = reduce(np.add, (images[:, i::scale] for i in range(scale)))
    return reduce(np.add, (rows[:, :, i::scale] for i in range(scale))) / np.float32(scale**2)


def levels(thumbs: np.ndarray, sides: Sequence[int], sigma: float) -> list[Level]:
    """`make_levels` for a whole collection, in 8 bits: levels are the largest thing in memory."""

    def make(part: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(array for level in make_levels(part, sides, sigma) for array in pack(level))

    flat = in_threads(make, thumbs)
    return list(zip(flat[::2], flat[1::2], strict=True))


def details(level: Level, sigma: float) -> Level:
    """A collection's level normalised once more, over another neighbourhood."""
    image, weight = in_threads(
        lambda i: pack((normalise(*take(level, i), sigma), level[1][i])), np.arange(len(level[0]))
    )
    return image, weight


def pack(level: Level) -> Level:
    """A level in 8 bits: what rounds off is a hundredth of the detail's standard deviation."""
    image, weight = level
    weight = weight if weight.dtype == np.uint8 else np.rint(weight * 255).astype(np.uint8)
    return np.rint(image * (127 / np.float32(CLIP))).astype(np.int8), weight


def take(level: Level, index: np.ndarray) -> Level:
    """Slices of a collection's level, as float32 again."""
    return level[0][index] * np.float32(CLIP / 127), level[1][index] * np.float32(1 / 255)


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
    return (np.exp(-0.5 * offset**2) / (sigma * side * np.sqrt(2 * np.pi))).astype(np.float32)


def warp(images: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Moving images float32 [n, side, side] as seen from the fixed ones: bilinear, 0 outside."""
    rows, columns = _samplings(pose, images.shape[-1])
    return rows @ images @ columns


def _samplings(pose: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrices that warp from the left and from the right, float32 [n, side, side]: bilinear weights."""
    grid = np.arange(side, dtype=np.float32)
    centre = np.float32((side - 1) / 2)
    zoom, shift = pose[:, ::2].astype(np.float32), (pose[:, 1::2] * side).astype(np.float32)
    at = zoom[:, :, None] * (grid - centre) + shift[:, :, None] + centre
    weight = at[..., None] - grid
    np.abs(weight, out=weight)
    np.subtract(1, weight, out=weight)
    np.maximum(weight, 0, out=weight)
    return weight[:, 0], weight[:, 1].transpose(0, 2, 1)


def register(fixed: Level, moving: Level, pose: np.ndarray, steps: int, stiffness: float) -> np.ndarray:
    """The pose under which moving looks like fixed: so many Gauss-Newton steps from a pose (Lucas and Kanade 1981).

    The derivative is that of the mean of both images at the start (Malis 2004), computed once for all steps.
    stiffness pulls the pose back towards IDENTITY, relative to the curvature of the error; where the two images show
    different things, as a slice and the mean slice do, it keeps the pose from running away.
    """
    n, side, _ = moving[0].shape
    rows, columns = _samplings(pose, side)
    seen = rows @ moving[0] @ columns
    weight = rows @ moving[1] @ columns
    weight *= fixed[1]
    middle = (fixed[0] + seen) * np.float32(side / 2)
    by_row, by_column = np.gradient(middle, axis=1), np.gradient(middle, axis=2)
    by_row /= pose[:, 0, None, None].astype(np.float32)
    by_column /= pose[:, 2, None, None].astype(np.float32)
    pull_row, pull_column = weight * by_row, weight * by_column
    # Zoom and shift of an axis weigh a line of pixels alike, so that lines are summed first: half the work.
    place = (np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2)) / side
    lines = np.stack([place, np.ones_like(place)], 1)
    curvature = np.empty((n, 4, 4), np.float32)
    curvature[:, :2, :2] = lines.T @ (np.einsum("nij,nij->ni", pull_row, by_row)[:, :, None] * lines)
    curvature[:, 2:, 2:] = lines.T @ (np.einsum("nij,nij->nj", pull_column, by_column)[:, :, None] * lines)
    curvature[:, :2, 2:] = lines.T @ np.multiply(pull_row, by_column, out=by_column) @ lines
    curvature[:, 2:, :2] = curvature[:, :2, 2:].transpose(0, 2, 1)
    hold = stiffness * np.diagonal(curvature, axis1=1, axis2=2) + 1e-3
    inverse = np.linalg.inv(curvature + np.eye(4) * hold[:, None])
    for step in range(steps):
        if step:
            seen = warp(moving[0], pose)
        rest = np.subtract(fixed[0], seen, out=seen)
        force = [np.einsum("nij,nij->ni", pull_row, rest) @ lines, np.einsum("nij,nij->nj", pull_column, rest) @ lines]
        change = np.einsum("nij,nj->ni", inverse, np.concatenate(force, 1) - hold * (pose - IDENTITY))
        pose = np.clip(pose + np.clip(change, -0.05, 0.05), IDENTITY - 0.3, IDENTITY + 0.3)
    return pose


def correlation(fixed: Level, moving: Level, pose: np.ndarray) -> np.ndarray:
    """Weighted correlation under the pose, float [n] in [-1, 1]; 0 where less than 60 % of the smaller one overlap."""
    rows, columns = _samplings(pose, moving[0].shape[-1])
    a, b, weight = fixed[0], rows @ moving[0] @ columns, rows @ moving[1] @ columns
    weight *= fixed[1]

    total = weight.sum((1, 2)) + 1e-6
    weighted_a, weighted_b = weight * a, np.multiply(weight, b, out=weight)
    sum_a, sum_b = weighted_a.sum((1, 2)), weighted_b.sum((1, 2))
    power = (_dot(weighted_a, a) - sum_a**2 / total) * (_dot(weighted_b, b) - sum_b**2 / total)
    enough = total > 0.6 * np.minimum(fixed[1].sum((1, 2)), moving[1].sum((1, 2)))
    value = (_dot(weighted_a, b) - sum_a * sum_b / total) / np.sqrt(np.maximum(power, 0) + 1e-6)
    return np.where(enough, np.clip(value, -1, 1), 0)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("nij,nij->n", a, b)


def align_all(pyramid: list[Level], mean: list[Level]) -> np.ndarray:
    """The pose of every slice relative to the mean slice, float [n, 4]."""

    def align(index: np.ndarray) -> tuple[np.ndarray]:
        pose = np.tile(IDENTITY, (len(index), 1))
        for fixed, level in zip(mean, pyramid, strict=True):
            pose = register(fixed, take(level, index), pose, steps=5, stiffness=0.3)
        return (pose,)

    return in_threads(align, np.arange(len(pyramid[0][0])))[0]


def mean_slice(pyramid: list[Level]) -> list[Level]:
    """The mean of the slices after they were registered to the mean, twice."""
    pose = np.tile(IDENTITY, (len(pyramid[0][0]), 1))
    for turn in range(3):
        mean = []
        for level in pyramid:
            middle = warp(take(level, np.arange(len(pose)))[0], pose).mean(0, keepdims=True)
            mean.append((middle, np.ones_like(middle)))
        if turn < 2:
            pose = align_all(pyramid, mean)
            pose += IDENTITY - pose.mean(0)
    return mean


def parts(array: np.ndarray, size: int = 128) -> Iterator[np.ndarray]:
    """The array piece by piece."""
    return (array[start : start + size] for start in range(0, len(array), size))


def reuse_memory() -> None:
    """Makes the C library keep memory that is given back, for the next array of a few megabytes.

    Otherwise every such array comes from the system anew and filled with zeros page by page, which takes as long as
    the work that is done in it. glibc raises its bounds to the largest block that it has seen freed, up to 32 MB.
    """
    np.empty(24 << 20, np.uint8)


def in_threads(function: Callable[..., tuple[np.ndarray, ...]], *arrays: np.ndarray) -> list[np.ndarray]:
    """function over parts of the arrays, on all cores, its results joined; numpy lets go of the interpreter lock.

    An empty array is one part, so that results have their shapes and types whatever there is to do.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(function, *(list(parts(array)) or [array] for array in arrays))
        return [np.concatenate(column) for column in zip(*results, strict=True)]
