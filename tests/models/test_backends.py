"""Other programs that run a bundle: the same answers, chosen by what is there, refused with the way out."""

import dataclasses
import functools
import importlib.util
import logging
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from chestct.config.schema_serving import FILES
from chestct.errors import BundleError, ConfigError
from chestct.files import digest
from chestct.models import backends
from chestct.models.backends import PACKAGES, choose, computes, convert, has_int8, load_graph
from chestct.models.bundle import Bundle, load_bundle, save_bundle
from chestct.serving.predictor import Predictor
from tests.conftest import network
from tests.models.test_bundle import rewrite, squares
from tests.serving.test_predictor import png

CONTEXT = {"pool": "topk", "block": "3+4", "context": True, "smooth": 0.7, "standardise": True, "hidden": [8]}
HEADS = {"means": {"hidden": [8]}, "places in context": CONTEXT}
NUMBERS = {"slices": 9, "calibration": 0, "logits": 0.0, "decisions": 0.0, "heat": 1.0, "version": "x 1"}
NUMBERS |= {"auroc": {"value": 0.0, "low": None, "high": None, "slices": 9}}


def needs(name: str) -> None:
    """Skips where a package is missing; none is imported, for OpenVINO would report that to its makers."""
    packages = {"openvino_int8": ("openvino", "nncf"), "onnx": ("onnxruntime", "onnxscript")}
    packages = packages.get(name, (PACKAGES[name],))
    if missing := [package for package in packages if not importlib.util.find_spec(package)]:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'chestct[export]'")
    if not computes(name):
        pytest.skip("needs a processor with bfloat16 (AMX or AVX512_BF16)")


def with_backend(bundle: Path, folder: Path, name: str, graph: bool = False) -> Bundle:
    """A copy of a bundle in `folder` that says it was verified for a backend; its files are no graphs unless asked."""
    plain = load_bundle(bundle)
    files = convert(plain.net, name, np.empty(0)) if graph else [b"no graph"] * len(FILES[name])
    facts = plain.facts | {"backends": {name: NUMBERS}}
    parts = dict(zip(FILES[name], files, strict=True))
    return save_bundle(folder, dataclasses.replace(plain, facts=facts, files=parts))


