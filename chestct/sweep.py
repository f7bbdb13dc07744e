"""Sweeps: grids and searches over settings, behind Hydra's sweeper in hydra_plugins; Hydra's launchers run the jobs.

The sweep's folder is the record: study.db holds Optuna's study, and each job has a folder with its number. A proposal
depends on the seed and on the trials before it alone, so that a search that was killed and goes on makes the proposals
that it would have made; a trial that was under way, or failed on a mistake, is run again under its own number.

Not hydra-optuna-sweeper: its release needs Optuna 2 and cannot go on with a sweep that was killed.
"""

import math
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from chestct.config.schema import Config
from chestct.data.sources import check_roots
from chestct.errors import ChestCTError, ConfigError, Interrupted
from chestct.files import sole_writer, write_atomic
from chestct.tracking import Run, TrackingError, open_run
from chestct.tracking.stores import usable

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STUDY = "study.db"
NOT_THE_MODELS = ("sweep=", "launcher=", "hydra", "evaluation.report=", "tracking.run_name=")
"""Beginnings of overrides that describe how a sweep runs, not what a job trains."""


def sweep(arguments: list[str], config: DictConfig, loader: ConfigLoader, launcher: Launcher) -> None:
    """Runs the jobs that `arguments` (Hydra's overrides) and config.hydra.sweeper describe, and sums them up.

    Raises ConfigError for a setting that does not exist, ChestCTError in the end where jobs failed, and Interrupted.
    """
    options, folder = config.hydra.sweeper, Path(config.hydra.sweep.dir)
    if config.hydra.job.name != "train":
        raise ConfigError("-m is for training: other commands have no objective.")
    for name, least in (("trials", 0), ("jobs", 1)):
        if not isinstance(options[name], int) or options[name] < least:
            raise ConfigError(f"hydra.sweeper.{name}={options[name]}: give a whole number from {least} on.")
    lines = [f"{key}={'null' if value is None else value}" for key, value in options.params.items()] + arguments
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(lines)
    overrides = {override.get_key_element().lstrip("+"): override for override in parsed}  # the later ones count
    swept = {override.get_key_element(): override for override in overrides.values() if override.is_sweep_override()}
    fixed = [str(override.input_line) for override in overrides.values() if not override.is_sweep_override()]
    if not options.trials and (ranges := [k for k, o in swept.items() if isinstance(o.value(), IntervalSweep)]):
        raise ConfigError(f"{ranges[0]}: an interval has no end of values; give hydra.sweeper.trials=N for a search.")
    if options.trials and not swept:
        raise ConfigError("Nothing to search: give ranges, as in 'optim.lr=interval(1e-4,1e-1)', or take a sweep=...")
    cfg, *others = [_settings(example, config, loader) for example in _examples(list(overrides.values()))]
    for example in (cfg, *others):
        check_roots(example.data)  # now, not when its job's turn comes
    space = {key: _distribution(override) for key, override in swept.items()}
    alike = sorted(line for line in fixed if not line.startswith("launcher="))  # whoever runs it, it is this sweep
    facts = [{key: str(value) for key, value in space.items()}, alike, options.seed]
    kept = f" (with {shlex.quote(f'hydra.sweep.dir={folder}')})"
    with sole_writer(folder), open_run(cfg, folder, sweep=True) as run:
        study = _open_study(folder, cfg.trainer.mode, facts, space, grid=not options.trials)
        total = options.trials or len(study.trials)
        run.begin()
        try:
            while trials := _next_trials(study, space, total, options.jobs, options.seed):
                jobs = [[*fixed, *(f"{k}={v}" for k, v in _written(trial.params).items())] for trial in trials]
                for trial, job in zip(trials, launcher.launch(jobs, trials[0].number), strict=True):
                    _record(study, trial.number, job)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted(f"The sweep was stopped. The same command goes on with it{kept}.") from None
        finally:
            _report(study, cfg.trainer.monitor, fixed, folder, run)
    if errors := _errors(study):
        jobs_of = {text: [str(job) for job in sorted(errors) if errors[job] == text] for text in errors.values()}
        lines = [f"job {', '.join(numbers)}: {text}" for text, numbers in jobs_of.items()]
        if left := [str(job) for job in sorted(errors) if not study.trials[job].state.is_finished()]:
            lines.append(f"The same command runs job {', '.join(left)} again{kept}.")
        raise ChestCTError("\n".join([f"{len(errors)} of {total} jobs failed.", *lines]))


def _examples(overrides: list[Override]) -> Iterator[list[str]]:
    """Overrides of single jobs: of each range the first value, then also every other one that names other data."""
    choices = []
    for override in overrides:
        key, value, lines = override.get_key_element(), override.value(), [str(override.input_line)]
        if override.is_sweep_override():
            values = [value.start] if isinstance(value, IntervalSweep) else override.sweep_string_iterator()
            lines = [f"{key}={one}" for one in values]
        choices.append(lines)
    first = [lines[0] for lines in choices]
    yield first
    for at, lines in enumerate(choices):
        if lines[0].lstrip("+").startswith(("data=", "data.root=", "data.sources")):
            yield from ([*first[:at], line, *first[at + 1 :]] for line in lines[1:])


def _settings(example: list[str], config: DictConfig, loader: ConfigLoader) -> Config:
    """The settings of a job; composed with every key of the sweep, so that a misspelt one stops it here.

    Not checked: a value may fit only together with another swept one. Each job checks its own.
    """
    composed = loader.load_sweep_config(config, example)
    with open_dict(composed):
        del composed["hydra"]
    return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed)))


