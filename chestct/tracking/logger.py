"""Lightning's MLFlowLogger for a run that begins before the Trainer and goes on after it.

Apart from chestct.tracking.run because Lightning takes seconds to import.
"""

import logging
import multiprocessing
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from mlflow import MlflowClient


class RunLogger(MLFlowLogger):
    """Metrics into a run that there is already, written by MLflow's own threads: no call waits for a store or server.

    shared: the run is on a server, whose troubles are reported once, when the run ends.
    """

    def __init__(self, uri: str, run_id: str, shared: bool = False) -> None:
        super().__init__(tracking_uri=uri, run_id=run_id, synchronous=False)
        self.client, self.shared = _Client(uri), shared
        if shared:
            queue = logging.getLogger("mlflow.utils.async_logging.async_logging_queue")
            queue.addFilter(lambda record: run_id not in record.getMessage())

    @property
    def experiment(self) -> MlflowClient:
        """Without Lightning's call of mlflow.set_tracking_uri, which sets MLFLOW_TRACKING_URI for all that follows."""
        return self.client

    def finalize(self, status: str = "success") -> None:
        """The run goes on (a Trainer calls this after every fit and validation); open_run ends it.

        A process that Lightning spawned ends without waiting for MLflow's threads, so it waits here.
        """
        if multiprocessing.parent_process() and not self.shared:
            for operations in self.client.pending:
                operations.wait()


class _Client(MlflowClient):
    """Remembers what is being written."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.pending: list[Any] = []

    def log_batch(self, *args: Any, **kwargs: Any) -> Any:
        operations = super().log_batch(*args, **kwargs)
        if operations:
            self.pending.append(operations)
        return operations
