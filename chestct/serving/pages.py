"""The parts of the page that say the same to everybody: banner, header, examples, and what programs may ask."""

from html import escape

from chestct.serving.examples import Example
from chestct.serving.predictor import NOT_MEDICAL

_FIRST, _REST = NOT_MEDICAL.split(". ", 1)
BANNER = f'<div class="research" role="note"><strong>{_FIRST}.</strong> {_REST}</div>'

HEADER = """<div class="masthead"><svg class="mark" viewBox="0 0 40 40" aria-hidden="true">
<circle cx="20" cy="20" r="19"/>
<path d="M17 9c-6 1-9 8-9 15 0 4 2 6 5 6 4 0 5-3 5-7V10zM23 9c6 1 9 8 9 15 0 4-2 6-5 6-4 0-5-3-5-7V10z"/></svg>
<div><h1>chestct</h1><p>Cancer or normal on a chest CT slice, with the odds, the reasons and the doubts.</p></div>
</div>"""

EMPTY = """<article class="answer start"><h2>Drop a slice, or try an example</h2>
<ol><li><b>Give it</b> one or more axial chest CT slices: PNG, JPEG, TIFF or DICOM, a zip, or a picture from the
clipboard.</li><li><b>Read</b> the decision, how probable cancer is, and what that number is worth.</li>
<li><b>Look</b> at where the model looked, and at when not to trust it.</li></ol>
<p class="small">Files are read once and deleted at once. Nothing leaves the machine that this page runs on.</p>
</article>"""

API_HELP = """<article class="prose"><h2>For programs</h2>
<p>One slice a request, JSON back. For folders use the command line: <code>chestct predict FOLDER</code>.</p>
<h3>curl</h3><pre tabindex="0"><code>curl --data-binary @slice.png ADDRESS/predict
curl -F file=@slice.dcm "ADDRESS/predict?overlay=true"</code></pre>
<h3>Python, gradio_client</h3><pre tabindex="0"><code>from gradio_client import Client, handle_file

client = Client("ADDRESS")
told = client.predict(file=handle_file("slice.png"), overlay=False, api_name="/predict")
print(told["decision"], told["score"])</code></pre>
<h3>What comes back</h3><dl><dt>score</dt><dd>calibrated probability of cancer, 0 to 1</dd>
<dt>decision</dt><dd>cancer, normal, uncertain or refused; <code>reason</code> says why, for the last two</dd>
<dt>possible</dt><dd>the answers that cannot be excluded</dd>
<dt>novelty</dt><dd>distance to the training slices; uncertain beyond 1, refused beyond 1.5</dd>
<dt>known</dt><dd>whether this very slice was used for training</dd>
<dt>bundle</dt><dd>which model answered</dd></dl>
<p>What is wrong with a request comes back as <code>{"error": "…"}</code> with a status of 4xx or 5xx.
<code>/healthz</code> tells whether the service is ready, <code>/metrics</code> is for Prometheus.</p></article>"""


def api_help(host: str, port: int) -> str:
    """What programs may ask, with the address that this service listens on."""
    return API_HELP.replace("ADDRESS", f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}")


def example_buttons(examples: list[Example]) -> str:
    """The examples as buttons with thumbnails."""
    buttons = "".join(
        f'<li><button type="button" data-example="{i}"><img src="{example.thumb}" alt="" width="56" height="56">'
        f"<span><b>{escape(example.title)}</b><small>{escape(example.about)}</small></span></button></li>"
        for i, example in enumerate(examples)
    )
    return f'<section class="examples"><h2>Or try one of these</h2><ul>{buttons}</ul></section>'
