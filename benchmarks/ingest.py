"""Ingest against Pillow: `python -m benchmarks.ingest FOLDER`, the time of a cold ingest over that of plain decoding.

The yardstick is what nobody can do without: two processes that open each file, make it grey and resize it. Ingest does
that with data.fit=pad; as the public set is configured, it also finds the body and resizes once more. Both start
their own pool, read from a warm page cache, and take turns, so that a busy machine slows both; the CPU seconds tell
what a quiet one would do.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from chestct.config.compose import compose
from chestct.config.schema import DataConfig
from chestct.data.ingest import ingest
from chestct.data.sources import list_slices


@dataclass
class Cost:
    """What one run took: seconds on the wall and of CPU, children included."""

    seconds: float
    cpu: float


def resize(path: Path) -> None:
    Image.open(path).convert("L").resize((224, 224), Image.Resampling.BILINEAR)


def plain(paths: list[Path]) -> None:
    """The yardstick."""
    with multiprocessing.Pool(2) as pool:
        pool.map(resize, paths, chunksize=8)
        pool.close()
        pool.join()  # the CPU seconds of children count once they have ended


def cold(cfg: DataConfig, folder: Path) -> None:
    ingest(cfg, folder / "store")


def ungrouped(cfg: DataConfig, folder: Path) -> None:
    """The ingest without its search for near-copies."""
    from chestct.data import duplicates as groups

    found = groups.find_pairs
    groups.find_pairs = lambda thumbs, content, **_: found(thumbs[:0], [])
    try:
        cold(cfg, folder)
    finally:
        groups.find_pairs = found


def cost(task: Callable[[Path], None]) -> Cost:
    def cpu() -> float:
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usage)

    with tempfile.TemporaryDirectory() as folder:
        start, start_cpu = time.perf_counter(), cpu()
        task(Path(folder))
        return Cost(time.perf_counter() - start, cpu() - start_cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder with class folders as data=chest_ct names them")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    cfg = compose("data=chest_ct", f"data.root={arguments.root}", "data.max_unreadable=1000000").data
    padded = replace(cfg, fit="pad", contrast="keep")
    paths = [file.root / file.path for file in list_slices(cfg).slices]
    tasks: dict[str, Callable[[Path], None]] = {
        "plain": lambda _: plain(paths),
        "padded, without near-copies": partial(ungrouped, padded),
        "padded": partial(cold, padded),
        f"as data=chest_ct (data.fit={cfg.fit})": partial(cold, cfg),
    }
    turns = [{name: cost(task) for name, task in tasks.items()} for _ in range(arguments.turns + 1)][1:]  # first: warm
    table = Table("", "seconds", "CPU seconds", "ratio", "CPU ratio", title=f"{len(paths)} files, medians")
    for name in tasks:
        columns = [
            [turn[name].seconds for turn in turns],
            [turn[name].cpu for turn in turns],
            [turn[name].seconds / turn["plain"].seconds for turn in turns],
            [turn[name].cpu / turn["plain"].cpu for turn in turns],
        ]
        table.add_row(name, *(f"{statistics.median(column):.2f}" for column in columns))
    Console(width=100).print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MB, mapped store included")


if __name__ == "__main__":
    main()
