import shutil
from contextlib import contextmanager

import pytest
from mlflow import MlflowClient

from chestct.tracking import open_run


@pytest.fixture
def uri(tmp_path, monkeypatch, empty_store):
    """URI of an empty store."""
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts there
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@contextmanager
def recorded(cfg, out):
    """A run of open_run that has begun."""
    with open_run(cfg, out) as run:
        run.begin()
        yield run


def runs(uri):
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("chestct")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def fit(run, steps):
    """What a training logs through the loggers of the run: 1 / (step + 1) as valid/loss in each step."""
    for logger in run.loggers():
        for step in steps:
            logger.log_metrics({"valid/loss": 1 / (step + 1)}, step)
        logger.finalize("success")
