"""Parallel coordinates of a sweep: one axis a setting, one line a job, coloured by what it reached."""

import io

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from chestct.config.schema import TrainerConfig
from chestct.sweep.jobs import Outcome


def parallel_coordinates(outcomes: list[Outcome], trainer: TrainerConfig) -> bytes:
    """A PNG; the best lines lie on top, jobs without an objective are left out."""
    sign = 1 if trainer.mode == "min" else -1
    shown = sorted((o for o in outcomes if o.value is not None), key=lambda o: -sign * (o.value or 0.0))
    values = [o.value or 0.0 for o in shown]
    axes = {key: _axis([o.params.get(key, "") for o in shown]) for key in shown[0].params}
    axes[trainer.monitor] = _axis([repr(value) for value in values])
    figure = Figure(figsize=(1.9 * len(axes) + 1.2, 4.2), layout="constrained")
    plot = figure.subplots()
    heights = np.array([places for places, _ in axes.values()])  # [axes, jobs]
    colors = mpl.colormaps["viridis"](np.linspace(0.95, 0.0, len(shown)))
    for i, color in enumerate(colors):
        best = i == len(shown) - 1
        plot.plot(heights[:, i], color=color, lw=2.6 if best else 1.2, alpha=1.0 if best else 0.75)
    for x, (_, ticks) in enumerate(axes.values()):
        plot.axvline(x, color="0.6", lw=0.8, zorder=0)
        for height, text in ticks:
            plot.text(
                x + 0.03,
                height,
                text,
                fontsize=8,
                va="center",
                bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1},
            )
    plot.set_xticks(range(len(axes)), list(axes))
    plot.set_yticks([])
    plot.set_xlim(-0.1, len(axes) - 0.7)
    plot.spines[:].set_visible(False)
    plot.set_title(f"{len(shown)} jobs by {trainer.monitor}; dark: better, thick: the best")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def _axis(values: list[str]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0, 1] of one setting's values, and where its labels go; text and few values as even steps."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    distinct = sorted(set(values), key=lambda v: (float(v) if numbers else 0.0, v))
    if not numbers or len(distinct) <= 4:
        step = {value: i / max(1, len(distinct) - 1) for i, value in enumerate(distinct)}
        return [step[value] for value in values], [(height, value) for value, height in step.items()]
    low, high = min(numbers), max(numbers)
    wide = low > 0 and high / low > 20  # spans decades
    scaled = np.log(numbers) if wide else np.array(numbers)
    heights = (scaled - scaled.min()) / (scaled.max() - scaled.min())
    middle = float(np.sqrt(low * high)) if wide else (low + high) / 2
    return heights.tolist(), [(0.0, f"{low:.3g}"), (0.5, f"{middle:.2g}"), (1.0, f"{high:.3g}")]
