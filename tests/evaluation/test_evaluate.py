from dataclasses import replace

import numpy as np
import pytest

from chestct.config.schema import Config
from chestct.errors import ChestCTError
from chestct.evaluation.evaluate import Evaluation, evaluate
from chestct.models.operating_point import OperatingPoint
from chestct.training.train import Result


def test_nothing_is_evaluated_without_a_checkpoint(small) -> None:
    with pytest.raises(ChestCTError, match="Nothing to evaluate"):
        evaluate(small())


def test_evaluation_sees_the_logits_that_training_saw(run: tuple[Config, Result], found: Evaluation) -> None:
    told = run[1].predictions.set_index(["path"])["logit_cancer"]
    assert np.abs(found.table.set_index("path")["logit_cancer"] - told).max() < 1e-4
    assert found.metrics["test"]["auroc"].value == pytest.approx(run[1].metrics["test/auroc"], abs=1e-6)


def test_the_operating_point_is_fitted_on_validation_alone(run: tuple[Config, Result], found: Evaluation) -> None:
    valid = found.table[found.table["split"] == "valid"]
    again = OperatingPoint.fit(valid[["logit_cancer"]].to_numpy(), valid["target"].to_numpy(), run[0].evaluation)
    assert found.point.threshold == pytest.approx(again.threshold, abs=1e-6)
    assert found.point.validation["cancers"] == int(valid["target"].sum())
    flagged = valid["flagged"] == (valid["probability_cancer"] >= found.point.threshold)
    assert flagged.all()


@pytest.mark.slow
def test_images_and_cached_features_are_measured_alike(run: tuple[Config, Result], found: Evaluation) -> None:
    cfg = replace(run[0], features=replace(run[0].features, cache=False))
    direct = evaluate(cfg)
    assert np.abs(direct.table["logit_cancer"] - found.table["logit_cancer"]).max() < 1e-3
    assert np.abs(direct.table["novelty"] - found.table["novelty"]).max() < 1e-3


def test_the_headline_stands_beside_its_best_shortcut(found: Evaluation) -> None:
    row = found.headline
    assert row.policy == "grouped"
    assert row.slices["normal"] + row.slices["cancer"] == len(found.test)
    assert row.shortcut
    assert row.margin is not None
    auroc = row.estimates["auroc"].value
    if row.margin.value is not None:
        assert row.margin.value == pytest.approx(auroc - row.shortcut_auroc, abs=1e-6)


def test_every_slice_has_a_decision_a_set_and_a_novelty(found: Evaluation) -> None:
    assert set(found.table["decision"]) <= {"cancer", "normal", "uncertain"}
    assert found.table["novelty"].between(0, 100).all()
    sure = found.table[found.table["decision"] != "uncertain"]
    assert (sure["decision"] == sure["set"]).all()


def test_subgroups_divide_the_test_slices(found: Evaluation) -> None:
    rows = found.sections["subgroups"]
    for by in {row["by"] for row in rows}:
        assert sum(row["normal"] + row["cancer"] for row in rows if row["by"] == by) == len(found.test)


@pytest.mark.slow
def test_subtypes_are_measured_by_class_and_as_cancer(small, tmp_path) -> None:
    from chestct.training.train import train

    cfg = small("task=subtype", "evaluation.resamples=100")
    result = train(cfg, tmp_path)
    found = evaluate(replace(cfg, ckpt=str(result.best)), result.data)
    assert found.metrics["test"]["cancer/auroc"].value is not None
    assert found.table[[f"probability_{n}" for n in ("normal", "adenocarcinoma", "large_cell", "squamous")]].sum(
        axis=1
    ).to_numpy() == pytest.approx(np.ones(len(found.table)))
