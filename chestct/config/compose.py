"""How Hydra's files in conf/ and the overrides of a command become a `Config`, and the files that follow from both."""

import json
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from chestct.config.checks import explain, resolve
from chestct.config.schema import Config, leaves
from chestct.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"

PIPELINE = "params"
"""Name of the config that DVC's stages are given: params.yaml, which `dvc exp run -S` writes."""

MACHINE = ("strategy", "accelerator", "devices", "num_nodes", "precision", "deterministic")
"""What the files of conf/trainer set."""


def compose(*overrides: str, config_name: str = "train") -> Config:
    """The settings that the program conf/<config_name>.yaml would see for these overrides; for tests and notebooks.

    Raises ConfigError like the program does.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose(config_name, [opened_tables(override) for override in overrides])
    except Exception as error:
        if not type(error).__module__.startswith(("hydra", "omegaconf", "antlr4")):
            raise
        raise ConfigError(explain(error)) from None
    return resolve(composed)


def overlay(cfg: Config, overrides: list[str], base: dict[str, Any]) -> Config:
    """`base` with the overridden keys of `cfg` laid over it.

    overrides: Hydra's override strings, such as `data.root=/x` or `data=chest_ct`; their values are read from `cfg`,
    where groups are opened and types are right.
    """
    merged, source = OmegaConf.create(base), OmegaConf.structured(cfg)
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~").split("@")[0]
        if key == "experiment":
            raise ConfigError(
                "With ckpt, the experiment is the checkpoint's own. Leave out experiment=, or give single settings."
            )
        # trainer=NAME says on what to train; how long is the checkpoint's.
        for said in [f"trainer.{name}" for name in MACHINE] if key == "trainer" else [key]:
            OmegaConf.update(merged, said, OmegaConf.select(source, said), merge=False, force_add=True)
    return resolve(merged)


def opened_tables(override: str) -> str:
    """Lets tables such as data.labels take new keys, which Hydra admits only where the override begins with ++."""
    key = override.split("=", 1)[0]
    tables = {name for name, default, _ in leaves(Config) if isinstance(default, dict)}
    return f"++{override}" if any(key == table or key.startswith(f"{table}.") for table in tables) else override


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


def made_files() -> dict[Path, str]:
    """The files that follow from the schema and conf/: all defaults with their meaning, and DVC's params.yaml."""
    composed = OmegaConf.to_yaml(OmegaConf.structured(compose()))  # as DVC writes it, so that git sees no change
    return {CONF / "defaults.yaml": as_yaml(), CONF.parent / "params.yaml": composed}


if __name__ == "__main__":  # `make params`; the defaults first, since params.yaml is composed on top of them
    (CONF / "defaults.yaml").write_text(as_yaml())
    for made, text in made_files().items():
        made.write_text(text)
