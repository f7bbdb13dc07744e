"""How well things that no radiologist would look at tell cancer from normal.

A score means something only as a margin over these. Resampling is over groups throughout, and the bootstrap is one
matrix of weights that all baselines share. Choosing a direction on the data, and the best of many baselines, biases an
AUROC upwards on small sets: a shortcut must therefore be both material and significant after correction.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.base import ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from chestct.audit.inventory import Table

MATERIAL = 0.60
"""A shortcut's 95 % interval begins above this: less would not be noticed beside what a model is expected to reach."""

MIN_GROUPS = 10
"""Fewer groups of a class than this, and a bootstrap interval is too narrow to be believed."""

RESAMPLES, FOLDS, TREES = 2000, 5, 50


@dataclass(frozen=True)
class Baseline:
    """A rule that sees no lesion: one number a slice (model ""), or a small model on several."""

    name: str
    title: str
    family: str  # what is to be done about it: size | file | grey | border | metadata | seen | picture
    features: tuple[str, ...]
    model: str = ""  # forest | logistic


def _number(name: str, title: str, family: str) -> Baseline:
    return Baseline(name, title, family, (name,))


SIZE = ("width", "height", "area", "aspect")
BASELINES = (
    _number("width", "Width", "size"),
    _number("height", "Height", "size"),
    _number("area", "Area in pixels", "size"),
    _number("aspect", "Aspect ratio", "size"),
    _number("bytes", "File size", "file"),
    _number("bytes_per_pixel", "Bytes per pixel", "file"),
    _number("mean", "Mean grey level", "grey"),
    _number("std", "Standard deviation of grey levels", "grey"),
    _number("border_mean", "Mean grey level of the border", "border"),
    _number("border_std", "Standard deviation of the border", "border"),
    _number("seen_mean", "Mean grey level after preprocessing", "seen"),
    _number("seen_std", "Standard deviation of grey levels after preprocessing", "seen"),
    Baseline("size_forest", "Width and height (random forest)", "size", ("width", "height"), model="forest"),
    Baseline("format_mode", "File format and colour mode (logistic regression)", "file", ("format",),
             model="logistic"),
    Baseline("metadata_forest", "All metadata (random forest)", "metadata",
             (*SIZE, "bytes", "bytes_per_pixel", "format"), model="forest"),
    Baseline("border_ring", "Outermost 5 % only (logistic regression)", "border", ("ring",), model="logistic"),
    Baseline("thumbnail", "Thumbnail of 10 × 10 pixels (logistic regression)", "picture", ("thumbnail",),
             model="logistic"),
)  # fmt: skip
SIGNIFICANT = 0.05 / len(BASELINES)
"""Bonferroni: at this level, two-sided, a shortcut's interval must leave out 0.5."""
STATISTICS = tuple(baseline.name for baseline in BASELINES if not baseline.model and baseline.family != "seen")
"""Single numbers of a slice that stand in the manifest or follow from it."""
TITLES = {baseline.name: baseline.title for baseline in BASELINES}


