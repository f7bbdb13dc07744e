"""The checkpoint of an MLflow run, wherever it was trained: `ckpt=runs:/RUN_ID`.

The run folder on this machine is used where there is one; else the best checkpoint is fetched from the run's artifacts
into a run folder of its own, with the id beside it, so that a training resumed from there goes on with that run.
"""

import shutil
import tempfile
from pathlib import Path

from chestct.config.schema import TrackingConfig
from chestct.errors import ConfigError
from chestct.tracking.mirror import ORIGIN, first_line
from chestct.tracking.run import RUN_ID_FILE
from chestct.tracking.server import local_uri, probe, server_uri

SCHEME = "runs:/"


def checkpoint_of_run(ckpt: str, cfg: TrackingConfig, runs_dir: str) -> Path:
    """Path of the best checkpoint of the run that `ckpt` (runs:/RUN_ID) names.

    Looks in runs_dir, the local store and the server of the settings, in this order. Raises ConfigError where no run
    has that id, it was deleted, or it kept no checkpoint.
    """
    run_id = ckpt.removeprefix(SCHEME).strip("/")
    for note in sorted(Path(runs_dir).glob(f"**/{RUN_ID_FILE}")):
        best = note.with_name("best.ckpt")
        if note.read_text().strip() == run_id and best.is_file():
            return best
    server = server_uri(cfg)
    troubles = []
    for uri in filter(None, (local_uri(cfg), server)):
        found = _fetch(uri, run_id, Path(runs_dir) / run_id) if run_id else "no id"
        if isinstance(found, Path):
            return found
        troubles.append(f"{uri}: {found}")
    raise ConfigError(
        f"ckpt={ckpt}: no checkpoint of that MLflow run. {'; '.join(troubles)}. Ids of runs: make ui. A run on a "
        "server: add tracking.uri=..., or tracking=dagshub with tracking.owner and tracking.repo."
    )


def _fetch(uri: str, run_id: str, folder: Path) -> Path | str:
    """The fetched checkpoint, or why there is none."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if uri.startswith("http") and (problem := probe(uri, write=False)):
        return problem.rstrip(".")
    client = MlflowClient(uri)
    try:
        run = client.get_run(run_id)
        if run.info.lifecycle_stage == "deleted":
            return "the run was deleted"
        kept = [item.path for item in client.list_artifacts(run_id, "checkpoints") if item.path.endswith(".ckpt")]
        if not kept:
            return "the run kept no checkpoint (tracking.log_model=false, or it did not finish)"
        target = folder / "checkpoints" / "best.ckpt"
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fetched:
            client.download_artifacts(run_id, kept[0], fetched)
            shutil.move(next(Path(fetched).rglob("*.ckpt")), target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)
        target.with_name(RUN_ID_FILE).write_text(run.data.tags.get(ORIGIN, run_id) + "\n")
    except MlflowException as error:
        return first_line(error).rstrip(".")
    return target
