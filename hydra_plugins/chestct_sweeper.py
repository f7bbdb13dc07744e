"""Hydra's entrance to chestct.sweep: Hydra finds sweepers in packages named hydra_plugins, and nowhere else."""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ChestCTSweeper(Sweeper):
    """Grids and searches; conf/hydra/sweeper/chestct.yaml explains the settings."""

    def __init__(self, **_: Any) -> None:  # the settings are read from the config
        pass

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.loader = config, hydra_context.config_loader
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from chestct.sweep import sweep  # Hydra imports this module for every command

        sweep(arguments, self.config, self.loader, self.launcher)
