"""Who trains, who validates, who tests: always whole groups, never single slices.

A group (copies, near-copies, one patient) that stands on both sides makes a score meaningless; on the field's standard
data set it does so for 46 of 54 normal test slices. Every split made here is checked, and so is every split loaded.
"""

import numpy as np
import pandas as pd

from chestct.config.schema import SUBTYPES, Config, DataConfig, classes_of
from chestct.errors import DataError

SPLITS = ("train", "valid", "test")
LEFT_OUT = ""

LARGE = 1 / 3
"""Share of a class in validation or test that one group should not exceed."""


def targets(manifest: pd.DataFrame, task: str) -> pd.Series:
    """The class name of each slice for the task.

    Raises DataError where the subtype of a cancer is not known to a subtype task.
    """
    if task == "binary":
        return manifest["label"]
    unknown = manifest.index[~manifest["subtype"].isin(SUBTYPES)]
    if len(unknown):
        raise DataError(
            f"task=subtype needs a subtype for every slice; {len(unknown)} are only known as cancer, for example "
            f"{manifest['path'][unknown[0]]}. Map their folders in data.labels, or use task=binary."
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
        test = splits == "test"
        raise DataError(
            f"data.split={cfg.data.split} leaks: {int((crossing & test).sum())} of {int(test.sum())} test slices and "
            f"{int((crossing & ~test).sum())} of {int((splits == 'valid').sum())} validation slices are copies or "
            "near-copies of slices in train. Use data.split=grouped or official_clean; to train on it all the same, "
            "set data.allow_leakage=true, and every result will say so."
        )
    names = {name: i for i, name in enumerate(classes_of(cfg.task))}
    target = targets(manifest, cfg.task).map(names)
    table = manifest.assign(split=splits, target=target, leaked=crossing)
    return table[splits != LEFT_OUT].reset_index(drop=True)


def make_splits(manifest: pd.DataFrame, task: str, cfg: DataConfig) -> pd.Series:
    """The split of each slice: train, valid, test, or "" for slices that are left out.

    grouped and official_clean keep one slice of each set of exact copies; contents that carry two classes are left
    out of them. Raises DataError where folders do not give the split of the settings, or where a class is missing.
    """
    classes = targets(manifest, task)
    if cfg.split == "grouped":
        splits = _grouped(manifest, classes, cfg)
    else:
        splits = _official(manifest, cfg)
        if cfg.split == "official_clean":
            splits = _clean(manifest, classes, splits)
    _check_classes(splits, classes, manifest["group"], task)
    return splits


def leaked(manifest: pd.DataFrame, splits: pd.Series) -> pd.Series:
    """True for each valid or test slice whose group also stands in a split before its own (train, then valid)."""
    order = splits.map({"train": 0, "valid": 1, "test": 2})
    first = order.groupby(manifest["group"]).transform("min")
    return order.gt(first) & order.notna()


def _grouped(manifest: pd.DataFrame, classes: pd.Series, cfg: DataConfig) -> pd.Series:
    splits = pd.Series(LEFT_OUT, index=manifest.index, dtype=object)
    kept = manifest.index[~manifest["content"].duplicated() & ~_conflicting(manifest, classes)]
    counts = pd.crosstab(manifest["group"][kept], classes[kept])  # groups x classes
    if cfg.folds:
        fold = stratified_group_split(counts, [1 / cfg.folds] * cfg.folds, cfg.split_seed)
        rest = counts[fold != cfg.fold]
        part = stratified_group_split(rest, [1 - cfg.valid_fraction, cfg.valid_fraction], cfg.split_seed)
        names = pd.Series("test", index=counts.index, dtype=object)
        names[rest.index] = part.map({0: "train", 1: "valid"})
    else:
        shares = [1 - cfg.valid_fraction - cfg.test_fraction, cfg.valid_fraction, cfg.test_fraction]
        names = stratified_group_split(counts, shares, cfg.split_seed).map(dict(enumerate(SPLITS)))
    splits[kept] = manifest["group"][kept].map(names)
    return splits


def stratified_group_split(counts: pd.DataFrame, shares: list[float], seed: int) -> pd.Series:
    """Divides groups into parts so that every class is shared out as `shares` say, as far as groups allow.

    counts: groups x classes, slices of each class in each group. Returns the part (0, 1, ...) of each group. Large
    groups come first, each to the part that lacks its classes most: the greedy rule of multiway partitioning. But a
    group that would be more than LARGE of a small part's class goes to the largest parts while they have room: what
    validation and test say should rest on many patients. (scikit-learn's StratifiedGroupKFold knows equal parts only
    and no such limit.)
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
    folders = set(splits)
    if not {"train", "test"} <= folders:
        raise DataError(
            f"data.split={cfg.split} takes the folders' own split, but there are no train and test folders (saw: "
            f"{', '.join(sorted(folders - {''})) or 'none'}). Use data.split=grouped."
        )
    if not splits.isin(SPLITS).all():
        unsplit = manifest["source"][~splits.isin(SPLITS)].unique()
        raise DataError(
            f"data.split={cfg.split} takes the folders' own split, and these sources have none: {', '.join(unsplit)}. "
            "Use data.split=grouped, or leave them out."
        )
    for source in manifest["source"].unique():
        own = manifest["source"] == source
        if "valid" not in set(splits[own]):
            train = own & (splits == "train")
            counts = pd.crosstab(manifest["group"][train], manifest["subtype"][train])
            part = stratified_group_split(counts, [1 - cfg.valid_fraction, cfg.valid_fraction], cfg.split_seed)
            splits[train] = manifest["group"][train].map(part).map({0: "train", 1: "valid"})
    return splits


def _clean(manifest: pd.DataFrame, classes: pd.Series, splits: pd.Series) -> pd.Series:
    """Official splits without what crosses them: each keeps one of its copies, valid and test only what is new."""
    copies = manifest.assign(split=splits).duplicated(["content", "split"])
    return splits.mask(leaked(manifest, splits) | copies | _conflicting(manifest, classes), LEFT_OUT)


def _conflicting(manifest: pd.DataFrame, classes: pd.Series) -> pd.Series:
    """True for slices whose content carries two classes."""
    return classes.groupby(manifest["content"]).transform("nunique") > 1


def _check_classes(splits: pd.Series, classes: pd.Series, groups: pd.Series, task: str) -> None:
    names = classes_of(task)
    present = [name for name in names if (classes == name).any()]
    if len(present) < 2:
        raise DataError(
            f"Only one class is there: {', '.join(present) or 'none'}. Training needs slices of {' and '.join(names)}; "
            "check data.labels and the class folders."
        )
    for split in ("train", "valid"):
        missing = [name for name in names if not ((splits == split) & (classes == name)).any()]
        if missing:
            raise DataError(
                f"No {' and no '.join(missing)} slices in the {split} split. {_sizes(classes, groups, names)} Use "
                "data.split=grouped with larger fractions, or add slices of other patients; `chestct audit` shows what "
                "ties slices together."
            )
    if not (splits == "test").any():
        raise DataError(
            f"The test split is empty. {_sizes(classes, groups, names)} Raise data.test_fraction, or use "
            "data.split=grouped."
        )


def _sizes(classes: pd.Series, groups: pd.Series, names: tuple[str, ...]) -> str:
    """How many groups there are of each class, which is what can be divided."""
    each = [
        f"{(classes == name).sum()} {name} slices make {groups[classes == name].nunique()} groups" for name in names
    ]
    return f"Groups (copies, near-copies, one patient) stay whole: {', '.join(each)}."
