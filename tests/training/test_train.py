import json
import multiprocessing
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar

from chestct.config.compose import CONF
from chestct.config.schema import ModelConfig
from chestct.errors import ChestCTError, ConfigError, DataError
from chestct.evaluation.evaluate import evaluate
from chestct.experiment import train_and_report
from chestct.models import backends
from chestct.models.backends import convert
from chestct.models.features import attach, plain_maps
from chestct.models.lightning_module import Classifier
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights
from chestct.reporting.text import caveats
from chestct.training import train
from chestct.training.callbacks import History, callbacks_of
from chestct.training.train import _trainer, environment
from tests.conftest import SMALL
from tests.models.test_backends import needs

ROOT = CONF.parent


def test_history_has_the_rate_that_an_epoch_began_with(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    trainer = SimpleNamespace(optimizers=[optimizer], callback_metrics={}, current_epoch=0, is_global_zero=True)
    history = History(tmp_path / "history.csv")
    history.on_train_epoch_start(trainer, None)
    optimizer.param_groups[0]["lr"] = 0.05
    history.on_train_epoch_end(trainer, None)
    assert pd.read_csv(tmp_path / "history.csv")["lr"].tolist() == [0.1]


def losses(folder):
    return pd.read_csv(folder / "history.csv")[["train/loss", "valid/loss"]]


def test_training_learns_and_leaves_what_it_says(small, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "s3fs", raising=False)
    result = train(small("trainer.max_epochs=12", "optim.lr=0.02"), tmp_path / "run")
    assert result.metrics["test/auroc"] > 0.8
    assert result.best.is_file()
    assert result.last.is_file()
    history = losses(tmp_path / "run")
    assert history["train/loss"].iloc[-1] < 0.8 * history["train/loss"].iloc[0]
    assert pd.read_csv(tmp_path / "run" / "history.csv").notna().all(axis=None)  # of each epoch
    assert set(result.predictions["split"]) == {"valid", "test"}
    for path in (result.best, result.last):  # plain data only
        assert torch.load(path, weights_only=True)["hyper_parameters"]["settings"]["task"] == "binary"
    assert result.best.stat().st_size < 100_000  # the frozen convolutions are in the package
    assert Classifier.load_from_checkpoint(result.best, weights_only=True).class_names == ("normal", "cancer")
    assert "s3fs" not in sys.modules  # Lightning would take half a second to import it for a local folder


def test_without_a_report_test_is_neither_computed_nor_measured(small, tmp_path):
    result = train(small("trainer.max_epochs=1", "evaluation.report=false"), tmp_path / "run")
    assert set(result.data.features) == set(result.predictions["split"]) | {"train"} == {"train", "valid"}
    assert not [name for name in result.metrics if name.startswith("test/")]


def test_a_small_learning_rate_learns_too(small, tmp_path):
    result = train(small("trainer.max_epochs=12", "optim.lr=1e-4"), tmp_path / "run")
    losses_seen = losses(tmp_path / "run")["train/loss"]
    assert result.metrics["valid/auroc"] > 0.8
    assert np.log(2) + 0.01 > losses_seen.iloc[0] > losses_seen.iloc[-1]  # from knowing nothing, not from noise


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "openvino_bf16", "openvino_int8"])
def test_evaluation_measures_what_the_backend_of_training_computed(small, tmp_path, monkeypatch, backend):
    needs(backend)
    made = []
    monkeypatch.setattr(backends, "convert", lambda *given: made.append(given) or convert(*given))
    cfg = small(f"features.backend={backend}", f"cache_dir={tmp_path}/cache", "data.views=0")
    result = train(cfg, tmp_path / "run")
    monkeypatch.setattr(VGG16, "conv5", lambda *_: pytest.fail("convolutions of torch"))
    evaluation = evaluate(replace(cfg, ckpt=str(result.best)), result.data)
    assert len(made) == 1
    assert evaluation.metrics["test"]["auroc"].value == pytest.approx(result.metrics["test/auroc"])
    assert ("Rounded features" in [caveat.kind for caveat in caveats(evaluation)]) == (backend != "openvino")


