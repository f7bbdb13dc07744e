"""The search over settings: Optuna's TPE proposes, and the study in the sweep's folder remembers.

A proposal depends on the seed and on the trials before it alone, so that a search that was killed and goes on makes the
proposals that it would have made. A trial that was under way is run again under its own number.
"""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override

from chestct.config.schema import Config
from chestct.errors import ChestCTError, ConfigError
from chestct.sweep.jobs import DONE, FAILED, PRUNED, Outcome, launch, outcome

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

    from hydra_plugins.chestct_sweeper import ChestCTSweeper

STUDY = "study.db"
STARTUP = 5
"""Random trials before TPE has something to go by: few, because a sweep here has some dozen trials."""


def search(sweeper: "ChestCTSweeper", cfg: Config, overrides: dict[str, Override], outcomes: list[Outcome]) -> None:
    """Runs the trials that are left of sweeper.trials; fills `outcomes` with all of them, earlier ones included.

    Raises ConfigError where the folder holds the study of another search, ChestCTError without Optuna.
    """
    space = {key: distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
    fixed = [str(override.input_line) for override in overrides.values() if not override.is_sweep_override()]
    if not space:
        raise ConfigError("Nothing to search: give ranges, as in 'optim.lr=interval(1e-4,1e-1)', or take a sweep=...")
    study = _study(Path(sweeper.config.hydra.sweep.dir), cfg)
    facts = {"space": {key: str(d) for key, d in space.items()}, "settings": sorted(fixed), "seed": sweeper.seed}
    _claim(study, facts, sweeper)
    try:
        while todo := _next(study, sweeper, space):
            jobs = [fixed + [f"{key}={value}" for key, value in written(trial.params).items()] for trial in todo]
            for trial, job in zip(todo, launch(sweeper, jobs, todo[0].number), strict=True):
                _tell(study, trial.number, outcome(trial.number, {}, job))
    finally:
        outcomes += [_outcome(study, trial) for trial in study.trials if trial.state.is_finished()]


def trial_of(out: Path) -> "optuna.Trial | None":
    """The trial that the run folder `out` belongs to, where its sweep ends hopeless ones early; else None."""
    if not (out.parent / STUDY).is_file():
        return None
    optuna = _optuna()
    study = optuna.load_study(study_name="sweep", storage=_storage(out.parent), pruner=_pruner())
    if not study.user_attrs["prune"]:
        return None
    return optuna.Trial(study, study.trials[int(out.name)]._trial_id)


def mark_pruned(trial: "optuna.Trial") -> None:
    """Tells the sweep, which may be another process, that this trial was ended early."""
    trial.set_user_attr(PRUNED, True)


def distribution(override: Override) -> "BaseDistribution":
    """What a range on the command line stands for: lists of any kind are choices, interval(a, b) is a range."""
    distributions = _optuna().distributions
    value = override.value()
    if not isinstance(value, IntervalSweep):
        return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    return kind(value.start, value.end, log="log" in value.tags)


def written(params: dict[str, Any]) -> dict[str, str]:
    """Proposed values as they are given to a job; four digits, so that people can read and repeat them."""
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in params.items()}


def _claim(study: "optuna.Study", facts: dict[str, Any], sweeper: "ChestCTSweeper") -> None:
    """Makes the study that of this search, or raises ConfigError where it is another's."""
    before = study.user_attrs.get("facts", facts)
    for what, value in facts.items():
        if before[what] != value:
            raise ConfigError(
                f"{sweeper.config.hydra.sweep.dir} holds a sweep with another {what}: {before[what]}, now {value}. "
                "Give the same settings to go on with it, or begin another with hydra.sweep.dir=FOLDER."
            )
    study.set_user_attr("facts", facts)
    study.set_user_attr("prune", sweeper.prune)


def _next(
    study: "optuna.Study", sweeper: "ChestCTSweeper", space: dict[str, "BaseDistribution"]
) -> "list[optuna.trial.FrozenTrial]":
    """The trials to launch together: those that were cut short, else new ones; with consecutive numbers."""
    optuna = _optuna()
    running = study.get_trials(states=[optuna.trial.TrialState.RUNNING])
    if not running:
        for number in range(len(study.trials), min(len(study.trials) + sweeper.jobs, sweeper.trials)):
            # A sampler of its own for each trial: its draws then do not depend on where a search was interrupted.
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=1009 * sweeper.seed + number)
            study.ask(space)
        running = study.get_trials(states=[optuna.trial.TrialState.RUNNING])
    runs = groupby(enumerate(running), lambda pair: pair[1].number - pair[0])
    return [trial for _, trial in next(runs, (0, []))[1]][: sweeper.jobs]


def _tell(study: "optuna.Study", number: int, found: Outcome) -> None:
    states = _optuna().trial.TrialState
    if found.state == FAILED:
        study.set_user_attr(f"{FAILED} {number}", found.error)
        study.tell(number, state=states.FAIL)
    elif study.trials[number].user_attrs.get(PRUNED):
        study.tell(number, state=states.PRUNED)
    else:
        study.tell(number, found.value)


def _outcome(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> Outcome:
    state = {"COMPLETE": DONE, "PRUNED": PRUNED, "FAIL": FAILED}[trial.state.name]
    error = study.user_attrs.get(f"{FAILED} {trial.number}", "")
    return Outcome(trial.number, written(trial.params), trial.value, state, error)


def _study(folder: Path, cfg: Config) -> "optuna.Study":
    optuna = _optuna()
    direction = {"min": "minimize", "max": "maximize"}[cfg.trainer.mode]
    return optuna.create_study(study_name="sweep", storage=_storage(folder), direction=direction, load_if_exists=True)


def _storage(folder: Path) -> Any:
    # Trials in other processes write, too: wait for them instead of failing.
    return _optuna().storages.RDBStorage(f"sqlite:///{folder / STUDY}", engine_kwargs={"connect_args": {"timeout": 60}})


def _pruner() -> Any:
    return _optuna().pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2)


def _optuna() -> Any:
    """Optuna, which belongs to an extra and takes a second to import."""
    try:
        import optuna
    except ImportError:
        raise ChestCTError("Searches need Optuna: pip install 'chestct[sweep]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
