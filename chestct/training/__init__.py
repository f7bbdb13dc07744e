"""Training: `train(cfg, out, run)` is what `chestct train` calls."""

import logging
import warnings

from chestct.training.train import Result, train

__all__ = ["Result", "train"]

# Here, so that the processes that Lightning starts are as quiet: they import this package before anything else happens.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
for message in (
    ".*LeafSpec.*is deprecated.*",  # Lightning 2.6 calls a name that torch 2.14 renamed
    ".*does not have many workers.*",  # batches come whole from memory: more workers would only cost
    ".*exists and is not empty.*",  # a resumed run writes into the folder it began in
    ".*in eval mode at the start of training.*",  # frozen convolutions, on purpose
    ".*is smaller than the logging interval.*",  # an epoch of a few dozen steps is logged once, at its end
):
    warnings.filterwarnings("ignore", message)