def shortcuts(manifest: pd.DataFrame, splits: dict[str, pd.Series], images: np.ndarray, *, seed: int) -> Table:
    """AUROC (cancer against normal) of every baseline, over all slices and on the test set of every split policy.

    manifest: index 0..N-1; images: uint8 [M, S, S], found through the manifest's `row`. One row for each baseline:
    `auroc`, `low`, `high` (95 %, bootstrap over groups) on distinct contents, direction-free for single numbers,
    cross-validated over groups for models; `flagged`; and `test`: for each policy the same figures on its test files,
    with the direction or the model learned on its train files. Undefined figures are None with a `reason`.
    """
    target = (manifest["label"] == "cancer").to_numpy()
    group = manifest["group"].to_numpy()
    features = _features(manifest, images)
    # A content with two labels is no evidence either way.
    clear = manifest.groupby("content")["label"].transform("nunique").eq(1) & ~manifest.duplicated("content")
    everywhere = np.flatnonzero(clear)
    few = _few_groups(group[everywhere], target[everywhere])
    weights = _resample(group[everywhere], target[everywhere], seed)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    folds = [] if few else list(splitter.split(everywhere, target[everywhere], group[everywhere]))
    parts = {
        name: (np.flatnonzero(split == "train"), np.flatnonzero(split == "test")) for name, split in splits.items()
    }
    test_weights = {name: _resample(group[test], target[test], seed) for name, (_, test) in parts.items()}
    rows = []
    for baseline in BASELINES:
        X = np.column_stack([features[name] for name in baseline.features])
        overall = _nothing(_undefined(X[everywhere], target[everywhere]) or few)
        if not overall["reason"]:
            scores = _cross_validated(baseline, X[everywhere], target[everywhere], folds, seed)
            overall = _estimate(scores, target[everywhere], weights)
        tests = {}
        for name, (train, test) in parts.items():
            tests[name] = _nothing(_undefined(X[train], target[train]) or _undefined(X[test], target[test]))
            if not tests[name]["reason"]:
                scores = _learn(baseline, X[train], target[train], seed)(X[test])
                tests[name] = _estimate(scores, target[test], test_weights[name])
                if too_few := _few_groups(group[test], target[test]):
                    tests[name] |= _nothing(too_few) | {"auroc": tests[name]["auroc"]}
        flagged = overall["significant"] and overall["low"] > MATERIAL and baseline.family != "picture"
        about = {"name": baseline.name, "title": baseline.title, "family": baseline.family, "model": baseline.model}
        rows.append(about | overall | {"flagged": flagged, "test": tests})
    return rows


@dataclass(frozen=True)
class ShortcutScores:
    """A baseline learned on train, and its scores float [N] on the N test slices; larger speaks for cancer."""

    title: str
    scores: np.ndarray
    auroc: float


def shortcut_scores(manifest: pd.DataFrame, images: np.ndarray, *, seed: int) -> list[ShortcutScores]:
    """Every baseline that is defined on these slices, learned on `split` "train" and applied to "test".

    manifest: as in `shortcuts`, with the column `split`. For comparing a model with its best shortcut, slice by slice.
    """
    manifest = manifest[manifest["split"].isin(["train", "test"])].reset_index(drop=True)
    y = (manifest["label"] == "cancer").to_numpy()
    features = _features(manifest, images)
    train, test = (np.flatnonzero(manifest["split"] == name) for name in ("train", "test"))
    found = []
    for baseline in BASELINES:
        X = np.column_stack([features[name] for name in baseline.features])
        if not (_undefined(X[train], y[train]) or _undefined(X[test], y[test])):
            scores = _learn(baseline, X[train], y[train], seed)(X[test])
            found.append(
                ShortcutScores(baseline.title, scores, float(auroc(scores, y[test], np.ones((1, len(test))))[0]))
            )
    return found


