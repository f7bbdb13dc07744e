"""One sweep, start to end: the jobs of a grid or a search are launched and summed up in a table.

Hydra's launchers run the jobs, one after the other, in processes or on a cluster. A job that fails on a mistake that
the user can mend does not stop the others.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from chestct.config.schema import Config
from chestct.errors import ChestCTError, ConfigError, Interrupted
from chestct.sweep.results import failures, report, written
from chestct.sweep.study import distribution, next_trials, open_study, record
from chestct.tracking import open_run, sole_writer


def sweep(arguments: list[str], config: DictConfig, loader: ConfigLoader, launcher: Launcher) -> None:
    """Runs the jobs that `arguments` (Hydra's overrides) and config.hydra.sweeper describe.

    Raises ConfigError for a setting that does not exist, ChestCTError in the end where jobs failed, and Interrupted.
    """
    options, folder = config.hydra.sweeper, Path(config.hydra.sweep.dir)
    overrides = _parsed(arguments, options, loader)
    swept = {key: override for key, override in overrides.items() if override.is_sweep_override()}
    fixed = [str(override.input_line) for key, override in overrides.items() if key not in swept]
    cfg = _settings(overrides, config, loader)
    if not options.trials and (ranges := [k for k, o in swept.items() if isinstance(o.value(), IntervalSweep)]):
        raise ConfigError(f"{ranges[0]}: an interval has no end of values; give hydra.sweeper.trials=N for a search.")
    if options.trials and not swept:
        raise ConfigError("Nothing to search: give ranges, as in 'optim.lr=interval(1e-4,1e-1)', or take a sweep=...")
    if config.hydra.job.name != "train":  # other programs have no objective, and no MLflow run
        lists = [[f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] for o in swept.values()]
        for job in launcher.launch([[*fixed, *values] for values in product(*lists)], initial_job_idx=0):
            _ = job.return_value  # raises what the job raised
        return
    space = {override.get_key_element(): distribution(override) for override in swept.values()}
    facts = {"space": {key: str(value) for key, value in space.items()}, "settings": sorted(fixed)}
    facts["seed"] = options.seed
    hint = "" if options.trials else f"With hydra.sweep.dir={folder}: "
    with (
        sole_writer(folder),
        _resumable(f"{hint}The same command goes on with it."),
        open_run(cfg, folder, sweep=True) as run,
    ):
        study = open_study(folder, cfg.trainer.mode, facts, space, grid=not options.trials, prune=options.prune)
        total = options.trials or len(study.trials)
        run.begin()
        try:
            while trials := next_trials(study, space, total, options.jobs, options.seed):
                jobs = [[*fixed, *(f"{k}={v}" for k, v in written(trial.params).items())] for trial in trials]
                for trial, job in zip(trials, launcher.launch(jobs, trials[0].number), strict=True):
                    record(study, trial.number, job)
        finally:
            report(study, cfg.trainer.monitor, fixed, folder, run)
    if errors := failures(study):
        lines = [f"{len(errors)} of {total} jobs failed.", *(f"job {number}: {e}" for number, e in errors.items())]
        raise ChestCTError("\n".join(lines))


def _parsed(arguments: list[str], options: DictConfig, loader: ConfigLoader) -> dict[str, Override]:
    """Overrides by key; the command line's replace those of the sweeper's settings."""
    lines = [f"{key}={_line(value)}" for key, value in options.params.items()] + arguments
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(lines)
    return {override.get_key_element().lstrip("+"): override for override in parsed}


def _line(value: object) -> str:
    """A value in YAML as on the command line, where null and booleans are written in small letters."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _settings(overrides: dict[str, Override], config: DictConfig, loader: ConfigLoader) -> Config:
    """The settings of the sweep as a whole; composed with every key, so that a misspelt one stops it here.

    Not checked: a value may fit only together with a swept one. Each job checks its own.
    """
    composed = loader.load_sweep_config(config, [_example(override) for override in overrides.values()])
    with open_dict(composed):
        del composed["hydra"]
    cfg = cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed)))
    tracking = dataclasses.replace(cfg.tracking, system_metrics=False)  # the jobs record them
    return dataclasses.replace(cfg, tracking=tracking)


def _example(override: Override) -> str:
    if not override.is_sweep_override():
        return str(override.input_line)
    value = override.value()
    first = value.start if isinstance(value, IntervalSweep) else next(override.sweep_string_iterator())
    return f"{override.get_key_element()}={first}"


@contextmanager
def _resumable(hint: str) -> Iterator[None]:
    """Adds how to go on to the message where the user or the machine ends the sweep."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"The sweep was stopped. {hint}") from None
