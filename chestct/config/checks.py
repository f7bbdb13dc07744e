"""From composed settings to checked plain dataclasses."""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chestct.config.explain import explain
from chestct.config.fields import leaves, type_name
from chestct.config.schema import (
    HIGHEST_SEED,
    LABEL_NAMES,
    NAME,
    PHANTOM,
    Config,
    DataConfig,
    OptimConfig,
    SourceConfig,
    TrainerConfig,
)
from chestct.errors import ConfigError

REMOVED = (
    *("tracking.required", "tracking.system_metrics", "serve.batch_size", "evaluation.sources"),
    *("evaluation.prevalences", "evaluation.permuted", "evaluation.folds"),
    *("data.phantom.format", "data.phantom.defect_rate", "data.phantom.defects"),
)
"""Settings of earlier versions, which checkpoints and a params.yaml may still hold: left out."""

WHOLE = {
    "model.head": ("context", "smooth", "standardise", "hidden", "dropout"),
    "optim.optimizer": ("name", "momentum"),
    "optim.scheduler": ("schedule", "warmup"),
}
"""A part of the user's own -> settings next to it that only shape the part that it replaces."""

EPOCHS = {"max_steps": -1, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}
"""Arguments of Lightning's Trainer with which an epoch could end without its validation -> the value that they have."""

ELSEWHERE = {
    "callbacks": "callbacks.NAME._target_=PACKAGE.CLASS",
    "logger": "loggers.NAME._target_=PACKAGE.CLASS",
    "enable_progress_bar": "trainer.progress=true or false",
    "enable_model_summary": "callbacks.summary._target_=lightning.pytorch.callbacks.ModelSummary",
    "default_root_dir": "runs_dir=FOLDER",
    **{field.name: f"trainer.{field.name}=VALUE" for field in dataclasses.fields(TrainerConfig)},
}
"""Arguments of Lightning's Trainer that have a setting of their own -> that setting."""


def resolve(cfg: DictConfig | Mapping[str, Any]) -> Config:
    """Composed settings as checked plain dataclasses.

    Raises ConfigError for a key that the schema does not know, a wrong type, a value out of bounds, or settings that
    contradict each other.
    """
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type) and isinstance(value := cfg.get(field.name), str):
            raise ConfigError(
                f"{field.name}={value} names a group of settings; params.yaml holds the settings themselves. "
                "This writes it anew, so add whatever else you set there: "
                f"python train.py --cfg job {field.name}={value} > params.yaml"
            )
    cfg = OmegaConf.create(cast(dict[str, Any], cfg))
    for group, name in (key.rsplit(".", 1) for key in REMOVED):
        settings = OmegaConf.select(cfg, group) or {}
        if name in settings:
            del settings[name]
    try:
        result = cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), cfg)))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    if result.data.labels_file:
        # What the file says becomes part of the settings: a checkpoint then needs the file no more.
        result.data.labels |= _read_labels(Path(result.data.labels_file))
        result.data.labels_file = None
    check(result)
    return result


def resolve_composed(cfg: DictConfig) -> Config:
    """`resolve` of what Hydra composed, where a folder without a name is given its own; a checkpoint's has had one."""
    result = resolve(cfg)
    result.data.name = _name_of(result.data)
    return result


def _name_of(data: DataConfig) -> str:
    """The name of the data: a folder that was given none lends its own, lest patients be taken for phantoms.

    Where its slices are named as phantoms are, that is what they are. Several sources are called by the first of them.
    """
    root = Path(data.root or "")
    if data.name == PHANTOM and data.sources:
        first, *others = sorted(data.sources, key=PHANTOM.__eq__)
        return f"{first} and {len(others)} more" if others else str(first)
    if data.name != PHANTOM or not data.root:
        return data.name
    if any(next(root.glob(f"{folders}/phantom_?????.png"), None) for folders in ("[!.]*", "[!.]*/[!.]*")):
        return data.name
    name = root.resolve().name.replace("\\", "_")
    return f"{name} slices".strip() if name in ("", PHANTOM) else name


OmegaConf.register_new_resolver("data_name", lambda *, _root_: _name_of(_root_.data), replace=True)  # conf/stage.yaml


