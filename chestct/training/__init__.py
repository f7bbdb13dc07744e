"""Training: `train(cfg, out, run)` is what train.py calls."""

from chestct.training.train import Result, train

__all__ = ["Result", "train"]
