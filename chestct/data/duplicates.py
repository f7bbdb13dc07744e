"""Finds slices that are copies, near-copies or close neighbours of each other and joins them into groups.

A near-copy may be re-encoded, rescaled, cropped, shifted, scribbled on or shown in another window, so no hash finds
it: every slice is registered to the mean slice, which undoes shift and zoom; its nearest neighbours by a compact
descriptor are candidates; each candidate pair is registered to each other and compared in its fine detail. All work is
done in the order of the content keys, so that the groups do not depend on the order of the files.

Of 1,500 near-copies planted among 2,000 different phantoms all join their originals, and two phantoms are joined that
are none, alike by 0.881; of 635 among the 847 different slices of the public set 634 do (tests/data/test_duplicates.py
counts fewer). What is alike there besides, down to THRESHOLD, are neighbouring slices of one patient, which must not be
in two splits.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

from chestct.data.registration import (
    IDENTITY,
    Level,
    align,
    blur_matrix,
    correlation,
    make_levels,
    mean_slice,
    normalise,
    register,
    warp,
)
from chestct.imaging.preprocess import THUMBNAIL

THRESHOLD = 0.88  # correlation of local detail from which two slices count as near-copies; see above
# Candidates of a slice in one round. In the public set 8 miss 14 of the 720 pairs that comparing all with all finds, 32
# miss 3, and 64 none, if a source is searched by itself (beside another one, 6).
NEIGHBOURS = 64
ROUNDS = 4  # of search at most; a round that finds nothing is the last
# Members of each group so far that look for more outside of it in the next round: a slice with more copies than
# NEIGHBOURS has a list of candidates that is full before all are in it; the cap then costs rounds, not connections.
REPRESENTATIVES = 4
SAMPLE = 512  # slices from which the descriptor is learned; half of them make the mean slice
CHANGES = 1024  # changed copies of the sample, from which it learns what does not tell slices apart
DESCRIBED = 14  # side of the registered image that a descriptor is made of
COARSE = (14, 28)  # sides at which a registration begins; pairs that still look alike there go on to THUMBNAIL
GATE = 0.83  # correlation at the last coarse side below which a pair is given up
DISTORTION = 0.12  # largest log ratio of the zooms of both axes; a crop of 5 % a side, stretched square, makes 0.11
PART = 128  # slices or pairs that a thread takes at a time


def find_pairs(thumbs: np.ndarray, content: Sequence[str], source: Sequence[str] | None = None) -> pd.DataFrame:
    """Copies and near-copies, enough pairs to connect each group.

    thumbs: uint8 [N, THUMBNAIL, THUMBNAIL], grey, letterboxed or not; content: a hash of each slice's pixels at full
    resolution; source: of each slice, one for all by default. Returns columns a < b (positions), similarity in [0, 1]
    and kind: "exact" (same content) or "near". Of each content only the first slice is compared. Constant slices have
    no near-copies.
    """
    first = pd.Series(list(content), dtype=object).drop_duplicates().sort_values().index.to_numpy()
    origin = pd.Series(source if source is not None else [""] * len(content), dtype=object).to_numpy()[first]
    # Each source by itself as well: its descriptor tells its slices apart better than that of all sources does.
    parts = [first, *(first[origin == name] for name in np.unique(origin) if (origin != name).any())]
    tables = [link(content, "exact")]
    with threadpool_limits(1, "blas"):  # matrices are small and all cores busy: threads of its own would only wait
        for part in parts:
            a, b, similarity = _near(thumbs[part])
            tables.append(_table(part[a], part[b], similarity, "near"))
    pairs = pd.concat(tables).drop_duplicates(["a", "b", "kind"])
    return pairs.sort_values(["a", "b", "kind"], ignore_index=True)


def link(keys: Sequence[str], kind: str) -> pd.DataFrame:
    """Pairs of the given kind, as `find_pairs` returns them, that chain all slices with one key; "" links nothing."""
    key = pd.Series(list(keys), dtype=object)
    before = pd.Series(np.arange(len(key))).groupby(key).shift()[key != ""].dropna()
    return _table(before.to_numpy(), before.index.to_numpy(), np.ones(len(before)), kind)


def group(n: int, pairs: pd.DataFrame) -> np.ndarray:
    """Connected components of the pairs: int64 [n], numbered in the order of their first members."""
    return _components(n, pairs["a"].to_numpy(int), pairs["b"].to_numpy(int))


def _components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    _, component = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(n, n)), directed=False)
    return pd.factorize(component)[0].astype(np.int64)


def _table(a: np.ndarray, b: np.ndarray, similarity: np.ndarray, kind: str) -> pd.DataFrame:
    frame = pd.DataFrame({"a": np.minimum(a, b), "b": np.maximum(a, b), "similarity": similarity, "kind": kind})
    return frame.astype({"a": np.int64, "b": np.int64, "kind": str})


def _near(thumbs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Near-copies among slices of different content: positions a and b, and how alike they are."""

    def describe(part: np.ndarray) -> tuple[np.ndarray, ...]:
        coarse, fine = make_levels(part, COARSE, 0.2)
        return *coarse, *fine, normalise(*fine, 1 / 20)

    *arrays, detail = _in_threads(describe, thumbs)
    # Constant slices all look alike: only exact copies of them belong together.
    usable = np.flatnonzero(arrays[1].mean((1, 2)) >= 0.1)
    if (n := len(usable)) < 2:
        return usable[:0], usable[:0], np.zeros(0)
    if n < len(thumbs):  # else all of it would be there twice
        thumbs, arrays, detail = thumbs[usable], [array[usable] for array in arrays], detail[usable]
    pyramid: list[Level] = list(zip(arrays[::2], arrays[1::2], strict=True))

    def compare(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
        """How well the detail of slices a and b agrees once they are registered to each other: float [n], at most 1."""
        pose = np.tile(IDENTITY, (len(a), 1))
        for level in pyramid:
            pose = register(_take(level, a), _take(level, b), pose, steps=4, stiffness=1e-3)
        level = detail, pyramid[-1][1]
        similarity = correlation(_take(level, a), _take(level, b), pose)
        alike = (similarity >= GATE) & (np.abs(np.log(pose[:, 0] / pose[:, 2])) <= DISTORTION)
        (fixed,), (moving,) = (make_levels(thumbs[i[alike]], [THUMBNAIL], 1 / 28) for i in (a, b))
        result = np.zeros(len(a))
        result[alike] = correlation(fixed, moving, register(fixed, moving, pose[alike], steps=2, stiffness=1e-3))
        return (result,)

    code = _encode(thumbs, pyramid)
    component = np.arange(n)
    tested = np.zeros(0, int)
    matches = np.zeros((3, 0))
    for _ in range(ROUNDS):
        fresh = np.setdiff1d(_candidates(code, component), tested)
        tested = np.union1d(tested, fresh)
        a, b = np.divmod(fresh, n)
        (similarity,) = _in_threads(compare, a, b)
        same = similarity >= THRESHOLD
        if not same.any():
            break
        matches = np.concatenate([matches, np.stack([a, b, similarity])[:, same]], 1)
        component = _components(n, *matches[:2].astype(int))
    a, b = usable[matches[:2].astype(int)]
    return a, b, matches[2]


def _encode(thumbs: np.ndarray, pyramid: list[Level]) -> np.ndarray:
    """Descriptors whose dot product tells copies from other slices: float32 [n, d <= 48], unit length.

    Linear discriminant analysis (Fisher 1936): copies of a sample are made by zoom, shift and gamma; the directions
    kept are those in which slices differ most relative to how their copies differ.
    """
    mean = mean_slice([(image[: SAMPLE // 2], weight[: SAMPLE // 2]) for image, weight in pyramid])
    base = _describe(pyramid, mean)
    rng = np.random.default_rng(0)
    sample = min(SAMPLE, len(base))
    origin = np.repeat(np.arange(sample), math.ceil(CHANGES / sample))
    pose = rng.uniform([0.92, -0.05, 0.92, -0.05], [1.1, 0.05, 1.1, 0.05], (len(origin), 4))
    gamma = np.exp(rng.uniform(-0.5, 0.5, (len(origin), 1, 1))).astype(np.float32)
    copies = np.rint(255 * np.clip(warp(thumbs[origin] / np.float32(255), pose), 0, 1) ** gamma).astype(np.uint8)
    change = _describe(make_levels(copies, COARSE, 0.2), mean) - base[origin]
    within = change.T @ change / len(change)
    within += np.eye(len(within)) * (0.05 * np.trace(within) / len(within) + 1e-9)
    middle = base[:SAMPLE].mean(0)
    between = np.cov(base[:SAMPLE].T)
    whiten = np.linalg.inv(np.linalg.cholesky(within))
    _, axes = np.linalg.eigh(whiten @ between @ whiten.T)
    return _unit((base - middle) @ (whiten.T @ axes[:, -48:]).astype(np.float32))


def _describe(pyramid: list[Level], mean: list[Level]) -> np.ndarray:
    """Registered, blurred and flattened images, mean 0 and length 1: float32 [n, DESCRIBED ** 2]."""
    side = pyramid[-1][0].shape[-1]
    shrink = blur_matrix(side, 0.043).reshape(DESCRIBED, side // DESCRIBED, side).mean(1)

    def describe(*arrays: np.ndarray) -> tuple[np.ndarray]:
        part = list(zip(arrays[::2], arrays[1::2], strict=True))
        image = warp(normalise(*part[-1], 1 / 11), align(part, mean))
        flat = (shrink @ image @ shrink.T).reshape(len(image), -1)
        return (_unit(flat - flat.mean(1, keepdims=True)),)

    return _in_threads(describe, *(array for level in pyramid for array in level))[0]


def _candidates(code: np.ndarray, component: np.ndarray) -> np.ndarray:
    """For each representative of a component its nearest ones in other components: sorted a * n + b with a < b."""
    n = len(code)
    rank = pd.Series(component).groupby(component).cumcount().to_numpy()
    members = np.flatnonzero(rank < REPRESENTATIVES)
    k = min(NEIGHBOURS, len(members))

    def nearest(query: np.ndarray) -> tuple[np.ndarray]:
        likeness = code[query] @ code[members].T
        likeness[component[query][:, None] == component[members]] = -2
        best = np.argpartition(likeness, -k)[:, -k:]
        a, b = query[:, None], members[best]
        pairs = np.minimum(a, b) * n + np.maximum(a, b)
        return (np.where(np.take_along_axis(likeness, best, 1) > -2, pairs, -1),)

    pairs = np.unique(_in_threads(nearest, members)[0])
    return pairs[pairs >= 0]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + np.float32(1e-9))


def _take(level: Level, index: np.ndarray) -> Level:
    return level[0][index], level[1][index]


def _in_threads(function: Callable[..., tuple[np.ndarray, ...]], *arrays: np.ndarray) -> list[np.ndarray]:
    """function over parts of the arrays, on all cores, row by row; numpy lets go of the interpreter lock."""
    parts = [slice(at, at + PART) for at in range(0, max(1, len(arrays[0])), PART)]
    whole: list[np.ndarray] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda part: function(*(array[part] for array in arrays)), parts)
        for part, result in zip(parts, results, strict=True):
            whole = whole or [np.empty((len(arrays[0]), *of_part.shape[1:]), of_part.dtype) for of_part in result]
            for array, of_part in zip(whole, result, strict=True):
                array[part] = of_part
    return whole