def _read_labels(path: Path) -> dict[str, Any]:
    """The table `class folder: label` in a YAML file; `check` looks at the labels."""
    try:
        table = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(table, dict) or not all(
            isinstance(folder, str) and isinstance(label, str | None) for folder, label in table.items()
        ):
            raise ValueError("no table of folders and labels, whose names are text")
        if without := [folder for folder, label in table.items() if label is None]:  # a file of no colon is one name
            raise ValueError(f"what follows {without[0]!r} is not one of {', '.join(LABEL_NAMES)}")
    except Exception as error:  # whatever a YAML parser can say
        raise ConfigError(
            f"data.labels_file={path} cannot be read: {error}. Write one line a class folder, as in\n\n"
            '"Class A (new)": normal\n"Class B": cancer'
        ) from None
    return cast(dict[str, Any], table)


def check(cfg: Config) -> None:
    """Raises ConfigError where a value is not among its choices, out of its bounds, or at odds with another."""
    settings = [*leaves(cfg)]
    for name, source in cfg.data.sources.items():
        settings += leaves(source, f"data.sources.{name}.")
    if nested := [
        f"{key}: {part!r} stands where one value belongs ({item.metadata['help']})."
        for key, value, item in settings
        if isinstance(value, list | dict) and "Any" not in type_name(item)
        for part in (value.values() if isinstance(value, dict) else value)
        if isinstance(part, list | dict)
    ]:
        raise ConfigError("\n".join(nested))
    empty = [key for key, value, item in settings if value == "" and item.default != ""]
    problems = [
        f"{key}= is empty, as a variable that is not set leaves it. Give a value, or leave it out." for key in empty
    ]
    for key, value, item in settings:
        problems += [] if key in empty else _out_of_bounds(key, value, item.metadata)
    problems = problems or [*_contradictions(cfg)]
    if problems:
        raise ConfigError("\n".join(problems))


def _out_of_bounds(key: str, value: Any, meta: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(value, list | dict):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _out_of_bounds(f"{key}[{name}]", item, meta)
    elif meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), meta["choices"], n=1)
        hint = f". Did you mean {near[0]}?" if near else f" ({meta['help']})."
        yield f"{key}={value!r} is not one of {', '.join(meta['choices'])}{hint}"
    elif isinstance(value, int | float) and not meta["low"] <= value <= meta["high"]:
        yield f"{key}={value} is out of range: {meta['low']} to {meta['high']}."
    elif meta["form"] and not re.fullmatch(meta["form"], value):
        yield f"{key}={value}: give {meta['help']}."


def _contradictions(cfg: Config) -> Iterator[str]:
    """What is wrong between settings, each of which may be by itself."""
    yield from _training_problems(cfg)
    yield from _model_problems(cfg)
    yield from _split_problems(cfg)
    yield from _source_problems(cfg)
    for key, parts in WHOLE.items():
        group, _, name = key.partition(".")
        now, usual = getattr(cfg, group), getattr(Config(), group)
        idle = [part for part in parts if getattr(now, name) and getattr(now, part) != getattr(usual, part)]
        given, back = (" ".join(f"{group}.{part}={getattr(of, part)}" for part in idle) for of in (now, usual))
        if idle:
            yield f"{key} is the whole {name}: {given} has no effect. Leave that out, or take it back with: {back}"
    for key, path in (("cache_dir", cfg.cache_dir), ("runs_dir", cfg.runs_dir), ("data.store", cfg.data.store or "")):
        if path.encode("utf-8", "replace").decode() != path:
            yield f"{key}={path!a} is not UTF-8, and some libraries cannot open such a folder. Give another name."
    if cfg.compare and len(cfg.compare) != 2:
        yield f"compare={cfg.compare}: give two evaluations, as in 'compare=[runs/A,runs/B]'."


