from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from chestct import experiment
from chestct.config.compose import compose
from chestct.errors import ConfigError
from chestct.evaluation.evaluate import Evaluation
from chestct.evaluation.export import elsewhere
from chestct.evaluation.protocol import Part
from chestct.models.bundle import load_bundle
from chestct.serving.predictor import Predictor
from chestct.stats.metrics import Estimate


def test_the_bundle_gives_the_numbers_of_the_evaluation_and_the_predictor_those_of_the_files(folder, evaluation, run):
    manifest, table, root = run[1].data.manifest, evaluation.table, Path(run[0].data.root or "")
    answers = load_bundle(folder).predict(evaluation.images[manifest.set_index("path").loc[table["path"], "row"]])
    assert np.abs(answers.score - table["probability_cancer"]).max() < 1e-5
    assert np.abs(answers.novelty - table["novelty"]).max() < 1e-3
    assert list(answers.decision) == list(table["decision"])
    predictor = Predictor(folder)
    for row in evaluation.test.head(4).itertuples():
        answer = predictor.predict(root / str(row.path))
        assert answer.score == pytest.approx(row.probability_cancer, abs=1e-5)
        assert not answer.known
    learned = manifest.query("split == 'train'").iloc[0]
    assert predictor.predict(root / learned["path"]).known


def test_an_export_that_can_make_no_bundle_ends_before_it_evaluates(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(experiment, "from_checkpoint", lambda cfg: cfg)
    monkeypatch.setattr(experiment, "_evaluate_checkpoint", lambda cfg, out: pytest.fail("evaluated"))
    own = compose("experiment=head", "ckpt=x", f"bundle={tmp_path}", "model.head._target_=mine.Narrow", "trust=[mine]")
    with pytest.raises(ConfigError, match="holds no code"):
        experiment.export.__wrapped__(own, tmp_path)  # type: ignore[attr-defined]
    for given in ("ckpt=x", "format=onnx"):
        with pytest.raises(ConfigError, match=r"packaged is the bundle in the package.*bundle=FOLDER"):
            experiment.export.__wrapped__(compose("bundle=packaged", given), tmp_path)  # type: ignore[attr-defined]


def test_the_bundle_knows_what_it_was_made_from(folder: Path, evaluation: Evaluation) -> None:
    bundle = load_bundle(folder)
    facts = bundle.facts
    assert facts["data"]["synthetic"] is True
    assert facts["data"]["data_hash"] == evaluation.about["data_hash"]
    assert facts["data"]["slices"] == evaluation.manifest["split"].value_counts().to_dict()  # phantoms alone
    assert facts["metrics"]["test"]["auroc"]["value"] == evaluation.metrics["test"]["auroc"].value
    for name in ("width", "std", "score", "novelty"):
        assert len(facts["statistics"][name]) == 101
    assert "not a medical device" in bundle.card.lower()


def test_a_source_of_one_class_is_nothing_that_the_bundle_says_of_elsewhere() -> None:
    def figure(value: float | None) -> Estimate:
        return Estimate(value, None, None, 10, 5)

    ranked = [{"held out": "a", "AUROC": figure(0.8)}, {"held out": "b", "AUROC": figure(None)}]
    called = [{"held out": name, "sensitivity": figure(0.9), "specificity": figure(0.6)} for name in ("a", "b")]
    ranked.append({"held out": "mean", "AUROC": figure(0.8)})
    called.append({"held out": "mean", "sensitivity": figure(0.9), "specificity": figure(0.6)})
    parts = {"loso": Part("", ranked, []), "threshold": Part("", called, [])}
    known = elsewhere(SimpleNamespace(sections={"protocol": parts}))
    assert known == [{"source": "a", "auroc": 0.8, "sensitivity": 0.9, "specificity": 0.6}]
