"""The LightningModule: loss, metrics, optimiser and schedule around the plain network.

Its hyper-parameters are the run's settings as plain containers, so a checkpoint loads with `weights_only=True` and
knows the data it was made for. Convolutions that never train are not saved: the checkpoint names the weights instead.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torchmetrics import Metric, MetricCollection
from torchmetrics import classification as tm

from chestct.config.checks import resolve
from chestct.config.targets import build, check_trusted
from chestct.data.augment import Batch
from chestct.errors import WeightsError
from chestct.models.checkpoint import read_checkpoint
from chestct.models.head import has_places
from chestct.models.vgg16 import VGG16
from chestct.models.weights import load_weights


class Classifier(L.LightningModule):
    """Trains a VGG16 on batches of `x` (slices, or pooled features), `y` and `i` as SliceDataset makes them.

    settings: the run's Config as plain containers; class_names: in the order of the targets; class_counts: slices of
    each class in train, for the class weights; data: what identifies the data (hash, leaks, the slices that are seen),
    kept for the record and for evaluation.
    """

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
        if cfg.always_frozen:  # hooks work in wrappers, too, such as that of a callback that averages weights
            self.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(_put_back)  # type: ignore[no-untyped-call]
        self.maps = self.net.maps  # for training steps of a head that judges places; compiled if that is asked for
        counts = torch.tensor(class_counts, dtype=torch.float32)
        weight = counts.sum() / (len(counts) * counts) if cfg.optim.class_weights else torch.ones(len(counts))
        self.register_buffer("class_weight", weight, persistent=False)
        self.metrics = nn.ModuleDict({f"{stage}_": metric_collection(outputs, stage) for stage in ("train", "valid")})
        self.losses = nn.ModuleDict({f"{stage}_": MeanLoss() for stage in ("train", "valid")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: slices float [B, 1, S, S] in [0, 1], or features [B, D] or [B, C, h, w]. Returns logits [B, outputs]."""
        return self.net(x) if x.ndim == 4 and x.shape[1] == 1 else self.net.head(x)

    def loss(self, logits: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        """Mean of binary or categorical cross-entropy with label smoothing; logits [B, K], y [B].

        w: float [B], what each slice counts (data.balance); None: the class weights.
        """
        weight = cast(torch.Tensor, self.class_weight)
        smoothing = self.cfg.optim.label_smoothing
        if logits.shape[1] > 1 and w is None:
            return functional.cross_entropy(logits, y, weight, label_smoothing=smoothing)
        if logits.shape[1] > 1:
            losses = functional.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
        else:
            target = y * (1 - smoothing) + smoothing / 2
            losses = functional.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none")
        return (losses * weight[y]).sum() / weight[y].sum() if w is None else (losses * w).mean()

    def measured(
        self, logits: torch.Tensor, y: torch.Tensor, stage: str, w: torch.Tensor | None = None
    ) -> dict[str, float]:
        """Loss and metrics, `stage/NAME`, of a whole split at once: logits float32 [N, K], y int [N], w float [N]."""
        metrics = metric_collection(logits.shape[1], stage)
        metrics.update(_scores(logits), y)
        # Of a split that lacks a class the loss alone: torchmetrics takes an AUROC that is not defined for 0.
        values = metrics.compute() if len(set(y.tolist())) == len(self.class_names) else {}
        device = cast(torch.Tensor, self.class_weight).device
        values[f"{stage}/loss"] = self.loss(logits.to(device), y.to(device), w if w is None else w.to(device))
        return {name: float(value) for name, value in values.items()}

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        loss = self._step(batch, "train")
        if self.trainer.is_last_batch:  # not at the end of the epoch: callbacks that look then would come too early
            self._log_metrics("train")
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        self._step(batch, "valid")

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("valid")

    def _step(self, batch: Batch, stage: str) -> torch.Tensor:
        w = batch.get("w")
        if "places" in batch and has_places(self.net.head):
            evidence = self.net.head[:-1](batch["x"] if batch["x"].shape[1] > 1 else self.maps(batch["x"]))
            logits = self.net.head[-1](evidence)
            known = functional.adaptive_avg_pool2d(batch["places"], evidence.shape[2:])
            loss = self.loss(logits, batch["y"], w) + self.cfg.optim.places * places_loss(evidence, known, w)
        else:
            logits = self(batch["x"])
            loss = self.loss(logits, batch["y"], w)
        # Batches count by what their loss was divided by: an epoch's mean is that over its slices, however dealt.
        weight = torch.ones_like(w) if w is not None else cast(torch.Tensor, self.class_weight)[batch["y"]]
        cast(MeanLoss, self.losses[f"{stage}_"]).update(loss.detach(), weight.sum())
        cast(MetricCollection, self.metrics[f"{stage}_"]).update(_scores(logits.detach().float()), batch["y"])
        return loss

    def _log_metrics(self, stage: str) -> None:
        # Once an epoch: logged in every step, metrics would cost more than all else that a step on features does.
        self.log_dict(cast(MetricCollection, self.metrics[f"{stage}_"]), on_step=False, on_epoch=True)
        mean = cast(MeanLoss, self.losses[f"{stage}_"])
        self.log(f"{stage}/loss", mean, on_step=False, on_epoch=True, prog_bar=stage == "valid")

    def on_fit_start(self) -> None:
        if self.cfg.trainer.compile:
            self.net.compile()  # what `forward` calls
            self.maps = torch.compile(self.net.maps)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout draws from here: a resumed run draws in each step what the uninterrupted one would have drawn.
        # By batches, not by `global_step`: several may make one step (accumulate_grad_batches).
        batches = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        seed = (self.cfg.seed * 1_000_003 + batches) * self.trainer.world_size + self.trainer.global_rank
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes milliseconds where there is no GPU
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def configure_optimizers(self) -> Any:
        cfg = self.cfg.optim
        optimizer: torch.optim.Optimizer
        groups = [{"params": list(self.net.head.parameters()), "lr": cfg.lr}]
        if convolutions := self._trained_convolutions():  # from the start: without gradients they are left alone
            groups.append({"params": convolutions, "lr": cfg.lr * cfg.backbone_lr_ratio})
        if cfg.optimizer:
            optimizer = build(cfg.optimizer, torch.optim.Optimizer, "optim.optimizer", groups)
        else:
            # One kernel for all parameters; Lightning cannot clip gradients next to it.
            more: dict[str, Any] = (
                {"fused": True} if self.device.type == "cuda" and not self.trainer.gradient_clip_val else {}
            )
            more |= {"momentum": cfg.momentum} if cfg.name == "sgd" else {}
            kind = torch.optim.SGD if cfg.name == "sgd" else torch.optim.AdamW
            optimizer = kind(groups, weight_decay=cfg.weight_decay, **more)
        if cfg.scheduler:
            own = build(cfg.scheduler, lr_scheduler.LRScheduler, "optim.scheduler", optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": own, "monitor": self.cfg.trainer.monitor}}
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(cfg.warmup * steps)

        def factor(step: int) -> float:
            if step < warmup and cfg.schedule == "one_cycle":
                return 0.04 + 0.96 * (1 - math.cos(math.pi * step / warmup)) / 2  # as OneCycleLR rises
            if step < warmup:
                return (step + 1) / (warmup + 1)
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return 1.0 if cfg.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * done))

        schedule = lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _trained_convolutions(self) -> list[nn.Parameter]:
        """Parameters of the convolutions that train at any time in the run."""
        freeze, trainer = self.cfg.model.freeze, self.cfg.trainer
        if trainer.unfreeze_epoch:
            freeze = self.net.block - trainer.unfreeze_blocks
        return list(self.net.features[self.net.first_trainable(freeze) :].parameters())

    def parameter_counts(self) -> dict[str, int]:
        """Trainable and all parameters, as the settings leave them after the last unfreezing."""
        training = [*self.net.head.parameters(), *self._trained_convolutions()]
        parts = {"parameters/trainable": training, "parameters/all": self.net.parameters()}
        return {name: sum(p.numel() for p in part) for name, part in parts.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["chestct"] = {"weights": self.net.digest}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(checkpoint, self)


def _leave_out(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Takes the convolutions out of what is saved."""
    for key in [key for key in state if key.startswith(f"{prefix}net.features.")]:
        del state[key]


def _put_back(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Adds the convolutions, as they are, to what is loaded."""
    state.update(cast(Classifier, model).net.features.state_dict(prefix=f"{prefix}net.features."))


def _scores(logits: torch.Tensor) -> torch.Tensor:
    """What metrics take: torchmetrics would take logits that happen to lie in [0, 1] for scores."""
    return logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def places_loss(evidence: torch.Tensor, covered: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
    """How badly evidence tells places with a lesion from those without: cross-entropy, both kinds alike.

    evidence: logits [B, 1, h, w]; covered: share of each place that a lesion covers, [B, 1, h, w], below 0 where that
    is not known. A place counts as lesion from a third on, or if no other of its slice is covered more; one that is
    touched counts as neither. Each slice counts once, however many places it has: a small lesion as much as a large
    one. w: float [B], what each slice counts; None: all alike.
    """
    most = covered.amax((2, 3), keepdim=True).clamp(min=0.02)
    lesion = (covered >= 0.33) | (covered >= 0.9 * most)
    clear = (covered >= 0) & (covered < 0.03)
    each = functional.softplus(torch.where(lesion, -evidence, evidence))
    kinds = (lesion, clear & ~lesion)
    of_slices = torch.stack([(each * kind).sum((1, 2, 3)) / kind.sum((1, 2, 3)).clamp(min=1) for kind in kinds]).sum(0)
    return of_slices.mean() if w is None else (of_slices * w).mean()


def metric_collection(outputs: int, stage: str) -> MetricCollection:
    """What is measured on every epoch of a stage: binary metrics of the class cancer, or macro means over classes."""
    kind: dict[str, Any] = {"task": "binary"} if outputs == 1 else {"task": "multiclass", "num_classes": outputs}
    kind["validate_args"] = False  # looking at every batch, a GPU would have to wait for it
    parts: dict[str, Any] = {
        "accuracy": tm.Accuracy(**kind),
        "precision": tm.Precision(**kind, average="macro"),
        "recall": tm.Recall(**kind, average="macro"),
        "specificity": tm.Specificity(**kind, average="macro"),
        "f1": tm.F1Score(**kind, average="macro"),
        "auroc": tm.AUROC(**kind),
        "average_precision": tm.AveragePrecision(**kind),
    }
    return MetricCollection(parts, prefix=f"{stage}/")


class MeanLoss(Metric):
    """The weighted mean of losses.

    torchmetrics' own looks for NaN in each, for which a GPU would have to wait; told not to, by nan_strategy="disable",
    it forgets the weights (1.9.0).
    """

    total: torch.Tensor
    weight: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros(()), "sum")

    def update(self, loss: torch.Tensor, weight: torch.Tensor) -> None:
        self.total += loss * weight
        self.weight += weight

    def compute(self) -> torch.Tensor:
        return self.total / self.weight


def load_classifier(path: Path, trust: Sequence[str] = ()) -> Classifier:
    """The classifier in a checkpoint, on the CPU.

    trust: packages whose classes its settings may name, besides those of chestct.config.targets. Raises ConfigError
    where they name others, WeightsError as `read_checkpoint` and `check_fits` do.
    """
    checkpoint = read_checkpoint(path)
    check_trusted(checkpoint["hyper_parameters"]["settings"], str(path), trust)
    model = Classifier(**checkpoint["hyper_parameters"])
    check_fits(checkpoint, model)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def check_fits(checkpoint: dict[str, Any], model: Classifier) -> None:
    """Raises WeightsError where a checkpoint belongs to another task, another network or other weights."""
    stored = resolve(checkpoint["hyper_parameters"]["settings"])
    if stored.task != model.cfg.task:
        raise WeightsError(f"The checkpoint was made for task={stored.task}, not task={model.cfg.task}.")
    states = checkpoint["state_dict"], model.state_dict()
    shapes = [{key: getattr(value, "shape", None) for key, value in state.items()} for state in states]
    if shapes[0] != shapes[1]:
        now, then = dataclasses.asdict(model.cfg.model), dataclasses.asdict(stored.model)
        settings = ", ".join(f"model.{key}={then[key]} (now {now[key]})" for key in now if now[key] != then[key])
        raise WeightsError(
            f"The checkpoint belongs to another model: {settings or 'its tensors differ'}. "
            "Give the settings it was made with, or start anew without ckpt."
        )
    # Features are of the weights, and so are mean and scale of the input, which no checkpoint holds.
    if checkpoint["chestct"].get("weights") != model.net.digest:
        raise WeightsError(
            f"model.weights={model.cfg.model.weights} are not the convolutions that the checkpoint began with, or "
            "expect another mean and scale since. Put the file of then in that place, or start anew without ckpt."
        )
