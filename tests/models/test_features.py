from dataclasses import replace

import numpy as np
import pytest
import torch

from chestct.config.schema import AugmentConfig
from chestct.models import backends
from chestct.models.features import attach, settled, space_folder
from tests.conftest import network, opened
from tests.models.test_backends import needs


def test_every_setting_that_changes_features_has_its_own_folder(small):
    cfg = small()

    def folder(view, **parts):
        changed = {name: replace(getattr(cfg, name), **own) for name, own in parts.items()}
        return space_folder(replace(cfg, **changed), "w", view)

    changed = ({"model": {"pool": "flatten"}}, {"data": {"fit": "body"}}, {"data": {"size": 96}})
    of_views = ({"data": {"view_seed": 1}}, {"data": {"augment": AugmentConfig(rotate=3)}})
    folders = {folder(view) for view in range(3)} | {space_folder(cfg, "other weights", 0)}
    folders |= {folder(0, **parts) for parts in changed} | {folder(1, **parts) for parts in of_views}
    assert len(folders) == 9
    assert folder(0, data={"view_seed": 1}) == folder(0)  # the plain view has no seed
    assert space_folder(replace(cfg, seed=1), "w", 1) == folder(1)  # seeds of training share views
    assert folder(1, optim={"lr": 1}, model={"dropout": 0.5}) == folder(1)


@pytest.mark.slow
def test_features_of_another_seed_are_those_that_are_there(small):
    data, held = opened(small()), {}
    for seed in (0, 1):
        attach(data, network(), small(f"seed={seed}"), ("train", "valid"), views=1)
        held[seed] = data.features["train"][0]
    assert held[0] is held[1]
    attach(data, network(), small("data.fit=stretch"), ("train",), views=1)
    assert data.features["train"][0] is not held[0]


ROUNDED = [pytest.param(name, marks=pytest.mark.slow) for name in ("openvino_bf16", "openvino_int8")]


@pytest.mark.parametrize("backend", ["openvino", *ROUNDED])
def test_another_backend_gives_the_features_of_torch_from_a_cache_of_its_own(small, monkeypatch, backend):
    needs(backend)
    cfg = small(f"features.backend={backend}", "data.views=0")
    exact = replace(cfg, features=replace(cfg.features, backend="torch"))
    net, data, plain = network(), opened(cfg), opened(exact)
    for module, settings in ((data, cfg), (plain, exact)):
        attach(module, net, settings, ["train", "valid"], 1)
    assert data.spaces["train"][0][0] != plain.spaces["train"][0][0]
    for split in ("train", "valid"):
        got, expected = data.features[split][0][:], plain.features[split][0][:]
        if backend == "openvino":
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        else:
            assert not torch.allclose(got, expected, rtol=1e-3)
            assert np.corrcoef(got.flatten(), expected.flatten())[0, 1] > (0.98 if "int8" in backend else 0.9999)
    # Warm, nothing is converted.
    monkeypatch.setattr(backends, "convert", lambda *_: pytest.fail("converted again"))
    again = opened(cfg)
    attach(again, net, cfg, ["train"], 1)
    assert torch.equal(again.features["train"][0][:], data.features["train"][0][:])


def test_auto_is_openvino_on_a_processor_that_has_it(small, monkeypatch):
    cfg, installed = small("features.backend=auto"), ["openvino"]
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert settled(cfg, torch.device("cpu")).features.backend == "openvino"
    assert settled(cfg, torch.device("cuda")).features.backend == "torch"
    installed.clear()
    assert settled(cfg, torch.device("cpu")).features.backend == "torch"
    assert settled(small(), torch.device("cpu")) == small()
