"""python -m chestct.export: writes the bundle of a checkpoint, the folder that serve.py and the batch CLI use."""

from pathlib import Path

from chestct.cli import door, from_checkpoint
from chestct.config.schema import Config
from chestct.errors import ConfigError

USAGE = """
Evaluates a checkpoint and writes its bundle: weights, preprocessing, threshold, calibration, model card.

  python -m chestct.export ckpt=last bundle=FOLDER

Settings that are not given come from the checkpoint; evaluation.threshold chooses the operating point, and what else
evaluation.* asks for goes into the model card.
"""


@door("evaluate", USAGE)
def main(cfg: Config, out: Path) -> None:
    from chestct.evaluation.asked import asked_for
    from chestct.evaluation.evaluate import evaluate
    from chestct.evaluation.export import export
    from chestct.evaluation.split_policies import beside
    from chestct.tracking import run_of
    from chestct.training import train

    if not cfg.ckpt:
        raise ConfigError("Nothing to export: give a checkpoint with ckpt=last or ckpt=runs/.../checkpoints/best.ckpt.")
    cfg = from_checkpoint(cfg)
    folder = Path(cfg.bundle) if cfg.bundle else out / "bundle"
    found = evaluate(cfg)
    found.sections |= asked_for(found)
    found.rows += beside(cfg, lambda name, cfg, data: train(cfg, out / "refits" / name, data=data).predictions)
    bundle = export(found, folder)
    if cfg.tracking.log_model:
        from chestct.pyfunc import log_bundle

        with run_of(cfg, Path(cfg.ckpt or "")) as run:
            log_bundle(run, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"bundle {bundle.id}, {size / 1000:,.0f} kB  {folder}")


if __name__ == "__main__":
    main()
