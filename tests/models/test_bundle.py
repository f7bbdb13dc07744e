import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chestct import experiment
from chestct.config.compose import compose
from chestct.config.schema import EvaluationConfig, ModelConfig
from chestct.errors import BundleError, ChestCTError
from chestct.files import file_digest, json_digest
from chestct.models.bundle import CARD, FACTS, PACKAGED_BUNDLE, TENSORS, Bundle, load_bundle, save_bundle
from chestct.models.bundle_folder import check_target, replacing
from chestct.models.novelty import channel_means, fit_novelty
from chestct.models.operating_point import OperatingPoint
from chestct.models.predictions import to_scores
from chestct.models.saliency import normal_cam
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights

ROOT = Path(__file__).parents[2]
SIZE = 32


def squares(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE), np.uint8)


def make(folder: Path, *, trained: bool = False, classes: int = 2, pool: str = "gap") -> Bundle:
    torch.manual_seed(0)
    loaded = load_weights("oxford")
    net = VGG16(ModelConfig(pool=pool), 1 if classes == 2 else classes, SIZE, loaded).eval()
    with torch.no_grad():
        maps = net.maps(torch.from_numpy(squares(24)).unsqueeze(1).float() / 255)
        logits = net.head(maps).numpy()
    targets = np.arange(24) % classes
    point = OperatingPoint.fit(logits, targets, EvaluationConfig(threshold="youden"))
    pooled = channel_means(maps, 512)
    facts = {
        "task": "binary" if classes == 2 else "subtype",
        "classes": ["normal", "cancer"] if classes == 2 else ["normal", "adenocarcinoma", "large_cell", "squamous"],
        "model": {"pool": pool, "hidden": [], "dropout": 0.0, "trained_convolutions": trained},
        "preprocess": {"size": SIZE, "fit": "pad"},
        "window": {"center": -600.0, "width": 1500.0, "from_file": False},
        "data": {"data_hash": "0" * 64, "seen": []},
    }
    with torch.no_grad():
        baseline = normal_cam(net, net.conv5(torch.from_numpy(squares(4)).unsqueeze(1).float() / 255))
    return save_bundle(folder, net, point, fit_novelty(pooled, pooled), baseline, facts, "# Card\n")


