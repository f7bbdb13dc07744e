"""The LightningModule: loss, metrics, optimiser and schedule around the plain network.

Its hyper-parameters are the run's settings as plain containers, so a checkpoint loads with `weights_only=True` and
knows the data it was made for. Convolutions that never train are not saved: the checkpoint names the weights instead.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics import classification as tm

from chestct.config.checks import resolve
from chestct.config.targets import build, check_trusted
from chestct.errors import WeightsError
from chestct.models.checkpoint import read_checkpoint
from chestct.models.vgg16 import VGG16, count_parameters
from chestct.models.weights import load_weights

Batch = dict[str, torch.Tensor]


class Classifier(L.LightningModule):
    """Trains a VGG16 on batches of `x` (slices, or pooled features), `y` and `i` as SliceDataset makes them.

    settings: the run's Config as plain containers; class_names: in the order of the targets; class_counts: slices of
    each class in train, for the class weights; data: what identifies the data (hash, split, leaks), kept for the
    record.
    """

    # Frozen convolutions are not in the checkpoint; `on_load_checkpoint` looks that nothing else is missing.
    strict_loading = False

    def __init__(
        self, settings: dict[str, Any], class_names: Sequence[str], class_counts: Sequence[float], data: dict[str, Any]
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # tracking records the settings itself
        self.cfg = cfg = resolve(settings)
        self.class_names = tuple(class_names)
        weights = load_weights(cfg.model.weights, cfg.model.backbone)
        outputs = 1 if cfg.task == "binary" else len(class_names)
        self.net = VGG16(cfg.model, outputs, cfg.data.size, weights)
        self.net.set_frozen(cfg.model.freeze)
        counts = torch.tensor(class_counts, dtype=torch.float32)
        weight = counts.sum() / (len(counts) * counts) if cfg.optim.class_weights else torch.ones(len(counts))
        self.register_buffer("class_weight", weight, persistent=False)
        self.metrics = nn.ModuleDict({f"{s}_": metric_collection(outputs, s) for s in ("train", "valid", "test")})
        self.losses = nn.ModuleDict({f"{s}_": MeanMetric() for s in ("train", "valid", "test")})
        self.predictions: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: slices float [B, 1, S, S] in [0, 1], or features [B, D]. Returns logits [B, outputs]."""
        return self.net.head(x) if x.ndim == 2 else self.net(x)

    def loss(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Class-weighted mean of binary or categorical cross-entropy with label smoothing; logits [B, K], y [B]."""
        weight = cast(torch.Tensor, self.class_weight)
        smoothing = self.cfg.optim.label_smoothing
        if logits.shape[1] > 1:
            return functional.cross_entropy(logits, y, weight, label_smoothing=smoothing)
        target = y * (1 - smoothing) + smoothing / 2
        losses = functional.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none")
        return (losses * weight[y]).sum() / weight[y].sum()

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        loss = self._step(batch, "train")
        if self.trainer.is_last_batch:  # not at the end of the epoch: callbacks that look then would come too early
            self._log_metrics("train")
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        self._step(batch, "valid")

    def test_step(self, batch: Batch, _: int) -> None:
        self._step(batch, "test")

    def _step(self, batch: Batch, stage: str) -> torch.Tensor:
        logits = self(batch["x"])
        loss = self.loss(logits, batch["y"])
        # Batches count by their class weights: the mean over an epoch is that over its slices, however they are dealt.
        weight = cast(torch.Tensor, self.class_weight)[batch["y"]].sum()
        cast(MeanMetric, self.losses[f"{stage}_"]).update(loss.detach(), weight)
        scores = logits.detach().float()
        # Scores, not logits: torchmetrics takes logits that happen to lie in [0, 1] for scores.
        scores = scores[:, 0].sigmoid() if scores.shape[1] == 1 else scores.softmax(1)
        cast(MetricCollection, self.metrics[f"{stage}_"]).update(scores, batch["y"])
        if stage != "train":
            self.predictions.setdefault(stage, []).append((batch["i"].cpu(), logits.detach().float().cpu()))
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout draws from here: a resumed run draws in each step what the uninterrupted one would have drawn.
        seed = (self.cfg.seed * 1_000_003 + self.global_step) * self.trainer.world_size + self.trainer.global_rank
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes milliseconds where there is no GPU
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _log_metrics(self, stage: str) -> None:
        # Once an epoch: logged in every step, metrics would cost more than all else that a step on features does.
        self.log_dict(cast(MetricCollection, self.metrics[f"{stage}_"]), on_step=False, on_epoch=True)
        mean = cast(MeanMetric, self.losses[f"{stage}_"])
        self.log(f"{stage}/loss", mean, on_step=False, on_epoch=True, prog_bar=stage == "valid")

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("valid")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def on_validation_epoch_start(self) -> None:
        self._begin("valid")

    def on_test_epoch_start(self) -> None:
        self._begin("test")

    def _begin(self, stage: str) -> None:
        # Lightning resets only what the same trainer has measured.
        self.predictions.pop(stage, None)
        cast(MetricCollection, self.metrics[f"{stage}_"]).reset()
        cast(MeanMetric, self.losses[f"{stage}_"]).reset()

    def logits(self, stage: str) -> torch.Tensor:
        """Logits [N, outputs] of the last validation or test of one process, in the order of the split's slices."""
        positions, logits = (torch.cat(parts) for parts in zip(*self.predictions[stage], strict=True))
        return logits[positions.argsort()]

    def configure_optimizers(self) -> Any:
        cfg = self.cfg.optim
        optimizer: torch.optim.Optimizer
        # Convolutions that join in later are in the optimiser from the start: without gradients it leaves them alone.
        later = self.net.features[self._first_layer() :].parameters()
        groups = [
            {"params": list(self.net.head.parameters()), "lr": cfg.lr},
            {"params": list(later), "lr": cfg.lr * cfg.backbone_lr_ratio},
        ]
        groups = [group for group in groups if group["params"]]
        if cfg.optimizer:
            optimizer = build(cfg.optimizer, torch.optim.Optimizer, "optim.optimizer", groups)
        elif cfg.name == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=cfg.momentum, weight_decay=cfg.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)
        if cfg.scheduler:
            own = build(cfg.scheduler, lr_scheduler.LRScheduler, "optim.scheduler", optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": own, "monitor": self.cfg.trainer.monitor}}
        schedule = self._schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LRScheduler:
        cfg = self.cfg.optim
        if cfg.schedule == "one_cycle":
            top = [group["lr"] for group in optimizer.param_groups]
            # One step more than will be taken: Lightning steps the schedule once after the last batch.
            return lr_scheduler.OneCycleLR(optimizer, top, total_steps=steps + 1, pct_start=max(cfg.warmup, 1 / steps))
        warmup = round(cfg.warmup * steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if cfg.schedule == "constant":
                return 1.0
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))

        return lr_scheduler.LambdaLR(optimizer, factor)

    def _first_layer(self) -> int:
        """Index of the first layer of the convolutions that trains at any time in the run."""
        later = self.cfg.trainer
        return self.net.first_trainable(5 - later.unfreeze_blocks if later.unfreeze_epoch else self.cfg.model.freeze)

    def parameter_counts(self) -> dict[str, int]:
        """Trainable and all parameters, as the settings leave them after the last unfreezing."""
        head, _ = count_parameters(list(self.net.head.parameters()))
        _, later = count_parameters(list(self.net.features[self._first_layer() :].parameters()))
        _, everything = count_parameters(list(self.net.parameters()))
        return {"parameters/trainable": head + later, "parameters/all": everything}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        state = super().state_dict(*args, **kwargs)
        if self.cfg.always_frozen:
            return {key: tensor for key, tensor in state.items() if not key.startswith("net.features.")}
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["chestct"] = {"weights": self.net.digest}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(checkpoint, self)


