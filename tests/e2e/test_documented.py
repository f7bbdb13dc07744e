"""Every command of README and docs: they compose, and what they name exists."""

import re
import shlex
import subprocess
import sys

import pytest

from chestct.config.compose import compose
from chestct.config.schema import Config, leaves
from tests.e2e.test_commands import ROOT

PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"chestct [a-z]+\b(?![|.])|python (train|evaluate|serve)\.py|python -c 'import chestct|(torchrun|srun) .*train\.py"
)
CODE = re.compile(r"^( *)```\w*\n(.*?)^\1```", re.M | re.S)

FILLED = {
    r"bundle=(FOLDER|\.\.\.)": "bundle=runs/A/bundle",
    r"(--viewer|space) FOLDER": r"\1 new\1",
    r"data\.root=\.\.\.": "data.root=FOLDER",
    r"data=\.\.\.": "data=chest_ct",
    r"\{\.\.\.\}": "{healthy: normal, tumour: cancer}",
    r"\$\w+": "torch",
    r" > .*|\"$": "",
}
"""What stands for dots and variables; files and folders of the names in capitals are there."""

PROGRAMS = {"train": "train", "evaluate": "evaluate", "export": "evaluate", "serve": "serve"}
"""The file of conf/ that a command with settings starts from; "stage" for the others."""


def documented() -> list[str]:
    """The commands in blocks and in running text, as they are typed, each once."""
    found = []
    for page in PAGES:
        text = re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8"))
        prose = CODE.sub("", text)
        lines = [line for _, block in CODE.findall(text) for line in block.splitlines()]
        lines += [line for line in prose.splitlines() if line.startswith("    ")]
        lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        for part in (part for line in lines for part in re.split(r"&&|\|\|", re.split(r"\s{2,}|\s#", line.strip())[0])):
            if command := COMMAND.search(part):
                found.append(part[command.start() :].strip())
    return list(dict.fromkeys(found))


def filled(command: str) -> list[str]:
    """The words of a command that can be run: python or chestct, the subcommand, its arguments."""
    for pattern, value in FILLED.items():
        command = re.sub(pattern, value, command)
    words = shlex.split(re.sub(r"^(torchrun|srun) .*(?=train\.py)|^python (?=\w+\.py)", "", command))
    return ["chestct", words[0].removesuffix(".py"), *words[1:]] if words[0].endswith(".py") else words


def test_every_setting_that_is_named_exists():
    known = {name for name, _, _ in leaves(Config)}
    tables = ("data.labels.", "data.sources.", "callbacks.", "loggers.", "hydra.", "optim.optimizer.", "trainer.args.")
    tables += ("optim.scheduler.", "model.head.")
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8")):
            for name in re.findall(r"(?:^| )([a-z_]+\.[a-z_.]+)=", code):
                assert name in known or f"{name}.".startswith(tables), f"{page.name}: {code}"


@pytest.mark.slow
def test_every_command_composes():
    said: dict[str, str] = {}
    for command in documented():
        program, name, *words = filled(command)
        if program == "python":
            continue
        flags = [word for word in words if word.startswith("--")]
        if name in ("predict", "embed", "space", "push", "data", "drift"):
            if name not in said:
                done = subprocess.run([sys.executable, "-m", "chestct", name, "-h"], capture_output=True, text=True)
                said[name] = done.stdout
            assert set(flags) <= set(re.findall(r"--[\w-]+", said[name])), command
            continue
        settings = [word for word in words if "=" in word and not re.search("^.?hydra.launcher|^launcher=", word)]
        if "-m" in words:  # the first of the values, the lower end of the range
            settings = [re.sub(r"(\[.*?\]|[^=,(\[]+),\S+$", r"\1", word.replace("interval(", "")) for word in settings]
        compose(*settings, config_name=PROGRAMS.get(name, "stage"))
