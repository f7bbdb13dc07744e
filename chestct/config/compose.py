"""How Hydra's files in conf/ and the overrides of a command become a `Config`, and the files that follow from both."""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from chestct.config.checks import resolve, resolve_composed
from chestct.config.explain import explain
from chestct.config.fields import leaves, type_name
from chestct.config.schema import Config, SourceConfig
from chestct.errors import ConfigError
from chestct.files import write_atomic

PACKAGE = Path(__file__).resolve().parents[1]
CONF = next((folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir()), PACKAGE / "conf")
"""Hydra's files: at the top of the repository; inside the package where it was installed from a wheel."""

DEFAULTS = CONF / "defaults.yaml"
HEAD = "# Every setting, its value where no file of a group sets another, and its meaning. Made by `make params`.\n"

PIPELINE = "params"  # name of the config that DVC's stages are given: params.yaml, which `dvc exp run -S` writes
PARTS = ["callbacks", "trainer.args", "loggers"]
"""Groups of HERE that take part in a training; what it logs to goes last."""
HERE = [*PARTS, "ckpt", "cache_dir", "runs_dir", "bundle", "format", "compare", "trust", "seeds"]
HERE += ["serve", "monitor", "data.store", "data.workers", "trainer.strategy", "trainer.accelerator", "trainer.devices"]
HERE += ["trainer.num_nodes", "trainer.progress", "tracking"]
"""Settings that describe this machine, never taken from a file that may come from elsewhere.

Callbacks, loggers and arguments of the Trainer's, such as default_root_dir or a profiler, write where they like."""

ABOUT_THE_MACHINE = ("trainer.args.benchmark", "trainer.args.profiler")
"""Arguments of the Trainer's, in files of conf/, that change nothing of what is trained."""

MACHINE = ("strategy", "accelerator", "devices", "num_nodes", "precision", "compile", "deterministic")
"""What the files of conf/trainer set."""

SOURCE = ("name", "root", "sources", "labels")
"""What of the files in conf/data says whose slices these are; how slices are shown stays the checkpoint's."""


BUNDLED = (
    *("task=", "model.", "data.size=", "data.fit=", "data.contrast=", "data.window"),
    *("evaluation.threshold=", "evaluation.coverage=", "evaluation.cost_ratio="),
)
"""How overrides begin of what a bundle brings along."""


def compose(*overrides: str, config_name: str = "train") -> Config:
    """The settings that the program of conf/<config_name>.yaml sees for these overrides; raises ConfigError as it does.

    For tests, notebooks and tools: a program lets Hydra compose them.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose(config_name, [*map(readable, overrides)])
    except Exception as error:
        if isinstance(error, ValueError) or type(error).__module__.startswith(("hydra", "omegaconf", "antlr4")):
            raise ConfigError(explain(error)) from None
        raise
    return resolve_composed(composed)


def idle_with_bundle(overrides: Sequence[str]) -> list[str]:
    """Those of Hydra's override strings that have no effect on a bundle, which brings its own along."""
    return [override for override in overrides if override.lstrip("+").startswith(BUNDLED)]


def check_pipeline(roots: Iterable[str | None]) -> None:
    """Raises ConfigError in a stage of DVC's that would not run again when slices or their labels change.

    That is where dvc.yaml does not name their folders. roots: of all sources; None of phantoms, which are drawn.
    """
    from hydra.core.hydra_config import HydraConfig

    both = [Path(f"{PIPELINE}.yaml"), Path("dvc.yaml")]
    if HydraConfig.get().job.config_name != PIPELINE or not all(map(Path.is_file, both)):
        return
    settings = OmegaConf.merge(*map(OmegaConf.load, both))  # deps may be written as ${data.root}
    files = [OmegaConf.select(settings, "data.labels_file"), *roots]  # the file of labels is read by now
    deps = [Path(path).resolve() for path in OmegaConf.select(settings, "stages.ingest.deps")]
    if unseen := [file for file in files if file and not any(map(Path(file).resolve().is_relative_to, deps))]:
        lines = "\n".join(f"      - {file}" for file in unseen)
        raise ConfigError(
            "dvc.yaml does not say that the stage ingest depends on its slices, so `dvc repro` would not notice when "
            f"they change. Add to its deps:\n\n{lines}"
        )


