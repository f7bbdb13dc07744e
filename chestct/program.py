"""What every command with settings has in common: Hydra in, a checked `Config` out, and errors for people.

Hydra composes the settings, makes the run folder, logs, and runs one job or many; a mistake leaves no folder behind.
"""

import atexit
import contextlib
import functools
import gc
import inspect
import io
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig

from chestct.config.checks import resolve_composed
from chestct.config.compose import CONF, help_text, in_home, quoted, readable
from chestct.config.explain import explain, suggest
from chestct.config.schema import Config
from chestct.errors import ChestCTError, ConfigError, DataError, Interrupted, out_of_memory
from chestct.files import sole_writer

WITH_VALUE = ("--config-name", "-cn", "--config-dir", "-cd", "--cfg", "-c", "--package", "-p")
ALONE = ("--multirun", "-m", "--run", "-r", "--resolve", "--hydra-help", "--version", "--info", "-i")
"""Hydra's own options; everything else is a setting, `key=value`."""

FIRST_FILES = {".lock", "settings.yaml", "train.log", "evaluate.log"}
"""What lies in a run folder, beside Hydra's own, before anything was computed."""

OUT_OF_MEMORY = (
    "Out of memory: lower data.batch_size, features.batch_size (of frozen convolutions) or data.size; or compute "
    "elsewhere: trainer.accelerator=cpu, or --accelerator cpu for predict and embed."
)

Task = Callable[[Config, Path], Any]
RunFolder = Callable[[dict[str, str], bool], Path | None]


def program(config_name: str, run_folder: RunFolder = lambda *_: None) -> Callable[[Task], Callable[[], None]]:
    """Decorator: `task(cfg, out)` becomes a program whose settings are composed from conf/<config_name>.yaml.

    The task's docstring is the first part of `--help`. run_folder: from the settings that are given on the command
    line, and whether they are of a sweep, the folder that a run goes on in; None for a new one. The program exits with
    0, with 2 after an error that the user can mend, with 130 when it was interrupted.
    """

    def decorate(task: Task) -> Callable[[], None]:
        @functools.wraps(task)
        def run() -> None:
            with errors_for_people():
                if {"-h", "--help"} & set(sys.argv):
                    print(help_text(inspect.getdoc(task) or ""))
                    return
                # The first of several processes has the run folder, the others one that goes with them.
                with contextlib.ExitStack() as stack:
                    scratch = stack.enter_context(TemporaryDirectory(prefix="chestct-")) if rank() else ""
                    sys.argv[1:] = _hydra_arguments(config_name, run_folder, scratch)
                    _run(task, config_name)

        return run

    return decorate


def _hydra_arguments(config_name: str, run_folder: RunFolder, scratch: str) -> list[str]:
    """The command line as Hydra reads it: its options first, then overrides in its grammar, the run's folder included.

    scratch: the folder of a process that has no run folder, else "". Raises ConfigError for a command that cannot be.
    """
    flags, overrides = split_arguments(sys.argv[1:])
    sweep = bool(flags.keys() & {"-m", "--multirun"})
    started = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1
    if int(started) > 1 and (config_name != "train" or sweep):
        raise ConfigError(f"{started} processes were started; only a single training takes several.")
    given = {key: in_home(value.strip("'\"")) for key, _, value in (o.partition("=") for o in overrides)}
    overrides = [readable(override, sweep) for override in overrides]
    for key in {"tracking.uri", "tracking.local"} & given.keys():
        from chestct.tracking.stores import refuse_password

        refuse_password(given[key])  # before Hydra writes it into the run's folder
    folder = run_folder(given, sweep)
    if scratch:
        overrides += [quoted("hydra.run.dir", scratch), "hydra.output_subdir=null"]
    elif folder and "hydra.run.dir" not in given:
        overrides.append(quoted("hydra.run.dir", str(folder)))
    options = [part for flag, value in flags.items() for part in (flag, value) if part is not None]
    return [*options, *overrides]


