import shutil
from contextlib import contextmanager

import lightning as L
import pytest
import torch
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
def recorded(cfg, out, sweep=False):
    """A run of open_run that has begun."""
    with open_run(cfg, out, sweep) as run:
        run.begin()
        yield run


def runs(uri):
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("chestct")
    return client.search_runs([experiment.experiment_id]) if experiment else []


class Steps(L.LightningModule):
    """Logs 1 / (step + 1) as valid/loss in every step."""

    def __init__(self, steps):
        super().__init__()
        self.weight, self.steps = torch.nn.Parameter(torch.zeros(1)), steps

    def training_step(self, step, *_):
        for logger in self.loggers:  # self.log takes the step from the trainer, which begins at 0 in every fit
            logger.log_metrics({"valid/loss": 1 / (int(step) + 1)}, int(step))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return list(self.steps)


def fit(run, steps):
    """A training that logs these steps through the loggers of the run."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    L.Trainer(max_epochs=1, logger=run.loggers(), accelerator="cpu", **quiet).fit(Steps(steps))