@functools.cache
def converted(name: str, head: str) -> list[bytes]:
    """The files of a backend for `network` with one of HEADS."""
    return convert(network(**HEADS[head]), name, np.empty((0, 64, 64), np.uint8))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("openvino", "means"),
        ("openvino", "places in context"),
        ("onnx", "places in context"),
        pytest.param("onnx", "means", marks=pytest.mark.slow),
    ],
)
def test_a_graph_gives_the_logits_and_the_map_of_the_network(name: str, head: str) -> None:
    needs(name)
    net, x = network(**HEADS[head]), torch.rand(3, 1, 64, 64)
    logits, conv5 = load_graph(name, converted(name, head))(x)
    with torch.no_grad():
        expected = net.answer(x)
    torch.testing.assert_close(logits, expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(conv5, expected[1], rtol=1e-3, atol=1e-2)


def test_bfloat16_gives_the_map_of_the_network_to_its_seven_bits() -> None:
    needs("openvino_bf16")
    net, x = network(**CONTEXT), torch.rand(3, 1, 64, 64)
    conv5 = load_graph("openvino_bf16", converted("openvino", "places in context"))(x)[1]
    with torch.no_grad():
        expected = net.conv5(x)
    assert not torch.allclose(conv5, expected, rtol=1e-4)
    assert (conv5 - expected).abs().max() < 0.03 * expected.max()


@pytest.mark.slow
def test_int8_rounds_the_convolutions_and_leaves_the_head_alone() -> None:
    needs("openvino_int8")
    net, x = network(**CONTEXT), torch.from_numpy(squares(40)).float().div(255).repeat(1, 2, 2)[:, None]
    files = convert(net, "openvino_int8", (x[:32, 0] * 255).byte().numpy())
    assert len(files[1]) < 0.3 * len(convert(net, "openvino", np.empty(0))[1])
    logits, conv5 = load_graph("openvino_int8", files)(x[32:])
    with torch.no_grad():
        expected = net.answer(x[32:])
        assert not torch.allclose(conv5, expected[1], rtol=1e-4)
        assert np.corrcoef(conv5.flatten(), expected[1].flatten())[0, 1] > 0.99
        torch.testing.assert_close(logits, net.head(net.pool(conv5)), rtol=1e-3, atol=1e-4)


def test_openvino_answers_explains_and_refuses_as_torch_does(small_bundle, tmp_path, caplog) -> None:
    needs("openvino")
    bundle = with_backend(small_bundle, tmp_path / "b", "openvino", graph=True)
    with caplog.at_level(logging.INFO, "chestct"):
        fast = Predictor(tmp_path / "b", accelerator="cpu").bundle
    assert [r.message for r in caplog.records if r.name == "chestct"] == ["answers by openvino on cpu"]
    assert sys.modules["openvino_telemetry"] is None  # nothing is sent to anyone
    assert fast.id == f"{bundle.id}-openvino"
    a, b = (one.predict(squares(5, seed=1), explain=True) for one in (bundle, fast))
    np.testing.assert_allclose(b.logits, a.logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(b.novelty, a.novelty, rtol=1e-3)
    assert a.heat is not None
    assert b.heat is not None
    np.testing.assert_allclose(b.heat, a.heat, atol=0.01)
    assert list(a.decision) == list(b.decision)
    slow = Predictor(tmp_path / "b", backend="torch")
    assert slow.bundle.id == bundle.id
    assert slow.predict(png(0)).heat is not None


def test_slices_at_once_get_the_answers_that_each_gets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("openvino")
    monkeypatch.setattr(backends, "threads", lambda: 2)
    graph = load_graph("openvino", converted("openvino", "means"))
    x = torch.rand(12, 1, 64, 64)
    alone = [graph(one[None]) for one in x]
    together = graph(x)
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda one: graph(one[None]), x))
    for i, answers in enumerate(zip(*alone, strict=True)):
        torch.testing.assert_close(together[i], torch.cat(answers), rtol=0, atol=0)
        torch.testing.assert_close(torch.cat([answer[i] for answer in at_once]), torch.cat(answers), rtol=0, atol=0)


@pytest.mark.slow
def test_a_service_leaves_torch_one_thread_where_openvino_computes(small_bundle: Path, tmp_path: Path) -> None:
    needs("openvino")
    with_backend(small_bundle, tmp_path / "b", "openvino", graph=True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        backends.threads.cache_clear()
        predictor = Predictor(tmp_path / "b", accelerator="cpu", whole_process=True)
        assert (torch.get_num_threads(), predictor.bundle.graph.at_once) == (1, 2)
        predictor.reload(small_bundle)  # has no other backend
        assert torch.get_num_threads() == 2
        predictor.reload(tmp_path / "b")
        assert (torch.get_num_threads(), predictor.bundle.graph.at_once) == (1, 2)
        Predictor(tmp_path / "b", accelerator="cpu")
        assert torch.get_num_threads() == 1  # nobody else's is changed
    finally:
        torch.set_num_threads(before)
        backends.threads.cache_clear()


def test_auto_takes_the_quickest_that_is_verified_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"openvino", "onnxruntime"}
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert choose("auto", FILES, "cpu")[0] == "openvino_int8"
    assert choose("auto", ["onnx", "openvino"], "cpu")[0] == "openvino"
    for known, name in ((True, "openvino_bf16"), (False, "openvino")):
        monkeypatch.setattr(backends, "computes", lambda name, known=known: known or name != "openvino_bf16")
        assert choose("auto", ["openvino", "openvino_bf16"], "cpu")[0] == name
    assert choose("auto", [], "cpu")[0] == "torch"
    installed.remove("openvino")
    assert choose("auto", FILES, "cpu")[0] == "onnx"
    monkeypatch.setattr(backends, "pick_device", lambda accelerator: torch.device("cuda"))
    assert choose("auto", FILES) == ("torch", torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "package"), [("openvino", "openvino"), ("openvino_int8", "openvino"), ("onnx", "onnxruntime")]
)
def test_a_backend_that_cannot_be_had_is_an_error_with_the_way_out(small_bundle, tmp_path, monkeypatch, name, package):
    with pytest.raises(ConfigError, match=rf"verified for torch alone.*format={name}"):
        load_bundle(small_bundle, name)
    with_backend(small_bundle, tmp_path / "b", name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=rf"{package}, which is not installed.*chestct\[{name.removesuffix('_int8')}\]"
    ):
        load_bundle(tmp_path / "b", name)
    assert load_bundle(tmp_path / "b", "auto").backend == "torch"