def metric_collection(outputs: int, stage: str) -> MetricCollection:
    """What is measured on every epoch of a stage: binary metrics of the class cancer, or macro means over classes."""
    if outputs == 1:
        parts: dict[str, Any] = {
            "accuracy": tm.BinaryAccuracy(),
            "precision": tm.BinaryPrecision(),
            "recall": tm.BinaryRecall(),
            "specificity": tm.BinarySpecificity(),
            "f1": tm.BinaryF1Score(),
            "auroc": tm.BinaryAUROC(),
            "average_precision": tm.BinaryAveragePrecision(),
            "balanced_accuracy": BinaryBalancedAccuracy(),
        }
    else:
        parts = {
            "accuracy": tm.MulticlassAccuracy(outputs, average="micro"),
            "precision": tm.MulticlassPrecision(outputs),
            "recall": tm.MulticlassRecall(outputs),
            "f1": tm.MulticlassF1Score(outputs),
            "auroc": tm.MulticlassAUROC(outputs),
            "average_precision": tm.MulticlassAveragePrecision(outputs),
            "balanced_accuracy": tm.MulticlassAccuracy(outputs, average="macro"),
        }
    return MetricCollection(parts, prefix=f"{stage}/")


class BinaryBalancedAccuracy(tm.BinaryStatScores):
    """Mean of sensitivity and specificity; torchmetrics has it for several classes only."""

    def compute(self) -> torch.Tensor:
        tp, fp, tn, fn = (getattr(self, name).float() for name in ("tp", "fp", "tn", "fn"))
        return (tp / (tp + fn).clamp(min=1) + tn / (tn + fp).clamp(min=1)) / 2


def load_classifier(path: Path, trust: Sequence[str] = ()) -> Classifier:
    """The classifier in a checkpoint, on the CPU.

    trust: packages whose classes its settings may name, besides those of chestct.config.targets. Raises ConfigError
    where they name others, WeightsError as `read_checkpoint` and `check_fits` do.
    """
    checkpoint = read_checkpoint(path)
    check_trusted(checkpoint["hyper_parameters"]["settings"], str(path), trust)
    model = Classifier(**checkpoint["hyper_parameters"])
    check_fits(checkpoint, model)
    model.load_state_dict(checkpoint["state_dict"], strict=False)
    return model


def check_fits(checkpoint: dict[str, Any], model: Classifier) -> None:
    """Raises WeightsError where a checkpoint belongs to another task, another network or other weights."""
    theirs = resolve(checkpoint["hyper_parameters"]["settings"])
    if theirs.task != model.cfg.task:
        raise WeightsError(f"The checkpoint was made for task={theirs.task}, not task={model.cfg.task}.")
    state, wanted = checkpoint["state_dict"], model.state_dict()
    differing = sorted(
        key
        for key in state.keys() | wanted.keys()
        if getattr(state.get(key), "shape", 0) != getattr(wanted.get(key), "shape", 1)
    )
    if differing:
        ours, other = (dataclasses.asdict(cfg.model) for cfg in (model.cfg, theirs))
        settings = ", ".join(f"model.{k}={other[k]} (now {ours[k]})" for k in ours if ours[k] != other[k])
        raise WeightsError(
            f"The checkpoint belongs to another model: {settings or 'the tensor ' + differing[0] + ' differs'}. "
            "Give the settings it was made with, or start anew without ckpt."
        )
    if model.cfg.always_frozen and checkpoint["chestct"]["weights"] != model.net.digest:
        raise WeightsError(
            "The checkpoint's head was trained on other convolution weights than "
            f"model.weights={model.cfg.model.weights} now gives."
        )
