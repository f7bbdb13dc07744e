"""Hydra's entrance to chestct.sweep: it looks for sweepers in packages named hydra_plugins, and nowhere else."""

from collections.abc import Mapping
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ChestCTSweeper(Sweeper):
    """Grids and searches; conf/hydra/sweeper/chestct.yaml tells what the settings mean."""

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def __init__(self, trials: int, seed: int, jobs: int, prune: bool, params: Mapping[str, Any]) -> None:
        self.trials, self.seed, self.jobs, self.prune = trials, seed, jobs, prune
        self.params = {str(key): value for key, value in params.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from chestct.sweep import sweep

        sweep(self, arguments)
