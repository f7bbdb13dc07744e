"""What a sweep found: a table on the terminal and as CSV, a picture, and the command that makes the winner again."""

import shlex
from pathlib import Path

import pandas as pd

from chestct.config.schema import TrainerConfig
from chestct.sweep.jobs import FAILED, PRUNED, Outcome
from chestct.tracking import Run

NOT_THE_MODELS = ("sweep=", "launcher=", "hydra", "evaluation.report=", "tracking.run_name=")
"""Beginnings of overrides that tell how a sweep runs, not what a job trains."""


def report(outcomes: list[Outcome], trainer: TrainerConfig, fixed: list[str], folder: Path, run: Run) -> None:
    """Prints the table and the winner's command, and leaves sweep.csv and sweep.png in the folder and in the run."""
    if not outcomes:
        return
    table = to_table(outcomes, trainer)
    write_whole(folder / "sweep.csv", table.to_csv(index=False).encode())
    shown = table.drop(columns=[name for name in ("error",) if name in table])
    print(f"\n{shown.to_string(index=False, na_rep='-', float_format=lambda x: f'{x:.4f}')}\n")
    best = winner(outcomes, trainer)
    if best is not None:
        print(f"best of {len(outcomes)}: job {best.number}, {trainer.monitor} {best.value:.4f}")
        print(f"again, with report and bundle:\n  {command(best, fixed)}")
        run.metrics({f"best/{trainer.monitor}": best.value or 0.0})
        run.tags({"sweep.winner": command(best, fixed)})
    if len({o.value for o in outcomes if o.value is not None}) > 1:
        from chestct.sweep.picture import parallel_coordinates

        write_whole(folder / "sweep.png", parallel_coordinates(outcomes, trainer))
        run.artifacts(folder / "sweep.png", "sweep")
    run.artifacts(folder / "sweep.csv", "sweep")
    print(f"table {folder / 'sweep.csv'}, picture {folder / 'sweep.png'}, runs in {folder}")


def to_table(outcomes: list[Outcome], trainer: TrainerConfig) -> pd.DataFrame:
    """One row a job, best first: number, the swept settings, the objective, state, and the error if there is one."""
    rows = [
        {"job": o.number, **o.params, trainer.monitor: o.value, "state": o.state, "error": o.error} for o in outcomes
    ]
    table = pd.DataFrame(rows).astype({trainer.monitor: float})
    return table.sort_values(trainer.monitor, ascending=trainer.mode == "min", kind="stable", na_position="last")


def winner(outcomes: list[Outcome], trainer: TrainerConfig) -> Outcome | None:
    """The finished job with the best objective, the first of equals; None where there is none."""
    done = [o for o in outcomes if o.value is not None and o.state not in (PRUNED, FAILED)]
    sign = 1 if trainer.mode == "min" else -1
    return min(done, key=lambda o: sign * (o.value or 0.0), default=None)


def command(best: Outcome, fixed: list[str]) -> str:
    """The command line that trains the winner again, as one run."""
    settings = [line for line in fixed if not line.lstrip("+").startswith(NOT_THE_MODELS)]
    settings += [f"{key}={value}" for key, value in best.params.items()]
    return shlex.join(["python", "train.py", *settings])


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)
