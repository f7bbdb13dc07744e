"""The answer as HTML: the decision first, then the pictures, then why, and when not to trust it.

Plain elements that work without a script as far as they can; `static/page.js` adds the opacity, the window and the way
through several slices. Everything that came from outside passes `escape`.
"""

from collections import Counter
from html import escape

from markdown_it import MarkdownIt

from chestct.models.bundle import Bundle
from chestct.serving import sentences as text
from chestct.serving.predictor import NOT_MEDICAL, Prediction
from chestct.serving.reading import Reading, most_suspicious

MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")
"""Model cards come with bundles, which may come from strangers: no HTML in them."""

WINDOWS = (("Lung", -600, 1500), ("Soft tissue", 40, 400), ("Bone", 400, 1800))
"""Name, centre and width in HU of the usual windows."""


def render(readings: list[Reading], bundle: Bundle) -> str:
    """The whole answer to one request. readings: at least one, in the order of the scan."""
    first = most_suspicious(readings)
    slices = "".join(_slice(i, reading, bundle, shown=i == first) for i, reading in enumerate(readings))
    overview = _overview(readings, first, bundle.point.threshold) if len(readings) > 1 else ""
    return f'<article class="answer" data-first="{first}" data-count="{len(readings)}">{overview}{slices}</article>'


def message(said: str, title: str = "That did not work") -> str:
    """A sentence instead of an answer."""
    return (
        f'<article class="answer"><div class="verdict failed" data-headline="{escape(title)}"><h2>{escape(title)}</h2>'
        f"<p>{escape(said)}</p></div></article>"
    )


def waiting(done: int, count: int) -> str:
    """While slices are read."""
    said = "Reading the slice…" if count == 1 else f"Reading slice {min(done + 1, count)} of {count}…"
    bar = f'<progress max="{count}" value="{done}" aria-label="Progress"></progress>'
    return f'<div class="waiting"><p>{said}</p>{bar}</div>'


def _overview(readings: list[Reading], first: int, threshold: float) -> str:
    counts = Counter(decision(reading) for reading in readings)
    tally = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    bars = "".join(_bar(i, reading) for i, reading in enumerate(readings))
    order = sorted(range(len(readings)), key=lambda i: -_score(readings[i]))
    rows = "".join(_row(i, readings[i]) for i in order)
    return f"""<section class="overview" aria-label="All slices">
<p class="tally"><strong>{len(readings)} slices</strong>: {tally}. The most suspicious one is shown first; the dashed
line is the threshold.</p>
<div class="bars" aria-hidden="true" style="--threshold:{threshold:.3f}">{bars}</div>
<div class="steps">
<button type="button" class="step" data-step="-1" aria-label="Previous slice">‹</button>
<label class="slider">Slice <output class="which">{first + 1}</output> of {len(readings)}
<input type="range" class="pick" min="1" max="{len(readings)}" value="{first + 1}"></label>
<button type="button" class="step" data-step="1" aria-label="Next slice">›</button>
</div>
<details><summary>Table of all slices, most suspicious first</summary>
<div class="scroll" role="region" aria-label="Table of all slices" tabindex="0"><table>
<thead><tr><th scope="col">Slice</th><th scope="col">File</th><th scope="col">Decision</th>
<th scope="col" class="number">Probability of cancer</th></tr></thead><tbody>{rows}</tbody></table></div></details>
</section>"""


def decision(reading: Reading) -> str:
    """The decision, or `unreadable`."""
    return reading.prediction.decision if reading.prediction else "unreadable"


def _score(reading: Reading) -> float:
    return reading.prediction.score if reading.prediction else -1.0


def _bar(i: int, reading: Reading) -> str:
    kind, height = decision(reading), max(0.04, _score(reading))
    return f'<i class="bar {kind}" data-go="{i}" style="--score:{height:.3f}"></i>'


def _row(i: int, reading: Reading) -> str:
    found = reading.prediction
    score = text.percent(found.score) if found and found.decision != "refused" else "–"
    return (
        f'<tr><td><button type="button" class="link" data-go="{i}">{i + 1}</button></td><td>{escape(reading.name)}</td>'
        f'<td><span class="tag {decision(reading)}">{decision(reading)}</span></td><td class="number">{score}</td></tr>'
    )


def _slice(i: int, reading: Reading, bundle: Bundle, shown: bool) -> str:
    found = reading.prediction
    if found is None:
        inner = f'<div class="verdict failed"><h2>Not read</h2><p>{escape(reading.error)}</p></div>'
        headline = "Not read"
    elif found.decision == "refused":
        inner, headline = _refusal(reading, found, bundle), text.HEADLINES["refused"]
    else:
        inner, headline = _verdict(found, bundle) + _body(reading, found, bundle), text.HEADLINES[found.decision]
    hidden = "" if shown else " hidden"
    return (
        f'<section class="slice" data-index="{i}" data-headline="{escape(headline)}"{hidden}>'
        f'<p class="name">{escape(reading.name)}</p>{inner}</section>'
    )


def _verdict(found: Prediction, bundle: Bundle) -> str:
    return f"""<div class="verdict {found.decision}"><h2>{text.HEADLINES[found.decision]}</h2>
<p>{escape(text.verdict(found, bundle.point))}</p>{_meter(found, bundle)}
<p class="small">{escape(text.threshold_meaning(bundle.point))}</p>{_known(found)}</div>"""


