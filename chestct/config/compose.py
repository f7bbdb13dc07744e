"""How Hydra's files in conf/ and the overrides of a command become a `Config`, and the files that follow from both."""

import json
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from chestct.config.checks import explain, resolve
from chestct.config.schema import Config, leaves, type_name
from chestct.config.targets import refuse_expressions
from chestct.errors import ConfigError
from chestct.files import write_atomic

PACKAGE = Path(__file__).resolve().parents[1]
CONF = next((folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir()), PACKAGE / "conf")
"""Hydra's files: at the top of the repository; inside the package where it was installed from a wheel."""

PIPELINE = "params"
"""Name of the config that DVC's stages are given: params.yaml, which `dvc exp run -S` writes."""

HERE = (
    *(
        "ckpt",
        "cache_dir",
        "runs_dir",
        "bundle",
        "compare",
        "callbacks",
        "loggers",
        "trust",
        "seeds",
        "tracking",
        "serve",
        "monitor",
        "data.store",
        "data.workers",
    ),
    *("trainer.strategy", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.progress"),
    "trainer.args",
)
"""Settings that describe this machine, never taken from a file that may come from elsewhere.

Callbacks, loggers and arguments of the Trainer's, such as default_root_dir or a profiler, write where they like."""

MACHINE = ("strategy", "accelerator", "devices", "num_nodes", "precision", "deterministic")
"""What the files of conf/trainer set."""


def compose(*overrides: str, config_name: str = "train", config_dir: Path | None = None) -> Config:
    """The settings that the program conf/<config_name>.yaml would see for these overrides; for tests and notebooks.

    config_dir: an absolute folder with more files, as Hydra's --config-dir. Raises ConfigError like the program does.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    first, second = CONF, config_dir
    if config_dir and (config_dir / f"{config_name}.yaml").is_file():  # Hydra looks for it in the first folder alone
        first, second = config_dir, CONF
    search = [f"hydra.searchpath=['{second}']"] if second else []
    try:
        with initialize_config_dir(str(first), version_base="1.3"):
            composed = hydra_compose(config_name, [*map(readable, overrides), *search])
    except Exception as error:
        if not type(error).__module__.startswith(("hydra", "omegaconf", "antlr4")) and not isinstance(
            error, ValueError
        ):
            raise
        raise ConfigError(explain(error)) from None
    return resolve(composed)


def readable(override: str, sweep: bool = False) -> str:
    """An override as Hydra's grammar takes it.

    Tables such as data.labels take new keys, which Hydra admits only where the override begins with ++. A value is
    quoted where it would not be read as typed: a path with `=`, parentheses or, unless `sweep`, a comma.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    key, equals, value = override.partition("=")
    kinds = {name: type_name(item) for name, _, item in leaves(Config)}
    if any(kind.startswith("dict") and (key == name or key.startswith(f"{name}.")) for name, kind in kinds.items()):
        key, override = f"++{key}", f"++{override}"
    if not equals or value.startswith(("{", "[")):
        return override
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except OverrideParseException:
        return quoted(key, value)
    one_text = kinds.get(key.lstrip("+"), "").startswith("str") and not sweep
    return quoted(key, value) if one_text and parsed.is_sweep_override() else override


def quoted(key: str, value: str) -> str:
    """An override whose value Hydra's grammar reads as this text, whatever it contains."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def merge_settings(cfg: Config, overrides: list[str], stored: dict[str, Any]) -> Config:
    """The settings in a checkpoint, with the overridden keys of `cfg` laid over them.

    stored: what the checkpoint holds. It describes a model and its data; where this machine keeps things, what it runs
    on and whom it talks to (HERE) comes from `cfg`, since a file from elsewhere does not decide that.
    overrides: Hydra's override strings, such as `data.root=/x` or `data=chest_ct`; their values are read from `cfg`,
    where groups are opened and types are right.
    Raises ConfigError where the stored settings hold an interpolation, which could read this machine's environment.
    """
    refuse_expressions(stored, "The checkpoint")
    merged, source = OmegaConf.create(stored), OmegaConf.structured(cfg)
    keys = [override.split("=", 1)[0].lstrip("+~").split("@")[0] for override in overrides]
    keys = [{"data.labels_file": "data.labels"}.get(key, key) for key in keys]  # `resolve` read the file
    if group := next((key for key in keys if key in ("experiment", "debug")), None):
        raise ConfigError(
            f"With ckpt, the experiment is the checkpoint's own. Leave out {group}=, or give single settings."
        )
    for key in [*HERE, *keys]:
        # trainer=NAME says on what to train; how long is the checkpoint's.
        for part in [f"trainer.{name}" for name in MACHINE] if key == "trainer" else [key]:
            OmegaConf.update(merged, part, OmegaConf.select(source, part), merge=False, force_add=True)
    return resolve(merged)


def help_text(usage: str) -> str:
    """What `--help` prints: how the program is used, the groups in conf/ and every setting."""
    groups = "\n".join(
        f"  {folder.name}={'|'.join(sorted(f.stem for f in folder.glob('*.yaml')))}"
        for folder in sorted(CONF.iterdir())
        if list(folder.glob("*.yaml"))
    )
    settings = re.sub(r"^#.*\n", "", as_yaml())
    return (
        f"{usage.strip()}\n\nGroups: each is a folder in conf/ and each option a file in it\n{groups}\n\n"
        f"Settings: give as a.b=value; -m a.b=1,2 runs every combination\n\n{settings}\n"
        "--cfg job prints the composed settings; --hydra-help tells of Hydra's own options."
    )


def as_yaml() -> str:
    """Every setting with its default and its meaning, as YAML; the text of conf/defaults.yaml."""
    lines = ["# Every setting, its default and its meaning. Made by `make params` from chestct/config/schema.py.\n"]
    opened: list[str] = []
    for key, value, item in leaves(Config):
        *parents, name = key.split(".")
        shared = next(
            (i for i, (a, b) in enumerate(zip(opened, parents, strict=False)) if a != b), min(len(opened), len(parents))
        )
        for depth in range(shared, len(parents)):
            lines.append(f"{'  ' * depth}{parents[depth]}:\n")
        opened = parents
        listed = isinstance(value, list | dict)  # on one line, before its comment
        text = f"{name}: {json.dumps(value)}" if listed else OmegaConf.to_yaml(OmegaConf.create({name: value})).strip()
        choices = " | ".join(map(str, item.metadata["choices"]))
        note = item.metadata["help"] + (
            f" ({choices})" if choices and choices.split(" | ")[0] not in item.metadata["help"] else ""
        )
        lines.append(f"{'  ' * len(parents)}{text}  # {note}\n")
    return "".join(lines)


def change_params(overrides: list[str], path: Path = Path("params.yaml")) -> list[tuple[str, Any, Any]]:
    """Changes params.yaml by overrides as train.py takes them, and keeps what else stands in it.

    DVC's own `-S` changes single settings; a group such as `data=chest_ct` or an experiment is opened here. Returns
    (key, old value, new value) of each setting that changed; raises ConfigError for an override that is wrong.
    """
    default, wanted = OmegaConf.structured(compose()), OmegaConf.structured(compose(*overrides))
    stored = OmegaConf.load(path) if path.is_file() else OmegaConf.create()
    before = resolve(stored)  # type: ignore[arg-type]
    merged = OmegaConf.structured(before)
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    for key, _, _ in leaves(Config):
        value = OmegaConf.select(wanted, key)
        if key in given or value != OmegaConf.select(default, key):
            OmegaConf.update(merged, key, value, merge=False)
    write_atomic(path, OmegaConf.to_yaml(OmegaConf.structured(resolve(merged))))
    old, new = ({key: value for key, value, _ in leaves(cfg)} for cfg in (before, resolve(merged)))
    return [(key, old[key], new[key]) for key in new if old[key] != new[key]]


def derived_files() -> dict[Path, str]:
    """The files that follow from the schema and conf/: all defaults with their meaning, and DVC's params.yaml."""
    composed = OmegaConf.to_yaml(OmegaConf.structured(compose()))  # as DVC writes it, so that git sees no change
    return {CONF / "defaults.yaml": as_yaml(), CONF.parent / "params.yaml": composed}


if __name__ == "__main__":  # `make params`; the defaults first, since params.yaml is composed on top of them
    write_atomic(CONF / "defaults.yaml", as_yaml())
    for derived, text in derived_files().items():
        write_atomic(derived, text)
