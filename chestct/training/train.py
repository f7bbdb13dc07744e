"""One training run, start to end: settings in, a result out. train.py, sweeps, notebooks and tests all call this."""

import dataclasses
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pandas as pd
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf

from chestct.config.schema import Config
from chestct.data.datamodule import SliceModule
from chestct.data.prepare import is_synthetic
from chestct.errors import ChestCTError, ConfigError, DataError, Interrupted
from chestct.models.checkpoint import read_checkpoint
from chestct.models.features import attach
from chestct.models.lightning_module import Classifier, check_fits
from chestct.models.predictions import prediction_table
from chestct.ranks import Place, is_first, on_first, place, share, together
from chestct.reporting.audit_report import kept_report
from chestct.tracking import Run
from chestct.training.callbacks import StopWhenTold, all_callbacks, stop_on_signals
from chestct.training.checkpoints import SealedCheckpoints, keepers
from chestct.training.processes import connected, devices, environment, processes


@dataclass(frozen=True)
class Result:
    """What a run leaves behind; all metrics are those of the best checkpoint."""

    folder: Path
    best: Path
    last: Path
    epochs: int
    metrics: dict[str, float]  # valid/... and test/... (without evaluation.report: valid only)
    predictions: pd.DataFrame  # of the same slices, see chestct.models.predictions
    data: SliceModule


def train(cfg: Config, out: Path, run: Run | None = None, data: SliceModule | None = None) -> Result:
    """Trains as `cfg` says, keeps checkpoints and history in `out`, and tests the best checkpoint.

    data: made from `cfg` unless it is given, set up or not; this process alone then trains. With cfg.ckpt, goes on from
    that checkpoint. With trainer.strategy=ddp, other processes take part while it lasts.
    Raises ChestCTError for what the user can mend, and Interrupted after Ctrl-C or SIGTERM; the checkpoint of the last
    whole epoch is then in place.
    """
    if data is not None:  # which other processes do not have
        cfg = dataclasses.replace(
            cfg, trainer=dataclasses.replace(cfg.trainer, strategy="single", devices="auto", num_nodes=1)
        )
    with processes(cfg.trainer, join):
        return _train(cfg, out, run or Run(), data)


def join(here: Place, port: int | None = None) -> None:
    """What every process but the first does: takes part in the training that the first one shares, and ends.

    port: of the first process's store, where this project started the processes.
    """
    store = None if port is None else dist.TCPStore("127.0.0.1", port, is_master=False)
    try:
        with connected(here, store):
            _train(None, None, Run(), None)
    except (ChestCTError, KeyboardInterrupt):
        sys.exit(2)  # the first process tells of it
    except Interrupted:
        sys.exit(130)


def _train(cfg: Config | None, out: Path | None, run: Run, data: SliceModule | None) -> Result:
    """The same in every process; only the first has settings and a run to record."""
    cfg, out = share((cfg, out))
    assert cfg is not None
    assert out is not None
    if not is_first():
        cfg = dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, progress=False))
    _quiet()
    on_first(lambda: _make_writable(out, cfg))
    L.seed_everything(cfg.seed, verbose=False)
    data = data or SliceModule(cfg)
    on_first(data.prepare_data)
    keeper, last = keepers(cfg.trainer, out / "checkpoints")
    callbacks = [*all_callbacks(cfg.trainer, out), keeper, last]
    model, resume, trainer = together(lambda: _set_up(cfg, out, data, callbacks))
    run.begin()
    trainer.loggers = run.loggers()
    if cfg.features.cache and cfg.starts_frozen:
        model.to(trainer.strategy.root_device)
        splits = ("train", "valid", "test") if cfg.always_frozen else ("train", "valid")
        attach(data, model.net, cfg, splits)
    on_first(lambda: _record_data(cfg, data, run))
    run.tags(model.parameter_counts())

    stop = next(callback for callback in callbacks if isinstance(callback, StopWhenTold))
    try:
        with stop_on_signals(stop):
            trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    except Interrupted:
        kept = out / "checkpoints" / "last.ckpt"
        rest = f"Go on with: python train.py ckpt={kept}" if kept.is_file() else "No epoch was finished."
        raise Interrupted(f"Stopped in epoch {trainer.current_epoch}. {rest}") from None

    best = Path(keeper.best_model_path)
    metrics, predictions = _measure_best(cfg, best, model, data, trainer)
    return Result(
        out,
        best,
        Path(last.best_model_path),
        trainer.current_epoch,
        metrics,
        predictions,
        data=data,
    )


def _set_up(
    cfg: Config, out: Path, data: SliceModule, callbacks: list[Callback]
) -> tuple[Classifier, Path | None, L.Trainer]:
    """What can go wrong before anything is computed: data, model, the checkpoint to go on from, the trainer."""
    data.setup()
    smallest = min(data.manifest["split"].value_counts().min(), cfg.data.batch_size)
    if smallest < place().size:
        raise ConfigError(
            f"{place().size} processes share batches and splits, the smallest of which has {smallest} slices."
        )
    model = _classifier(cfg, data)
    return model, _resumable(cfg, model), _trainer(cfg, out, callbacks)


