"""Lightning's MLFlowLogger for a run that begins before the Trainer and goes on after it.

Apart from chestct.tracking.run because Lightning takes seconds to import.
"""

import logging
import multiprocessing
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient

DETAILS = ("accuracy", "precision", "recall", "specificity", "f1", "average_precision", "epoch")
"""Metrics of an epoch that history.csv has, and a run's page would be full of."""


class RunLogger(MLFlowLogger):
    """Metrics into a run that there is already, written by MLflow's own threads: no call waits for a store or server.

    shared: the run is on a server, whose troubles are reported once, when the run ends.
    """

    def __init__(self, uri: str, run_id: str, shared: bool = False) -> None:
        super().__init__(tracking_uri=uri, run_id=run_id, synchronous=False)
        self.client = MlflowClient(uri) if shared else _LocalClient(uri)
        if shared:
            queue = logging.getLogger("mlflow.utils.async_logging.async_logging_queue")
            queue.addFilter(lambda record: run_id not in record.getMessage())

    @property
    def experiment(self) -> MlflowClient:
        """Without Lightning's call of mlflow.set_tracking_uri, which sets MLFLOW_TRACKING_URI for all that follows."""
        return self.client

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """All but the details, and those of the test set, which the evaluation records with their intervals."""
        skipped = {name for name in metrics if name.startswith("test/") or name.rpartition("/")[2] in DETAILS}
        super().log_metrics({name: value for name, value in metrics.items() if name not in skipped}, step)

    def finalize(self, status: str = "success") -> None:
        """The run goes on (a Trainer calls this after every fit and validation); open_run ends it."""


class _LocalClient(MlflowClient):
    """Waits in a process that Lightning spawned, which would end without waiting for MLflow's threads."""

    def log_batch(self, *args: Any, **kwargs: Any) -> Any:
        return super().log_batch(*args, **kwargs | {"synchronous": multiprocessing.parent_process() is not None})
