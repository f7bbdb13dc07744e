"""The command line of train.py, evaluate.py and `python -m chestct.data`: Hydra in, plain dataclasses out.

Hydra composes; this module answers `--help` before anything is imported, turns every error that a user can mend into
one message without a traceback, and gives the task its settings and the folder to write to.
"""

import dataclasses
import errno
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from chestct.config.checks import explain, resolve
from chestct.config.compose import CONF, PIPELINE, help_text, opened_tables, overlay
from chestct.config.schema import Config, TrackingConfig
from chestct.errors import ChestCTError, ConfigError, Interrupted
from chestct.ranks import launched

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
"""What the operating system says of a place that cannot be written to; any other OSError is a bug of ours."""


def door(config_name: str, usage: str) -> Callable[[Callable[[Config, Path], Any]], Callable[[], None]]:
    """Decorator: `task(cfg, out)` becomes a program whose settings are composed from conf/<config_name>.yaml.

    usage: the first part of `--help`. The program exits with 0, with 2 after an error that the user can mend, with
    130 when it was interrupted.
    """

    def decorate(task: Callable[[Config, Path], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def program() -> None:
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(help_text(usage))
                return
            if launched().rank:
                _take_part(config_name)
                return
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints errors itself and exits
            failures: list[str] = []
            try:
                signal.signal(signal.SIGTERM, _terminate)
                _refuse_several(config_name, sys.argv[1:])
                _refuse_passwords(sys.argv[1:])
                sys.argv[1:] = _ordered(sys.argv[1:])
                if config_name == "train":
                    sys.argv += _resumed_folder(sys.argv[1:])
                _run(task, config_name, failures)
            except Interrupted as stop:
                print(f"\n{stop}", file=sys.stderr)
                sys.exit(130)
            except KeyboardInterrupt:
                print("\nInterrupted.", file=sys.stderr)
                sys.exit(130)
            except ChestCTError as error:
                failures.append(str(error))
            except Exception as error:
                failures.append(_explained(error))
            if failures:
                print(f"error: {failures[0]}", file=sys.stderr)
                sys.exit(2)

        return program

    return decorate


def _explained(error: Exception) -> str:
    """What a user has to know of an error from outside this package; raises it again where it is a bug of ours."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised_by = (type(error).__module__, frame.f_globals.get("__name__", ""))  # Hydra raises plain ValueErrors, too
    if any(name.startswith(("hydra.", "omegaconf.", "antlr4.")) for name in raised_by):  # one of Hydra's is an OSError
        return explain(error)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return (
            f"Cannot write {error.filename or 'a file'}: {error.strerror}. Free space there, or choose other folders "
            "with runs_dir=FOLDER and cache_dir=FOLDER."
        )
    raise error


def _run(task: Callable[[Config, Path], Any], config_name: str, failures: list[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    # The signature is Hydra's: it passes the composed config and takes the objective of a sweep.
    def job(composed: DictConfig) -> Any:
        try:
            return task(resolve(composed), Path(HydraConfig.get().runtime.output_dir))
        except ChestCTError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the sweep, maybe in another process, tells of it
            failures.append(str(error))  # Hydra would print a line of its own
            return None

    hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()


def _take_part(config_name: str) -> None:
    """What a process that torchrun or srun started beside the first does: it has its settings from the first."""
    if config_name == "train":
        from chestct.training.train import join

        join(launched())


def _refuse_several(config_name: str, argv: list[str]) -> None:
    """Raises ConfigError where torchrun or srun started several processes for what one does."""
    here = launched()
    if here.size == 1:
        return
    if config_name != "train":
        raise ConfigError(f"{here.launcher} started {here.size} processes; only train.py takes several.")
    if {"-m", "--multirun"} & set(argv):
        raise ConfigError(
            f"{here.launcher} started {here.size} processes of a sweep. Start it once, without {here.launcher}: with "
            "trainer=ddp each job starts its own processes, and launcher=... spreads jobs over machines."
        )


def _refuse_passwords(argv: list[str]) -> None:
    """Stops before Hydra writes a password that stands in an override beside the run."""
    for override in argv:
        if override.startswith("tracking.uri="):
            from chestct.tracking.server import refuse_password

            refuse_password(override.split("=", 1)[1])


def _terminate(signum: int, _: object) -> None:
    raise Interrupted("Terminated.")


def _ordered(argv: list[str]) -> list[str]:
    """Flags before overrides: argparse, under Hydra, does not admit them in between."""
    overrides = [arg for arg in argv if "=" in arg and not arg.startswith("-")]
    return [arg for arg in argv if arg not in overrides] + [opened_tables(arg) for arg in overrides]


def find_checkpoint(ckpt: str, runs_dir: str = "runs", tracking: TrackingConfig | None = None) -> Path:
    """The checkpoint file that `ckpt` names.

    A file, a run folder (its last), `last` (of the newest run), or runs:/RUN_ID (the best of an MLflow run, in the
    stores that `tracking` names). Raises ConfigError where there is none.
    """
    if ckpt.startswith("runs:/"):
        from chestct.tracking import checkpoint_of_run

        return checkpoint_of_run(ckpt, tracking or TrackingConfig(), runs_dir)
    path = Path(ckpt)
    if ckpt == "last":
        found = sorted(Path(runs_dir).glob("**/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise ConfigError(f"ckpt=last: no run with a checkpoint under {runs_dir}. Train first: python train.py")
        path = found[-1]
    elif path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.ckpt"))) or "no .ckpt file"
        raise ConfigError(
            f"ckpt={ckpt}: no checkpoint {path} (in that folder: {near}). Give a .ckpt file, a run folder, or "
            "ckpt=last for the newest run, or ckpt=runs:/ID for an MLflow run."
        )
    return path


def _resumed_folder(argv: list[str]) -> list[str]:
    """Hydra's override that lets a resumed run write to the folder it began in."""
    given = dict(arg.split("=", 1) for arg in argv if "=" in arg)
    if given.get("ckpt", "null") in ("null", "") or "hydra.run.dir" in given:
        return []
    named = {key: given[f"tracking.{key}"] for key in ("uri", "local", "owner", "repo") if f"tracking.{key}" in given}
    tracking = TrackingConfig(given.get("tracking", "mlflow"), **named)  # type: ignore[arg-type]
    path = find_checkpoint(given["ckpt"], given.get("runs_dir", "runs"), tracking).resolve()
    return [f"hydra.run.dir={_quoted(path.parent.parent)}"] if path.parent.name == "checkpoints" else []


def _quoted(path: Path) -> str:
    """A path as Hydra's override grammar reads it, whatever it contains."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def from_checkpoint(cfg: Config) -> Config:
    """The settings in the checkpoint cfg.ckpt with what was said on the command line laid over them.

    Only for tasks that run behind a door: what was said is Hydra's list of overrides.
    """
    from hydra.core.hydra_config import HydraConfig

    from chestct.models.lightning_module import read_checkpoint

    path = find_checkpoint(cfg.ckpt or "", cfg.runs_dir, cfg.tracking)
    settings = read_checkpoint(path)["hyper_parameters"]["settings"]
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().job.config_name == PIPELINE:  # what params.yaml says of evaluation is said, too
        overrides.append("evaluation=params")
    said = overlay(cfg, overrides, settings)
    return dataclasses.replace(said, ckpt=str(path))