def _classifier(cfg: Config, data: SliceModule) -> Classifier:
    assert data.store is not None
    return Classifier(
        settings=dataclasses.asdict(cfg),
        class_names=list(data.class_names),
        class_counts=data.class_counts().tolist(),
        data={"hash": data.store.data_hash, "leaks": int(data.manifest["leaked"].sum())},
    )


def _resumable(cfg: Config, model: Classifier) -> Path | None:
    """The checkpoint to go on from, found fit for it before anything is computed."""
    if not cfg.ckpt:
        return None
    checkpoint = read_checkpoint(Path(cfg.ckpt))
    check_fits(checkpoint, model)
    theirs, ours = (hparams["data"]["hash"][:12] for hparams in (checkpoint["hyper_parameters"], model.hparams))
    if theirs != ours:
        raise DataError(
            f"The data changed since {cfg.ckpt} was written (hash {theirs}, now {ours}). "
            "Resume with the data of that run, or start anew without ckpt."
        )
    return Path(cfg.ckpt)


def _trainer(cfg: Config, out: Path, callbacks: list) -> L.Trainer:
    # Buffers here are constants.
    strategy = DDPStrategy(forward_sync_buffers=False) if cfg.trainer.strategy == "ddp" else "auto"
    try:
        trainer = L.Trainer(
            max_epochs=cfg.trainer.max_epochs,
            accelerator=cfg.trainer.accelerator,
            devices=devices(cfg.trainer),
            num_nodes=cfg.trainer.num_nodes,
            strategy=strategy,
            plugins=[environment(), SealedCheckpoints()],
            precision=cfg.trainer.precision,  # type: ignore[arg-type]
            deterministic=cfg.trainer.deterministic,
            logger=False,  # the run begins when all this has proved usable
            callbacks=callbacks,
            default_root_dir=out,
            num_sanity_val_steps=0,
            enable_progress_bar=cfg.trainer.progress,
            enable_model_summary=False,
            use_distributed_sampler=False,  # SliceDataset gives each process its share
            # The loaders change from features to images when convolutions join in.
            reload_dataloaders_every_n_epochs=1 if cfg.trainer.unfreeze_epoch else 0,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ChestCTError(f"trainer settings that this machine cannot meet: {error}") from None
    # Lightning's handler of SIGTERM talks to the other processes from wherever it interrupts this one, and may hang
    # them all; StopWhenTold does it between batches.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _measure_best(
    cfg: Config, best: Path, model: Classifier, data: SliceModule, trainer: L.Trainer
) -> tuple[dict[str, float], pd.DataFrame]:
    """Metrics and predictions of the best checkpoint on valid and test; a job of a search never looks at test."""
    model.load_state_dict(read_checkpoint(best)["state_dict"], strict=False)  # frozen convolutions are not in it
    # Loaders, not the data module: Lightning would look again whether the files changed.
    metrics = dict(trainer.validate(model, data.val_dataloader(), verbose=False)[0])
    if cfg.evaluation.report:
        metrics |= trainer.test(model, data.test_dataloader(), verbose=False)[0]
    tables = [
        prediction_table(data.manifest, split, model.logits(split).numpy(), cfg.task)
        for split in ("valid", "test")
        if split in model.predictions
    ]
    return {name: float(value) for name, value in metrics.items()}, pd.concat(tables, ignore_index=True)


def _record_data(cfg: Config, data: SliceModule, run: Run) -> None:
    """Audits the data where that has not been done, and tells the run what it stands on."""
    assert data.store is not None
    slices = {str(split): int(n) for split, n in data.manifest["split"].value_counts().items()}
    leaks = int(data.manifest["leaked"].sum())
    run.artifacts(kept_report(cfg, data.store), "audit")
    run.data(cfg.data.name, data.store.data_hash, str(data.store.folder.resolve()), slices)
    run.tags(
        {
            "data.hash": data.store.data_hash,
            "data.split": cfg.data.split,
            "data.leakage": f"{leaks} slices have copies in an earlier split" if leaks else "none",
            "data.synthetic": is_synthetic(cfg.data),
            **{f"slices.{split}": n for split, n in slices.items()},
        }
    )


def _make_writable(out: Path, cfg: Config) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
        (out / "settings.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    except OSError as error:
        raise ChestCTError(
            f"Cannot write to the run folder {out}: {error.strerror}. Choose another with runs_dir=FOLDER."
        ) from None


def _quiet() -> None:
    """Silences what Lightning says to everybody, so that what it says to somebody is seen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning 2.6 calls a name that torch 2.14 renamed; nothing that a user could mend.
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    # Batches come whole from memory: more workers would only cost.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # A resumed run writes into the folder it began in.
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    # Frozen convolutions stay in eval mode, on purpose.
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
    # An epoch of a few dozen steps is logged once, at its end.
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
