"""Who trains, who validates, who tests: always whole groups, never single slices.

A group (copies, near-copies, one patient) that stands on both sides makes a score meaningless; on the field's standard
data set it does so for 46 of 54 normal test slices. Every split made here is checked, and so is every split loaded.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chestct.config.schema import PHANTOM, SUBTYPES, Config, DataConfig, classes_of, of_patients
from chestct.errors import DataError

SPLITS = ("train", "valid", "test")
LEFT_OUT = ""

SPLITTING = ("split", "split_seed", "valid_fraction", "test_fraction", "folds", "fold", "allow_leakage", "holdout")
"""Settings of `data` that decide which slices are test."""

LARGE = 1 / 3  # share of a class in validation or test that one group should not exceed


def targets(manifest: pd.DataFrame, task: str) -> pd.Series:
    """The class name of each slice for the task.

    Raises DataError where the subtype of a cancer is not known to a subtype task.
    """
    if task == "binary":
        return manifest["label"]
    unknown = manifest["path"][~manifest["subtype"].isin(SUBTYPES)]
    if len(unknown):
        raise DataError(
            f"task=subtype needs a subtype for every slice; {len(unknown)} are only known as cancer, for example "
            f"{unknown.iloc[0]}. Map their folders in data.labels, or use task=binary."
        )
    return manifest["subtype"]


def load_splits(manifest: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """The slices that take part, with the columns `split`, `target` (index into classes_of) and `leaked`.

    Raises DataError where a group crosses splits, unless data.split=official and
    data.allow_leakage=true.
    """
    splits = make_splits(manifest, cfg.task, cfg.data)
    crossing = leaked(manifest, splits)
    if crossing.any() and not (cfg.data.split == "official" and cfg.data.allow_leakage):
        counts = [f"{(crossing & (splits == s)).sum()} of {(splits == s).sum()} {s}" for s in ("test", "valid")]
        raise DataError(
            f"data.split={cfg.data.split} leaks: {' and '.join(counts)} slices are copies or near-copies of slices in "
            "train. Use data.split=grouped or official_clean; to train on it all the same, set "
            "data.allow_leakage=true, and every result will say so."
        )
    target = targets(manifest, cfg.task).map({name: i for i, name in enumerate(classes_of(cfg.task))})
    table = manifest.assign(split=splits, target=target, leaked=crossing)
    return table[splits != LEFT_OUT].reset_index(drop=True)


def make_splits(manifest: pd.DataFrame, task: str, cfg: DataConfig, *, check: bool = True) -> pd.Series:
    """The split of each slice: train, valid, test, or "" for slices that are left out.

    grouped and official_clean keep one slice of each set of exact copies; contents that carry two classes are left
    out of them. With data.holdout, those sources are test, and the others train and valid. Raises DataError where
    folders do not give the split of the settings, or, with `check`, where a class is missing.
    """
    classes = targets(manifest, task)
    conflicting = classes.groupby(manifest["content"]).transform("nunique") > 1
    if cfg.split == "grouped":
        # Of exact copies the first stays, that of a held-out source before others: it is test with all its slices.
        order = manifest["source"].isin(cfg.holdout).sort_values(ascending=False, kind="stable").index
        kept = ~manifest["content"].reindex(order).duplicated().reindex(manifest.index) & ~conflicting
        divide = _held_out if cfg.holdout else _grouped
        splits = divide(manifest[kept], classes[kept], cfg).reindex(manifest.index, fill_value=LEFT_OUT)
    else:
        splits = _official(manifest, cfg)
    # Next to patients, phantoms are there to learn from, not to be measured on.
    if any(map(of_patients, cfg.sources)) and PHANTOM not in cfg.holdout:
        splits = splits.mask(~manifest["source"].map(of_patients) & (splits == "test"), "train")
    if cfg.split == "official_clean":
        copies = manifest.assign(split=splits).duplicated(["content", "split"])
        splits = splits.mask(leaked(manifest, splits) | copies | conflicting, LEFT_OUT)
    if check:
        _check_classes(splits, classes, manifest["group"], task, cfg.holdout)
    return splits


def measurable(table: pd.DataFrame, split: str) -> pd.DataFrame:
    """The slices of a split that are fitted to and measured on, see `of_patients_first`."""
    slices = table[table["split"] == split]
    return slices[of_patients_first(slices)]


def of_patients_first(slices: pd.DataFrame) -> np.ndarray:
    """Which of the slices are fitted to and measured on, bool [N]: phantoms only where the others lack a class.

    They are there to learn from: what they say holds for no patient.
    """
    real = slices["source"].map(of_patients).to_numpy(bool, copy=True)
    return real if slices["label"][real].nunique() == 2 else np.ones(len(slices), bool)


def balanced_weights(
    manifest: pd.DataFrame, target: np.ndarray, drawn: float = 0.0, sources: Mapping[str, float] | None = None
) -> np.ndarray:
    """How much each slice counts in the loss with data.balance: float32 [N].

    The classes of a source have the same sum, so that one with both never stands in for the label. The sum grows with
    the fourth root of the source's groups of normal slices, and within a class a group's share with the square root of
    its slices: what is alike, or of few patients, teaches less.

    manifest: of the slices of one split; target: int [N]; drawn: share of the normal slices, over all views, that show
    a drawn lesion and are cancer: they take the place of so many others, and classes still count alike. sources: what
    the classes of a source count besides, where that is not 1.
    """
    cells = manifest[["source", "group"]].assign(target=target)
    weight = cells.groupby(["source", "target", "group"])["target"].transform("size").to_numpy(float) ** -0.5
    total = cells.assign(weight=weight).groupby(["source", "target"])["weight"].transform("sum").to_numpy()
    normal = cells["group"].where(cells["target"] == 0).groupby(cells["source"]).transform("nunique")
    weight *= normal.clip(lower=1).to_numpy() ** 0.25 / total
    weight *= manifest["source"].map(sources or {}).fillna(1).to_numpy(float)
    weight *= len(cells) / weight.sum()
    return np.where(target > 0, (1 - 2 * drawn) * weight, weight).astype(np.float32)


def leaked(manifest: pd.DataFrame, splits: pd.Series) -> pd.Series:
    """True for each valid or test slice whose group also stands in a split before its own (train, then valid)."""
    order = splits.map({"train": 0, "valid": 1, "test": 2})
    first = order.groupby(manifest["group"]).transform("min")
    return order.gt(first) & order.notna()


def identity(manifest: pd.DataFrame, data_hash: str) -> dict[str, Any]:
    """What a checkpoint keeps of its data: the hash, how many slices leak, and which are `seen` in train and valid, by
    16 digits of each content hash.

    manifest: as load_splits makes it, of the store with that hash.
    """
    short = manifest["content"].str[:16]
    seen = {split: sorted(set(short[manifest["split"] == split])) for split in ("train", "valid")}
    return {"hash": data_hash, "leaks": int(manifest["leaked"].sum()), "seen": seen}


def check_own(then: Mapping[str, Any], now: Mapping[str, Any], ckpt: Path | str, otherwise: str) -> None:
    """Raises DataError unless the data are those of a checkpoint, and the same slices train and validate.

    One file more deals all groups anew, and other patterns for patients make other groups: what it has learned from
    would be test.

    then, now: `identity` of the data when the checkpoint was written, and as they are; otherwise: what the user can do
    where neither the data nor the settings are to be as they were, the end of a sentence.
    """
    if then["hash"] != now["hash"]:
        raise DataError(
            f"The data changed since {ckpt} was written (hash {then['hash'][:12]}, now {now['hash'][:12]}). Take the "
            f"data of that run, or {otherwise}"
        )
    if then != now:
        raise DataError(
            f"The data are divided otherwise than when {ckpt} was written, or an earlier version wrote it: slices that "
            "it has learned from would be test. Leave out what divides them (data.split=..., "
            f"data.sources.NAME.patient=...), or {otherwise}"
        )


def groups_of(manifest: pd.DataFrame, contents: Collection[str]) -> set[int]:
    """The groups that hold a slice of these contents, which are given as by `identity`."""
    return set(manifest["group"][manifest["content"].str[:16].isin(contents)])


def _held_out(manifest: pd.DataFrame, classes: pd.Series, cfg: DataConfig) -> pd.Series:
    """All of the held-out sources for test, the others for train and valid, shared out by source and class.

    What the others have in common with a held-out source (copies, a patient) is left out, so that it stays unseen.
    """
    held = manifest["source"].isin(cfg.holdout)
    rest = manifest[~held & ~manifest["group"].isin(manifest["group"][held])]
    counts = pd.crosstab(rest["group"], [rest["source"], classes[rest.index]])
    part = stratified_group_split(counts, _shares(cfg.valid_fraction), cfg.split_seed)
    splits = held.map({True: "test", False: LEFT_OUT}).astype(object)
    splits[rest.index] = rest["group"].map(part).map(dict(enumerate(SPLITS)))
    return splits


def _grouped(manifest: pd.DataFrame, classes: pd.Series, cfg: DataConfig) -> pd.Series:
    group = manifest["group"]
    counts = pd.crosstab(group, classes)
    if cfg.folds:
        fold = stratified_group_split(counts, [1 / cfg.folds] * cfg.folds, cfg.split_seed)
        rest = stratified_group_split(counts[fold != cfg.fold], _shares(cfg.valid_fraction), cfg.split_seed)
        part = rest.reindex(counts.index, fill_value=2)
    else:
        part = stratified_group_split(counts, _shares(cfg.valid_fraction, cfg.test_fraction), cfg.split_seed)
    return group.map(part).map(dict(enumerate(SPLITS)))


def _shares(*held_out: float) -> list[float]:
    return [1 - sum(held_out), *held_out]


def stratified_group_split(counts: pd.DataFrame, shares: list[float], seed: int) -> pd.Series:
    """Divides groups into parts so that every class is shared out as `shares` say, as far as groups allow.

    counts: groups x classes, slices of each class in each group. Returns the part (0, 1, ...) of each group. Large
    groups come first, each to the part that lacks its classes most: the greedy rule of multiway partitioning. But a
    group that would be more than LARGE of a small part's class goes to the largest parts while they have room: what
    validation and test say should rest on many patients. (scikit-learn's StratifiedGroupKFold, 20 folds of it joined to
    such shares, leaves classes of the public set off by 0.25 in the mean over seeds; this by 0.003.)
    """
    rng = np.random.default_rng(seed)
    table = counts.to_numpy(float)
    order = rng.permutation(len(table))
    order = order[np.argsort(-table[order].sum(1), kind="stable")]
    wanted = np.outer(shares, table.sum(0)) + 1e-9  # (parts, classes)
    have = np.zeros_like(wanted)
    largest = np.equal(shares, max(shares))
    part = np.empty(len(table), int)
    for i in order:
        lack = (table[i] * (1 - have / wanted)).sum(1)
        heavy = (table[i] > np.maximum(1, LARGE * wanted)).any(1) & ~largest
        room = (largest & ((have + table[i] <= wanted) | (table[i] == 0)).all(1)).any()
        part[i] = np.argmax(np.where(heavy & room, -np.inf, lack))
        have[part[i]] += table[i]
    return pd.Series(part, index=counts.index)


def _official(manifest: pd.DataFrame, cfg: DataConfig) -> pd.Series:
    splits = manifest["folder_split"].astype(object)
    without = manifest["source"][~splits.isin(SPLITS)].unique()
    if len(without) or not {"train", "test"} <= set(splits):
        raise DataError(
            f"data.split={cfg.split} takes the folders' own split, and there are no train and test folders in: "
            f"{', '.join(without) or 'any source'}. Use data.split=grouped, or leave these sources out."
        )
    for _, own in manifest.groupby("source"):
        if "valid" not in set(splits[own.index]):
            train = own[splits[own.index] == "train"]
            counts = pd.crosstab(train["group"], train["subtype"])
            part = stratified_group_split(counts, _shares(cfg.valid_fraction), cfg.split_seed)
            splits[train.index] = train["group"].map(part).map({0: "train", 1: "valid"})
    return splits


def lacking(splits: pd.Series, classes: pd.Series, task: str) -> list[str]:
    """What training needs and these splits do not have, such as `normal slices in valid`."""
    wanted = [(split, name) for split in ("train", "valid") for name in classes_of(task)]
    missing = [f"{name} slices in {part}" for part, name in wanted if not ((splits == part) & (classes == name)).any()]
    return missing if (splits == "test").any() else [*missing, "slices in test"]


def _check_classes(
    splits: pd.Series, classes: pd.Series, groups: pd.Series, task: str, holdout: Collection[str]
) -> None:
    names = classes_of(task)
    present = [name for name in names if (classes == name).any()]
    if len(present) < 2:
        raise DataError(
            f"Only one class is there: {', '.join(present) or 'none'}. Training needs slices of {' and '.join(names)}; "
            "check data.labels and the class folders."
        )
    if missing := lacking(splits, classes, task):
        of = {name: (classes == name) & (splits.isin(("train", "valid")) | (not holdout)) for name in names}
        sizes = [f"{of[name].sum()} {name} slices make {groups[of[name]].nunique()} groups" for name in names]
        without = f"without what is held out ({', '.join(holdout)}), " if holdout else ""
        way_out = (
            "Hold out other sources, use a larger data.valid_fraction"
            if holdout
            else "Use data.split=grouped with larger fractions"
        )
        raise DataError(
            f"There are no {' and no '.join(missing)}. Groups (copies, near-copies, one patient) stay whole: {without}"
            f"{', '.join(sizes)}. {way_out}, or add slices of other patients; `chestct audit` shows what ties slices "
            "together."
        )