def test_bfloat16_is_refused_where_the_processor_would_compute_in_fp32(small_bundle, tmp_path, monkeypatch) -> None:
    needs("openvino")
    with_backend(small_bundle, tmp_path / "b", "openvino_bf16")
    monkeypatch.setattr(backends, "computes", lambda name: name != "openvino_bf16")
    with pytest.raises(ConfigError, match=r"no instructions for bfloat16.*Take openvino or torch"):
        load_bundle(tmp_path / "b", "openvino_bf16")
    assert load_bundle(tmp_path / "b", "auto").backend == "torch"


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_files_of_a_backend_that_are_altered_or_no_graph_are_refused(small_bundle, tmp_path, name) -> None:
    needs(name)
    with_backend(small_bundle, tmp_path / "b", name)
    with pytest.raises(BundleError, match="cannot be used"):
        load_bundle(tmp_path / "b", name)
    (tmp_path / "b" / FILES[name][0]).write_bytes(b"another")
    with pytest.raises(BundleError, match=f"{FILES[name][0]} was altered"):
        load_bundle(tmp_path / "b", name)
    assert load_bundle(tmp_path / "b").backend == "torch"


def test_a_bundle_lists_the_files_of_its_backends_and_no_others(small_bundle: Path, tmp_path: Path) -> None:
    with_backend(small_bundle, tmp_path / "b", "openvino")
    copy = Path(shutil.copytree(tmp_path / "b", tmp_path / "c"))
    rewrite(copy, lambda facts: facts["files"].pop("openvino.bin"))
    with pytest.raises(BundleError, match="files: "):
        load_bundle(copy)
    copy = Path(shutil.copytree(tmp_path / "b", tmp_path / "d"))
    rewrite(copy, lambda facts: facts["files"].update({"network.onnx": digest(b"")}))
    with pytest.raises(BundleError, match="files: "):
        load_bundle(copy)


def test_a_processor_without_int8_is_told_of(tmp_path: Path) -> None:
    for flags, known in (("sse2 avx2", False), ("avx2 avx_vnni", True), ("fp asimd asimddp", True)):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        assert has_int8(tmp_path / "cpuinfo") == known
    assert has_int8(tmp_path / "none")  # unknown is no reason to warn


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_a_bundle_computes_on_an_accelerator_with_the_answers_of_the_processor(small_bundle: Path) -> None:
    fast = load_bundle(small_bundle, "auto", "auto")
    assert fast.net.mean.device.type != "cpu"
    a, b = (one.predict(squares(4), explain=True) for one in (load_bundle(small_bundle), fast))
    assert np.abs(a.logits - b.logits).max() < 1e-2
    assert list(a.decision) == list(b.decision)


def test_an_accelerator_that_is_not_there_is_an_error(small_bundle: Path) -> None:
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ConfigError, match=f"accelerator={missing}"):
        load_bundle(small_bundle, "torch", missing)
