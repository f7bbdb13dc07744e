"""How well things that no radiologist would look at tell cancer from normal.

A score means something only as a margin over these. Resampling is over groups throughout, and all baselines share the
draws. Choosing a direction on the data, and the best of many baselines, biases an AUROC upwards on small sets: a
shortcut must therefore be both material and significant after correction.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.base import ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from chestct.audit.findings import Table
from chestct.data.splits import measurable, of_patients_first
from chestct.stats.bootstrap import MIN_GROUPS, draws, fewest_groups
from chestct.stats.metrics import auroc

MATERIAL = 0.60
"""A shortcut's 95 % interval begins above this: less would not be noticed next to what a model is expected to reach."""

RESAMPLES, FOLDS, TREES = 2000, 5, 50


class Baseline(NamedTuple):
    """A rule that sees no lesion: one number a slice (model ""), or a small model on several."""

    name: str
    title: str
    family: str  # what is to be done about it: size | file | grey | border | metadata | seen | picture
    model: str = ""  # forest | logistic


BASELINES = (
    Baseline("width", "Width", "size"),
    Baseline("height", "Height", "size"),
    Baseline("area", "Area in pixels", "size"),
    Baseline("aspect", "Aspect ratio", "size"),
    Baseline("bytes", "File size", "file"),
    Baseline("bytes_per_pixel", "Bytes per pixel", "file"),
    Baseline("mean", "Mean grey level", "grey"),
    Baseline("std", "Standard deviation of grey levels", "grey"),
    Baseline("border_mean", "Mean grey level of the border", "border"),
    Baseline("border_std", "Standard deviation of the border", "border"),
    Baseline("seen_mean", "Mean grey level after preprocessing", "seen"),
    Baseline("seen_std", "Standard deviation of grey levels after preprocessing", "seen"),
    Baseline("size_forest", "Width and height (random forest)", "size", "forest"),
    Baseline("format_mode", "File format and colour mode (logistic regression)", "file", "logistic"),
    Baseline("metadata_forest", "All metadata (random forest)", "metadata", "forest"),
    Baseline("border_ring", "Outermost 5 % only (logistic regression)", "border", "logistic"),
    Baseline("thumbnail", "Thumbnail of 10 × 10 pixels (logistic regression)", "picture", "logistic"),
)
SIGNIFICANT = 0.05 / len(BASELINES)  # Bonferroni: at this level, two-sided, a shortcut's interval must leave out 0.5
STATISTICS = [baseline.name for baseline in BASELINES if not baseline.model and baseline.family != "seen"]
"""Single numbers of a slice that stand in the manifest or follow from it."""


def shortcuts(manifest: pd.DataFrame, images: np.ndarray, *, seed: int) -> Table:
    """AUROC (cancer against normal) of every baseline on distinct contents, of phantoms only where nothing else counts.

    images: uint8 [M, S, S], by the manifest's `row`. One row for each baseline: `auroc`, `low`, `high` (95 %, bootstrap
    over groups), direction-free for single numbers, cross-validated over groups for models; `significant`, above 0.5
    after correction; `flagged`. Undefined figures are None with a `reason`.
    """
    manifest = manifest[of_patients_first(manifest)].reset_index(drop=True)
    # A content with two labels is no evidence either way.
    clear = manifest.groupby("content")["label"].transform("nunique").eq(1) & ~manifest.duplicated("content")
    once = np.flatnonzero(clear)
    y = (manifest["label"] == "cancer").to_numpy()[once]
    group = np.unique(manifest["group"].to_numpy()[once], return_inverse=True)[1]
    features, number = _features(manifest, images), fewest_groups(y, group) if len(y) else 0
    few = f"too few groups: {number} of a class, needs {MIN_GROUPS}" if number < MIN_GROUPS else ""
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    folds = [] if few else list(splitter.split(group, y, group))
    weights = [] if few else [part.astype(np.uint8) for part in draws(group, RESAMPLES, seed)]
    rows = []
    for baseline in BASELINES:
        X = features[baseline.name][once]
        reason = _undefined(X, y) or few
        row = baseline._asdict() | {"auroc": None, "low": None, "high": None, "significant": False, "reason": reason}
        if not reason:
            if baseline.model:
                model = _model(baseline, seed)
                scores = cross_val_predict(model, X, y, cv=folds, method="predict_proba")[:, 1]
            else:
                scores = _score(baseline, X, y, X, seed)
            resampled = np.concatenate([auroc(scores, y, part.astype(float)) for part in weights])
            # NaN: draws without a class.
            low, high, corrected = np.nanquantile(resampled, [0.025, 0.975, SIGNIFICANT / 2]).tolist()
            row |= {"auroc": float(auroc(scores, y)[0]), "low": low, "high": high, "significant": corrected > 0.5}
        row["flagged"] = row["significant"] and row["low"] > MATERIAL and baseline.family != "picture"
        rows.append(row)
    return rows


