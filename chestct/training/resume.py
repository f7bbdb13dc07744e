"""Going on from a checkpoint: what it has to agree with."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from chestct.config.checks import resolve
from chestct.config.fields import leaves
from chestct.config.schema import Config
from chestct.data.splits import check_own
from chestct.errors import ConfigError
from chestct.models.checkpoint import read_checkpoint
from chestct.models.lightning_module import Classifier, check_fits

FIXED = ("optim.", "model.freeze", "trainer.monitor")
"""Settings, or how they begin, that a checkpoint's states of optimiser, schedule and callbacks decide."""

STEPS = {"accumulate_grad_batches": 1, "limit_train_batches": 1.0}
"""Arguments of Lightning's Trainer that decide, as data.batch_size does, how many steps an epoch has, by which a
falling learning rate counts -> what they are when nothing is said."""

LOSS = ("optim.label_smoothing", "optim.class_weights", "optim.places")
"""Those of the loss, which has no state."""


def resumable(cfg: Config, model: Classifier) -> Path | None:
    """The checkpoint to go on from, once it is known to be whole and to fit the settings and the data.

    Raises WeightsError, DataError, and ConfigError for a setting that would have no effect.
    """
    if not cfg.ckpt:
        return None
    checkpoint = read_checkpoint(Path(cfg.ckpt))
    _check_settings(cfg, checkpoint)  # first: it names the setting by which tensors differ
    check_fits(checkpoint, model)
    check_own(checkpoint["hyper_parameters"]["data"], model.hparams["data"], cfg.ckpt, "start anew without ckpt.")
    return Path(cfg.ckpt)


def _check_settings(cfg: Config, checkpoint: dict[str, Any]) -> None:
    stored = resolve(checkpoint["hyper_parameters"]["settings"])

    def by_key(settings: Config) -> dict[str, Any]:
        steps = {f"trainer.args.{name}": settings.trainer.args.get(name, usual) for name, usual in STEPS.items()}
        return {key: value for key, value, _ in leaves(settings)} | steps

    before, now = by_key(stored), by_key(cfg)
    falls = cfg.optim.schedule != "constant" and not cfg.optim.scheduler
    steps = ("data.batch_size", *(f"trainer.args.{name}" for name in STEPS))
    fixed: tuple[str, ...] = (*FIXED, *steps) if falls else FIXED
    done = checkpoint["epoch"] + 1  # epochs
    unfrozen_at, unfreeze_at = stored.trainer.unfreeze_epoch, cfg.trainer.unfreeze_epoch
    # What has trained does not freeze again.
    if bool(unfreeze_at) != bool(unfrozen_at) or unfrozen_at < done < unfreeze_at:
        fixed += ("trainer.unfreeze_epoch",)
    elif unfreeze_at:
        fixed += ("trainer.unfreeze_blocks",)
    if changed := [key for key in now if key.startswith(fixed) and key not in LOSS and now[key] != before[key]]:
        given = ", ".join(f"{key}={now[key]} (was {before[key]})" for key in changed)
        raise ConfigError(f"{given}: a training goes on as it began. Leave that out, or start anew without ckpt.")
    epochs = cfg.trainer.max_epochs
    if epochs < done:
        raise ConfigError(
            f"trainer.max_epochs={epochs}: {cfg.ckpt} has {done} epochs behind it. Give more, or start anew without "
            "ckpt."
        )
    if falls and any("total_steps" in state for state in checkpoint["lr_schedulers"]):
        raise ConfigError(f"{cfg.ckpt}: its one_cycle is that of an earlier version. Start anew without ckpt.")
    if falls and epochs != stored.trainer.max_epochs:
        rank_zero_only(print)(f"From here on the learning rate is that of a run of {epochs} epochs.")
