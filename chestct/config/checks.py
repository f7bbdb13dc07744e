"""From composed settings to checked plain dataclasses, with errors that name the key that was meant."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chestct.config.schema import LABEL_NAMES, Config, TrainerConfig, leaves, type_name
from chestct.errors import ConfigError

THRESHOLD_POLICY = r"youden|cost|half|(sensitivity|specificity)\s*>=\s*(0?\.\d+|1(\.0*)?)"


def resolve(cfg: DictConfig | Mapping[str, Any]) -> Config:
    """Composed settings as checked plain dataclasses.

    Raises ConfigError for a key that the schema does not know, a wrong type, a value out of bounds, or settings that
    contradict each other.
    """
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type) and isinstance(value := cfg.get(field.name), str):
            raise ConfigError(
                f"{field.name}={value} names a group of settings; params.yaml holds the settings themselves. "
                f"Write them there with: chestct params {field.name}={value}"
            )
    try:
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), cfg))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    assert isinstance(result, Config)
    if result.data.labels_file:
        # What the file says becomes part of the settings: a checkpoint then needs the file no more.
        result.data.labels |= read_labels(Path(result.data.labels_file))
        result.data.labels_file = None
    check(result)
    return result


def read_labels(path: Path) -> dict[str, str]:
    """The table `class folder: label` in a YAML file. Raises ConfigError, which says what to write."""
    example = 'Write one line a class folder, as in\n\n"Class A (new)": normal\n"Class B": cancer'
    try:
        table = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # whatever a YAML parser can say
        raise ConfigError(f"data.labels_file={path} cannot be read: {error}. {example}") from None
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"data.labels_file={path} holds no table of labels. {example}")
    for folder, label in table.items():
        if not isinstance(folder, str):
            raise ConfigError(f"data.labels_file={path}: put {folder!r} in quotes; YAML takes it for no text.")
        if label not in LABEL_NAMES:
            problem = "has no label" if label is None else f"maps to {label!r}"
            raise ConfigError(f"data.labels_file={path}: {folder!r} {problem}; give one of {', '.join(LABEL_NAMES)}.")
    return {str(folder): str(label) for folder, label in table.items()}


def check(cfg: Config) -> None:
    """Raises ConfigError where a value is not among its choices, out of its bounds, or at odds with another."""
    problems = [problem for key, value, item in leaves(cfg) for problem in _out_of_bounds(key, value, item.metadata)]
    problems += _contradictions(cfg)
    if problems:
        raise ConfigError("\n".join(problems))


def _out_of_bounds(key: str, value: Any, meta: Mapping[str, Any]) -> Iterator[str]:
    choices, low, high = meta.get("choices"), meta.get("low", -math.inf), meta.get("high", math.inf)
    if choices and value not in choices:
        yield f"{key}={value!r} is not one of {', '.join(map(str, choices))}.{_did_you_mean(str(value), choices)}"
    if isinstance(value, int | float) and not low <= value <= high:
        yield f"{key}={value} is out of range: {low} to {high}."


def _contradictions(cfg: Config) -> Iterator[str]:
    data, model, trainer = cfg.data, cfg.model, cfg.trainer
    if not isinstance(model.freeze, bool) and not 0 <= model.freeze <= 5:
        yield f"model.freeze={model.freeze}: VGG16 has 5 blocks of convolutions; give true, false or 0 to 5."
    if model.weights == "none" and model.freeze not in (False, 0):
        yield (
            "model.weights=none with model.freeze: random convolutions that never change learn nothing. "
            "Set model.freeze=false, or take weights."
        )
    if any(width < 1 for width in model.hidden):
        yield f"model.hidden={model.hidden}: widths are at least 1."
    if trainer.unfreeze_epoch and model.freeze is not True:
        yield "trainer.unfreeze_epoch starts from frozen convolutions: set model.freeze=true."
    if trainer.unfreeze_epoch >= trainer.max_epochs and trainer.unfreeze_epoch:
        yield f"trainer.unfreeze_epoch={trainer.unfreeze_epoch} comes after the last epoch ({trainer.max_epochs})."
    yield from _misplaced(trainer)
    if not re.fullmatch(THRESHOLD_POLICY, cfg.evaluation.threshold):
        yield (
            f"evaluation.threshold={cfg.evaluation.threshold}: give youden, sensitivity>=0.95, specificity>=0.95 (any "
            "share up to 1), cost or half."
        )
    if any(not 0 < share < 1 for share in cfg.evaluation.prevalences):
        yield f"evaluation.prevalences={cfg.evaluation.prevalences}: shares lie between 0 and 1."
    if cfg.evaluation.folds == 1:
        yield "evaluation.folds=1: two folds at least, or 0 for none."
    if cfg.compare and len(cfg.compare) != 2:
        yield f"compare={cfg.compare}: give two evaluations, as in compare=[runs/A,runs/B]."
    if data.folds == 1 or (data.folds and data.fold >= data.folds):
        yield f"data.folds={data.folds} data.fold={data.fold}: two folds at least, and fold counts from 0."
    if data.folds and data.split != "grouped":
        yield f"data.folds works with data.split=grouped, not with {data.split}: folders give one split only."
    if not data.folds and data.valid_fraction + data.test_fraction > 0.9:
        yield "data.valid_fraction and data.test_fraction leave less than a tenth of the slices for training."
    if data.root and data.sources:
        yield "Give either data.root (one source) or data.sources (several), not both; data.root=null takes it back."
    mappings = {"data.labels": data.labels} | {f"data.sources.{k}.labels": s.labels for k, s in data.sources.items()}
    for key, labels in mappings.items():
        for folder, label in labels.items():
            if label not in LABEL_NAMES:
                yield f"{key}: {folder!r} maps to {label!r}, which is not one of {', '.join(LABEL_NAMES)}."


def _misplaced(trainer: TrainerConfig) -> Iterator[str]:
    """Devices that cannot be meant."""
    given = trainer.devices
    if not re.fullmatch(r"auto|[1-9]\d*|\d+,|\d+(,\d+)+", given):
        yield f"trainer.devices={given}: give how many (2), which ('0,1', or '1,' for one), or auto."
    elif trainer.strategy == "single" and (trainer.num_nodes > 1 or not re.fullmatch(r"auto|1|\d+,", given)):
        yield f"trainer.devices={given} trainer.num_nodes={trainer.num_nodes}: for several processes say trainer=ddp."
    elif trainer.strategy == "ddp" and trainer.accelerator == "mps":
        yield "trainer=ddp does not run on Apple's GPUs: set trainer.accelerator=cpu, or leave out trainer=ddp."


OTHER_NAMES = {
    "optim.lr": ("learning_rate", "lr", "base_lr", "eta"),
    "optim.name": ("optimizer", "optimiser"),
    "optim.schedule": ("scheduler", "lr_scheduler"),
    "optim.weight_decay": ("wd", "decay", "l2"),
    "optim.class_weights": ("class_weight", "pos_weight"),
    "data.root": ("path", "dir", "data_dir", "data_path", "dataset", "folder", "root_dir", "data_root"),
    "data.size": ("img_size", "image_size", "input_size", "resolution", "resize"),
    "data.batch_size": ("bs", "batch"),
    "data.workers": ("num_workers", "n_workers"),
    "data.augment": ("augmentation", "augmentations", "transforms"),
    "trainer.max_epochs": ("epochs", "epoch", "num_epochs", "n_epochs"),
    "trainer.patience": ("early_stopping", "early_stop"),
    "trainer.devices": ("gpus", "num_gpus", "ngpu"),
    "trainer.accelerator": ("device", "cuda", "gpu"),
    "model.freeze": ("frozen", "freeze_backbone", "freeze_features", "train_backbone"),
    "model.weights": ("pretrained", "backbone_weights"),
    "evaluation.threshold": ("cutoff", "thresh"),
    "tracking.experiment": ("experiment_name",),
    "runs_dir": ("output_dir", "out_dir", "output", "out", "save_dir"),
    "ckpt": ("checkpoint", "ckpt_path", "resume", "resume_from", "resume_from_checkpoint"),
    "seed": ("random_seed", "random_state", "seed_everything"),
}
"""What other projects of the field call a setting."""

WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "None": "null"}


def explain(error: Exception) -> str:
    """Hydra's or OmegaConf's message in one or two lines, with the nearest key where one was misspelt."""
    text, cause = str(error), error.__cause__
    first = str(cause or error).strip().splitlines()[0]
    named = re.search(r"Could not override '([^']+)'", text)
    key = named[1] if named else getattr(error, "full_key", None) or getattr(cause, "full_key", None)
    option = re.search(r"Could not find '(\w+)/([^']+)'", text)
    if option:
        return f"There is no {option[1]}={option[2]}: the options are the files in conf/{option[1]}/, see --help."
    override = (
        getattr(error, "override", None) or (re.findall(r"Ambiguous value for argument '(.*)'", text) or [None])[0]
    )
    if override:
        return _unparsed(override.lstrip("+"), first)
    if key and any("not in struct" in part or "not in '" in part for part in (text, first)):
        near = suggest(key)
        return f"There is no setting {key!r}.{f' Did you mean {near}?' if near else ''} All settings: --help."
    wanted = _wanted(key) if key else ""
    if wanted:
        value = re.search(r"Value '(.*?)' of type", first)
        return f"{key}={value[1]}: give {wanted}." if value else f"{key}: give {wanted}."
    return f"{key}: {first}" if key and key not in first else first


def suggest(key: str) -> str:
    """The setting or group that a misspelt key most likely means; empty where none is near."""
    keys = [known for known, _, _ in leaves(Config)]
    group, _, name = key.lstrip("+~").rpartition(".")
    same = [known for known in keys if name == known.rpartition(".")[2] or name in OTHER_NAMES.get(known, ())]
    same.sort(key=lambda known: not known.startswith(f"{group}."))  # of the same group first
    near = same or difflib.get_close_matches(
        key, [*keys, *{k.rpartition(".")[0] for k in keys} - {""}], n=1, cutoff=0.6
    )
    if not near and not group:  # `lrr` for `optim.lr`
        last = {k.rpartition(".")[2]: k for k in reversed(keys)}
        near = [last[match] for match in difflib.get_close_matches(name, last, n=1, cutoff=0.6)]
    return near[0] if near else ""


def _wanted(key: str) -> str:
    """What a setting takes, in words, with its meaning; empty where the schema does not know it."""
    for known, _, item in leaves(Config):
        if key.split("[")[0] == known:
            kind = type_name(item)
            kinds = re.sub(r"\b(list|dict)\[.*\]", "", kind).split("|")
            words = [WORDS[part.strip()] for part in kinds if part.strip() in WORDS]
            if kind.startswith("list"):
                words.append("a list, as in [1,2]" if "int" in kind or "float" in kind else "a list, as in [a,b]")
            if kind.startswith("dict"):
                words.append("a table, as in {key: value}")
            return f"{' or '.join(words)} ({item.metadata['help']})"
    return ""


def _unparsed(override: str, message: str) -> str:
    """How an override is written that Hydra's grammar does not take."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is no setting: settings are given as key=value, for example optim.lr=1e-4."
    if message.startswith("Ambiguous"):
        return f"{override} names several values: add -m to run each of them, or give a list as in {key}=[{value}]."
    return (
        f"{override}: Hydra cannot read this value. Names with spaces, parentheses or other scripts go into a YAML "
        "file; for class folders: data.labels_file=FILE."
    )


def _did_you_mean(word: str, options: Any) -> str:
    near = difflib.get_close_matches(word, [str(option) for option in options], n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