class ShortcutScores(NamedTuple):
    """A baseline's scores, float [N], on the N test slices; larger speaks for cancer."""

    title: str
    scores: np.ndarray
    auroc: float


def shortcut_scores(manifest: pd.DataFrame, images: np.ndarray, *, seed: int) -> list[ShortcutScores]:
    """Every baseline that is defined on these slices, learned on the measurable of `split` "train", applied to "test".

    manifest, images: as in `shortcuts`, with the column `split`. For comparing a model with its best shortcut slice by
    slice.
    """
    manifest = pd.concat([measurable(manifest, "train"), manifest[manifest["split"] == "test"]], ignore_index=True)
    y = (manifest["label"] == "cancer").to_numpy()
    train, test = (np.flatnonzero(manifest["split"] == name) for name in ("train", "test"))
    features = _features(manifest, images)
    learned = []
    for baseline in BASELINES:
        X = features[baseline.name]
        if not (_undefined(X[train], y[train]) or _undefined(X[test], y[test])):
            scores = _score(baseline, X[train], y[train], X[test], seed)
            learned.append(ShortcutScores(baseline.title, scores, float(auroc(scores, y[test])[0])))
    return learned


def _features(manifest: pd.DataFrame, images: np.ndarray) -> dict[str, np.ndarray]:
    """What each baseline sees, [N, k]; slices that share a row of the store share the work."""
    area, aspect = manifest["width"] * manifest["height"], manifest["width"] / manifest["height"]
    numbers = manifest.assign(area=area, aspect=aspect, bytes_per_pixel=manifest["bytes"] / area)[STATISTICS]
    numbers = numbers.astype(float)
    rows, which = np.unique(manifest["row"], return_inverse=True)
    small = np.stack([np.asarray(Image.fromarray(images[row]).resize((20, 20), Image.Resampling.BOX)) for row in rows])
    small = small.astype(np.float32) / 255
    ring = np.ones((20, 20), bool)
    ring[1:-1, 1:-1] = False
    seen = np.array([(images[row].mean(), images[row].std()) for row in rows])[which]
    kind = pd.get_dummies(manifest[["format", "mode"]]).to_numpy(float)
    metadata = numbers[["width", "height", "area", "aspect", "bytes", "bytes_per_pixel"]].to_numpy()
    return {name: numbers[[name]].to_numpy() for name in STATISTICS} | {
        "seen_mean": seen[:, :1],
        "seen_std": seen[:, 1:],
        "size_forest": numbers[["width", "height"]].to_numpy(),
        "format_mode": kind,
        "metadata_forest": np.hstack([metadata, kind]),
        "border_ring": small[:, ring][which],
        "thumbnail": small.reshape(-1, 10, 2, 10, 2).mean((2, 4)).reshape(-1, 100)[which],
    }


def _model(baseline: Baseline, seed: int) -> ClassifierMixin:
    if baseline.model == "forest":  # two slices a leaf: single ones would let copies vote for themselves
        return RandomForestClassifier(TREES, min_samples_leaf=2, random_state=seed)
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))


def _score(baseline: Baseline, X: np.ndarray, y: np.ndarray, new: np.ndarray, seed: int) -> np.ndarray:
    """Scores [N] of new slices [N, k] by a model, or a number's direction, learned on X [M, k] and y [M]."""
    if baseline.model:
        return _model(baseline, seed).fit(X, y).predict_proba(new)[:, 1]
    return new[:, 0] if auroc(X[:, 0], y)[0] >= 0.5 else -new[:, 0]


def _undefined(X: np.ndarray, y: np.ndarray) -> str:
    """Why no AUROC can be given, or ""."""
    if not len(y):
        return "no slices"
    if y.all() or not y.any():
        return "one class only"
    if not np.isfinite(X).all():
        return "values are missing"
    return "the same for every slice" if (X[0] == X).all() else ""