def rank() -> int:
    """Which of the processes that torchrun or srun started for one training this is; 0 for the only one."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


@contextlib.contextmanager
def errors_for_people() -> Iterator[None]:
    """Ends the program with one message and a status, without a traceback, for whatever a user can mend.

    SIGTERM ends it as Ctrl-C does: what has to be kept is kept on the way out.
    """
    signal.signal(signal.SIGTERM, _terminate)
    gc.set_threshold(10_000)  # Python 3.11's, 700, is reached a thousand times while torch and MLflow are imported
    atexit.register(gc.freeze)  # else Python looks for cycles among all modules before it ends, for one to two seconds
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character must not end a finished training
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        if not rank():
            print(f"\n{str(stop) or 'Interrupted.'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `chestct train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if not (rank() and isinstance(error, ConfigError | DataError)):  # all processes find it, the first one says it
            print(f"error: {_mistake(error) or _explained(error)}", file=sys.stderr)
        sys.exit(2)


def _terminate(signum: int, frame: object) -> None:
    raise Interrupted("Terminated.")


def split_arguments(arguments: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """Hydra's options, each with its value or None, and the overrides, which Hydra wants behind them.

    Raises ConfigError for an option that Hydra does not have, such as `--lr 1e-3`.
    """
    flags: dict[str, str | None] = {}
    overrides = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in WITH_VALUE:
            flags[flag] = value if equals else next(rest, "")
        elif flag in ALONE:
            flags[flag] = None
        elif argument.startswith("-"):
            meant = suggest(flag.lstrip("-").replace("-", "_")) or "optim.lr"
            given = value or "VALUE"
            raise ConfigError(f"{flag}: settings are given as key=value, without dashes: {meant}={given}. See --help.")
        else:
            overrides.append(argument)
    return flags, overrides


def _run(task: Task, config_name: str) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    for name in ("matplotlib", "torch", "onnx_ir", "onnxscript"):  # which tell of fonts, of caches, and of each pass
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints errors itself and exits
    failures: list[ChestCTError] = []
    main = os.getpid()

    # The signature is Hydra's: it passes the composed config and takes the objective of a sweep.
    def job(composed: DictConfig) -> Any:
        _end_with(main)
        out = Path(HydraConfig.get().runtime.output_dir)
        try:
            return task(resolve_composed(composed), out)
        except Exception as error:
            if not (mistake := _mistake(error)) and HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # a full disk is no fault of one job: it ends the sweep, which goes on where there is room
            failure = mistake or ChestCTError(_explained(error))
        # Outside the handlers: torch's error would hold on to what fills the memory, which the next job needs.
        if out != Path.cwd():
            _remove_if_empty(out)  # a mistake leaves no empty run
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise failure  # the sweep, maybe in another process, reports it
        failures.append(failure)  # Hydra would print a line of its own
        return None

    hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    if failures:
        raise failures[0]


@functools.cache  # a worker runs job after job
def _end_with(parent: int) -> None:
    """Ends a launcher's worker soon after `parent`, which started it, was killed: its job will be run again."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)  # files are whole at any time

    if os.getppid() == parent:
        threading.Thread(target=watch, daemon=True).start()


def _remove_if_empty(out: Path) -> None:
    """Removes a run folder in which nothing was computed, and no other training is about to."""
    written = {path.name for path in out.rglob("*") if path.is_file() and path.parent.name != ".hydra"}
    if written <= FIRST_FILES:
        with contextlib.suppress(ChestCTError, OSError), sole_writer(out):
            shutil.rmtree(out, ignore_errors=True)  # what cannot be removed must not hide the mistake


def _mistake(error: Exception) -> ChestCTError | None:
    """What a user can mend, wherever it was raised, in this package's words; None for any other error."""
    if out_of_memory(error):
        return ChestCTError(OUT_OF_MEMORY)
    return error if isinstance(error, ChestCTError) else None


def _explained(error: Exception) -> str:
    """What a user has to know of an error from outside this package; raises it again where it is a bug of ours."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised_by = (type(error).__module__, frame.f_globals.get("__name__", ""))  # Hydra raises plain ValueErrors, too
    if any(name.startswith(("hydra.", "omegaconf.", "antlr4.")) for name in raised_by):  # one of Hydra's is an OSError
        return explain(error)
    if isinstance(error, OSError) and error.strerror:
        return (
            f"Cannot use {error.filename or 'a file'}: {error.strerror}. Free space there, let this user read and "
            "write there, or choose another place: runs_dir=FOLDER and cache_dir=FOLDER, bundle=FOLDER for an export, "
            "--out for a table or page, --viewer for DICOM."
        )
    raise error
