"""How fast the frozen path is, as ratios within one run: `python -m benchmarks.speed [--slices 64]`.

Twenty epochs of a head on frozen convolutions: every step through them, features cached from cold, and cached and warm.
Absolute figures are this machine's, ratios are worth comparing.
"""

import argparse
import tempfile
import time
from pathlib import Path

from chestct.config.compose import compose
from chestct.config.schema import PhantomConfig
from chestct.phantom.dataset import write
from chestct.training import train

SETTINGS = (
    *("data.views=0", "trainer.max_epochs=20", "trainer.patience=0", "trainer.progress=false", "tracking=off"),
    "evaluation.report=false",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=64)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root / "set", PhantomConfig(slices=parser.parse_args().slices))
        settings = (*SETTINGS, f"data.root={root}/set", f"cache_dir={root}/cache")
        train(compose(*settings, "trainer.max_epochs=1", "features.cache=false"), root / "first")  # store and audit
        cases = {"every step": ("features.cache=false",), "cold cache": (), "warm cache": ()}
        every_step = 0.0
        for name, more in cases.items():
            start = time.perf_counter()
            train(compose(*settings, *more), root / name)
            seconds = time.perf_counter() - start
            every_step = every_step or seconds
            print(f"{name:14}{seconds:8.1f} s   {seconds / every_step:.3f} of running every step")


if __name__ == "__main__":
    main()