@pytest.mark.slow
def test_same_settings_give_the_same_numbers(small, tmp_path):
    first = train(small("model.dropout=0.5"), tmp_path / "a").metrics
    assert train(small("model.dropout=0.5"), tmp_path / "b").metrics == pytest.approx(first, abs=1e-6)
    assert train(small("model.dropout=0.5", "seed=1"), tmp_path / "c").metrics != pytest.approx(first, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "rounding"),
    [
        (["data.views=0"], 1e-4),
        (["data.views=1"], 1e-4),
        (["data.views=1", "model.pool=topk", "model.standardise=true", "data.balance=true"], 1e-3),  # float16
    ],
)
def test_cached_views_train_like_running_the_convolutions_every_step(small, tmp_path, settings, rounding):
    cached = train(small(*settings), tmp_path / "a")
    direct = train(small(*settings, "features.cache=false"), tmp_path / "b")
    assert losses(cached.folder).to_numpy() == pytest.approx(losses(direct.folder).to_numpy(), abs=rounding)
    assert (cached.predictions["logit_cancer"] - direct.predictions["logit_cancer"]).abs().max() < 10 * rounding


@pytest.mark.slow
def test_the_runs_own_report_has_the_checks_asked_for_and_says_what_measures_the_rest(small, tmp_path, capsys):
    checks = ("evaluation.phantoms=6", "evaluation.novelty=1", "evaluation.robustness=4", "evaluation.resamples=100")
    more = ("evaluation.policies=true", "evaluation.protocol=[within]")
    optimizer = "optim.optimizer={_target_: torch.optim.Adam, lr: 1}"
    train_and_report(small(*checks, *more, optimizer), run := tmp_path / "my run")
    first, second, third, *_ = (printed := capsys.readouterr().out).splitlines()
    assert second.startswith("optim.weight_decay=0.3 has no effect")
    assert third.startswith("optim.optimizer.lr=1 has no effect: optim.lr=")
    assert first.startswith("evaluation.policies and evaluation.protocol")
    assert shlex.split(first)[-1] == f"ckpt={run}"
    assert f"(python serve.py 'bundle={run}/bundle')" in printed
    sections = json.loads((run / "evaluation" / "evaluation.json").read_text())["sections"]
    assert {"explanation", "novelty", "robustness"} <= sections.keys()
    assert sections["explanation"]["pointing"]["slices"] == 6
    assert "phantoms" in (run / "bundle" / "MODEL_CARD.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("block", "first"), [("5", 24), ("3+4", 17)])
def test_two_stage_training_moves_the_last_block_and_nothing_else(small, tmp_path, block, first):
    staged = ("trainer.unfreeze_epoch=1", "trainer.unfreeze_blocks=1", "optim.lr=0.05", f"model.block={block}")
    result = train(small(*staged), tmp_path)
    assert len(losses(tmp_path)) == 3
    saved = torch.load(result.last, weights_only=True)["state_dict"]
    original = VGG16(ModelConfig(block=block), 1, 64, load_weights("oxford"))
    for name, tensor in original.features.named_parameters():
        moved = not torch.equal(saved[f"net.features.{name}"], tensor)
        assert moved == (int(name.split(".")[0]) >= first), name


@pytest.mark.slow
def test_fine_tuned_places_are_standardised_as_the_frozen_network_left_them(small, tmp_path):
    """By all training slices, before any batch: fine-tuning would else take each batch's own means and spreads."""
    short = ("trainer.max_epochs=2", "trainer.unfreeze_epoch=1", "data.size=64", "features.cache=true")
    result = train(small("experiment=places_finetuned", *short), tmp_path)
    saved = torch.load(result.last, weights_only=True)["state_dict"]
    net = VGG16(result.data.cfg.model, 1, 64, load_weights("oxford"))
    attach(result.data, net, result.data.cfg, ("train",), views=1)
    slices = result.data.dataset("train", train=True)
    net.fit_standardise(plain_maps(net, slices, 16), slices.w)
    layer = next(name for name in saved if name.endswith("running_mean"))
    torch.testing.assert_close(saved[layer], net.state_dict()[layer.removeprefix("net.")], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_runs(small, tmp_path, experiment):
    short = ["trainer.unfreeze_epoch=1"] if experiment in ("two_stage", "places_finetuned") else []
    result = train(small(f"experiment={experiment}", "trainer.max_epochs=2", *short, "data.size=32"), tmp_path)
    assert 0 <= result.metrics["test/accuracy"] <= 1


@pytest.mark.parametrize(
    ("setting", "says"), [("trainer=gpu", "gpu backend"), ("trainer.args.gradient_clipp=1", "clipp")]
)
def test_what_the_trainer_cannot_do_is_said_before_anything_is_made(small, tmp_path, setting, says):
    if torch.cuda.is_available() and setting == "trainer=gpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=f"trainer settings.*{says}"):
        train(small(setting, "data.root=null", f"cache_dir={tmp_path}/cache"), tmp_path / "run")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("target", "setting", "says"),
    [
        ("LearningRateMonitor", None, "has no logger"),
        ("EarlyStopping", "monitor=val_loss", "metric `val_loss` which is not available"),
        ("ModelCheckpoint", "monitor=val_acc", "could not find the monitored key"),
        ("EarlyStopping", "monitor=valid/loss", "add trainer.patience=0"),
        ("LearningRateFinder", None, "Say python train.py -m optim.lr=1e-4"),
        ("BatchSizeFinder", None, "Say data.batch_size=N"),
    ],
)
def test_a_callback_that_cannot_work_is_a_mistake(small, tmp_path, target, setting, says):
    given = [f"callbacks.mine.{setting}"] if setting else []
    named = f"callbacks.mine._target_=lightning.pytorch.callbacks.{target}"
    with pytest.raises(ConfigError, match=says):
        train(small(named, *given, "trainer.max_epochs=2"), tmp_path)


def test_a_bar_of_the_users_comes_instead_of_ours(small, monkeypatch):
    for on_terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda shown=on_terminal: shown)
        for settings, bars in (
            ((), on_terminal),
            (("callbacks.bar._target_=lightning.pytorch.callbacks.TQDMProgressBar",), 1),
        ):
            cfg = small(*settings, "trainer.progress=true")
            trainer = _trainer(cfg, Path(), callbacks_of(cfg, Path()), environment("single"))
            assert sum(isinstance(callback, ProgressBar) for callback in trainer.callbacks) == bars


