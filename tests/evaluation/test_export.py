from pathlib import Path

import numpy as np
import pytest

from chestct.config.schema import Config
from chestct.evaluation.evaluate import Evaluation
from chestct.evaluation.export import export
from chestct.models.bundle import Bundle, load_bundle
from chestct.reporting.render import model_card
from chestct.serving.predictor import Predictor
from chestct.training.train import Result


@pytest.fixture(scope="module")
def folder(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("export") / "bundle"
    export(evaluation, made, model_card(evaluation))
    return made


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder)


def test_the_bundle_gives_the_numbers_of_the_evaluation(bundle: Bundle, evaluation: Evaluation) -> None:
    assert evaluation.data is not None
    assert evaluation.data.store is not None
    rows = evaluation.data.manifest.set_index("path").loc[evaluation.table["path"], "row"].to_numpy()
    answers = bundle.predict(evaluation.data.store.images[rows])
    assert np.abs(answers.score - evaluation.table["probability_cancer"]).max() < 1e-5
    assert np.abs(answers.novelty - evaluation.table["novelty"]).max() < 1e-3
    assert list(answers.decision) == list(evaluation.table["decision"])


def test_the_predictor_gives_the_same_numbers_for_the_files(
    folder: Path, evaluation: Evaluation, run: tuple[Config, Result]
) -> None:
    predictor = Predictor(folder)
    for row in evaluation.test.head(4).itertuples():
        answer = predictor.predict(Path(run[0].data.root or "") / str(row.path))
        assert answer.score == pytest.approx(row.probability_cancer, abs=1e-5)
        assert not answer.known
    learned = run[1].data.manifest.query("split == 'train'").iloc[0]
    assert predictor.predict(Path(run[0].data.root or "") / learned["path"]).known


def test_the_bundle_knows_what_it_was_made_from(bundle: Bundle, evaluation: Evaluation) -> None:
    facts = bundle.facts
    assert facts["data"]["synthetic"] is True
    assert facts["data"]["data_hash"] == evaluation.about["data_hash"]
    assert sum(facts["data"]["slices"].values()) == len(evaluation.data.manifest)  # type: ignore[union-attr]
    assert facts["metrics"]["test"]["auroc"]["value"] == evaluation.metrics["test"]["auroc"].value
    for split, rows in evaluation.table.groupby("split"):
        assert sum(row["n"] for row in facts["reliability"][split]) == len(rows)
    for name in ("width", "std", "score", "novelty"):
        quantiles = facts["statistics"][name]
        assert len(quantiles) == 101
        assert quantiles == sorted(quantiles)
    assert "not a medical device" in bundle.card.lower()
