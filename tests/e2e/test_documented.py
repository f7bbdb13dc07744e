"""Every command of README and docs: run by the installed wheel or, where that cannot be, composed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from chestct.config.compose import compose
from chestct.config.schema import Config, leaves
from chestct.models.bundle import load_bundle
from tests.e2e.loopback import free_port
from tests.e2e.test_commands import ROOT
from tests.reporting.test_drift_report import records, write
from tests.serving.conftest import examples as examples
from tests.serving.conftest import scan as scan
from tests.serving.conftest import zipped

PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"chestct [a-z]+\b(?![|.])|python (train|evaluate|serve)\.py|python -c 'import chestct|(torchrun|srun) .*train\.py"
)
CODE = re.compile(r"^( *)```\w*\n(.*?)^\1```", re.M | re.S)

ELSEWHERE = {
    r"serve\.host=0": "opens the machine to its network; others serve on loopback here",
    r"launcher=(slurm|ray)|^torchrun|^srun": "a cluster: training/test_ddp, test_sweep",
    r"trainer=(ddp|gpu)": "several processes or a GPU: training/test_ddp",
    r"dagshub|tracking\.(uri|register)|^chestct sync": "a server: test_servers, test_registry, test_story",
    r"^chestct push|hf://": "the hub: test_hub has a stand-in",
    r"data=hospitals|data fetch \w+": "other people's data: data/test_public, evaluation/test_protocol",
    r"format=|\.backend=|openvino_int8": "the extra `export`, minutes of verification: evaluation/test_backends",
    r"sweep=": "many trainings: test_sweep",
    r"_target_=|model\.backbone=|trust=": "code and weights of one's own: test_extend",
    r"ckpt=runs/(four|row)|evaluation\.protocol": "minutes: evaluation/test_protocol, test_split_policies",
    r"^chestct (predict|space)$": "no command, named in passing",
}
"""What is composed and not run, why, and the tests that run it."""

FILLED = {
    r"bundle=(FOLDER|\.\.\.)": "bundle=runs/A/bundle",
    r"(predict|embed|packaged data.root=)( ?)FOLDER": r"\1\2FOLDER/valid",  # a second a slice
    r"\.\./shared/data/chest-ct": "chest-ct",
    r"data\.size=256": "data.size=32",
    r"seeds=3": "seeds=2",
    r"/data/monitor": "monitor",
    r"(--viewer|space) FOLDER": r"\1 new\1",
    r"data\.root=\.\.\.": "data.root=FOLDER",
    r"data=\.\.\.": "data=chest_ct",
    r"\{\.\.\.\}": "{healthy: normal, tumour: cancer}",
    r"\$\w+": "torch",
    r" > .*|\"$": "",
}
"""What stands for dots and variables; files and folders of the names in capitals are there."""

EXTRA = {
    "python train.py": ["hydra.run.dir=runs/A", "evaluation.report=true"],
    "python train.py model.freeze=true optim.lr=1e-4": [
        "hydra.run.dir=runs/B",
        "evaluation.report=true",
    ],
    "python train.py experiment=two_stage": ["trainer.unfreeze_epoch=1"],
}
QUICK = [
    "data.size=32",
    "data.batch_size=8",
    "trainer.max_epochs=2",
    "trainer.progress=false",
    "tracking=off",
    "data.phantom.slices=60",
    "data.phantom.size=96",
    "evaluation.resamples=100",
    "evaluation.report=false",
]
PROGRAMS = {"train": "train", "evaluate": "evaluate", "export": "evaluate", "serve": "serve"}
"""The file of conf/ that a command with settings starts from; "stage" for the others."""

RUNNER = """
import contextlib, json, os, runpy, signal, sys, time, urllib.request
import chestct.evaluation.export, chestct.experiment, chestct.pyfunc, chestct.reporting.render, chestct.training