@pytest.mark.slow
def test_spawned_workers_give_the_batches_of_the_main_process(small, tmp_path):
    settings = ("features.cache=false", "trainer.max_epochs=2", "data.size=32")
    alone = train(small(*settings), tmp_path / "alone")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)  # as on macOS and Windows
    try:
        train(small(*settings, "data.workers=1"), tmp_path / "spawned")
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert losses(tmp_path / "spawned").to_numpy() == pytest.approx(losses(alone.folder).to_numpy(), abs=1e-6)


@pytest.mark.slow
def test_trainings_that_start_at_once_have_folders_of_their_own(phantoms, cache, tmp_path):
    given = (*SMALL, "trainer.max_epochs=1", "evaluation.report=false", f"data.root={phantoms}", f"cache_dir={cache}")
    started = [subprocess.Popen([sys.executable, str(ROOT / "train.py"), *given], cwd=tmp_path) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(list(tmp_path.glob("runs/*/checkpoints/last.ckpt"))) == 3


def test_other_data_and_an_unwritable_folder_are_refused(small, tmp_path):
    last = train(small("trainer.max_epochs=1"), tmp_path / "run").last
    other = ("data.root=null", "data.phantom.slices=24", "data.phantom.size=64")
    with pytest.raises(DataError, match="data changed"):
        train(small(f"ckpt={last}", *other), tmp_path / "b")
    with pytest.raises(DataError, match="divided otherwise"):
        train(small(f"ckpt={last}", "data.split_seed=1"), tmp_path / "b")
    with pytest.raises(ChestCTError, match="runs_dir=FOLDER"):
        train(small(), last / "run")
