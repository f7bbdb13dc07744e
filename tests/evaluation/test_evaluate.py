import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from chestct import experiment
from chestct.config.schema import Config, classes_of
from chestct.data.datamodule import SliceModule
from chestct.errors import ConfigError, DataError
from chestct.evaluation.evaluate import Evaluation, evaluate, provenance
from chestct.models.operating_point import OperatingPoint
from chestct.models.vgg16 import VGG16, pick_device
from chestct.training.train import Result, train


def test_a_checkpoint_is_measured_as_in_training_on_its_own_slices_alone_and_its_bundle_on_others(run, tmp_path):
    root = Path(shutil.copytree(run[0].data.root or "", tmp_path / "moved"))
    ckpt = tmp_path / "run (1)" / "checkpoints" / "best.ckpt"
    ckpt.parent.mkdir(parents=True)
    shutil.copy(run[0].ckpt or "", ckpt)
    cfg = replace(run[0], ckpt=str(ckpt), data=replace(run[0].data, root=str(root)))
    table, result = evaluate(cfg).table, run[1]
    assert table["path"].tolist() == result.predictions["path"].tolist()
    np.testing.assert_allclose(table["logit_cancer"], result.predictions["logit_cancer"], atol=1e-5)
    for split, part in table.groupby("split"):
        right = (part["logit_cancer"] > 0) == part["target"]
        ours = [roc_auc_score(part["target"], part["logit_cancer"]), right.mean()]
        assert [result.metrics[f"{split}/{name}"] for name in ("auroc", "accuracy")] == pytest.approx(ours, abs=1e-6)
    with pytest.raises(DataError, match=r"divided otherwise .*, or train anew\."):
        evaluate(replace(cfg, data=replace(cfg.data, split_seed=1)))
    noise = np.random.default_rng(0).integers(0, 256, (96, 96), dtype=np.uint8)
    Image.fromarray(noise).save(next(root.glob("train/normal/*.png")).with_name("new.png"))
    (tmp_path / "run (1)" / "bundle").mkdir()
    with pytest.raises(DataError, match=rf"data changed since {re.escape(str(ckpt))}") as refused:
        evaluate(cfg)
    _, program, *given = shlex.split(str(refused.value).partition("has seen: ")[2])  # as it is pasted
    assert (program, *given) == ("evaluate.py", f"bundle={tmp_path}/run (1)/bundle", "data=...", "data.root=...")


def test_features_that_training_left_are_not_believed_and_of_a_lone_file_the_name_is_told(run, evaluation, tmp_path):
    cfg = replace(run[0], ckpt=str(shutil.copy(run[1].best, tmp_path)), features=replace(run[0].features, cache=False))
    data = SliceModule(cfg)
    data.features = {split: [torch.rand(1000, 512)] for split in ("train", "valid", "test")}
    again = evaluate(cfg, data)
    assert np.abs(again.table["logit_cancer"] - evaluation.table["logit_cancer"]).max() < 1e-3
    assert again.about["checkpoint"] == run[1].best.name
    assert evaluation.about["checkpoint"] == "/".join(run[1].best.parts[-3:])


@pytest.mark.slow
def test_two_stage_runs_are_measured_on_the_network_that_they_end_with(small, tmp_path: Path) -> None:
    cfg = small("trainer.max_epochs=2", "trainer.unfreeze_epoch=1", "optim.backbone_lr_ratio=0.5")
    result = train(cfg, tmp_path)
    cfg = replace(cfg, ckpt=str(tmp_path / "checkpoints" / "last.ckpt"))
    after, fresh = evaluate(cfg, result.data), evaluate(cfg)
    assert (after.table["logit_cancer"] - fresh.table["logit_cancer"]).abs().max() < 1e-5


@pytest.mark.slow
def test_maps_of_normal_slices_are_computed_in_batches_and_once(run: tuple[Config, Result], tmp_path, monkeypatch):
    cfg = replace(run[0], cache_dir=str(tmp_path))
    batches: list[int] = []
    plain = VGG16.conv5

    def counted(net: VGG16, x: torch.Tensor) -> torch.Tensor:
        batches.append(len(x))
        return plain(net, x)

    monkeypatch.setattr(VGG16, "conv5", counted)
    first = evaluate(cfg)
    normals = int((first.manifest.query("split == 'train'")["label"] == "normal").sum())
    assert sum(batches) == len(first.manifest) + normals
    assert len(batches) < len(first.manifest) / 4
    batches.clear()
    assert torch.equal(evaluate(cfg).bundle.baseline, first.bundle.baseline)
    assert batches == []


