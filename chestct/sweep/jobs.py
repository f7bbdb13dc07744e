"""What Hydra's launchers run, and what came out of it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus

from chestct.errors import ChestCTError

if TYPE_CHECKING:
    from hydra_plugins.chestct_sweeper import ChestCTSweeper

DONE, PRUNED, FAILED = "done", "pruned", "failed"


@dataclass(frozen=True)
class Outcome:
    """One job of a sweep: what it was given beside what all were given, and the objective that it reached."""

    number: int
    params: dict[str, str]  # setting -> value, as on the command line
    value: float | None
    state: str
    error: str = ""


def launch(sweeper: "ChestCTSweeper", jobs: list[list[str]], first: int) -> list[JobReturn]:
    """Runs jobs, each a list of overrides, under the numbers first, first + 1, ..."""
    return list(sweeper.launcher.launch(jobs, initial_job_idx=first))


def outcome(number: int, params: dict[str, str], job: JobReturn) -> Outcome:
    """Of a job that ended; what failed on a mistake of the user's says so, any other exception is raised."""
    if job.status != JobStatus.COMPLETED:
        error = job._return_value  # the property return_value would raise it
        if not isinstance(error, ChestCTError):
            raise error
        return Outcome(number, params, None, FAILED, str(error))
    value = job.return_value
    if isinstance(value, float) and not math.isfinite(value):
        return Outcome(number, params, None, FAILED, f"the objective is {value}")
    return Outcome(number, params, value, DONE)
