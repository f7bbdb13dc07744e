"""Finds slices that are copies, near-copies or close neighbours of each other and joins them into groups.

A near-copy may be re-encoded, rescaled, cropped, shifted, scribbled on or shown in another window, so no hash finds
it: every slice is registered to the mean slice, which undoes shift and zoom; its nearest neighbours by a compact
descriptor are candidates; each candidate pair is registered to each other and compared in its fine detail. All work is
done in the order of the content keys, so that the groups do not depend on the order of the files.

Measured (`python -m benchmarks.copies`, and with `--root` on the public set): of 1,500 near-copies planted among 2,000
different phantoms (JPEG 40 and 95, zoom 0.5 and 2, crops, shifts and borders up to 5 % a side, a line, brightness,
contrast, gamma, window, combinations) 1,499 join their originals, alike by 0.899 and more, and no false pair appears;
of 635 planted among the 847 different slices of the public set 632 do. What is alike there besides, down to THRESHOLD,
are copies of its own and neighbouring slices of one patient, which must not be in two splits either.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

from chestct.data.registration import (
    IDENTITY,
    Level,
    align_all,
    blur_matrix,
    correlation,
    details,
    in_threads,
    levels,
    mean_slice,
    normalise,
    parts,
    register,
    reuse_memory,
    take,
    warp,
)
from chestct.imaging.preprocess import THUMBNAIL

THRESHOLD = 0.88
"""Correlation of local detail from which two slices count as near-copies; see above for how it was chosen."""

NEIGHBOURS = 8
"""Candidates of a slice in one round."""

ROUNDS = 4
"""Rounds of search at most; a round that finds nothing is the last."""

REPRESENTATIVES = 4
"""Members of each group so far that look for more outside of it in the next round.