program, jobs = sys.argv[1], json.load(sys.stdin)
status = []
for n, (name, *arguments) in enumerate(jobs):
    if not (child := os.fork()):  # all that takes seconds to import is there
        for stream in (1, 2):
            os.dup2(os.open(f"{n}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.argv = [program, *arguments]
        if name == "python":
            exec(arguments[1])
            sys.exit()
        runpy.run_path(program, run_name="__main__")
    if arguments[0] == "serve":
        port = arguments[-1].partition("=")[2]
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
                break
            time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
    status.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(status))
"""


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


def quick(command: str) -> list[str]:
    """The same with small phantoms and few epochs, where it does not say otherwise."""
    words = [*filled(command), *EXTRA.get(command, [])]
    given = {word.split("=")[0] for word in words}
    wanted = QUICK if words[1] in ("train", "audit", "ingest") and "--cfg" not in words else []
    if words[1] == "evaluate" and "compare" not in given:
        wanted = ["evaluation.resamples=100", "trainer.progress=false"]
    if words[1] == "serve":
        wanted = [f"serve.port={free_port()}"]
    return [*words, *(item for item in wanted if item.split("=")[0] not in given)]


def test_every_setting_that_is_named_exists():
    known = {name for name, _, _ in leaves(Config)}
    tables = ("data.labels.", "data.sources.", "callbacks.", "loggers.", "hydra.", "optim.optimizer.", "trainer.args.")
    tables += ("optim.scheduler.", "model.head.")
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8")):
            for name in re.findall(r"(?:^| )([a-z_]+\.[a-z_.]+)=", code):
                assert name in known or f"{name}.".startswith(tables), f"{page.name}: {code}"


def test_every_reason_is_that_of_a_command():
    for pattern in ELSEWHERE:
        assert any(re.search(pattern, command) for command in documented()), pattern


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


@pytest.fixture
def place(tmp_path, scan, phantoms, empty_store):
    """A folder with all that the commands name: slices, a scan, runs/..."""
    for path in phantoms.glob("[tv]*/*/*.png"):  # not the masks
        kind = path.parent.name if path.parent.name == "normal" else "adenocarcinoma"  # all settings know these two
        named = {name: folder for folder, name in compose("data=chest_ct").data.labels.items()}
        for place in (f"FOLDER/{path.parts[-3]}/{kind}", f"chest-ct/{path.parts[-3]}/{named[path.parent.name]}"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / place / f"{path.parent.name}-{path.name}")
    series = scan(5)
    for name, content in series.items():
        (tmp_path / "SERIES_FOLDER" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "SERIES_FOLDER" / name).write_bytes(content)
    (tmp_path / "scans").symlink_to("SERIES_FOLDER")
    (tmp_path / "slice.dcm").write_bytes(content)
    (tmp_path / "study.zip").write_bytes(zipped(series))
    volume = np.full((64, 64, 2), -800, np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "ct.nii.gz")
    (tmp_path / "runs").mkdir()
    for name, other in {"RUN": "A", "winner": "B"}.items():
        (tmp_path / "runs" / name).symlink_to(other)
    write(tmp_path / "monitor.sqlite", records(load_bundle("packaged"), 0, 60))
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "evaluation").symlink_to("../runs/A/evaluation")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.skipif(sys.platform == "darwin", reason="forks after torch was loaded, which macOS does not bear")
def test_the_others_run_from_an_installed_wheel(installed, place):
    commands = [command for command in documented() if not any(re.search(p, command) for p in ELSEWHERE)]
    jobs = json.dumps([quick(command) for command in commands])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    runner = [str(installed / "python"), "-c", RUNNER, str(installed / "chestct")]
    done = subprocess.run(runner, cwd=place, env=environment, input=jobs, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    failed = {
        command: (place / f"{n}.log").read_text(encoding="utf-8")
        for n, (command, status) in enumerate(zip(commands, json.loads(done.stdout), strict=True))
        if status and not (status in (1, 3) and "drift report" in command)  # which is its answer
    }
    assert not failed
