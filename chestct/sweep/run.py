"""One sweep, start to end: the jobs of a grid or a search are launched, told of, and summed up in a table.

Hydra's launchers run the jobs, one after the other, in processes or on a cluster. A job that fails on a mistake that
the user can mend does not stop the others.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf, open_dict

from chestct.config.schema import Config
from chestct.errors import ChestCTError, Interrupted
from chestct.sweep.jobs import FAILED, Outcome, launch, outcome
from chestct.sweep.search import STUDY, search
from chestct.sweep.table import report
from chestct.tracking import open_run, sole_writer

if TYPE_CHECKING:
    from hydra_plugins.chestct_sweeper import ChestCTSweeper


def sweep(sweeper: "ChestCTSweeper", arguments: list[str]) -> None:
    """Runs the jobs that `arguments` (Hydra's overrides) and the sweeper's settings describe.

    Raises ConfigError for a setting that does not exist, ChestCTError in the end where jobs failed, and Interrupted.
    """
    overrides = _parsed(sweeper, arguments)
    cfg = _settings(sweeper, overrides)
    folder = Path(sweeper.config.hydra.sweep.dir)
    fixed = [str(override.input_line) for override in overrides.values() if not override.is_sweep_override()]
    outcomes: list[Outcome] = []
    if sweeper.config.hydra.job.name != "train":  # other programs have no objective, and no MLflow run
        _grid(sweeper, overrides, outcomes)
    else:
        with sole_writer(folder), _orderly(folder), open_run(cfg, folder, sweep=True) as run:
            run.begin()
            try:
                if sweeper.trials:
                    search(sweeper, cfg, overrides, outcomes)
                else:
                    _grid(sweeper, overrides, outcomes)
            finally:
                report(outcomes, cfg.trainer, fixed, folder, run)
    failed = [f"job {o.number}: {o.error}" for o in outcomes if o.state == FAILED]
    if failed:
        raise ChestCTError("\n".join([f"{len(failed)} of {len(outcomes)} jobs failed.", *failed]))


def _parsed(sweeper: "ChestCTSweeper", arguments: list[str]) -> dict[str, Override]:
    """Overrides by key; the command line's replace those of the sweeper's settings."""
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    lines = [f"{key}={_line(value)}" for key, value in sweeper.params.items()] + arguments
    return {override.get_key_element().lstrip("+"): override for override in parser.parse_overrides(lines)}


def _line(value: object) -> str:
    """A value in YAML as on the command line, where null and booleans are written in small letters."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _settings(sweeper: "ChestCTSweeper", overrides: dict[str, Override]) -> Config:
    """The settings of the sweep as a whole; composed with every key, so that a misspelt one stops it here.

    Not checked: a value may fit only together with a swept one. Each job checks its own.
    """
    lines = [_example(override) for override in overrides.values()]
    composed = sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, lines)
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


def _grid(sweeper: "ChestCTSweeper", overrides: dict[str, Override], outcomes: list[Outcome]) -> None:
    """Every combination; adds to `outcomes` as jobs end."""
    swept = {key for key, override in overrides.items() if override.is_sweep_override()}
    for batch in BasicSweeper.split_arguments(list(overrides.values()), sweeper.jobs):
        first = len(outcomes)
        for number, (lines, job) in enumerate(zip(batch, launch(sweeper, batch, first), strict=True), first):
            given = dict(line.lstrip("+").split("=", 1) for line in lines)
            outcomes.append(outcome(number, {key: value for key, value in given.items() if key in swept}, job))


@contextmanager
def _orderly(folder: Path) -> Iterator[None]:
    """Says how to go on where the user or the machine ends the sweep."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        again = " The same command goes on with it." if (folder / STUDY).is_file() else ""
        raise Interrupted(f"The sweep in {folder} was stopped.{again}") from None
