"""Finds slices that are copies, near-copies or close neighbours of each other and joins them into groups.

A near-copy may be re-encoded, rescaled, cropped, shifted, scribbled on or shown in another window, so no hash finds
it: every slice is registered to the mean slice, which undoes shift and zoom; its nearest neighbours by a compact
descriptor are candidates; each candidate pair is registered to each other and compared in its fine detail. All work is
done in the order of the content keys, so that the groups do not depend on the order of the files.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from scipy.linalg import eigh
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE = 56
"""Side of the thumbnails that are compared, in pixels."""

THRESHOLD = 0.88
"""Correlation of local detail from which two slices count as near-copies."""

NEIGHBOURS = 6
"""Candidates of a slice in one round."""

ROUNDS = 4
"""Rounds of search; from the second on, REPRESENTATIVES of each group found so far look outside of it."""

REPRESENTATIVES = 4

CELL = 4096
"""Slices that are compared all with all by descriptor; larger collections are searched cell by cell."""

SAMPLE = 512
"""Slices from which the mean slice and the descriptor are learned."""

COARSE = (14, 28)
"""Sides at which a registration begins; pairs that still look alike there go on to SIDE."""

GATE = 0.8
"""Correlation at the last coarse side below which a pair is given up."""

IDENTITY = np.array([1.0, 0.0, 1.0, 0.0])
"""A pose: zoom and shift along rows, zoom and shift along columns; shifts in units of the side."""

Level = tuple[np.ndarray, np.ndarray]
"""Normalised images and their weights, both float32 [n, side, side]; weights in [0, 1] are 0 outside the image."""


def find_pairs(
    images: np.ndarray,
    content: Sequence[str],
    *,
    series: Sequence[str] | None = None,
    threshold: float = THRESHOLD,
) -> pd.DataFrame:
    """Pairs of slices that belong together."""
    exact = _chain(content, "exact")
    mates = _chain(series if series is not None else [""] * len(content), "series")
    position = pd.Series(np.arange(len(content)), index=list(content), dtype=np.int64)
    position = position[~position.index.duplicated()].sort_index()
    near = _near(images, position.to_numpy(), threshold)
    return pd.concat([exact, mates, near]).sort_values(["a", "b", "kind"], ignore_index=True)


def group(n: int, pairs: pd.DataFrame) -> np.ndarray:
    """Connected components of the pairs: int64 [n], numbered in the order of their first members."""
    return _components(n, pairs["a"].to_numpy(np.int64), pairs["b"].to_numpy(np.int64))


def _components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    links = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(n, n))
    _, component = connected_components(links, directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def _chain(keys: Sequence[str], kind: str) -> pd.DataFrame:
    """Each slice linked to the one before it with the same key; n - 1 links join n slices."""
    key = pd.Series(list(keys), dtype=object)
    b = np.arange(len(key))
    a = pd.Series(b).groupby(key, sort=False).shift().to_numpy()
    linked = (key != "").to_numpy() & ~np.isnan(a)
    return _table(a[linked], b[linked], np.ones(linked.sum()), kind)


def _table(a: np.ndarray, b: np.ndarray, similarity: np.ndarray, kind: str) -> pd.DataFrame:
    low, high = np.minimum(a, b), np.maximum(a, b)
    frame = pd.DataFrame({"a": low, "b": high, "similarity": similarity, "kind": kind})
    return frame.astype({"a": np.int64, "b": np.int64, "similarity": float, "kind": str})


def _near(images: np.ndarray, position: np.ndarray, threshold: float) -> pd.DataFrame:
    thumbs = _thumbnails(images, position)
    usable = np.concatenate([np.zeros(0, bool), *_in_threads(_has_content, thumbs)])
    thumbs, position = thumbs[usable], position[usable]
    n = len(thumbs)
    if n < 2:
        return _table(*np.zeros((3, 0)), "near")
    pyramid = [_pyramid_level(thumbs, side) for side in COARSE]
    mean = _mean_slice([(image[:SAMPLE], weight[:SAMPLE]) for image, weight in pyramid])
    pose = _align(pyramid, mean)
    code = _encode(thumbs, pyramid[-1], pose, mean)
    component = np.arange(n)
    tested = np.zeros(0, dtype=np.int64)
    found = [np.zeros((3, 0))]
    for _ in range(ROUNDS):
        fresh = np.setdiff1d(_candidates(code, component), tested)
        tested = np.union1d(tested, fresh)
        a, b = np.divmod(fresh, n)
        similarity = _compare(thumbs, pyramid, pose, a, b)
        same = similarity >= threshold
        if not same.any():
            break
        found.append(np.stack([a, b, similarity])[:, same])
        a, b, _ = np.concatenate(found, 1).astype(np.int64)
        component = _components(n, a, b)
    a, b = np.concatenate(found, 1)[:2].astype(np.int64)
    return _table(position[a], position[b], np.concatenate(found, 1)[2], "near")


# Pixels


def _parts(array: np.ndarray, size: int = 256) -> Iterator[np.ndarray]:
    return (array[start : start + size] for start in range(0, len(array), size))


def _in_threads(function, *arrays):
    """function over parts of the arrays, in all cores; numpy lets go of the interpreter in the heavy calls."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, *(list(_parts(array)) for array in arrays)))