def auroc(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted area under the ROC curve, ties counted half, for many weightings at once.

    scores: float [N]; targets: bool [N]; weights: [B, N], how often each slice is drawn. Returns float [B]. The
    probability that a random positive scores above a random negative (Hanley & McNeil 1982).
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    result = []
    for block in np.array_split(weights, max(1, weights.size // 5_000_000)):  # bounds the memory
        drawn = block[:, order].astype(float)
        positive = np.add.reduceat(drawn * targets[order], starts, axis=1)
        negative = np.add.reduceat(drawn * ~targets[order], starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2
        result.append((positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1)))
    return np.concatenate(result)


def columns(manifest: pd.DataFrame) -> pd.DataFrame:
    """The single numbers of every slice (`STATISTICS`), float, index as the manifest's."""
    area = manifest["width"] * manifest["height"]
    derived = {
        "area": area,
        "aspect": manifest["width"] / manifest["height"],
        "bytes_per_pixel": manifest["bytes"] / area,
    }
    return manifest.assign(**derived)[list(STATISTICS)].astype(float)


def _features(manifest: pd.DataFrame, images: np.ndarray) -> dict[str, np.ndarray]:
    """Every feature as [N, k]; slices that share a row of the store share the work."""
    numbers = columns(manifest)
    rows, which = np.unique(manifest["row"], return_inverse=True)
    small = np.stack([np.asarray(Image.fromarray(images[row]).resize((20, 20), Image.Resampling.BOX)) for row in rows])
    small = small.astype(np.float32) / 255
    ring = np.ones((20, 20), bool)
    ring[1:-1, 1:-1] = False
    thumbnail = small.reshape(-1, 10, 2, 10, 2).mean(axis=(2, 4)).reshape(-1, 100)
    features = {name: numbers[[name]].to_numpy() for name in STATISTICS}
    features["format"] = pd.get_dummies(manifest[["format", "mode"]]).to_numpy(float)
    seen = np.array([(images[row].mean(), images[row].std()) for row in rows])[which]
    features |= {"seen_mean": seen[:, :1], "seen_std": seen[:, 1:]}
    return features | {"ring": small[:, ring][which], "thumbnail": thumbnail[which]}


def _learn(baseline: Baseline, X: np.ndarray, y: np.ndarray, seed: int) -> Any:
    """What turns features [N, k] into scores [N], learned on X [M, k] and y [M]."""
    if not baseline.model:
        value = auroc(X[:, 0], y, np.ones((1, len(y))))[0]
        return lambda new: new[:, 0] if value >= 0.5 else -new[:, 0]
    model: ClassifierMixin = (
        # Two slices a leaf: single ones would let copies vote for themselves.
        RandomForestClassifier(TREES, min_samples_leaf=2, random_state=seed)
        if baseline.model == "forest"
        else make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    )
    model.fit(X, y)
    return lambda new: model.predict_proba(new)[:, 1]


def _cross_validated(baseline: Baseline, X: np.ndarray, y: np.ndarray, folds: list[Any], seed: int) -> np.ndarray:
    """Scores [N] of models that have not seen the slice's group; a single number is only turned the right way round."""
    if not baseline.model:
        return _learn(baseline, X, y, seed)(X)
    scores = np.empty(len(y))
    for train, test in folds:
        scores[test] = _learn(baseline, X[train], y[train], seed)(X[test])
    return scores


def _resample(group: np.ndarray, target: np.ndarray, seed: int) -> np.ndarray:
    """How often each slice is drawn in each resample, [RESAMPLES, N]: groups with replacement, by class.

    Classes are kept at their number of groups, so that no resample lacks one.
    """
    names, which = np.unique(group, return_inverse=True)
    positive = np.bincount(which, target, len(names)) > 0
    weights = np.zeros((RESAMPLES, len(names)), np.uint8)
    generator = np.random.default_rng(seed)
    for stratum in (np.flatnonzero(positive), np.flatnonzero(~positive)):
        if len(stratum):
            weights[:, stratum] = generator.multinomial(
                len(stratum), np.full(len(stratum), 1 / len(stratum)), RESAMPLES
            )
    return weights[:, which]


def _undefined(X: np.ndarray, y: np.ndarray) -> str:
    """Why no AUROC can be given, or ""."""
    if not len(y):
        return "no slices"
    if y.all() or not y.any():
        return "one class only"
    if not np.isfinite(X).all():
        return "values are missing"
    return "the same for every slice" if (X[0] == X).all() else ""


def _few_groups(group: np.ndarray, y: np.ndarray) -> str:
    """Why no interval can be given, or ""."""
    for name, mask in (("cancer", y), ("normal", ~y)):
        if (n := len(np.unique(group[mask]))) < MIN_GROUPS:
            return f"too few groups: {n} of {name}, needs {MIN_GROUPS}"
    return ""


def _nothing(reason: str) -> dict[str, Any]:
    return {"auroc": None, "low": None, "high": None, "significant": False, "reason": reason}


def _estimate(scores: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """AUROC with its 95 % percentile interval, and whether it is above 0.5 after correction."""
    value = float(auroc(scores, y, np.ones((1, len(y))))[0])
    resampled = auroc(scores, y, weights)
    low, high, corrected = (float(np.quantile(resampled, q)) for q in (0.025, 0.975, SIGNIFICANT / 2))
    return {"auroc": value, "low": low, "high": high, "significant": corrected > 0.5, "reason": ""}
