"""Batches that a GPU finishes are those of the processor; what is said where its memory is too small."""

import dataclasses
import multiprocessing

import numpy as np
import pytest
import torch

from chestct.data import datamodule
from chestct.training import train
from tests.conftest import opened

FINE_TUNED = ("model.freeze=false", "features.cache=false", "data.size=32", "data.augment.noise=0")


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_a_device_makes_of_a_batch_is_what_the_processor_makes(small, resident, frozen):
    data = opened(small(*FINE_TUNED, f"model.freeze={frozen}", "data.augment.blur=0.02", "data.balance=true"))
    plain, deferred = data.dataset("train", train=True), data.dataset("train", train=True)
    deferred.deferred, deferred.resident = True, resident
    data.resident = torch.from_numpy(np.array(data.store.images)) if resident else None
    for key in ((0, [3, 1, 7, 2, 5]), (1, [4])):
        expected, batch = plain[key], deferred[key]
        assert resident == ("x" not in batch)
        finished = data.on_after_batch_transfer(batch, 0)
        assert finished.keys() == expected.keys()
        torch.testing.assert_close(finished.pop("x"), expected.pop("x"), rtol=0, atol=2e-4)
        assert all(torch.equal(finished[name], expected[name]) for name in finished)


def test_workers_stay_from_one_epoch_to_the_next(small):
    loader, workers = opened(small("data.workers=1", "data.size=32")).train_dataloader(), []
    for _ in range(2):
        assert [*loader]
        workers.append({process.pid for process in multiprocessing.active_children()})
    assert workers[0] == workers[1] != set()


@pytest.mark.slow
def test_a_training_whose_device_makes_the_views_ends_like_one_whose_processor_does(small, tmp_path, monkeypatch):
    cfg = small(*FINE_TUNED, "trainer.max_epochs=2", "optim.backbone_lr_ratio=0.01")
    expected = train(cfg, tmp_path / "processor").metrics
    made = []
    monkeypatch.setattr(datamodule, "defers", lambda device: True)
    finish = datamodule.finish
    monkeypatch.setattr(datamodule, "finish", lambda *given: made.append(given[0]) or finish(*given))
    found = train(cfg, tmp_path / "device").metrics
    assert sum("changes" in batch for batch in made) > 2
    assert found["valid/loss"] == pytest.approx(expected["valid/loss"], rel=0.02)


def test_slices_that_a_gpu_has_no_room_for_stay_where_they_are_and_that_is_said(small, monkeypatch, capsys):
    data = opened(small())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * data.store.images.nbytes - 1, 10**9))
    assert not data._resides(torch.device("cuda"))
    assert "are more than half of" in capsys.readouterr().err
    assert not data._resides(torch.device("mps"))
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("compiled", [False, True])
def test_an_accelerator_trains_as_the_processor_does(small, tmp_path, compiled, monkeypatch):
    # In TF32, which torch takes for convolutions, the losses end a fifth apart: training magnifies rounding.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cfg = small(*FINE_TUNED, "trainer.max_epochs=2", "trainer.deterministic=false", f"trainer.compile={compiled}")
    found = train(cfg, tmp_path / "accelerator").metrics
    on_cpu = dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, accelerator="cpu", compile=False))
    assert found["valid/loss"] == pytest.approx(train(on_cpu, tmp_path / "cpu").metrics["valid/loss"], rel=0.1)
