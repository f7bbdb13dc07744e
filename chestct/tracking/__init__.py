"""Runs in MLflow: what was set, what came out, from which code and data.

Every run is written to a store on this machine. Where a server is named, a second logger writes there, which can
neither stop nor slow the training, and `sync` sends what the server missed. Nothing phones home.
"""

import os

# Read when MLflow is imported or talks to a server. By default it retries for four minutes and reports usage.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds without an answer
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # `sync` is the retry
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS", "1")  # an epoch of a head is shorter than a write

from chestct.tracking.registry import fetch_bundle
from chestct.tracking.run import Run, open_run, run_of
from chestct.tracking.stores import TrackingError, probe
from chestct.tracking.sync import sync

__all__ = ["Run", "TrackingError", "fetch_bundle", "open_run", "probe", "run_of", "sync"]