def visible(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


@pytest.fixture
def folder(small_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def test_a_head_on_packaged_convolutions_makes_a_small_bundle(small_bundle: Path) -> None:
    assert sum(path.stat().st_size for path in small_bundle.iterdir()) < 150_000
    assert {path.name for path in small_bundle.iterdir()} == {TENSORS, FACTS, CARD}


@pytest.mark.parametrize(("classes", "pool"), [(2, "gap"), (4, "gap"), (2, "flatten")])
def test_a_loaded_bundle_answers_as_the_network_did(tmp_path: Path, classes: int, pool: str) -> None:
    make(tmp_path / "b", classes=classes, pool=pool)
    loaded = load_bundle(tmp_path / "b")
    torch.manual_seed(0)
    net = VGG16(ModelConfig(pool=pool), 1 if classes == 2 else classes, SIZE, load_weights("oxford")).eval()
    net.head.load_state_dict(loaded.net.head.state_dict())
    images = squares(5, seed=1)
    with torch.no_grad():
        logits = net(torch.from_numpy(images).unsqueeze(1).float() / 255).numpy()
    found = loaded.predict(images, explain=True)
    assert np.abs(found.logits - logits).max() < 1e-5
    scaled = loaded.point.calibration.scale * logits + loaded.point.calibration.shift
    expected = to_scores(scaled)
    assert np.abs(found.score - (expected[:, 0] if classes == 2 else 1 - expected[:, 0])).max() < 1e-6
    assert found.heat is not None
    assert found.heat.shape == (5, 2, 2)
    assert found.probabilities.sum(1) == pytest.approx(np.ones(5))


def test_convolutions_that_were_trained_travel_with_the_bundle(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", trained=True)
    assert (tmp_path / "b" / TENSORS).stat().st_size > 50e6
    assert bundle.predict(squares(2)).score == pytest.approx(make(tmp_path / "c").predict(squares(2)).score, abs=1e-6)


def test_single_slices_and_batches_get_the_same_answers(small_bundle: Path) -> None:
    bundle, images = load_bundle(small_bundle), squares(6, seed=2)
    together = bundle.predict(images).score
    assert together == pytest.approx([bundle.predict(image[None]).score[0] for image in images], abs=1e-5)


def test_a_bundle_is_replaced_whole(folder: Path) -> None:
    before = load_bundle(folder).id
    make(folder, classes=4)
    assert load_bundle(folder).id != before
    assert visible(folder.parent) == [folder.name]


def test_loading_imports_nothing_that_trains_or_serves(small_bundle: Path) -> None:
    code = (
        f"from chestct.models.bundle import load_bundle; load_bundle({str(small_bundle)!r}); import sys; "
        "print([m for m in ('lightning', 'hydra', 'mlflow', 'dvc', 'gradio', 'sklearn', 'pandas', "
        "'scipy', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", [TENSORS, CARD])
def test_an_altered_file_is_refused(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        load_bundle(folder)


def test_an_altered_threshold_is_refused(folder: Path) -> None:
    facts = json.loads((folder / FACTS).read_text())
    facts["operating_point"]["threshold"] = 0.01
    (folder / FACTS).write_text(json.dumps(facts))
    with pytest.raises(BundleError, match="was altered"):
        load_bundle(folder)


@pytest.mark.parametrize("name", [TENSORS, CARD])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"lacks .*{name}"):
        load_bundle(folder)


def test_a_folder_without_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="chestct export"):
        load_bundle(tmp_path / "nothing")


@pytest.mark.parametrize(("schema", "way_out"), [(99, "Update chestct"), (1, "Export it again")])
def test_another_schema_is_refused_with_the_way_out(folder: Path, schema: int, way_out: str) -> None:
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps(facts | {"schema": schema}))
    with pytest.raises(BundleError, match=f"schema {schema};.*{way_out}"):
        load_bundle(folder)


NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("text", ["", "{", "[]", "[1]", '{"schema": 1}', '{"schema": "x", "digest": "0"}', "\xff",
                                  NESTED, '{"schema": 2, "digest": "", "score": NaN}'])  # fmt: skip
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


FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "classes is missing": lambda facts: facts.pop("classes"),
    "window is missing": lambda facts: facts.pop("window"),
    "files is missing": lambda facts: facts.pop("files"),
    r"files\.MODEL_CARD\.md is missing": lambda facts: facts["files"].pop(CARD),
    r"files\.run\.sh is unknown": lambda facts: facts["files"].update({"run.sh": "0" * 64}),
    "preprocess.size is '32', not a whole number": lambda facts: facts["preprocess"].update(size="32"),
    "preprocess.size is True, not a whole number": lambda facts: facts["preprocess"].update(size=True),
    "preprocess.size is 100000, out of range: 32 to 1024": lambda facts: facts["preprocess"].update(size=100_000),
    "preprocess.fit is 'crop', not one of pad": lambda facts: facts["preprocess"].update(fit="crop"),
    "preprocess.resize is unknown": lambda facts: facts["preprocess"].update(resize=1),
    r"window\.width is 0\.0, out of range": lambda facts: facts["window"].update(width=0.0),
    "model is 'vgg16', not an object": lambda facts: facts.update(model="vgg16"),
    "head's layers are .* wide": lambda facts: facts["model"].update(hidden=[50_000, 50_000]),
    r"model\.hidden\[0\] is -1": lambda facts: facts["model"].update(hidden=[-1]),
    "classes=.* are not those of task=binary": lambda facts: facts.update(classes=["normal", "benign"]),
    "quantiles has 3 values for 2 classes": lambda facts: facts["operating_point"].update(quantiles=[0.1, 0.2, 0.3]),
    r"operating_point\.threshold is None": lambda facts: facts["operating_point"].update(threshold=None),
    r"data\.seen is 5, not a list": lambda facts: facts["data"].update(seen=5),
    r"statistics\.mean\[1\] is '<b>'": lambda facts: facts.update(statistics={"mean": [0.1, "<b>"]}),
    r"auroc\.value is 'high'": lambda facts: facts.update(
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


def test_what_else_is_worth_knowing_may_stand_in_the_facts(folder: Path) -> None:
    rewrite(folder, lambda facts: facts.update(note={"trained by": ["somebody"]}))
    assert load_bundle(folder).facts["note"] == {"trained by": ["somebody"]}


@pytest.mark.parametrize("name", [FACTS, TENSORS, CARD])
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BundleError, match=rf"{name} \(not a regular file\)"):
        load_bundle(folder)


@pytest.mark.parametrize("name", [FACTS, TENSORS, CARD])
def test_a_file_larger_than_any_bundle_s_is_not_read(folder: Path, name: str) -> None:
    os.truncate(folder / name, 10**10)  # takes no space on the disk
    with pytest.raises(BundleError, match=rf"{name} \(10,000,000,000 bytes, more than"):
        load_bundle(folder)


def test_tensors_of_other_shapes_are_refused(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors["novelty.mean"] = tensors["novelty.mean"][:-1].clone()
    save_file(tensors, folder / TENSORS)
    rewrite(folder, lambda facts: facts["files"].update({TENSORS: file_digest(folder / TENSORS)}))
    with pytest.raises(BundleError, match=r"novelty\.mean is shaped \[511\]"):
        load_bundle(folder)


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from chestct.models import bundle_folder; "
        "from tests.models.test_bundle import make; "
        "bundle_folder._swap = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
        f"make(Path({str(tmp_path / 'one')!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert [path.name[:5] for path in tmp_path.iterdir() if path.suffix != ".lock"] == [".one-"]
    foreign = [tmp_path / ".one-ofaholiday", tmp_path / ".one-holidays"]
    for other in foreign:
        other.mkdir()
        (other / "photo.jpg").touch()
    make(tmp_path / "one")
    assert set(tmp_path.iterdir()) == {tmp_path / "one", tmp_path / ".one.lock", *foreign}


def test_exports_to_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    def export(name: str) -> None:
        with replacing(tmp_path / "one") as new:
            (new / FACTS).write_text(name, "utf-8")
            running.append(new)
            time.sleep(0.05)
            seen.append([path.exists() for path in running])
            running.remove(new)

    running: list[Path] = []
    seen: list[list[bool]] = []
    threads = [threading.Thread(target=export, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[True]] * 4
    assert {path.name for path in tmp_path.iterdir()} == {"one", ".one.lock"}


def test_a_bundle_that_a_killed_export_had_moved_away_comes_back(folder: Path) -> None:
    folder.rename(folder.with_name(f".{folder.name}-abcdefgh.old"))
    shutil.copytree(PACKAGED_BUNDLE, folder.with_name(f".{folder.name}-abcdefgh"))
    with pytest.raises(BundleError), replacing(folder):
        load_bundle(folder / "nothing")
    assert load_bundle(folder).id
    assert visible(folder.parent) == [folder.name]


@pytest.mark.parametrize("names", [("thesis.tex",), (FACTS, "thesis.tex"), (TENSORS,), (FACTS, "folder/a")])
def test_a_folder_with_somebody_s_files_is_never_replaced(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).touch()
    with pytest.raises(BundleError, match=r"work holds .* and is no bundle"):
        make(tmp_path / "work")
    assert all((tmp_path / "work" / name).is_file() for name in names)


def test_an_export_onto_somebody_s_folder_is_refused_before_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.tex").touch()
    monkeypatch.setattr(experiment, "from_checkpoint", lambda cfg: cfg)
    monkeypatch.setattr(experiment, "_evaluate_with_refits", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(BundleError, match=r"thesis\.tex"):
        experiment.write_bundle(compose("ckpt=x", f"bundle={tmp_path}"), tmp_path)


def test_a_file_is_not_replaced_and_an_empty_folder_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="not a folder"):
        check_target(tmp_path / "file")
    assert make(tmp_path / "empty").id


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


def test_a_pickle_inside_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "sprung",)

    (folder / "extra.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BundleError, match=r"extra\.pkl"):
        load_bundle(folder)
    (folder / "extra.pkl").replace(folder / TENSORS)
    with pytest.raises(BundleError):
        load_bundle(folder)
    assert not (tmp_path / "sprung").exists()