def _thumbnails(images: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Slices shrunk by averaging over areas: uint8 [N, S, S] -> uint8 [n, SIDE, SIDE]."""
    side = images.shape[1] if len(images) else SIDE
    edge = np.linspace(0, side, SIDE + 1)
    pixel = np.arange(side)
    area = np.clip(np.minimum(edge[1:, None], pixel + 1) - np.maximum(edge[:-1, None], pixel), 0, None)
    area = (area * SIDE / side).astype(np.float32)

    order = np.argsort(position)  # as they lie on disk
    thumbs = np.empty((len(position), SIDE, SIDE), dtype=np.uint8)

    def shrink(part: np.ndarray) -> None:
        thumbs[part] = np.rint(area @ images[position[part]].astype(np.float32) @ area.T)

    _in_threads(shrink, order)
    return thumbs


def _inside(thumbs: np.ndarray) -> np.ndarray:
    """True within the image, False on letterbox bars and on borders of one colour: bool [n, SIDE, SIDE]."""
    inside = np.ones(thumbs.shape, dtype=bool)
    index = np.arange(SIDE)
    for axis in (2, 1, 2, 1):  # twice: a coloured border within a letterbox shows only once the bars are off
        spread = np.where(inside, thumbs, 0).max(axis) - np.where(inside, thumbs, 255).min(axis).astype(np.int16)
        live = spread > 10  # grey levels; JPEG noise on a black border stays below
        low, high = live.argmax(1), SIDE - 1 - live[:, ::-1].argmax(1)
        span = (index >= low[:, None]) & (index <= high[:, None]) & live.any(1)[:, None]
        inside &= np.expand_dims(span, axis)
    core = np.zeros_like(inside)  # the outermost pixels mix image and border
    core[:, 1:-1, 1:-1] = inside[:, 2:, 1:-1] & inside[:, :-2, 1:-1] & inside[:, 1:-1, 2:] & inside[:, 1:-1, :-2]
    return core


def _has_content(thumbs: np.ndarray) -> np.ndarray:
    """False for constant slices: they all look alike, and only exact copies of them belong together."""
    return _inside(thumbs).mean((1, 2)) >= 0.1


def _level(thumbs: np.ndarray, side: int, sigma: float) -> Level:
    """Thumbnails at a smaller side, normalised over neighbourhoods of sigma (in units of the side)."""
    shape = (len(thumbs), side, SIDE // side, side, SIDE // side)
    weight = _inside(thumbs).reshape(shape).mean((2, 4), dtype=np.float32)
    return _normalise(thumbs.reshape(shape).mean((2, 4), dtype=np.float32), weight, sigma), weight


def _pyramid_level(thumbs: np.ndarray, side: int) -> Level:
    # Half precision: the pyramid is the largest thing in memory.
    levels = _in_threads(lambda part: [a.astype(np.float16) for a in _level(part, side, 0.2)], thumbs)
    return np.concatenate([image for image, _ in levels]), np.concatenate([weight for _, weight in levels])


def _take(level: Level, index: np.ndarray) -> Level:
    return level[0][index].astype(np.float32), level[1][index].astype(np.float32)


def _normalise(image: np.ndarray, weight: np.ndarray, sigma: float) -> np.ndarray:
    """Local mean off, local contrast made equal: a change of window, brightness or gamma is locally linear."""
    blur = _blur(image.shape[-1], sigma)
    mass = blur @ weight @ blur + 1e-6
    detail = (image - blur @ (image * weight) @ blur / mass) * weight
    power = detail * detail
    local = np.sqrt(np.maximum(blur @ power @ blur / mass, 0))
    overall = np.sqrt(power.sum((1, 2), keepdims=True) / (weight.sum((1, 2), keepdims=True) + 1e-6))
    return np.clip(detail / (local + 0.3 * overall + 1e-6), -3, 3)


def _blur(side: int, sigma: float) -> np.ndarray:
    """Gaussian blur along one axis as a matrix."""
    offset = (np.arange(side)[:, None] - np.arange(side)) / (sigma * side)
    return (np.exp(-0.5 * offset**2) / (sigma * side * np.sqrt(2 * np.pi))).astype(np.float32)


# Registration


def _warp(images: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Images zoomed and shifted, bilinear, 0 outside; zoom and shift separate into one small matrix per axis."""
    side = images.shape[-1]
    grid = np.arange(side, dtype=np.float32)
    centre = (side - 1) / 2

    def sampling(zoom: np.ndarray, shift: np.ndarray) -> np.ndarray:
        at = zoom[:, None] * (grid - centre) + shift[:, None] * side + centre
        return np.maximum(0, 1 - np.abs(at.astype(np.float32)[:, :, None] - grid))

    return sampling(pose[:, 0], pose[:, 1]) @ images @ sampling(pose[:, 2], pose[:, 3]).transpose(0, 2, 1)


def _register(fixed: Level, moving: Level, pose: np.ndarray, steps: int, stiffness: float) -> np.ndarray:
    """The pose under which moving looks like fixed: Gauss-Newton steps (Lucas and Kanade 1981) on zoom and shift.

    The derivative is that of the mean of both images at the start (Malis 2004), computed once for all steps.
    stiffness holds the pose back towards the identity, relative to what the images say.
    """
    n, side, _ = moving[0].shape
    grid = (np.arange(side, dtype=np.float32) - (side - 1) / 2) / side
    weight = fixed[1] * _warp(moving[1], pose)
    middle = (fixed[0] + _warp(moving[0], pose)) * (side / 2)
    by_row = np.gradient(middle, axis=1) / pose[:, 0, None, None].astype(np.float32)
    by_column = np.gradient(middle, axis=2) / pose[:, 2, None, None].astype(np.float32)
    slope = np.stack([by_row * grid[:, None], by_row, by_column * grid, by_column], 1).reshape(n, 4, side * side)
    pull = slope * weight.reshape(n, 1, side * side)
    curvature = pull @ slope.transpose(0, 2, 1)
    hold = np.eye(4) * (stiffness * curvature + 1e-3)
    inverse = np.linalg.inv(curvature + hold)
    for _ in range(steps):
        rest = (fixed[0] - _warp(moving[0], pose)).reshape(n, side * side, 1)
        change = inverse @ (pull @ rest - hold @ (pose - IDENTITY)[:, :, None])
        pose = np.clip(pose + np.clip(change[:, :, 0], -0.05, 0.05), IDENTITY - 0.3, IDENTITY + 0.3)
    return pose


def _correlation(fixed: Level, moving: Level, pose: np.ndarray) -> np.ndarray:
    """Correlation where both are inside, float [n]; 0 where that is less than 60 % of the smaller one."""
    weight = fixed[1] * _warp(moving[1], pose)
    total = weight.sum((1, 2))
    a, b = fixed[0], _warp(moving[0], pose)
    a = a - ((a * weight).sum((1, 2)) / (total + 1e-6))[:, None, None]
    b = b - ((b * weight).sum((1, 2)) / (total + 1e-6))[:, None, None]
    power = (weight * a * a).sum((1, 2)) * (weight * b * b).sum((1, 2))
    enough = total > 0.6 * np.minimum(fixed[1].sum((1, 2)), moving[1].sum((1, 2)))
    return np.where(enough, (weight * a * b).sum((1, 2)) / np.sqrt(power + 1e-6), 0)


def _compare(
    thumbs: np.ndarray, pyramid: list[Level], pose: np.ndarray, a: np.ndarray, b: np.ndarray
) -> np.ndarray:
    """How well the detail of slices a and b agrees once they are registered to each other: float [n], at most 1."""

    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        way = _from_to(pose[a], pose[b])
        for level in pyramid:
            fixed, moving = _take(level, a), _take(level, b)
            way = _register(fixed, moving, way, steps=4, stiffness=1e-3)
        fixed, moving = ((_normalise(image, weight, 1 / 20), weight) for image, weight in (fixed, moving))
        similarity = _correlation(fixed, moving, way)
        close = similarity >= GATE
        fixed, moving = (_level(thumbs[index[close]], SIDE, 1 / 28) for index in (a, b))
        way = _register(fixed, moving, way[close], steps=4, stiffness=1e-3)
        similarity[close] = _correlation(fixed, moving, way)
        return np.where(close, similarity, 0)

    return np.concatenate([np.zeros(0), *_in_threads(compare, a, b)])


def _from_to(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The pose of b relative to a, given the poses of both relative to a third."""
    zoom = b[:, ::2] / a[:, ::2]
    shift = b[:, 1::2] - a[:, 1::2] * zoom
    return np.stack([zoom[:, 0], shift[:, 0], zoom[:, 1], shift[:, 1]], 1)


# Search


def _align(pyramid: list[Level], mean: list[Level]) -> np.ndarray:
    """The pose of every slice relative to the mean slice, float [n, 4]."""

    def align(index: np.ndarray) -> np.ndarray:
        pose = np.tile(IDENTITY, (len(index), 1))
        for fixed, level in zip(mean, pyramid, strict=True):
            pose = _register(fixed, _take(level, index), pose, steps=8, stiffness=0.3)
        return pose

    return np.concatenate(_in_threads(align, np.arange(len(pyramid[0][0]))))


def _mean_slice(pyramid: list[Level]) -> list[Level]:
    """The mean of the slices after they were registered to the mean, twice."""
    pose = np.tile(IDENTITY, (len(pyramid[0][0]), 1))
    for turn in range(3):
        mean = []
        for image, _ in pyramid:
            middle = _warp(image.astype(np.float32), pose).mean(0, keepdims=True)
            mean.append((middle, np.ones_like(middle)))
        if turn < 2:
            pose = _align(pyramid, mean)
            pose += IDENTITY - pose.mean(0)
    return mean


def _encode(thumbs: np.ndarray, level: Level, pose: np.ndarray, mean: list[Level]) -> np.ndarray:
    """Descriptors whose dot product tells copies from other slices: float32 [n, d <= 48], unit length.

    Linear discriminant analysis (Fisher 1936): copies of a sample are made by zoom, shift and gamma; the directions
    kept are those in which slices differ most relative to how their copies differ.
    """
    sample = thumbs[:SAMPLE]
    base = _describe(level, pose)
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(4):
        n = len(sample)
        way = np.stack([f(n) for f in (lambda n: rng.uniform(0.92, 1.1, n), lambda n: rng.uniform(-0.05, 0.05, n)) * 2], 1)
        warped = np.clip(_warp(sample.astype(np.float32) / 255, way), 0, 1)
        copies = np.rint(255 * warped ** np.exp(rng.uniform(-0.5, 0.5, (n, 1, 1)))).astype(np.uint8)
        pyramid = [_pyramid_level(copies, side) for side in COARSE]
        differences.append(_describe(pyramid[-1], _align(pyramid, mean)) - base[:n])
    change = np.concatenate(differences)
    within = change.T @ change / len(change)
    within += np.eye(len(within)) * (0.05 * np.trace(within) / len(within) + 1e-9)
    middle = base[:SAMPLE].mean(0)
    between = np.cov(base[:SAMPLE].T)
    size = len(within)
    _, axes = eigh(between, within, subset_by_index=[size - min(48, len(sample)), size - 1])
    code = (base - middle) @ axes
    return (code / (np.linalg.norm(code, axis=1, keepdims=True) + 1e-9)).astype(np.float32)


def _describe(level: Level, pose: np.ndarray) -> np.ndarray:
    """Registered, blurred and flattened images, mean 0 and length 1: float32 [n, side * side]."""
    blur = _blur(level[0].shape[-1], 0.043)

    def describe(index: np.ndarray) -> np.ndarray:
        image, weight = _take(level, index)
        flat = (blur @ _warp(_normalise(image, weight, 1 / 11), pose[index]) @ blur).reshape(len(index), -1)
        flat = flat - flat.mean(1, keepdims=True)
        return flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-9)

    return np.concatenate(_in_threads(describe, np.arange(len(pose))))


def _candidates(code: np.ndarray, component: np.ndarray) -> np.ndarray:
    """For each representative of a component its nearest ones in other components: sorted a * n + b with a < b."""
    n = len(code)
    order = np.argsort(component, kind="stable")
    place = np.arange(n) - np.searchsorted(component[order], component[order])
    links = [_nearest(code, component, members) for members in _cells(code, np.sort(order[place < REPRESENTATIVES]))]
    a, b, likeness = (np.concatenate(column) for column in zip(*links, strict=True))
    keep = np.unique(a * n + b, return_index=True)[1]  # a pair of slices can share several cells
    keep = keep[np.lexsort((-likeness[keep], a[keep]))]
    a, b = a[keep], b[keep]
    nearest = np.arange(len(a)) - np.searchsorted(a, a) < NEIGHBOURS
    a, b = a[nearest], b[nearest]
    return np.unique(np.minimum(a, b) * n + np.maximum(a, b))


def _nearest(code: np.ndarray, component: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest members of other components for each member, all compared with all: a, b and their likeness."""
    k = min(NEIGHBOURS, len(members))
    columns = []
    for query in _parts(members, 512):
        likeness = code[query] @ code[members].T
        likeness[component[query][:, None] == component[members]] = -2
        best = np.argpartition(likeness, -k)[:, -k:]
        likeness = np.take_along_axis(likeness, best, 1).ravel()
        other = likeness > -2
        columns.append((np.repeat(query, k)[other], members[best].ravel()[other], likeness[other]))
    a, b, likeness = (np.concatenate(column) for column in zip(*columns, strict=True))
    return a, b, likeness


def _cells(code: np.ndarray, live: np.ndarray) -> Iterator[np.ndarray]:
    """Slices in overlapping cells of at most CELL: each slice is in the cells of the pivots nearest to it.

    Content keys are hashes, so the first slices are a random sample and serve as pivots. A cell that is too full holds
    slices that are nearly the same; it is cut, and the representatives of its pieces meet in the next round.
    """
    if len(live) <= CELL:
        yield live
        return
    pivots = code[live[: len(live) // 256]]
    near = [np.argpartition(code[part] @ pivots.T, -4)[:, -4:] for part in _parts(live, 1024)]
    cell = np.concatenate(near).ravel()
    member = np.repeat(live, 4)
    order = np.argsort(cell, kind="stable")
    for members in np.split(member[order], np.flatnonzero(np.diff(cell[order])) + 1):
        yield from _parts(members, CELL)
