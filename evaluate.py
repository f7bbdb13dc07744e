"""Evaluates a checkpoint or a bundle, or compares two. `python evaluate.py --help` explains every setting."""

from pathlib import Path
from typing import TYPE_CHECKING

from chestct.cli import door, from_checkpoint
from chestct.config.schema import Config

if TYPE_CHECKING:
    from chestct.evaluation.evaluate import Evaluation

USAGE = """
Scores the valid and test slices of a checkpoint's data, or other data, and writes report, metrics, plots, model card.

  python evaluate.py ckpt=last                                 the newest run
  python evaluate.py ckpt=runs/.../checkpoints/best.ckpt       any run
  python evaluate.py ckpt=last evaluation.policies=true evaluation.folds=5    beside other splits and folds
  python evaluate.py ckpt=last evaluation.phantoms=100 evaluation.novelty=24 evaluation.robustness=40
                                                               heat maps, refusals and robustness checked
  python evaluate.py bundle=FOLDER data.name=other data.root=FOLDER 'data.labels={healthy: normal, tumour: cancer}'
                                                               a bundle on slices that it never saw
  python evaluate.py bundle=models:/NAME@champion              a bundle by its name in MLflow
  python evaluate.py compare=[runs/A,runs/B]                   two models, slice by slice

Settings that are not given come from the checkpoint.
"""


@door("evaluate", USAGE)
def main(cfg: Config, out: Path) -> None:
    import dataclasses

    import pandas as pd

    from chestct.evaluation.asked import asked_for
    from chestct.evaluation.compare import compare_runs
    from chestct.evaluation.evaluate import evaluate
    from chestct.evaluation.external import evaluate_bundle
    from chestct.evaluation.split_policies import beside
    from chestct.reporting.figures import draw_history
    from chestct.reporting.render import flat, write
    from chestct.reporting.text import summary
    from chestct.tracking import fetch_bundle, run_of
    from chestct.training import train

    if cfg.compare:
        print(compare_runs(cfg, out))
        return
    if cfg.bundle:
        found = evaluate_bundle(dataclasses.replace(cfg, bundle=fetch_bundle(cfg.bundle, cfg)))
    else:
        cfg = from_checkpoint(cfg) if cfg.ckpt else cfg
        found = evaluate(cfg)
        found.rows += beside(cfg, lambda name, cfg, data: train(cfg, out / "refits" / name, data=data).predictions)
    found.sections |= asked_for(found)
    write(found, out)
    print(summary(found))
    print(f"\nreport  {out / 'report.html'}")
    if cfg.ckpt and _as_trained(found):
        if (history := Path(cfg.ckpt).parent.parent / "history.csv").is_file():
            draw_history(pd.read_csv(history), out / "curves.png")
        values = flat(found)
        with run_of(cfg, Path(cfg.ckpt)) as run:
            run.evaluation(Path(cfg.ckpt).stem, {split: values[split] for split in found.metrics}, out)


def _as_trained(found: "Evaluation") -> bool:
    """Whether the checkpoint was measured on its own run's data and split, so that the numbers belong to the run."""
    assert found.model is not None
    splitting = {name: getattr(found.model.cfg.data, name) for name in found.about["splitting"]}
    return found.model.hparams["data"]["hash"] == found.about["data_hash"] and splitting == found.about["splitting"]


if __name__ == "__main__":
    main()
