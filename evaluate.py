"""Evaluates a checkpoint. `python evaluate.py --help` explains every setting."""

from pathlib import Path

from chestct.config import Config
from chestct.door import door, from_checkpoint

USAGE = """
Scores the valid and test slices of a checkpoint's data, or of other data, and writes metrics and plots.

  python evaluate.py ckpt=last                                 the newest run
  python evaluate.py ckpt=runs/.../checkpoints/best.ckpt       any run
  python evaluate.py ckpt=... data.split=official_clean        another split of the same data

Settings that are not given come from the checkpoint.
"""


@door("evaluate", USAGE)
def main(cfg: Config, out: Path) -> None:
    from chestct.evaluation.evaluate import predict, write_report
    from chestct.evaluation.summary import summary

    if cfg.ckpt:
        cfg = from_checkpoint(cfg)
    metrics = write_report(predict(cfg), cfg, out)
    print(summary(metrics))
    print(f"\nmetrics and plots  {out}")


if __name__ == "__main__":
    main()
