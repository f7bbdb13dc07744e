"""The results of a sweep: a table on the terminal and as CSV, a picture, and the command that makes the winner."""

import io
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from chestct.files import write_atomic
from chestct.tracking import Run

if TYPE_CHECKING:
    import optuna

STATES = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
NOT_THE_MODELS = ("sweep=", "launcher=", "hydra", "evaluation.report=", "tracking.run_name=")
"""Beginnings of overrides that describe how a sweep runs, not what a job trains."""


def report(study: "optuna.Study", monitor: str, fixed: list[str], folder: Path, run: Run) -> None:
    """Prints the table and the winner's command, and leaves sweep.csv and sweep.png in the folder and in the run."""
    table = to_table(study, monitor)
    if table.empty:
        return
    write_atomic(folder / "sweep.csv", table.to_csv(index=False))
    columns = table.drop(columns="error")
    print(f"\n{columns.to_string(index=False, na_rep='-', float_format=lambda x: f'{x:.4f}')}\n")
    if (table["state"] == "done").any():
        best = study.best_trial
        again = command(written(best.params), fixed)
        print(f"best of {len(table)}: job {best.number}, {monitor} {best.value:.4f}")
        print(f"again, with report and bundle:\n  {again}")
        run.metrics({f"best/{monitor}": best.value or 0.0})
        run.tags({"sweep.winner": again})
    if table[monitor].nunique() > 1 and study.trials[0].params:
        write_atomic(folder / "sweep.png", parallel_coordinates(study, monitor))
        run.artifacts(folder / "sweep.png", "sweep")
    run.artifacts(folder / "sweep.csv", "sweep")
    print(f"table {folder / 'sweep.csv'}, picture {folder / 'sweep.png'}, runs in {folder}")


def to_table(study: "optuna.Study", monitor: str) -> pd.DataFrame:
    """One row a finished job, best first: number, the swept settings, the objective, state, and its error if any."""
    errors = failures(study)
    rows = [
        {"job": trial.number, **written(trial.params), monitor: trial.value}
        | {"state": STATES[trial.state.name], "error": errors.get(trial.number, "")}
        for trial in study.trials
        if trial.state.is_finished()
    ]
    table = pd.DataFrame(rows, columns=None if rows else [monitor]).astype({monitor: float})
    ascending = study.direction.name == "MINIMIZE"
    return table.sort_values(monitor, ascending=ascending, kind="stable", na_position="last")


def failures(study: "optuna.Study") -> dict[int, str]:
    """Number and error of each job that failed."""
    key = "error "
    return {int(name.removeprefix(key)): text for name, text in study.user_attrs.items() if name.startswith(key)}


def written(params: dict[str, Any]) -> dict[str, str]:
    """Proposed values as they are given to a job; four digits, so that people can read and repeat them."""
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in params.items()}


def command(params: dict[str, str], fixed: list[str]) -> str:
    """The command line that trains a job again, as one run."""
    settings = [line for line in fixed if not line.lstrip("+").startswith(NOT_THE_MODELS)]
    return shlex.join(["python", "train.py", *settings, *(f"{key}={value}" for key, value in params.items())])


def parallel_coordinates(study: "optuna.Study", monitor: str) -> bytes:
    """Optuna's picture as PNG: one axis a setting, one line a job, coloured by the objective."""
    from matplotlib import pyplot
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    pyplot.switch_backend("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its Matplotlib pictures experimental
        figure = plot_parallel_coordinate(study, target_name=monitor).figure
    figure.set_size_inches(2.2 * len(study.trials[0].params) + 4, 5)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return picture.getvalue()