def _training_problems(cfg: Config) -> Iterator[str]:
    trainer = cfg.trainer
    if trainer.unfreeze_epoch and cfg.model.freeze is not True:
        yield "trainer.unfreeze_epoch starts from frozen convolutions: set model.freeze=true."
    if trainer.unfreeze_epoch >= trainer.max_epochs:
        yield f"trainer.unfreeze_epoch={trainer.unfreeze_epoch} comes after the last epoch ({trainer.max_epochs})."
    if "fast_dev_run" in trainer.args:
        yield "trainer.args.fast_dev_run keeps no checkpoint, and the best one is measured in the end: say debug=fast."
    if trainer.args.get("overfit_batches"):
        yield "trainer.args.overfit_batches replaces what deals out the slices of a batch: say debug=overfit."
    for name, value in trainer.args.items():
        if name in ELSEWHERE:
            yield f"trainer.args.{name} has a setting of its own: say {ELSEWHERE[name]}."
        usual = EPOCHS.get(name, value)
        no_batches = name in ("limit_train_batches", "limit_val_batches") and value == 0
        if no_batches or (type(value), value) != (type(usual), usual):  # val_check_interval=1 is after every batch
            yield (
                f"trainer.args.{name}={value}: each epoch ends with one validation, by which the best checkpoint is "
                "chosen. Leave it out; trainer.max_epochs=N says how long."
            )
    several = trainer.num_nodes > 1 or not re.fullmatch(r"auto|1|\d+,", trainer.devices)
    if trainer.strategy == "single" and several:
        yield f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}: for several say trainer=ddp."
    if trainer.strategy == "ddp" and trainer.accelerator == "mps":
        yield "trainer=ddp does not run on Apple's GPUs: set trainer.accelerator=cpu, or leave out trainer=ddp."
    if cfg.seed + cfg.seeds - 1 > HIGHEST_SEED:
        yield f"seed={cfg.seed} seeds={cfg.seeds}: the last of them is out of range: 0 to {HIGHEST_SEED}."


def _model_problems(cfg: Config) -> Iterator[str]:
    data, model = cfg.data, cfg.model
    if model.weights == "none" and model.freeze not in (False, 0):
        yield (
            "model.weights=none with model.freeze: random convolutions that never change learn nothing. "
            "Set model.freeze=false, or take weights."
        )
    if data.lesions and cfg.task != "binary":
        yield "data.lesions draws cancer of no subtype: take experiment=subtype, or set data.lesions=0."
    if data.lesions and not data.views:
        yield f"data.lesions={data.lesions} draws into views alone: set data.views=1 or more, or data.lesions=0."
    for name, does in (("context", "compares"), ("smooth", "averages")):
        if getattr(model, name) and model.pool != "topk":
            yield (
                f"model.{name} {does} places, and model.pool={model.pool} leaves none: set model.pool=topk, or take "
                "experiment=head."
            )
    if cfg.optim.places != OptimConfig.places and (model.pool, cfg.task) != ("topk", "binary"):
        yield "optim.places weighs the loss at places: it works with model.pool=topk and task=binary."


def _split_problems(cfg: Config) -> Iterator[str]:
    data = cfg.data
    if data.folds == 1:
        yield "data.folds: two folds at least, or 0 for none."
    if data.fold >= max(1, data.folds):
        yield f"data.folds={data.folds} data.fold={data.fold}: fold counts from 0, up to data.folds - 1."
    if data.folds and data.split != "grouped":
        yield f"data.folds works with data.split=grouped, not with {data.split}: folders give one split only."
    if not data.folds and data.valid_fraction + data.test_fraction > 0.9:
        yield "data.valid_fraction and data.test_fraction leave less than a tenth of the slices for training."
    if unknown := set(data.holdout) - set(data.sources or [data.name]):
        yield (
            f"data.holdout={data.holdout}: there is no source {', '.join(sorted(unknown))}. The sources are "
            f"{', '.join(data.sources or [data.name])}; several are given with data.sources."
        )
    elif data.holdout and not set(data.sources) - set(data.holdout):
        yield f"data.holdout={data.holdout} leaves no source to train on: leave one out of it."
    if data.holdout and (data.folds or data.split != "grouped"):
        yield "data.holdout says what test is: it works with data.split=grouped and without data.folds."


def _source_problems(cfg: Config) -> Iterator[str]:
    data = cfg.data
    for name, source in data.sources.items():
        if not re.fullmatch(NAME, name):
            yield f"data.sources: {name!r} is no name of a source: give one without / and \\."
        if source.weight != SourceConfig.weight and not data.balance:
            yield f"data.sources.{name}.weight={source.weight} has no effect: it works with data.balance=true."
        try:
            groups = re.compile(source.patient).groups if source.patient else 1
        except re.error as error:
            yield f"data.sources.{name}.patient={source.patient} is no regular expression: {error}."
        else:
            if groups != 1:
                yield f"data.sources.{name}.patient={source.patient}: give one group, as in (LIDC-IDRI-\\d+)."
    if data.root and data.sources:
        yield "Give either data.root (one source) or data.sources (several), not both; data.root=null takes it back."
