"""Optuna's study of a sweep: a grid's combinations, or what TPE proposes.

A proposal depends on the seed and on the trials before it alone, so that a search that was killed and goes on makes the
proposals that it would have made. A trial that was under way is run again under its own number.
"""

import math
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override

from chestct.errors import ChestCTError, ConfigError

if TYPE_CHECKING:
    import optuna
    from hydra.core.utils import JobReturn
    from optuna.distributions import BaseDistribution

STUDY = "study.db"
NAME = "sweep"
PRUNED = "pruned"
STARTUP = 5
"""Random trials before TPE has something to go by: few, because a sweep here has some dozen trials."""


def open_study(
    folder: Path, mode: str, facts: dict[str, Any], space: dict[str, "BaseDistribution"], grid: bool, prune: bool
) -> "optuna.Study":
    """The study in a folder, made where there is none.

    mode: min or max of the objective. facts: what makes it this sweep and no other, in plain data. grid: all
    combinations of the choices in `space` become its trials. Raises ConfigError for the folder of another sweep.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = {"min": "minimize", "max": "maximize"}[mode]
    study = optuna.create_study(storage=_storage(folder), study_name=NAME, direction=direction, load_if_exists=True)
    before = study.user_attrs.get("facts", facts)
    for what, value in facts.items():
        if before.get(what) != value:
            raise ConfigError(
                f"{folder} holds a sweep with another {what}: {before.get(what)}, now {value}. Give the same settings "
                "to go on with it, or begin another with hydra.sweep.dir=FOLDER."
            )
    if grid and "prune" not in study.user_attrs:  # which stands there once all of them are in
        for values in product(*(distribution.choices for distribution in space.values())):
            study.enqueue_trial(dict(zip(space, values, strict=True)), skip_if_exists=True)
    study.set_user_attr("facts", facts)
    study.set_user_attr("prune", prune)
    return study


def distribution(override: Override) -> "BaseDistribution":
    """What a range on the command line stands for: lists of any kind are choices, interval(a, b) is a range."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if not isinstance(value, IntervalSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    return (IntDistribution if whole else FloatDistribution)(value.start, value.end, log="log" in value.tags)


def next_trials(
    study: "optuna.Study", space: dict[str, "BaseDistribution"], total: int, jobs: int, seed: int
) -> "list[optuna.trial.FrozenTrial]":
    """At most `jobs` trials to launch together, with consecutive numbers: those that were cut short, else new ones."""
    import optuna

    states = [optuna.trial.TrialState.RUNNING]
    if not study.get_trials(states=states):
        started = len(study.trials) - len(study.get_trials(states=[optuna.trial.TrialState.WAITING]))
        for number in range(started, min(started + jobs, total)):
            # A sampler of its own for each trial: its draws then do not depend on where a search was interrupted.
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=1009 * seed + number)
            study.ask(space)
    running = study.get_trials(states=states)[:jobs]
    return [trial for i, trial in enumerate(running) if trial.number == running[0].number + i]


def record(study: "optuna.Study", number: int, job: "JobReturn") -> None:
    """Keeps what a job reached. One that failed on a mistake of the user's says so; any other exception is raised."""
    from optuna.trial import TrialState

    try:
        value = job.return_value
        problem = None if math.isfinite(value) else f"the objective is {value}"
    except ChestCTError as error:
        problem = str(error)
    if problem:
        study.set_user_attr(f"error {number}", problem)
        study.tell(number, state=TrialState.FAIL)
    elif study.trials[number].user_attrs.get(PRUNED):
        study.tell(number, state=TrialState.PRUNED)
    else:
        study.tell(number, value)


def trial_of(out: Path) -> "optuna.Trial | None":
    """The trial that the run folder `out` belongs to, where its sweep ends hopeless ones early; else None."""
    if not (out.parent / STUDY).is_file():
        return None
    import optuna

    storage, pruner = _storage(out.parent), optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2)
    study = optuna.load_study(study_name=NAME, storage=storage, pruner=pruner)
    if not study.user_attrs["prune"]:
        return None
    study_id = storage.get_study_id_from_name(NAME)
    return optuna.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, int(out.name)))


def mark_pruned(trial: "optuna.Trial") -> None:
    """Leaves word for the sweep, which may be another process, that this trial was ended early."""
    trial.set_user_attr(PRUNED, True)


def _storage(folder: Path) -> "optuna.storages.RDBStorage":
    import optuna

    # Trials in other processes write, too: wait for them instead of failing.
    return optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY}", engine_kwargs={"connect_args": {"timeout": 60}})
