"""Trains one model, or a sweep of them. `python train.py --help` explains every setting."""

from pathlib import Path

from chestct.config import Config
from chestct.door import door, from_checkpoint

USAGE = """
Trains VGG16 on chest CT slices and tests the best checkpoint.

  python train.py                                       phantoms, frozen convolutions
  python train.py data=chest_ct data.root=FOLDER        your class folders
  python train.py model.freeze=true optim.lr=1e-4       single settings
  python train.py experiment=two_stage                  a named experiment
  python train.py -m optim.lr=1e-3,1e-4 model.freeze=true,false    all combinations
  python train.py ckpt=last                             goes on with the newest run
"""


@door("train", USAGE)
def main(cfg: Config, out: Path) -> float:
    # Imported when the settings are known to be right: --help and misspelt keys answer at once.
    import dataclasses

    import pandas as pd

    from chestct.evaluation.evaluate import evaluate
    from chestct.evaluation.export import export
    from chestct.evaluation.plots import draw_history
    from chestct.evaluation.report import flat, write
    from chestct.evaluation.summary import summary
    from chestct.tracking import open_run, sole_writer
    from chestct.training import train

    if cfg.ckpt:
        cfg = from_checkpoint(cfg)
    with sole_writer(out), open_run(cfg, out) as run:
        result = train(cfg, out, run)
        found = evaluate(dataclasses.replace(cfg, ckpt=str(result.best)), result.data)
        write(found, out / "evaluation")
        export(found, out / "bundle")
        draw_history(pd.read_csv(out / "history.csv"), out / "evaluation" / "curves.png")
        run.artifacts(out / "evaluation", "evaluation")
        run.artifacts(out / "settings.yaml", "config")
        run.metrics(
            {
                f"best/{split}/{name}": value
                for split, values in flat(found).items()
                for name, value in values.items()
                if split in found.metrics and value is not None
            }
        )
        if cfg.tracking.log_model:
            run.artifacts(result.best, "checkpoints")
            run.artifacts(out / "bundle", "bundle")
    print(summary(found))
    print(f"\nbest checkpoint  {result.best}\nreport           {out / 'evaluation' / 'report.html'}")
    print(f"bundle           {out / 'bundle'}  (python serve.py bundle={out / 'bundle'})")
    if run.run_id:
        print(f"MLflow run       {run.run_id} in {run.uri} (make ui)")
    return result.metrics[cfg.trainer.monitor]


if __name__ == "__main__":
    main()
