"""Lightning's MLFlowLogger for a run that begins before the Trainer and goes on after it.

Apart from chestct.tracking.run because Lightning takes seconds to import.
"""

import logging
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import MLFlowLogger

if TYPE_CHECKING:
    from mlflow import MlflowClient


class RunLogger(MLFlowLogger):
    """Metrics into a run that there is already, written by MLflow's own threads: no call waits for a store or server.

    shared: the run is on a server, whose troubles are said once, when the run ends.
    """

    def __init__(self, client: "MlflowClient", run_id: str, shared: bool = False, synchronous: bool = False) -> None:
        super().__init__(tracking_uri=client.tracking_uri, run_id=run_id, synchronous=synchronous)
        self.client, self.shared = client, shared
        if shared:
            queue = logging.getLogger("mlflow.utils.async_logging.async_logging_queue")
            queue.addFilter(lambda record: run_id not in record.getMessage())

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # A process that Lightning starts for DDP ends without waiting for threads.
        return type(self), (self.client, self.run_id, self.shared, True)

    @property
    def experiment(self) -> "MlflowClient":
        """Without Lightning's call of mlflow.set_tracking_uri, which sets MLFLOW_TRACKING_URI for all that follows."""
        return self.client

    def finalize(self, status: str = "success") -> None:
        """Nothing: a Trainer says this after every fit and validation, and open_run ends the run."""
