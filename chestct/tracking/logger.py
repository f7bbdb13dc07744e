"""What Lightning logs, into an MLflow run: gathered for a second, because writing takes longer than an epoch of a head.

Apart from chestct.tracking.run because Lightning takes seconds to import.
"""

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

WAIT = 1.0
"""Seconds that metrics may wait: what a killed run lacks in MLflow. Its history.csv and its checkpoint have them."""

MANY = 500
"""Metrics that are written at once; MLflow takes a thousand."""


class RunLogger(Logger):
    """Metrics into the run `run_id`; settings and the run's end are open_run's."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        super().__init__()
        self.client, self.run_id = client, run_id
        self.waiting: list[Metric] = []
        self.written = -math.inf  # the first are written at once

    @property
    def name(self) -> str:
        return "mlflow"

    @property
    def version(self) -> str:
        return self.run_id

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.waiting += [Metric(key, float(value), now, step or 0) for key, value in metrics.items()]
        if time.monotonic() - self.written > WAIT or len(self.waiting) > MANY:
            self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._write()

    def _write(self) -> None:
        waiting, self.waiting = self.waiting, []
        if waiting:
            self.client.log_batch(self.run_id, waiting)
        self.written = time.monotonic()
