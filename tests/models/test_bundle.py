import json
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chestct import experiment
from chestct.config.compose import compose
from chestct.config.schema import CONTRASTS, FITS, POOLS, EvaluationConfig, ModelConfig
from chestct.config.schema_serving import CARD, FACTS, TENSORS
from chestct.errors import BundleError, ChestCTError
from chestct.files import file_digest, json_digest
from chestct.models.bundle import PACKAGED_BUNDLE, Bundle, load_bundle, save_bundle
from chestct.models.bundle_schema import Network, Square
from chestct.models.novelty import fit_novelty
from chestct.models.operating_point import OperatingPoint
from chestct.models.saliency import normal_cam
from chestct.stats.calibration import to_scores
from tests.conftest import Trap, limited, network

ROOT = Path(__file__).parents[2]
SIZE = 32


def squares(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE), np.uint8)


def test_a_bundle_may_say_whatever_export_writes_of_the_network() -> None:
    of_training_alone = {"weights", "freeze"}
    assert vars(ModelConfig()).keys() - of_training_alone == Network.model_fields.keys() - {"trained_convolutions"}
    for part, name, choices in ((Network, "pool", POOLS), (Square, "fit", FITS), (Square, "contrast", CONTRASTS)):
        assert set(get_args(part.model_fields[name].annotation)) == set(choices)


def make(folder: Path, *, trained: bool = False, classes: int = 2, pool: str = "gap") -> Bundle:
    net = network(1 if classes == 2 else classes, SIZE, pool=pool)
    with torch.no_grad():
        conv5 = net.conv5(next(net.batches(squares(24), 24)))
        maps = net.pool(conv5)
        logits, baseline = net.head(maps).numpy(), normal_cam(net, conv5[:4])
    point = OperatingPoint.fit(logits, np.arange(24) % classes, EvaluationConfig(threshold="youden"))
    pooled = net.channel_means(maps)
    facts = {
        "task": "binary" if classes == 2 else "subtype",
        "classes": ["normal", "cancer"] if classes == 2 else ["normal", "adenocarcinoma", "large_cell", "squamous"],
        "model": {"pool": pool, "hidden": [], "dropout": 0.0, "trained_convolutions": trained},
        "preprocess": {"size": SIZE, "fit": "pad"},
        "window": {"center": -600.0, "width": 1500.0, "from_file": False},
        "data": {"data_hash": "0" * 64, "seen": []},
    }
    return save_bundle(folder, Bundle(net, point, fit_novelty(pooled, pooled), baseline, facts, "# Card\n"))


