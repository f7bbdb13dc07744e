"""Every command of README and docs, run by the installed wheel; what cannot be is named with its reason."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch

from chestct.config.compose import compose
from chestct.config.fields import leaves
from chestct.config.schema import Config, PhantomConfig
from chestct.models.bundle import load_bundle
from chestct.models.weights import convolutions
from chestct.phantom.dataset import write as draw
from tests.e2e.documented import ANSWERED, EXTRA, FILLED, NOT_RUN, OTHERS, PAGES, documented, filled, programs, quick
from tests.e2e.loopback import log_in
from tests.e2e.test_commands import ROOT
from tests.e2e.test_extend import code
from tests.reporting.test_drift_report import records, write
from tests.serving.conftest import zipped

RUNNER = """
import contextlib, gc, json, os, re, runpy, signal, subprocess, sys, time, urllib.request
import chestct.evaluation.export, chestct.experiment, chestct.pyfunc, chestct.reporting.render, chestct.training

program, jobs = sys.argv[1], json.load(sys.stdin)
status = []
copy = "?"
gc.freeze()
for n, (name, *arguments) in enumerate(jobs):
    arguments = [argument.replace("RUN_ID", copy) for argument in arguments]
    if not (child := os.fork()):  # all that takes seconds to import is there
        for stream in (1, 2):
            os.dup2(os.open(f"{n}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.argv = [program, *arguments]
        if name == "python":
            exec(arguments[1])
            sys.exit()
        if name == "torchrun":  # as often as it says how many machines there are
            command = [sys.executable, "-m", "torch.distributed.run", *arguments]
            machines = arguments[arguments.index("--nnodes") + 1] if "--nnodes" in arguments else 1
            sys.exit(max(one.wait() for one in [subprocess.Popen(command) for _ in range(int(machines))]))
        runpy.run_path(program, run_name="__main__")
    if arguments[0] == "serve":
        host = next((a.partition("=")[2] for a in arguments if a.startswith("serve.host=")), "127.0.0.1")
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{host}:{arguments[-1].partition('=')[2]}/readyz").close()
                break
            time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
    _, ended, used = os.wait4(child, 0)
    status.append((os.waitstatus_to_exitcode(ended), round(used.ru_utime + used.ru_stime, 1)))
    with open(f"{n}.log") as log:
        copy = (re.findall(r"MLflow copy +(\\w+)", log.read()) or [copy])[-1]
print(json.dumps(status))
"""


def test_every_setting_that_is_named_exists():
    known = {name for name, _, _ in leaves(Config)}
    tables = ("data.labels.", "data.sources.", "callbacks.", "loggers.", "hydra.", "optim.optimizer.", "trainer.args.")
    tables += ("optim.scheduler.", "model.head.")
    for page in PAGES:
        for text in re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8")):
            for name in re.findall(r"(?:^| )([a-z_]+\.[a-z_.]+)=", text):
                assert name in known or f"{name}.".startswith(tables), f"{page.name}: {text}"


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_the_first_pages_say_how_to_enter_the_environment_before_they_name_a_command_of_it(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    first = re.search(r"(`|^\$ |^    )(python \w+\.py|chestct \S)", page, re.M)
    assert 0 < page.find(". .venv/bin/activate") < first.start()


def test_a_picture_has_one_command_on_all_pages():
    """README names that of the report in its alternative text, docs/evaluation.md below the picture."""
    alternative = re.search(r"!\[.*`(.*)`\]\(docs/report\.png\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    below = re.search(r"\(report\.png\)\n\*`(.*)`\*", (ROOT / "docs/evaluation.md").read_text(encoding="utf-8"))
    assert alternative[1] == below[1]


def test_commands_can_be_pasted_into_zsh():
    """Typed there, # begins no comment, and a bracket that is not quoted is a pattern that no file matches."""
    texts = {page: page.read_text(encoding="utf-8") for page in (*PAGES, ROOT / "CONTRIBUTING.md")}
    for page, text in texts.items():
        of_a_shell = re.sub(r"^( *)```(?!bash|console)\w+\n.*?^\1```", "", text, flags=re.M | re.S)
        assert not (found := re.search(r"\S +# .*", of_a_shell)), (page.name, found)
        for fence in re.findall(r"^ *```(?:bash|console)\n(.*?)^ *```", text, re.M | re.S):
            assert not re.search(r"^\s*#", fence, re.M), (page.name, fence)
    for path in (ROOT / "chestct").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        texts[path] = "\n".join(text for text in strings if " " in text)
    for path, text in texts.items():
        found = re.search(r"(?<!['\"\w.])[a-z_][\w.]*=\[.*", text)
        assert not found, (path, found)


def test_every_other_program_is_named_with_what_runs_it():
    ours = {"chestct", "python", "torchrun", "srun"}
    assert programs() - ours == {name for names in OTHERS for name in names.split()}


def test_every_line_of_the_tables_is_that_of_a_command():
    for pattern in (*NOT_RUN, *ANSWERED, *EXTRA, *FILLED):
        assert any(re.search(pattern, command) for command in documented()), pattern


def test_what_runs_on_a_cluster_alone_composes():
    """Any other command does so when it is run."""
    for command in (command for command in documented() if re.search(r"^srun |launcher=(slurm|ray)", command)):
        settings = [word for word in filled(command) if "=" in word and "launcher" not in word]
        compose(*(setting.split(",")[0] for setting in settings))  # the first of several values


def test_each_row_of_the_table_of_recipes_composes():
    (rows,) = re.findall(r"`ROW` is (.*?)\.$", (ROOT / "RESULTS.md").read_text(encoding="utf-8"), re.M | re.S)
    recipes = [" ".join(re.findall(r"`(.*?)`", row, re.S)).split() for row in rows.split(";")]
    assert len(recipes) == 5
    for name, *settings in recipes:
        cfg = compose("data=hospitals", f"experiment={name}", *settings)
        assert cfg.data.views == cfg.data.lesions == 0


@pytest.fixture
def place(tmp_path, scan, phantoms, empty_store):
    """A folder with all that the commands name: slices, a scan, collections, runs, code and weights of one's own."""
    for path in phantoms.glob("[tv]*/*/*.png"):  # not the masks
        kind = path.parent.name if path.parent.name == "normal" else "adenocarcinoma"  # all settings know these two
        named = {name: folder for folder, name in compose("data=chest_ct").data.labels.items()}
        for place in (f"FOLDER/{path.parts[-3]}/{kind}", f"chest-ct/{path.parts[-3]}/{named[path.parent.name]}"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / place / f"{path.parent.name}-{path.name}")
    draw(tmp_path / "drawn", PhantomConfig(slices=96, size=96, difficulty=0.0, seed=1))
    for n, path in enumerate(sorted((tmp_path / "drawn").glob("[tv]*/*/*.png"))):
        root = tmp_path / "hospitals" / ["chest-ct", "iq-oth-nccd", "lidc", "lung-pet-ct-dx"][n % 4]
        to = root / ("normal" if path.parent.name == "normal" else "adenocarcinoma")
        to.mkdir(parents=True, exist_ok=True)
        path.rename(to / f"LIDC-IDRI-{n:04} Lung_Dx-A{n:04} {n:04}.png")
    (root / "boxes.csv").write_text("file,left,top,right,bottom\n", encoding="utf-8")
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
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "evaluation").symlink_to("../runs/A/evaluation")
    (tmp_path / "mine.py").write_text(code("class Noisy") + code("class Narrow"), encoding="utf-8")
    (tmp_path / "weights").mkdir()
    other = {f"features.{key}": x for key, x in convolutions("mobilenet_v3_small", "cpu").state_dict().items()}
    torch.save(other, tmp_path / "weights" / "mobilenet_v3_small_imagenet1k.pth")
    shutil.copy(ROOT / "train.py", tmp_path)  # for torchrun
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(sys.platform == "darwin", reason="forks after torch was loaded, which macOS does not bear")
def test_the_others_run_from_an_installed_wheel(installed, place, server, hub, monkeypatch):
    log_in(monkeypatch, "writer")
    commands = [command for command in documented() if not any(re.search(p, command) for p in NOT_RUN)]
    jobs = [quick(command, server.uri) for command in commands]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"no_proxy": "127.0.0.1", "HF_HOME": "hf", "PYTHONPATH": str(place)}
    runner = [str(installed / "python"), "-c", RUNNER, str(installed / "chestct")]
    done = subprocess.run(
        runner, cwd=place, env=environment, input=json.dumps(jobs), capture_output=True, text=True, timeout=2300
    )
    assert done.returncode == 0, done.stderr
    failed = {}
    for n, (command, (status, seconds)) in enumerate(zip(commands, json.loads(done.stdout), strict=True)):
        said = (place / f"{n}.log").read_text(encoding="utf-8")
        word = next((word for pattern, (_, word) in ANSWERED.items() if re.search(pattern, command)), None)
        expected = status == 0 or (status in (1, 3) and "drift report" in command)  # which is its answer
        expected |= status == 2 and word is not None and re.search(word, said) is not None
        if "Traceback" in said or not expected:
            failed[command] = f"{status}, {seconds} s: {said}"
        print(f"{seconds:6.1f} s  {status}  {command}")
    assert not failed