def _open_study(folder: Path, mode: str, facts: list[Any], space: dict[str, "BaseDistribution"], grid: bool) -> "Study":
    """The study in a folder, made where there is none; a grid's combinations become its trials.

    mode: min or max of the objective. facts: what makes it this sweep; raises ConfigError in the folder of another.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage, direction = f"sqlite:///{folder / STUDY}", f"{mode}imize"
    with usable(str(folder / STUDY), "Move it away, or begin another sweep with hydra.sweep.dir=FOLDER."):
        study = optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)
    if study.user_attrs.get("facts", facts) != facts:
        raise ConfigError(
            f"{folder} holds a sweep with other settings, ranges or another seed. Give the same to go on with it, or "
            "remove it, or begin another with hydra.sweep.dir=FOLDER."
        )
    if grid and "facts" not in study.user_attrs:  # which stand there once all of them are in
        for values in product(*(distribution.choices for distribution in space.values())):
            study.enqueue_trial(dict(zip(space, values, strict=True)), skip_if_exists=True)
    study.set_user_attr("facts", facts)
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.set_user_attr(f"error {trial.number}", "")  # what failed on a mistake runs again, as what was cut short
        if trial.params.keys() != space.keys():
            _fail(study, trial.number, "the sweep was stopped while its settings were being proposed")
    return study


def _distribution(override: Override) -> "BaseDistribution":
    """What a range on the command line stands for: lists of any kind are choices, interval(a, b) is a range."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if not isinstance(value, IntervalSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    return (IntDistribution if whole else FloatDistribution)(value.start, value.end, log="log" in value.tags)


def _next_trials(
    study: "Study", space: dict[str, "BaseDistribution"], total: int, jobs: int, seed: int
) -> "list[FrozenTrial]":
    """At most `jobs` trials to launch together, with consecutive numbers: those that were cut short, else new ones."""
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    def running() -> "list[FrozenTrial]":
        errors = _errors(study)
        return [trial for trial in study.get_trials(states=[TrialState.RUNNING]) if trial.number not in errors]

    if not running():
        started = len(study.trials) - len(study.get_trials(states=[TrialState.WAITING]))
        for number in range(started, min(started + jobs, total)):
            # A sampler of its own for each trial: its draws then do not depend on where a search was interrupted. Few
            # random trials before TPE has something to go by, because a sweep here has some dozen trials.
            study.sampler = TPESampler(n_startup_trials=5, seed=(1009 * seed + number) % 2**32)
            study.ask(space)
    trials = running()[:jobs]
    return [trial for i, trial in enumerate(trials) if trial.number == trials[0].number + i]


def _record(study: "Study", number: int, job: JobReturn) -> None:
    """Keeps what a job reached. One that failed on what the user can mend says so, and its trial stays open: the same
    command runs it again. Any other exception is raised.
    """
    try:
        value = job.return_value
    except TrackingError:  # of the store of all jobs
        raise
    except ChestCTError as error:
        study.set_user_attr(f"error {number}", str(error))
        return
    if math.isfinite(value):
        study.tell(number, value)
    else:
        _fail(study, number, f"the objective is {value}")


def _fail(study: "Study", number: int, problem: str) -> None:
    from optuna.trial import TrialState

    study.set_user_attr(f"error {number}", problem)
    study.tell(number, state=TrialState.FAIL)


def _errors(study: "Study") -> dict[int, str]:
    """Number and error of each job that failed."""
    return {int(key.split()[1]): text for key, text in study.user_attrs.items() if key.startswith("error ") and text}


def _report(study: "Study", monitor: str, fixed: list[str], folder: Path, run: Run) -> None:
    """Prints the table and the command that makes the winner, and leaves sweep.csv in the folder and in the run.

    A row a finished job, best first: number, the swept settings, the objective, state, and its error if any.
    """
    errors = _errors(study)
    rows: list[dict[str, Any]] = [
        {"job": trial.number, **_written(trial.params), monitor: trial.value}
        | {"state": "failed" if trial.number in errors else "done", "error": errors.get(trial.number, "")}
        for trial in study.trials
        if trial.state.is_finished() or trial.number in errors
    ]
    if not rows:
        return
    ascending = study.direction.name == "MINIMIZE"
    table = pd.DataFrame(rows).astype({monitor: float}).sort_values(monitor, ascending=ascending, kind="stable")
    write_atomic(folder / "sweep.csv", table.to_csv(index=False))
    run.artifacts(folder / "sweep.csv", "sweep")
    columns = table.drop(columns="error")
    print(f"\n{columns.to_string(index=False, na_rep='-', float_format=lambda x: f'{x:.4f}')}\n")
    if len(errors) < len(rows):
        best = study.best_trial
        settings = [line for line in fixed if not line.lstrip("+").startswith(NOT_THE_MODELS)]
        winner = [f"{key}={value}" for key, value in _written(best.params).items()]
        again = shlex.join(["python", "train.py", *settings, *winner])
        print(f"best of {len(table)}: job {best.number}, {monitor} {best.value:.4f}")
        print(f"again, with report and bundle:\n  {again}")
        run.metrics({f"best/{monitor}": best.value or 0.0})
        run.tags({"sweep.winner": again})
    print(f"table {folder / 'sweep.csv'}, runs in {folder}")


def _written(params: dict[str, Any]) -> dict[str, str]:
    """Proposed values as they are given to a job; four digits, so that people can read and repeat them."""
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in params.items()}
