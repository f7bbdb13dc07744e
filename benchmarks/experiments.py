"""What keeping records costs, and how long a sweep takes.

    python -m benchmarks.experiments [tracking] [sweep] [--slices 64] [--rounds 3]

Trains the uncached network (`features.cache=false`) without tracking and with the local store, in turns; prints the
seconds of an epoch as ratios, and the share of the time that the calls which record take. (That no call waits for a
server is tested in tests/e2e/test_servers.py.) Then a head sweep of twelve trials on warm features, in one process.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chestct.config.compose import CONF, compose
from chestct.config.schema import PhantomConfig
from chestct.phantom.dataset import write
from chestct.tracking import open_run
from chestct.tracking.logger import RunLogger
from chestct.training import train

EPOCHS = 6
CASES = ("off", "local store")


def epoch_seconds(case: str, settings: tuple[str, ...], out: Path) -> tuple[float, float]:
    """Seconds of an epoch, start and end of the run left out, and the share of them that recording took."""
    spent = 0.0
    log = RunLogger.log_metrics

    def timed(self: RunLogger, *args: object, **kwargs: object) -> None:
        nonlocal spent
        began = time.perf_counter()
        log(self, *args, **kwargs)  # type: ignore[arg-type]
        spent += time.perf_counter() - began

    uri = f"sqlite:///{out}.db"
    more = ["tracking=off"] if case == "off" else ["tracking=mlflow", f"tracking.uri={uri}", f"tracking.local={uri}"]
    cfg = compose(*settings, *more)
    with open_run(cfg, out) as run:
        RunLogger.log_metrics = timed  # type: ignore[method-assign]
        try:
            began = time.perf_counter()
            train(cfg, out, run)
            took = time.perf_counter() - began
        finally:
            RunLogger.log_metrics = log  # type: ignore[method-assign]
    return took / EPOCHS, spent / took


def tracking(slices: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root / "set", PhantomConfig(slices=slices))
        settings = (
            *(f"data.root={root}/set", f"cache_dir={root}/cache", "features.cache=false", "evaluation.report=false"),
            *(f"trainer.max_epochs={EPOCHS}", "trainer.patience=0", "trainer.progress=false"),
        )
        for case in CASES:
            epoch_seconds(case, settings, root / case)  # store, audit and imports are there afterwards
        times: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
        for turn in range(rounds):
            for case in CASES:
                times[case].append(epoch_seconds(case, settings, root / f"{case}-{turn}"))
        print(f"an epoch of the uncached network on {slices} phantoms, median of {rounds}")
        off = statistics.median(seconds for seconds, _ in times["off"])
        for case, rounds_of in times.items():
            seconds, share = (statistics.median(values) for values in zip(*rounds_of, strict=True))
            print(
                f"  {case:22}{seconds:7.2f} s   {seconds / off:.3f} of off   {100 * share:.2f} % in calls that record"
            )


def sweep() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(CONF.parent / "train.py"), "trainer.progress=false"]
        quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
        subprocess.run([*command, "evaluation.report=false"], **quiet)  # type: ignore[call-overload]
        began, before = time.perf_counter(), os.times()
        subprocess.run([*command, "-m", "sweep=head"], **quiet)  # type: ignore[call-overload]
        took, after = time.perf_counter() - began, os.times()
        used = sum(after[2:4]) - sum(before[2:4])
        print(f"head sweep of 12 trials, warm features: {took:.1f} s, {used:.1f} s of processor, start included")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["tracking", "sweep", []], help="both, if nothing is said")
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if "sweep" not in args.what or "tracking" in args.what:
        tracking(args.slices, args.rounds)
    if "tracking" not in args.what or "sweep" in args.what:
        sweep()


if __name__ == "__main__":
    main()
