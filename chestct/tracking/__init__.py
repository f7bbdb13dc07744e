"""Runs in MLflow: what was set, what came out, from which code and data.

Every run is written to the store on this machine; where a server is asked for, a thread mirrors the run there, so that
no server can slow, stop or lose anything. Nothing phones home.
"""

import os

# Read when mlflow is imported or asks a server: it would retry for four minutes, and tell its makers about it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds without an answer
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the mirror tries again by itself
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from chestct.tracking.bundle import fetch_bundle as fetch_bundle
from chestct.tracking.checkpoint import checkpoint_of_run as checkpoint_of_run
from chestct.tracking.run import LOCK_FILE as LOCK_FILE
from chestct.tracking.run import RUN_ID_FILE as RUN_ID_FILE
from chestct.tracking.run import Run as Run
from chestct.tracking.run import code_version as code_version
from chestct.tracking.run import open_run as open_run
from chestct.tracking.run import run_of as run_of
from chestct.tracking.run import sole_writer as sole_writer
from chestct.tracking.server import TrackingError as TrackingError
from chestct.tracking.server import probe as probe
