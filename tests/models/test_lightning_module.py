import dataclasses

import pytest
import torch
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from chestct.config.schema import classes_of
from chestct.errors import WeightsError
from chestct.models.lightning_module import Classifier, check_fits


def make(cfg, counts=None):
    names = classes_of(cfg.task)
    return Classifier(dataclasses.asdict(cfg), names, counts or [1.0] * len(names), {"hash": "h", "leaks": 0})


def test_losses_are_weighted_cross_entropy_and_smoothed(small):
    logits, y = torch.tensor([[0.3], [-1.0], [2.0], [0.0]]), torch.tensor([0, 1, 1, 1])
    target, weight = torch.tensor([0.1, 0.9, 0.9, 0.9]), torch.tensor([2.0, 2 / 3, 2 / 3, 2 / 3])
    losses = functional.binary_cross_entropy(logits[:, 0].sigmoid(), target, reduction="none")
    model = make(small("optim.label_smoothing=0.2"), [1.0, 3.0])
    assert model.loss(logits, y).item() == pytest.approx(((losses * weight).sum() / weight.sum()).item(), rel=1e-5)
    model = make(small("task=subtype"), [1.0, 1.0, 2.0, 4.0])
    logits, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 3])
    expected = functional.cross_entropy(logits, y, 8 / (4 * torch.tensor([1.0, 1.0, 2.0, 4.0])))
    assert model.loss(logits, y).item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_of_slices_take_the_place_of_class_weights(small):
    logits, y, w = (
        torch.tensor([[0.3], [-1.0], [2.0], [0.0]]),
        torch.tensor([0, 1, 1, 1]),
        torch.tensor([3.0, 0, 0.4, 0.6]),
    )
    model = make(small(), [1.0, 3.0])
    losses = functional.binary_cross_entropy_with_logits(logits[:, 0], y.float(), reduction="none")
    expected = pytest.approx((3 * losses[0] + 0.4 * losses[2] + 0.6 * losses[3]).item() / 4, rel=1e-5)
    assert model.loss(logits, y, w).item() == expected
    assert model.measured(logits, y, "valid", w)["valid/loss"] == expected
    two = torch.cat([torch.zeros(4, 1), logits], 1)  # the same as two classes
    assert model.loss(two, y, w).item() == expected
    for step in ([0, 1], [2, 3]):  # batches of an epoch add up to the same
        model._step({"x": torch.zeros(2, 512), "y": y[step], "w": w[step]}, "valid")
    zeros = model(torch.zeros(1, 512)).expand(4, 1)
    assert model.losses["valid_"].compute().item() == pytest.approx(model.loss(zeros, y, w).item(), rel=1e-5)


def test_logits_between_0_and_1_are_not_taken_for_scores(small):
    measured = make(small()).measured(torch.full((4, 1), 0.2), torch.tensor([0, 1, 1, 1]), "test")
    assert measured["test/recall"] == 1  # a score of 0.55: cancer
    assert measured["test/specificity"] == 0


def test_of_a_split_that_lacks_a_class_only_the_loss_is_known(small):
    logits, y, model = torch.tensor([[0.3], [-1.0]]), torch.tensor([1, 1]), make(small())
    assert model.measured(logits, y, "test") == {"test/loss": pytest.approx(model.loss(logits, y).item())}


def test_dropout_draws_anew_in_each_batch_however_many_make_a_step(small):
    model, about = make(small("seed=2")), {"world_size": 2, "global_rank": 1, "global_step": 5}
    model.trainer = type("T", (), about | {"current_epoch": 1, "num_training_batches": 10})()
    seeds = []
    for batch in range(2):
        model.on_train_batch_start({}, batch)
        seeds.append(torch.initial_seed())
    assert seeds == [(2 * 1_000_003 + step) * 2 + 1 for step in (10, 11)]


def test_compiled_training_of_a_head_that_judges_places_calls_what_was_compiled(small, monkeypatch):
    called = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: called.append(function.__name__) or function(x))
    model = make(small("model.pool=topk", "trainer.compile=true"))
    model.on_fit_start()
    batch = {"x": torch.rand(2, 1, 64, 64), "y": torch.tensor([0, 1])}
    model._step(batch | {"places": torch.zeros(2, 1, 64, 64)}, "train")
    model._step(batch, "valid")
    assert called == ["maps", "_call_impl"]


def test_convolutions_learn_more_slowly_than_the_head(small):
    model = make(small("model.freeze=3", "optim.lr=0.1", "optim.backbone_lr_ratio=0.01"))
    model.trainer = type("T", (), {"estimated_stepping_batches": 10})()
    groups = model.configure_optimizers()["optimizer"].param_groups
    assert [group["initial_lr"] for group in groups] == [0.1, pytest.approx(0.001)]
    assert len(groups[1]["params"]) == 12


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_schedules_warm_up_and_end_where_they_should(small, schedule):
    model = make(small(f"optim.schedule={schedule}", "optim.warmup=0.2", "optim.lr=1"))
    model.trainer = type("T", (), {"estimated_stepping_batches": 50})()
    made = model.configure_optimizers()
    rates = []
    for _ in range(50):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates[0] < 0.2
    if schedule == "one_cycle":
        assert (rates[0], rates[5]) == pytest.approx((1 / 25, 0.52))
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert 8 <= rates.index(max(rates)) <= 12
    assert rates[-1] == pytest.approx(1) if schedule == "constant" else rates[-1] < 0.02


@pytest.mark.parametrize(
    ("settings", "trains"),
    [((), 0), (("trainer.unfreeze_epoch=1", "trainer.unfreeze_blocks=1"), 3 * (512 * 512 * 9 + 512))],
)
def test_only_convolutions_that_train_are_in_the_checkpoint_and_counted(small, settings, trains):
    model = make(small(*settings))
    assert model.parameter_counts() == {"parameters/trainable": 513 + trains, "parameters/all": 513 + 14_714_688}
    assert any("features" in key for key in model.state_dict()) == bool(trains)


def test_frozen_convolutions_are_not_saved_with_averaged_weights_and_stay_when_those_load(small):
    model = make(small())
    averaged = AveragedModel(model, use_buffers=True)  # what Lightning's callbacks wrap around a model
    state = averaged.state_dict()
    assert state.keys() == {f"module.{key}" for key in model.state_dict()} | {"n_averaged"}
    assert not any("features" in key for key in state)
    for one, saved in ((averaged, state), (model, model.state_dict())):
        one.load_state_dict(saved)  # strictly
    assert torch.equal(averaged.module.net.features[0].weight, model.net.features[0].weight)


@pytest.mark.parametrize(
    ("made", "overrides", "says"),
    [
        ("", "task=subtype", "task=binary, not task=subtype"),
        ("", "model.hidden=[8]", r"model\.hidden=\[\] \(now \[8\]\)"),
        ("", "model.pool=flatten", r"model\.pool=gap \(now flatten\)"),
        ("", "model.freeze=false", r"model\.freeze=True"),
        ("", "", "not the convolutions"),
        # Its convolutions are in the checkpoint; mean and scale of the input are not.
        ("model.freeze=false", "model.freeze=false", "not the convolutions"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_what_differs(small, made, overrides, says):
    model = make(small(*filter(None, [made])))
    saved = {"hyper_parameters": model.hparams, "state_dict": model.state_dict(), "chestct": {"weights": "other"}}
    with pytest.raises(WeightsError, match=says):
        check_fits(saved, make(small(*filter(None, [overrides]))))