@pytest.fixture
def folder(small_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize(("classes", "pool"), [(2, "gap"), (4, "gap"), (2, "flatten")])
def test_a_loaded_bundle_answers_as_the_network_did_in_batches_or_one_by_one(tmp_path, classes, pool) -> None:
    make(tmp_path / "b", classes=classes, pool=pool)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {TENSORS, FACTS, CARD}
    assert sum(path.stat().st_size for path in (tmp_path / "b").iterdir()) < 200_000  # without the convolutions
    loaded, images = load_bundle(tmp_path / "b"), squares(5, seed=1)
    net = network(1 if classes == 2 else classes, SIZE, pool=pool)
    with torch.no_grad():
        logits = torch.cat(list(map(net, net.batches(images)))).numpy()
    answers = loaded.predict(images, explain=True)
    assert np.abs(answers.logits - logits).max() < 1e-5
    expected = to_scores(loaded.point.calibration.scale * logits + loaded.point.calibration.shift)
    assert np.abs(answers.score - (expected[:, 0] if classes == 2 else 1 - expected[:, 0])).max() < 1e-6
    assert answers.heat is not None
    assert answers.heat.shape == (5, 2, 2)
    assert answers.probabilities.sum(1) == pytest.approx(np.ones(5))
    assert answers.score == pytest.approx([loaded.predict(image[None]).score[0] for image in images], abs=1e-5)


def test_convolutions_that_were_trained_travel_with_the_bundle(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", trained=True)
    assert (tmp_path / "b" / TENSORS).stat().st_size > 50e6
    assert bundle.predict(squares(2)).score == pytest.approx(make(tmp_path / "c").predict(squares(2)).score, abs=1e-6)


@pytest.mark.parametrize("name", [TENSORS, CARD, FACTS])
def test_an_altered_a_missing_a_huge_file_and_a_pipe_are_refused_by_name(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    altered = content.replace(b'"threshold": ', b'"threshold": 1') if name == FACTS else content[:-1] + b"x"
    (folder / name).write_bytes(altered)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        load_bundle(folder)
    os.truncate(folder / name, 10**10)  # takes no space on the disk
    with pytest.raises(BundleError, match=rf"{name} \(10,000,000,000 bytes, more than"):
        load_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match="chestct export" if name == FACTS else f"lacks .*{name}"):
        load_bundle(folder)
    os.mkfifo(folder / name)
    with pytest.raises(BundleError, match=rf"{name} \(not a regular file\)"):
        load_bundle(folder)


@pytest.mark.parametrize(("schema", "way_out"), [(99, "Update chestct"), (1, "Export it again")])
def test_another_schema_is_refused_with_the_way_out(folder: Path, schema: int, way_out: str) -> None:
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps(facts | {"schema": schema}))
    with pytest.raises(BundleError, match=f"schema {schema};.*{way_out}"):
        load_bundle(folder)


NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("text", ["", "[1]", '{"schema": "x", "digest": "0"}', "\xff", NESTED])
def test_damaged_facts_are_refused(folder: Path, text: str) -> None:
    (folder / FACTS).write_text(text, "latin-1")
    with pytest.raises(BundleError):
        load_bundle(folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes bundle.json as somebody would who knows how its digest is made."""
    facts = json.loads((folder / FACTS).read_text("utf-8"))
    del facts["digest"]
    change(facts)
    (folder / FACTS).write_text(json.dumps(facts | {"digest": json_digest(facts)}), "utf-8")


FOREIGN = {"_target_": "mine.Narrow"}
FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "classes: Field required": lambda facts: facts.pop("classes"),
    "files: .* are not": lambda facts: facts["files"].pop(CARD),
    r"files: .*run\.sh": lambda facts: facts["files"].update({"run.sh": "0" * 64}),
    r"preprocess\.size: .* integer": lambda facts: facts["preprocess"].update(size="32"),
    r"preprocess\.size: .* 1024": lambda facts: facts["preprocess"].update(size=100_000),
    r"preprocess\.fit: .*'pad'": lambda facts: facts["preprocess"].update(fit="crop"),
    r"preprocess\.resize: ": lambda facts: facts["preprocess"].update(resize=1),
    r"model\.head: mine\.Narrow is of code outside": lambda facts: facts["model"].update(head=FOREIGN),
    "size mismatch|Missing key": lambda facts: facts["model"].update(hidden=[50_000, 50_000]),
    "classes=.* are not those of task=binary": lambda facts: facts.update(classes=["normal", "benign"]),
    "cannot be used": lambda facts: facts["operating_point"].update(quantiles=[0.1, 0.2, 0.3]),
    r"operating_point\.threshold: ": lambda facts: facts["operating_point"].update(threshold=None),
    r"statistics\.mean\.1: ": lambda facts: facts.update(statistics={"mean": [0.1, "<b>"]}),
    r"data\.slices\.train: .* 10000000": lambda facts: facts["data"].update(slices={"train": 10**12}),
    r"data\.splitting\.split: ": lambda facts: facts["data"].update(splitting={"root": "/"}),
    r"auroc\.value: ": lambda facts: facts.update(
        metrics={"test": {"auroc": {"value": "high", "low": None, "high": None, "slices": 1}}}
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_facts_that_break_the_schema_are_refused_by_the_key(folder: Path, message: str) -> None:
    rewrite(folder, FAULTS[message])
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


def test_a_head_that_would_make_its_target_by_an_expression_runs_nothing(folder: Path, tmp_path: Path) -> None:
    copy = f"{{_target_: shutil.copyfile, src: {folder / CARD}, dst: {tmp_path / 'sprung'}}}"
    head = {"_target_": "torch.nn.Identity", "y": f"${{oc.create:'{copy}'}}"}
    rewrite(folder, lambda facts: facts["model"].update(head=head))
    with pytest.raises(ChestCTError, match="expression"):
        load_bundle(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_bundle_that_nothing_could_load_takes_the_place_of_none(folder: Path) -> None:
    before = load_bundle(folder)
    facts = before.facts | {"model": before.facts["model"] | {"head": FOREIGN}}
    with pytest.raises(ValueError, match=r"mine\.Narrow is of code outside"):
        save_bundle(folder, replace(before, facts=facts))
    assert load_bundle(folder).id == before.id


def test_a_folder_that_cannot_even_be_looked_into_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot be read: .*bundle\.json \(File name too long\)"):  # as one forbidden
        load_bundle(tmp_path / ("a" * 300))


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["novelty.mean", "saliency.baseline", "head.2.weight"])
def test_tensors_of_other_shapes_and_tensors_that_are_not_there_are_refused(folder, name, there) -> None:
    tensors = load_file(folder / TENSORS)
    tensor = tensors.pop(name)
    tensors |= {name: tensor.repeat_interleave(3, -1)} if there else {}
    save_file(tensors, folder / TENSORS)
    rewrite(folder, lambda facts: facts["files"].update({TENSORS: file_digest(folder / TENSORS)}))
    with pytest.raises(BundleError, match="cannot be used"):
        load_bundle(folder)


def test_a_pickle_is_never_run(folder: Path) -> None:
    (folder / TENSORS).write_bytes(pickle.dumps(Trap()))
    rewrite(folder, lambda facts: facts["files"].update({TENSORS: file_digest(folder / TENSORS)}))
    with pytest.raises(BundleError, match="cannot be used"):
        load_bundle(folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["new.mkdir", "new.replace"])
def test_a_killed_export_leaves_the_old_bundle_and_its_rest_goes_with_the_next(folder: Path, stage: str) -> None:
    before = load_bundle(folder).id
    method = stage.split(".")[1]
    code = (
        "import os, signal; from pathlib import Path; from tests.models.test_bundle import make; "
        f"real = Path.{method}; Path.{method} = lambda self, *rest, **named: os.kill(os.getpid(), signal.SIGKILL) "
        "if self.name.endswith('-new') else real(self, *rest, **named); "
        f"make(Path({str(folder)!r}), classes=4)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert load_bundle(folder if stage == "new.mkdir" else folder.parent / f".{folder.name}.bundle-old").id == before
    (folder.parent / "thesis.tex").touch()
    make(folder, classes=4)
    assert load_bundle(folder).id != before
    assert sorted(path.name for path in folder.parent.glob("[!.]*")) == [folder.name, "thesis.tex"]
    assert not list(folder.parent.glob(".*bundle-*"))


def test_a_place_that_takes_no_bundle_is_found_before_an_evaluation_and_a_full_one_as_it_was(folder, monkeypatch):
    tmp_path, before = folder.parent, load_bundle(folder).id
    monkeypatch.setattr(experiment, "from_checkpoint", lambda cfg: cfg)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"file/below/bundle \(Not a directory\).*bundle=FOLDER"):
        experiment.export.__wrapped__(compose("ckpt=x", f"bundle={tmp_path}/file/below/bundle"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path == folder)
        with pytest.raises(BundleError, match=rf"mount point.*bundle={folder}/bundle$"):
            experiment.export.__wrapped__(compose("ckpt=x", f"bundle={folder}"), tmp_path)
    with pytest.raises(OSError, match="too large"), limited(resource.RLIMIT_FSIZE, 2000):
        make(folder, classes=4)
    assert load_bundle(folder).id == before
    assert {path.name for path in tmp_path.iterdir()} == {"file", "bundle", ".bundle.lock"}


def test_exports_to_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: make(tmp_path / "bundle").id, range(4)))
    assert load_bundle(tmp_path / "bundle").id in ids
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", ".bundle.lock"}


def test_an_export_through_a_link_goes_into_the_folder_that_it_leads_to(folder: Path) -> None:
    link = folder.with_name("current")
    link.symlink_to(folder.name)
    for classes in (2, 4):
        made = make(link, classes=classes)
        assert link.is_symlink()
        assert load_bundle(folder).id == made.id
    assert {path.name for path in folder.parent.iterdir()} == {"current", "bundle", ".bundle.lock"}


def test_what_a_file_browser_leaves_makes_a_bundle_no_other_folder(folder: Path) -> None:
    for name in (".DS_Store", "._bundle.json", "Thumbs.db"):
        (folder / name).touch()
    assert make(folder, classes=4).id == load_bundle(folder).id


@pytest.mark.parametrize(
    "names", [(FACTS, ".git/HEAD"), ("thesis.tex",), (FACTS, "thesis.tex"), (TENSORS,), (FACTS, "folder/a")]
)
def test_a_folder_with_somebody_s_files_is_never_replaced(tmp_path, names, monkeypatch) -> None:
    work = tmp_path / "my work"
    for name in names:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()
    with pytest.raises(BundleError, match=r"work holds .* and is no bundle"):
        make(work)
    # Export finds that out before it evaluates.
    monkeypatch.setattr(experiment, "from_checkpoint", lambda cfg: cfg)
    with pytest.raises(BundleError, match=r"work holds .* and is no bundle") as refused:
        experiment.export.__wrapped__(compose("ckpt=x", f"bundle={work}"), tmp_path)
    assert all((work / name).is_file() for name in names)
    assert compose(shlex.split(str(refused.value))[-1]).bundle == f"{work}/bundle"  # as it is pasted


def test_a_checkout_that_changes_line_ends_leaves_the_packaged_bundle_whole(tmp_path: Path) -> None:
    made = tmp_path / "repository"
    shutil.copytree(PACKAGED_BUNDLE, made / "chestct/models/bundle")
    shutil.copy(ROOT / ".gitattributes", made)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "core.autocrlf=false", "-C", str(made)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run(["git", "clone", "-q", "-c", "core.autocrlf=true", str(made), str(tmp_path / "clone")], check=True)
    assert b"\r\n" in (tmp_path / "clone/.gitattributes").read_bytes()
    assert load_bundle(tmp_path / "clone/chestct/models/bundle").id == load_bundle("packaged").id