def readable(override: str, sweep: bool = False, text: bool = False) -> str:
    """An override as Hydra's grammar takes it.

    Tables such as data.labels take new keys, which Hydra admits only where the override begins with ++. A value is
    quoted where it would not be read as typed: a path with `=`, parentheses or, unless `sweep`, a comma, or a text that
    looks like a number, such as 2024_11_27, an item of a list, too. text: whether it is one; else the schema says so,
    where it knows the key.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    key, equals, value = override.partition("=")
    settings = [*leaves(Config), *leaves(SourceConfig, "data.sources.*.")]
    kinds = {name: type_name(item) for name, _, item in settings} | {"hydra.run.dir": "str", "hydra.sweep.dir": "str"}
    kind = "str" if text else kinds.get(re.sub(r"^(data\.sources)\.[^.]+", r"\1.*", key.lstrip("+")), "")
    if any(kinds[name].startswith("dict") and f"{key}.".startswith(f"{name}.") for name in kinds):
        key = f"++{key}"
    value = in_home(value) if "str" in kind else value
    if kind == "list[str]":
        value = re.sub(r"(?<=[\[,])\s*([-+.\w]+)\s*(?=[,\]])", r"'\1'", value)
    override = f"{key}{equals}{value}"
    if not equals or (value.startswith(("{", "[")) and not kind.startswith("str")):
        return override
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except OverrideParseException:
        return quoted(key, value)
    if not kind.startswith("str"):
        return override
    if value.startswith(("{", "[")) or parsed.is_sweep_override():  # several values, or a text that looks like them
        return override if sweep else quoted(key, value)
    number = parsed.value()
    return quoted(key, value) if isinstance(number, int | float) and str(number) != value else override


def in_home(text: str) -> str:
    """A path below the home folder as a whole one: behind `key=` and `--option=`, shells leave `~` as it is."""
    return re.sub(r"(?<![^,=\[])~(?=/)", lambda _: str(Path.home()), text)


def quoted(key: str, value: str) -> str:
    """An override whose value Hydra's grammar reads as this text, whatever it contains."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def merge_settings(cfg: Config, overrides: list[str], stored: dict[str, Any]) -> Config:
    """The settings in a checkpoint, with the overridden keys of `cfg` laid over them.

    stored: what the checkpoint holds, which `check_trusted` has seen. It describes a model and its data; where this
    machine keeps things, what it runs on and whom it talks to (HERE) comes from `cfg`. overrides: Hydra's override
    strings, such as `data.root=/x` or `data=chest_ct`; their values are read from `cfg`, where groups are opened.
    Raises ConfigError for an experiment next to a checkpoint, and as `resolve` does.
    """
    merged, source = OmegaConf.create(stored), OmegaConf.structured(cfg)
    keys = [override.split("=", 1)[0].lstrip("+~").split("@")[0] for override in overrides]
    keys = [{"data.labels_file": "data.labels"}.get(key, key) for key in keys]  # `resolve` read the file
    if group := next((key for key in keys if key in ("experiment", "debug")), None):
        raise ConfigError(
            f"With ckpt, the experiment is the checkpoint's own. Leave out {group}=, or give single settings."
        )
    for key in [*HERE, *keys]:
        # trainer=NAME says on what to train, data=NAME whose slices; how long, and how they are seen, is the
        # checkpoint's.
        names = {"trainer": MACHINE, "data": SOURCE}.get(key)
        for part in [f"{key}.{name}" for name in names] if names else [key]:
            OmegaConf.update(merged, part, OmegaConf.select(source, part), merge=False, force_add=True)
    return resolve(merged)


def left_behind(stored: dict[str, Any], groups: Sequence[str], cfg: Config | None = None) -> list[str]:
    """Overrides, ready to paste, without which a command does not train as a run did: the parts of these groups, which
    no file decides (HERE).

    stored: settings as plain containers; groups: such as `callbacks`; cfg: has what the command said already.
    """
    current, before = OmegaConf.structured(cfg or Config()), OmegaConf.create(stored)
    lacking: list[str] = []
    for group in groups:
        parts: Any = OmegaConf.to_container(OmegaConf.select(before, group) or OmegaConf.create())
        for name, value in parts.items():
            if name not in OmegaConf.select(current, group) and f"{group}.{name}" not in ABOUT_THE_MACHINE:
                lacking += map(shlex.quote, _overrides(f"{group}.{name}", value))
    return lacking


def _overrides(key: str, value: Any) -> Iterator[str]:
    """The overrides that give a value, of whatever kind, to a key of an open table."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _overrides(f"{key}.{name}", part)
    elif isinstance(value, str):
        yield readable(f"{key}={value}", text=True).lstrip("+")
    else:
        yield f"{key}={json.dumps(value)}"


def help_text(usage: str) -> str:
    """What `--help` prints: how the program is used, the groups in conf/ and every setting."""
    files = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in sorted(CONF.iterdir())}
    groups = "\n".join(f"  {name}={'|'.join(options)}" for name, options in files.items() if options)
    return (
        f"{usage.strip()}\n\nGroups: each is a folder in conf/ and each option a file in it\n{groups}\n\n"
        "Settings: give as a.b=value; -m a.b=1,2 runs every combination. The values are those that hold where no file\n"
        f"of a group sets another, as that of training's default, experiment=places, does\n\n{as_yaml()}\n"
        "--cfg job prints the composed settings; --hydra-help tells of Hydra's own options."
    )


def as_yaml(group: Any = Config, indent: str = "") -> str:
    """Every setting with its default and its meaning, as YAML."""
    text = ""
    for item in dataclasses.fields(group):
        value, help = getattr(group(), item.name), item.metadata.get("help", "")
        if dataclasses.is_dataclass(value):
            text += f"{indent}{item.name}:\n{as_yaml(type(value), f'{indent}  ')}"
            continue
        choices = item.metadata["choices"]
        note = f"{help} ({' | '.join(choices)})" if choices and choices[0] not in help else help
        listed = isinstance(value, list | dict)  # on one line, before its comment
        line = f"{item.name}: {json.dumps(value)}" if listed else OmegaConf.to_yaml({item.name: value}).strip()
        text += f"{indent}{line}  # {note}\n"
    return text


def derived_files() -> Iterator[tuple[Path, str]]:
    """The files that follow from the schema and conf/: all defaults with their meaning, and DVC's params.yaml.

    Write each before the next is asked for, which is composed on top of it.
    """
    yield DEFAULTS, HEAD + as_yaml()
    yield CONF.parent / "params.yaml", OmegaConf.to_yaml(OmegaConf.structured(compose()))  # as DVC writes it


if __name__ == "__main__":  # `make params`
    for derived, text in derived_files():
        write_atomic(derived, text)