def _meter(found: Prediction, bundle: Bundle) -> str:
    score, threshold = text.percent(found.score), text.percent(bundle.point.threshold)
    at = f"left:{_inner(bundle.point.threshold):.1f}%"
    return f"""<div class="meter"><p class="score"><b>{score}</b> probability of cancer</p>
<div class="track" role="img" aria-label="Probability {score}, threshold {threshold}">
<i class="fill" style="width:{100 * found.score:.1f}%"></i>
<i class="tick" style="left:{100 * min(1, bundle.point.threshold):.1f}%"></i></div>
<p class="ends" aria-hidden="true"><span>0</span><span class="at" style="{at}">threshold
{threshold}</span><span>100 %</span></p></div>"""


def _inner(share: float) -> float:
    """Percent along the meter at which a label fits between the ends'."""
    return min(76.0, max(20.0, 100 * share))


def _known(found: Prediction) -> str:
    return f'<p class="caution">{escape(text.known_warning())}</p>' if found.known else ""


def _refusal(reading: Reading, found: Prediction, bundle: Bundle) -> str:
    return f"""<div class="verdict refused"><h2>{text.HEADLINES["refused"]}</h2>
<p>{escape(text.verdict(found, bundle.point))}</p>
<p class="small">Distance to the training slices: {escape(text.distance_meaning(found))}.</p></div>
<figure class="alone"><img src="{reading.picture}" alt="The image as it was read"></figure>
<details class="anyway"><summary>Show the score anyway</summary>
<p class="caution"><strong>This score means nothing reliable.</strong> The model gives a number for any picture, a
photograph of a cat included. This image was refused because it is not what the model was made for.</p>
{_meter(found, bundle)}{_pictures(reading, bundle)}</details>"""


def _body(reading: Reading, found: Prediction, bundle: Bundle) -> str:
    return f"""{_pictures(reading, bundle)}{_kinds(found, bundle)}
<details open><summary>Why this answer</summary><div class="prose"><p>{escape(reading.heat_meaning)}</p>
<dl><dt>What the score means</dt><dd>{escape(text.calibration_meaning(found))}</dd>
<dt>Answers that cannot be excluded</dt><dd>{escape(text.possible_meaning(found, bundle.point))}</dd>
<dt>Distance to the training slices</dt><dd>{escape(text.distance_meaning(found))}</dd>
<dt>Answered by</dt><dd>bundle <code>{escape(found.bundle)}</code> in {_milliseconds(found)} ms</dd></dl>
</div></details>
<details open><summary>When not to trust it</summary><div class="prose">{MARKDOWN.render(text.doubts(bundle))}
<p>{NOT_MEDICAL}</p></div></details>"""


def _milliseconds(found: Prediction) -> int:
    return max(1, round(1000 * sum(found.seconds.values())))


def _pictures(reading: Reading, bundle: Bundle) -> str:
    heat = f'<img class="heat" src="{reading.heat}" alt="">' if reading.heat else ""
    what = "The slice with the areas that speak for cancer coloured" if heat else "No area speaks for cancer"
    slider = (
        '<label class="slider">Colour <input type="range" class="opacity" min="0" max="100" value="60" '
        'aria-label="Opacity of the coloured areas, percent"></label>'
        if heat
        else ""
    )
    return f"""<div class="pictures" {f'data-hu="{reading.hounsfield}"' if reading.hounsfield else ""}>
<figure><div class="frame"><img class="ct" src="{reading.picture}" alt="The slice as it was read"></div>
<figcaption>The slice</figcaption></figure>
<figure><div class="frame"><img class="ct" src="{reading.picture}" alt="{what}">{heat}</div>
<figcaption>{"Where the model looked" if heat else what}{slider}</figcaption></figure>
{_window(reading, bundle)}</div>"""


def _window(reading: Reading, bundle: Bundle) -> str:
    """Controls of the display window; only for Hounsfield units."""
    if not reading.hounsfield:
        return ""
    buttons = "".join(
        f'<button type="button" class="preset" data-level="{level}" data-width="{width}">{name}</button>'
        for name, level, width in WINDOWS
    )
    return f"""<fieldset class="window"><legend>Display window (the model always sees its own)</legend>
<div class="presets">{buttons}<button type="button" class="preset" data-reset="1">As the model sees it</button></div>
{_range("level", -1000, 1500, bundle.window.center)}{_range("width", 50, 4000, bundle.window.width)}</fieldset>"""


def _range(name: str, low: int, high: int, value: float) -> str:
    """A slider in HU that starts where the model's own window lies."""
    return (
        f'<label class="slider">{name.capitalize()} <input type="range" class="{name}" min="{low}" max="{high}" '
        f'step="10" value="{value:.0f}"><span><output>{value:.0f}</output> HU</span></label>'
    )


def _kinds(found: Prediction, bundle: Bundle) -> str:
    """Probabilities of the subtypes, where the bundle tells them apart."""
    if len(bundle.classes) == 2:
        return ""
    rows = "".join(
        f'<li><span>{escape(text.class_name(name))}</span><i class="fill" style="--score:{share:.3f}"></i>'
        f"<span>{text.percent(share)}</span></li>"
        for name, share in sorted(found.probabilities.items(), key=lambda item: -item[1])
    )
    return f'<section class="kinds"><h3>Which kind</h3><ul>{rows}</ul></section>'
