"""Trains one model, or a sweep of them. `python train.py --help` explains every setting."""

from pathlib import Path
from typing import TYPE_CHECKING

from chestct.cli import door, from_checkpoint
from chestct.config.schema import Config

if TYPE_CHECKING:
    from chestct.tracking import Run
    from chestct.training import Result

USAGE = """
Trains VGG16 on chest CT slices and tests the best checkpoint.

  python train.py                                       phantoms, frozen convolutions
  python train.py data=chest_ct data.root=FOLDER        your class folders
  python train.py model.freeze=true optim.lr=1e-4       single settings
  python train.py experiment=two_stage                  a named experiment
  python train.py -m optim.lr=1e-3,1e-4 model.freeze=true,false    all combinations
  python train.py -m sweep=head                         a search; the same command goes on with it
  python train.py tracking.register=NAME                bundle=models:/NAME@champion then finds the bundle
  python train.py ckpt=last                             goes on with the newest run
  python train.py trainer=ddp trainer.devices=2         two processes, one training; see docs/clusters.md
"""


@door("train", USAGE)
def main(cfg: Config, out: Path) -> float:
    # Imported when the settings are known to be right: --help and misspelt keys answer at once.
    from chestct.tracking import open_run, sole_writer
    from chestct.training import train

    if cfg.ckpt:
        cfg = from_checkpoint(cfg)
    with sole_writer(out), open_run(cfg, out) as run:
        result = train(cfg, out, run)
        run.artifacts(out / "settings.yaml", "config")
        if cfg.tracking.log_model:
            run.artifacts(result.best, "checkpoints")
        told = report(cfg, out, run, result) if cfg.evaluation.report else ""
    objective = result.metrics[cfg.trainer.monitor]
    print(f"{told}best checkpoint  {result.best}  ({cfg.trainer.monitor} {objective:.4f})")
    if run.run_id:
        print(f"MLflow run       {run.run_id} in {run.uri} (make ui)")
    return objective


def report(cfg: Config, out: Path, run: "Run", result: "Result") -> str:
    """Evaluates the best checkpoint, writes report and bundle to `out` and to the run; returns what to tell."""
    import dataclasses

    import pandas as pd

    from chestct.evaluation.evaluate import evaluate
    from chestct.evaluation.export import export
    from chestct.pyfunc import log_bundle
    from chestct.reporting.figures import draw_history
    from chestct.reporting.render import flat, write
    from chestct.reporting.text import summary

    found = evaluate(dataclasses.replace(cfg, ckpt=str(result.best)), result.data)
    write(found, out / "evaluation")
    export(found, out / "bundle")
    draw_history(pd.read_csv(out / "history.csv"), out / "evaluation" / "curves.png")
    values = flat(found)
    run.evaluation("best", {split: values[split] for split in found.metrics}, out / "evaluation")
    if cfg.tracking.log_model:
        log_bundle(run, out / "bundle")
    return (
        f"{summary(found)}\n\nreport           {out / 'evaluation' / 'report.html'}\n"
        f"bundle           {out / 'bundle'}  (python serve.py bundle={out / 'bundle'})\n"
    )


if __name__ == "__main__":
    main()
