"""What Hydra and OmegaConf say of a setting, in a line or two that name the key that was meant and the way out."""

import difflib
import re

from chestct.config.fields import leaves, type_name
from chestct.config.schema import Config, SourceConfig

OTHER_NAMES = {
    "optim.lr": ("learning_rate", "base_lr", "head_lr"),
    "optim.name": ("optimizer", "optimiser"),
    "optim.schedule": ("scheduler", "lr_scheduler"),
    "optim.weight_decay": ("wd", "l2"),
    "data.root": ("path", "dir", "data_dir", "data_path", "dataset", "folder", "root_dir"),
    "data.size": ("img_size", "image_size", "input_size", "resolution", "resize"),
    "data.batch_size": ("bs", "batch"),
    "data.workers": ("num_workers",),
    "data.valid_fraction": ("val_size", "valid_size", "val_split", "val_fraction"),
    "data.test_fraction": ("test_size", "test_split"),
    "data.folds": ("k_folds", "kfold", "cv", "n_splits"),
    "trainer.max_epochs": ("epochs", "epoch", "num_epochs", "n_epochs", "max_steps"),
    "trainer.patience": ("early_stopping", "early_stopping_patience"),
    "trainer.devices": ("gpus", "num_gpus"),
    "trainer.accelerator": ("device", "cuda", "gpu"),
    "trainer.precision": ("amp", "fp16", "mixed_precision"),
    "trainer.progress": ("verbose", "progress_bar"),
    "trainer.args": ("gradient_clip_val", "accumulate_grad_batches", "profiler"),
    "debug=fast": ("fast_dev_run", "trainer.fast_dev_run"),
    "model.freeze": ("frozen", "freeze_backbone"),
    "model.weights": ("pretrained",),
    "model.backbone": ("arch", "architecture", "model.name"),
    "model.dropout": ("dropout_rate",),
    "task": ("num_classes", "classes"),
    "evaluation.protocol": ("sources", "loso", "evaluation.folds"),
    "tracking.uri": ("tracking_uri", "mlflow_uri"),
    "tracking.experiment": ("experiment_name",),
    "runs_dir": ("output_dir", "out_dir", "output", "out", "save_dir", "log_dir"),
    "ckpt": ("checkpoint", "ckpt_path", "resume", "resume_from"),
    "seed": ("random_seed", "random_state"),
}
"""What other projects of the field call a setting."""


LAUNCHERS = {"joblib": "'chestct[sweep]'", "submitit_slurm": "'chestct[slurm]'"}


def explain(error: Exception) -> str:
    """Hydra's or OmegaConf's message in one or two lines, with the nearest key where one was misspelt."""
    text, cause = str(error), error.__cause__ or error
    first = str(cause).strip().splitlines()[0]
    if launcher := re.search(r"Could not find 'hydra/launcher/(\w+)'", text):
        package = LAUNCHERS.get(launcher[1], f"hydra-{launcher[1]}-launcher")
        return f"The launcher {launcher[1]} is a plugin of Hydra's that is not installed here: pip install {package}"
    if option := re.search(r"Could not find '(\w+)/([^']*)'", text):
        return f"There is no {option[1]}={option[2]}: the options are the files in conf/{option[1]}/, see --help."
    if several := re.search("Ambiguous value for argument '(.*)'", text):
        key, _, value = several[1].lstrip("+").partition("=")
        lists = [known for known, _, item in leaves(Config) if type_name(item).startswith("list")]
        one = f"a list as in '{key}=[{value}]'" if key in lists else "one"
        return f"{several[1]} names several values: give {one}, or, to train with each, add -m."
    if override := getattr(error, "override", None):
        return (
            f"{override.lstrip('+')}: Hydra cannot read this. Settings are given as key=value, for example optim.lr="
            "1e-4. Names with spaces, parentheses or other scripts go into a YAML file; for class folders: "
            "data.labels_file=FILE."
        )
    named = re.search(r"Could not override '([^']+)'", text)
    key = named[1] if named else getattr(error, "full_key", None) or getattr(cause, "full_key", None) or ""
    if key and any("not in struct" in part or "not in '" in part for part in (text, first)):
        near = suggest(key)
        return f"There is no setting {key!r}.{f' Did you mean {near}?' if near else ''} All settings: --help."
    if "Could not append" in first and (existing := re.search("already at '(.*)'", first)):
        return f"{existing[1]} is a setting that is there already: leave out the + before it."
    key = key or next(iter(re.findall("field '(.*)' is not Optional", first)), "")
    if number := re.search(r"Key (\S+) \((int|float|bool)\)", first):
        key = key.rpartition(".")[0]
        example = "NAME.root=FOLDER" if key == "data.sources" else "NAME=VALUE"
        return f"{key}: a name in braces is read as {number[1]}, no text. Give each alone, as {key}.{example}"
    if group := re.search(r"(\w+) is not a subclass of (\w+)Config", first):
        key = key or f"data.{group[2].lower()}"
        example = "root=FOLDER" if group[2] == "Source" else "NAME=VALUE"
        return f"{key} is a group of settings, no {group[1]}: give each alone, as {key}.{example}"
    of_source = re.sub(r"^data\.sources\.[^.]+\.", "data.sources.NAME.", key)
    for known, _, item in [*leaves(Config), *leaves(SourceConfig, "data.sources.NAME.")]:
        if of_source.split("[")[0] == known:
            value, kind = re.search(r"Value '(.*?)' of type", first), type_name(item)
            if kind.startswith("list[") and "[" not in key:
                kind = f"a list, as in '{key}={'[1,2]' if 'int' in kind else '[A,B]'}'"
            kind = "a table in braces" if kind.startswith("dict[") else kind
            return f"{key}{f'={value[1]}' if value else ''}: give {kind} ({item.metadata['help']})."
    if "is not Optional" in first:
        return f"{key}: null is no value here. Give another, or leave it out."
    return f"{key}: {first}" if key and key not in first else first


def suggest(key: str) -> str:
    """The setting or group that a misspelt key most likely means; empty where none is near."""
    key = key.lstrip("+~")
    group, _, name = key.rpartition(".")
    of_source = leaves(SourceConfig, f"{group}.") if re.fullmatch(r"data\.sources\.[^.]+", group) else ()
    keys = [known for known, _, _ in (*leaves(Config), *of_source)]
    same = [known for known, others in OTHER_NAMES.items() if key in others] or [
        known for known in keys if name == known.rpartition(".")[2] or name in OTHER_NAMES.get(known, ())
    ]
    if same:
        meant = min(same, key=lambda known: not known.startswith(f"{group}."))  # of the same group, if there is one
        return f"{meant}.{name}" if meant == "trainer.args" else meant
    groups = {known.rpartition(".")[0] for known in keys} - {""}
    near = difflib.get_close_matches(key, [*keys, *groups], n=1, cutoff=0.8)
    if not near and not group:  # `lrr` for `optim.lr`
        last = {known.rpartition(".")[2]: known for known in reversed(keys)}
        near = [last[match] for match in difflib.get_close_matches(name, last, n=1, cutoff=0.75)]
    return near[0] if near else ""
