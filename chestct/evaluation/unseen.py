"""Which slices a checkpoint may be measured on: none that it learned from, however the data are divided by now.

One file more deals all groups anew, and other patterns for patients make other groups. So a checkpoint keeps which
slices it has seen, and those that would be test now are left out.
"""

import shlex
from pathlib import Path
from typing import Any

from chestct.config.schema import Config, DataConfig
from chestct.data.datamodule import SliceModule
from chestct.data.splits import groups_of
from chestct.errors import ChestCTError, DataError
from chestct.models.lightning_module import Classifier

SPLITTING = ("split", "split_seed", "valid_fraction", "test_fraction", "folds", "fold", "allow_leakage", "holdout")
"""Settings of `data` that decide which slices are test."""


def leave_out_learned(model: Classifier, data: SliceModule, cfg: Config) -> int:
    """Takes out of data.manifest what cfg.ckpt learned from, near-copies included, and returns how many slices.

    That is valid slices that it was trained on, and test slices that it was trained or validated on; leaks that were
    allowed stay, stamped. Raises ChestCTError where settings divide the checkpoint's own data otherwise, and DataError
    where it does not say what it has seen, or where too little is left.
    """
    assert data.store is not None
    about, theirs, ours = model.hparams["data"], _division(model.cfg.data), _division(cfg.data)
    changed = [f"data.{name}={value}" for name, value in theirs.items() if ours.get(name, value) != value]
    own = about["hash"] == data.store.data_hash
    if own and changed:
        raise ChestCTError(
            f"The checkpoint was trained with {', '.join(changed)}: divided otherwise, slices that it was trained on "
            "would be test. Leave these settings out."
        )
    folder = Path(cfg.ckpt or "").parent.parent / "bundle"
    command = f"{shlex.quote(f'bundle={folder}')} data=... data.root=..."
    bundle = f"Measure its bundle, which knows them, on the same data, named again: {command}"
    advice = bundle if folder.is_dir() else "Train anew."
    if "seen" not in about:
        if own and cfg.data.split == "official":  # which needs no groups: another version may find others
            return 0
        raise DataError(
            f"{cfg.ckpt} was written by an earlier version, which did not keep what slices it has seen: groups or data "
            f"have changed since, and some of them might be test now. {advice}"
        )
    manifest, every = data.manifest, data.store.manifest
    trained, seen = (groups_of(every, about["seen"][of]) for of in ("train", "valid"))
    in_valid = (manifest["split"] == "valid") & manifest["group"].isin(trained)
    in_test = (manifest["split"] == "test") & manifest["group"].isin(trained | seen)
    kept = manifest[~(in_valid | in_test) | manifest["leaked"]]
    classes = [set(table["target"][table["split"] == "valid"]) for table in (manifest, kept)]
    if classes[0] != classes[1] or "test" not in set(kept["split"]):
        raise DataError(
            f"The checkpoint learned from {len(manifest) - len(kept)} of the valid and test slices of {cfg.data.name}, "
            f"and too few are left to measure it. {advice}"
        )
    data.manifest = kept.reset_index(drop=True)
    return len(manifest) - len(kept)


def _division(data: DataConfig) -> dict[str, Any]:
    """The settings that decide which slices are test, by their names."""
    units = {name: {"patient": source.patient, "ordered": source.ordered} for name, source in data.sources.items()}
    of_sources = {f"sources.{name}.{key}": value for name, of in units.items() for key, value in of.items()}
    return {name: getattr(data, name) for name in SPLITTING} | of_sources