A slice with more copies than NEIGHBOURS has a list of candidates that is full before all are in it. The copies it does
find are one group in the next round, and groups of copies of one image are close wherever they are compared, so that
the cap costs rounds, not connections.
"""

CELL = 4096
"""Slices that are compared all with all by descriptor; larger collections are searched cell by cell."""

SAMPLE = 512
"""Slices from which the descriptor is learned; half of them make the mean slice."""

CHANGES = 1024
"""Changed copies of the sample from which the descriptor learns what does not tell slices apart."""

DESCRIBED = 14
"""Side of the registered image that a descriptor is made of."""

COARSE = (14, 28)
"""Sides at which a registration begins; pairs that still look alike there go on to THUMBNAIL."""

FINE = 16_384
"""Pairs that go on to THUMBNAIL at once; the levels of their slices are held meanwhile, 6 kB each."""

GATE = 0.83
"""Correlation at the last coarse side below which a pair is given up."""

DISTORTION = 0.12
"""Largest log ratio of the zooms along rows and columns; a crop of 5 % a side, stretched to a square, makes 0.11."""


def find_pairs(thumbs: np.ndarray, content: Sequence[str], threshold: float = THRESHOLD) -> pd.DataFrame:
    """Copies and near-copies, enough pairs to connect each group.

    thumbs: uint8 [N, THUMBNAIL, THUMBNAIL], grey, letterboxed or not; may be memory-mapped; content: a hash of each
    slice's pixels at full resolution; threshold: similarity in [0, 1] from which slices are near-copies. Returns
    columns a < b (positions), similarity in [0, 1] and kind: "exact" (same content) or "near". Of each content only
    the first slice is compared. Constant slices have no near-copies.
    Raises ValueError if the lengths differ or thumbs have another shape or type.
    """
    n = len(content)
    if thumbs.dtype != np.uint8 or thumbs.shape[1:] != (THUMBNAIL, THUMBNAIL):
        raise ValueError(f"thumbs must be uint8 [N, {THUMBNAIL}, {THUMBNAIL}], got {thumbs.dtype} {list(thumbs.shape)}")
    if len(thumbs) != n:
        raise ValueError(f"{len(thumbs)} thumbs and {n} contents")
    position = pd.Series(np.arange(n), index=list(content), dtype=np.int64)  # of the first slice with that content
    position = position[~position.index.duplicated()].sort_index()
    reuse_memory()
    with threadpool_limits(1, "blas"):  # matrices are small and all cores busy: threads of its own would only wait
        near = _near(thumbs, position.to_numpy(), threshold)
    return pd.concat([link(content, "exact"), near]).sort_values(["a", "b", "kind"], ignore_index=True)


def link(keys: Sequence[str], kind: str) -> pd.DataFrame:
    """Pairs of the given kind, as `find_pairs` returns them, that chain all slices with one key; "" links nothing."""
    key = pd.Series(list(keys), dtype=object)
    b = np.arange(len(key))
    a = pd.Series(b).groupby(key, sort=False).shift().to_numpy()
    linked = (key != "").to_numpy() & ~np.isnan(a)
    return _table(a[linked], b[linked], np.ones(linked.sum()), kind)


def group(n: int, pairs: pd.DataFrame) -> np.ndarray:
    """Connected components of the pairs: int64 [n], numbered in the order of their first members."""
    return _components(n, pairs["a"].to_numpy(np.int64), pairs["b"].to_numpy(np.int64))


def _components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    links = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(n, n))
    _, component = connected_components(links, directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def _table(a: np.ndarray, b: np.ndarray, similarity: np.ndarray, kind: str) -> pd.DataFrame:
    low, high = np.minimum(a, b), np.maximum(a, b)
    frame = pd.DataFrame({"a": low, "b": high, "similarity": similarity, "kind": kind})
    return frame.astype({"a": np.int64, "b": np.int64, "similarity": float, "kind": str})


def _near(thumbs: np.ndarray, position: np.ndarray, threshold: float) -> pd.DataFrame:
    """Near-copies among the slices at these positions, which no two share a content."""
    thumbs = thumbs[position]
    pyramid = levels(thumbs, COARSE, 0.2)
    # Constant slices all look alike: only exact copies of them belong together.
    usable = pyramid[0][1].mean((1, 2)) >= 0.1 * 255
    thumbs, position = thumbs[usable], position[usable]
    pyramid = [(image[usable], weight[usable]) for image, weight in pyramid]
    n = len(thumbs)
    if n < 2:
        return _table(position[:0], position[:0], np.zeros(0), "near")
    detail = details(pyramid[-1], 1 / 20)
    mean = mean_slice([(image[: SAMPLE // 2], weight[: SAMPLE // 2]) for image, weight in pyramid])
    pose = align_all(pyramid, mean)
    code = _encode(thumbs, pyramid[-1], pose, mean)
    component = np.arange(n)
    tested = np.zeros(0, dtype=np.int64)
    matches = [np.zeros((3, 0))]
    for _ in range(ROUNDS):
        fresh = np.setdiff1d(_candidates(code, component), tested)
        tested = np.union1d(tested, fresh)
        a, b = np.divmod(fresh, n)
        similarity = _compare(thumbs, pyramid, detail, a, b)
        same = similarity >= threshold
        if not same.any():
            break
        matches.append(np.stack([a, b, similarity])[:, same])
        a, b, _ = np.concatenate(matches, 1).astype(np.int64)
        component = _components(n, a, b)
    a, b = np.concatenate(matches, 1)[:2].astype(np.int64)
    return _table(position[a], position[b], np.concatenate(matches, 1)[2], "near")


def _encode(thumbs: np.ndarray, level: Level, pose: np.ndarray, mean: list[Level]) -> np.ndarray:
    """Descriptors whose dot product tells copies from other slices: float32 [n, d <= 48], unit length.

    Linear discriminant analysis (Fisher 1936): copies of a sample are made by zoom, shift and gamma; the directions
    kept are those in which slices differ most relative to how their copies differ.
    """
    base = _describe(level, pose)
    rng = np.random.default_rng(0)
    origin = np.repeat(np.arange(min(SAMPLE, len(base))), -(-CHANGES // min(SAMPLE, len(base))))
    way = rng.uniform([0.92, -0.05, 0.92, -0.05], [1.1, 0.05, 1.1, 0.05], (len(origin), 4))
    gamma = np.exp(rng.uniform(-0.5, 0.5, (len(origin), 1, 1))).astype(np.float32)

    def copy(original: np.ndarray, way: np.ndarray, gamma: np.ndarray) -> tuple[np.ndarray]:
        return (np.rint(255 * np.clip(warp(original / np.float32(255), way), 0, 1) ** gamma).astype(np.uint8),)

    (copies,) = in_threads(copy, thumbs[origin], way, gamma)
    pyramid = levels(copies, COARSE, 0.2)
    change = _describe(pyramid[-1], align_all(pyramid, mean)) - base[origin]
    within = change.T @ change / len(change)
    within += np.eye(len(within)) * (0.05 * np.trace(within) / len(within) + 1e-9)
    middle = base[:SAMPLE].mean(0)
    between = np.cov(base[:SAMPLE].T)
    whiten = np.linalg.inv(np.linalg.cholesky(within))
    _, axes = np.linalg.eigh(whiten @ between @ whiten.T)
    code = (base - middle) @ (whiten.T @ axes[:, -48:]).astype(np.float32)
    return (code / (np.linalg.norm(code, axis=1, keepdims=True) + 1e-9)).astype(np.float32)


def _describe(level: Level, pose: np.ndarray) -> np.ndarray:
    """Registered, blurred and flattened images, mean 0 and length 1: float32 [n, DESCRIBED ** 2]."""
    side = level[0].shape[-1]
    shrink = blur_matrix(side, 0.043).reshape(DESCRIBED, side // DESCRIBED, side).mean(1)

    def describe(index: np.ndarray) -> tuple[np.ndarray]:
        image, weight = take(level, index)
        flat = (shrink @ warp(normalise(image, weight, 1 / 11), pose[index]) @ shrink.T).reshape(len(index), -1)
        flat = flat - flat.mean(1, keepdims=True)
        return (flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-9),)

    return in_threads(describe, np.arange(len(pose)))[0]


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
    for query in parts(members, 512):
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
    pivots = code[live[: len(live) * 16 // CELL]]  # cells of a quarter of CELL on average
    near = [np.argpartition(code[part] @ pivots.T, -4)[:, -4:] for part in parts(live, 1024)]
    cell = np.concatenate(near).ravel()
    member = np.repeat(live, 4)
    order = np.argsort(cell, kind="stable")
    for members in np.split(member[order], np.flatnonzero(np.diff(cell[order])) + 1):
        yield from parts(members, CELL)


def _compare(thumbs: np.ndarray, pyramid: list[Level], detail: Level, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How well the detail of slices a and b agrees once they are registered to each other: float [n], at most 1."""

    def coarse(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        way = np.tile(IDENTITY, (len(a), 1))
        for level in pyramid:
            way = register(take(level, a), take(level, b), way, steps=4, stiffness=1e-3)
        return way, correlation(take(detail, a), take(detail, b), way)

    way, likeness = in_threads(coarse, a, b)
    distortion = np.abs(np.log(way[:, 0] / way[:, 2]))
    similarity = np.zeros(len(a))
    for part in parts(np.flatnonzero((likeness >= GATE) & (distortion <= DISTORTION)), FINE):
        # A slice is in several pairs and is normalised once for all of them.
        members, place = np.unique(np.concatenate([a[part], b[part]]), return_inverse=True)
        (level,) = levels(thumbs[members], [THUMBNAIL], 1 / 28)

        def fine(a: np.ndarray, b: np.ndarray, way: np.ndarray, level: Level = level) -> tuple[np.ndarray]:
            fixed, moving = take(level, a), take(level, b)
            return (correlation(fixed, moving, register(fixed, moving, way, steps=2, stiffness=1e-3)),)

        (similarity[part],) = in_threads(fine, *np.split(place, 2), way[part])
    return similarity
