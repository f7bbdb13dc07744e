"""A small trained run that several tests measure."""

from dataclasses import replace
from pathlib import Path

import pytest

from chestct.config.compose import compose
from chestct.config.schema import Config
from chestct.evaluation.evaluate import Evaluation, evaluate
from chestct.evaluation.export import export
from chestct.reporting.render import model_card
from chestct.training.train import Result, train
from tests.conftest import SMALL


@pytest.fixture(scope="session")
def run(phantoms: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Result]:
    """Settings (with ckpt) and result of a run on the small phantoms. Read only."""
    settings = ["evaluation.resamples=200", "evaluation.threshold='sensitivity>=0.9'"]  # not 0.5, whatever is fitted
    cfg = compose(*SMALL, f"data.root={phantoms}", f"cache_dir={cache}", *settings)
    result = train(cfg, tmp_path_factory.mktemp("run"))
    return replace(cfg, ckpt=str(result.best)), result


@pytest.fixture(scope="session")
def evaluation(run: tuple[Config, Result]) -> Evaluation:
    """That run, evaluated. Read only."""
    return evaluate(run[0])


@pytest.fixture(scope="session")
def folder(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of that run. Read only."""
    made = tmp_path_factory.mktemp("export") / "bundle"
    export(evaluation, made, model_card(evaluation))
    return made