@pytest.mark.skipif(pick_device().type == "cpu", reason="needs an accelerator")
def test_an_accelerator_gives_the_numbers_of_the_cpu(run: tuple[Config, Result], evaluation: Evaluation) -> None:
    fast = evaluate(replace(run[0], features=replace(run[0].features, cache=False)))
    assert np.abs(fast.table["logit_cancer"] - evaluation.table["logit_cancer"]).max() < 1e-2


def test_the_operating_point_is_fitted_on_validation_alone(run: tuple[Config, Result]) -> None:
    cfg = replace(run[0], evaluation=replace(run[0].evaluation, coverage=0.8))  # of so few, 0.9 gives quantiles of 1
    evaluation = evaluate(cfg)
    valid = evaluation.table[evaluation.table["split"] == "valid"]
    given = (valid["target"].to_numpy(), cfg.evaluation, valid["source"].tolist())
    assert evaluation.point == OperatingPoint.fit(valid[["logit_cancer"]].to_numpy(), *given)
    assert evaluation.point.threshold != 0.5
    assert max(evaluation.point.quantiles) < 1
    assert evaluation.point.validation["cancers"] == int(valid["target"].sum())
    table = evaluation.table
    assert (table["flagged"] == (table["probability_cancer"] >= evaluation.point.threshold)).all()
    called, cancer = evaluation.test["flagged"], evaluation.test["label"] == "cancer"
    assert evaluation.metrics["test"]["sensitivity"].value == pytest.approx(called[cancer].mean())
    assert evaluation.metrics["test"]["specificity"].value == pytest.approx(1 - called[~cancer].mean())


def test_the_headline_stands_beside_its_best_shortcut_and_subgroups_divide_the_slices(evaluation: Evaluation) -> None:
    row = evaluation.headline
    assert row.policy == "grouped"
    assert row.slices["normal"] + row.slices["cancer"] == len(evaluation.test)
    assert row.shortcut
    assert row.margin is not None
    auroc = row.estimates["auroc"].value
    assert row.margin.value == pytest.approx(auroc - row.shortcut_auroc, abs=1e-6)
    subgroups = evaluation.sections["subgroups"]
    for by in {part["by"] for part in subgroups}:
        assert sum(part["normal"] + part["cancer"] for part in subgroups if part["by"] == by) == len(evaluation.test)


@pytest.mark.slow
def test_subtypes_are_measured_by_class_and_as_cancer(small, tmp_path) -> None:
    cfg = small("task=subtype", "evaluation.resamples=100")
    result = train(cfg, tmp_path)
    evaluation = evaluate(replace(cfg, ckpt=str(result.best)), result.data)
    assert evaluation.metrics["test"]["cancer/auroc"].value is not None
    probabilities = evaluation.table[[f"probability_{name}" for name in classes_of("subtype")]]
    assert probabilities.sum(axis=1).to_numpy() == pytest.approx(np.ones(len(evaluation.table)))


def test_the_command_of_a_card_names_no_folders_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["ckpt=runs/a/best.ckpt", "data.root=/home/jane doe/clinic", "compare=[/data/x/a,/b]", "bundle=models:/l@c"]
    given += ["tracking.local=sqlite:////home/jane/secret/mlflow.db", "a=file:///home/jane/x/y", "b=file:/home/jane/y"]
    given += ["c=sqlite:///mlflow.db", "bundle=hf://jane/model"]
    said = "ckpt=runs/a/best.ckpt data.root=.../clinic 'compare=[.../a,/b]' bundle=models:/l@c"
    said += " tracking.local=sqlite:///.../mlflow.db a=file://.../y b=file:.../y c=sqlite:///mlflow.db bundle=hf://jane/model"
    uri = "tracking.uri=https://hub.example/u/r.mlflow"
    monkeypatch.setattr("sys.argv", ["/opt/env/bin/evaluate.py", *given, uri])
    assert provenance()["command"] == f"python evaluate.py {said} {uri}"


@pytest.mark.parametrize("given", ["bundle=packaged", "compare=[a,b]"])
def test_of_two_things_to_evaluate_none_is_dropped_in_silence(small, tmp_path: Path, given: str) -> None:
    with pytest.raises(ConfigError, match=r"^(bundle=packaged|compare=.*) and ckpt=last: .* one of them"):
        experiment.evaluate.__wrapped__(small(given, "ckpt=last"), tmp_path)  # type: ignore[attr-defined]
