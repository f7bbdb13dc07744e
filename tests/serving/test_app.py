"""The page behind its looks: what it answers, to whom, and what stays afterwards."""

import base64
import csv
import dataclasses
import io
import re
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from chestct.serving import about
from chestct.serving.predictor import NOT_MEDICAL
from tests.serving.conftest import Served, make_bundle, serving
from tests.serving.visitor import Visitor

pytestmark = pytest.mark.slow  # a service is started


@pytest.fixture
def visitor(served: Served) -> Visitor:
    return Visitor(served.url)


def headlines(html: str) -> list[str]:
    return re.findall(r'<section class="slice"[^>]*data-headline="([^"]*)"', html)


def shown(html: str) -> str:
    """The one slice that is not hidden."""
    (only,) = [part for part in html.split('<section class="slice"')[1:] if " hidden>" not in part.split("\n")[0][:400]]
    return only


def test_a_slice_gets_its_decision_its_reasons_and_its_pictures(
    visitor: Visitor, served: Served, files: list[bytes]
) -> None:
    html = visitor.look([("mine.png", files[0])])
    own = served.predictor.predict(files[0])
    assert f'class="verdict {own.decision}"' in html
    assert "cancers in the validation set were found" in html
    assert html.count('class="ct" src="data:image/jpeg') == 2
    assert "Why this answer" in html
    assert "It has only seen <strong>phantoms</strong>" in html  # from the card
    assert "<script>" not in html
    assert NOT_MEDICAL in html
    assert "data-hu" not in html  # no Hounsfield units in a PNG


def test_dicom_gets_its_hounsfield_units_for_the_window(visitor: Visitor, examples: dict[str, bytes]) -> None:
    import numpy as np
    from PIL import Image
    from pydicom import dcmread

    html = visitor.look([("a.dcm", examples["no-lesion.dcm"])])
    (uri,) = re.findall(r'data-hu="data:image/png;base64,([^"]+)"', html)
    rgb = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri)))).astype(int)
    dataset = dcmread(io.BytesIO(examples["no-lesion.dcm"]))
    stored = dataset.pixel_array + dataset.RescaleIntercept
    assert np.abs(rgb[..., 0] * 256 + rgb[..., 1] - 1024 - np.clip(stored, -1024, 3071)).max() <= 1


def test_an_image_that_is_no_ct_is_refused_and_its_score_stands_behind_a_warning(
    visitor: Visitor, examples: dict[str, bytes]
) -> None:
    html = visitor.look([("hills.jpg", examples["hills.jpg"])])
    assert headlines(html) == ["No answer for this image"]
    before, after = html.split('<details class="anyway">')
    assert "probability of cancer" not in before
    assert "Show the score anyway" in after
    assert after.index("means nothing") < after.index("probability of cancer")


def test_examples_are_answered(visitor: Visitor) -> None:
    assert [headlines(visitor.example(i))[0] for i in (0, 3)] == [
        "The model sees signs of cancer",
        "No answer for this image",
    ]


def test_a_series_is_in_the_order_of_the_scan_with_the_most_suspicious_slice_shown(
    visitor: Visitor, served: Served, files: list[bytes]
) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        for i in (10, 9, 2, 1):
            made.writestr(f"scan/{i}.png", files[i % 6])
        made.writestr("__MACOSX/x", b"no")
    html = visitor.look([("scan.zip", archive.getvalue())])
    assert re.findall(r'<p class="name">([^<]*)', html) == ["scan/1.png", "scan/2.png", "scan/9.png", "scan/10.png"]
    found = [served.predictor.predict(files[i % 6]) for i in (1, 2, 9, 10)]
    best = max(range(4), key=lambda i: (found[i].decision != "refused", found[i].score))
    assert f'data-first="{best}"' in html


def test_one_bad_file_spoils_no_other(visitor: Visitor, files: list[bytes]) -> None:
    html = visitor.look([("a.png", files[0]), ("b.png", b"rubbish"), ("c.png", files[1])])
    assert [line == "Not read" for line in headlines(html)] == [False, True, False]
    assert "cannot be read" in html


def test_names_are_escaped(visitor: Visitor) -> None:
    html = visitor.look([("<img src=x onerror=alert(1)>.png", b"rubbish")])
    assert "<img src=x" not in html + visitor.history


def test_too_many_slices_are_one_sentence(visitor: Visitor, files: list[bytes]) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        for i in range(21):
            made.writestr(f"{i}.png", files[0])
    html = visitor.look([("many.zip", archive.getvalue())])
    assert "21 slices at once; this service takes up to 20" in html


def test_the_history_holds_this_visit_and_comes_as_csv(served: Served, files: list[bytes]) -> None:
    visitor = Visitor(served.url)
    visitor.look([("=cmd()", files[0])])
    visitor.look([("second.png", files[1]), ("third.png", b"rubbish")])
    (link,) = re.findall(r'href="data:text/csv;charset=utf-8;base64,([^"]+)"', visitor.history)
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(link).decode("utf-8-sig"))))
    assert [row["file"] for row in rows] == ["'=cmd()", "second.png", "third.png"]
    assert [row["decision"] == "unreadable" for row in rows] == [False, False, True]
    assert float(rows[0]["probability of cancer"]) == pytest.approx(served.predictor.predict(files[0]).score, abs=1e-3)


def test_visitors_see_only_their_own(served: Served, files: list[bytes]) -> None:
    visitors = [Visitor(served.url) for _ in range(6)]
    start = threading.Barrier(6)

    def visit(i: int) -> list[str]:
        start.wait()
        return [visitors[i].look([(f"of-{i}-{turn}.png", files[i])]) for turn in range(3)]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(visit, range(6)))
    pictures = [{re.search(r'class="ct" src="([^"]+)"', html)[1] for html in own} for own in answers]
    assert all(len(own) == 1 for own in pictures)
    assert len(set.union(*pictures)) == 6
    for i, own in enumerate(answers):
        said = "".join(own) + visitors[i].history
        assert all(f"of-{i}-{turn}.png" in said for turn in range(3))
        assert not any(f"of-{j}-" in said for j in range(6) if j != i)


def test_nothing_of_a_request_stays_on_disk(visitor: Visitor, served: Served, files: list[bytes]) -> None:
    visitor.look([("a.png", files[0]), ("b.png", b"rubbish")])
    visitor.example(1)
    assert not served.left()


PATHS = (
    "/etc/passwd",
    "{uploads}/../passwd",
    "{uploads}/x",
    "{uploads}",
    "{uploads}/a/b/c",
    "http://127.0.0.1:1/x.png",
)


@pytest.mark.parametrize("path", PATHS)
def test_only_uploads_can_be_asked_about_and_no_other_is_touched(visitor: Visitor, served: Served, path: str) -> None:
    path = path.format(uploads=served.uploads)
    (other,) = visitor.upload([("other.png", b"x")])
    file = {"path": path, "orig_name": "x", "meta": {"_type": "gradio.FileData"}}
    said = visitor.ask(("drop", "upload"), [[file], None])
    assert "verdict" not in said
    assert [path.name for path in served.left()] == [Path(other["path"]).parent.name]
    shutil.rmtree(Path(other["path"]).parent)


def test_gradio_client_gets_plain_json(served: Served, files: list[bytes], tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    (tmp_path / "slice.png").write_bytes(files[2])
    client = Client(served.url, verbose=False)
    found = client.predict(file=handle_file(str(tmp_path / "slice.png")), overlay=True, api_name="/predict")
    own = served.predictor.predict(files[2])
    assert found["score"] == pytest.approx(own.score, abs=1e-5)
    assert found["decision"] == own.decision
    assert found["overlay"].startswith("data:image/png;base64,")
    assert not served.left()
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/predict"}


def test_gradio_client_is_told_what_is_wrong_with_a_file(served: Served, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    (tmp_path / "slice.png").write_bytes(b"rubbish")
    with pytest.raises(Exception, match="neither PNG"):
        Client(served.url, verbose=False).predict(file=handle_file(str(tmp_path / "slice.png")), api_name="/predict")


def test_the_page_about_the_model_tells_what_its_bundle_knows(served: Served) -> None:
    bundle = served.predictor.bundle
    html = about.render(bundle)
    for said in ("0.930", "[0.880, 0.970]", "Does the probability hold?", "phantoms"):
        assert said in html
    assert html.count('class="point"') == len(bundle.facts["reliability"]["test"])
    bare = {**bundle.facts, "reliability": {}, "metrics": {}}
    assert "<svg" not in about.render(dataclasses.replace(bundle, facts=bare))  # an older one


def test_the_page_names_no_other_host(served: Served) -> None:
    html = httpx.get(f"{served.url}/").text
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']([^"']+)""", html)
    assert loaded
    assert not [address for address in loaded if re.match(r"(https?:)?//", address)]
    theme = httpx.get(f"{served.url}/theme.css").text
    assert "http" not in theme.replace("http://www.w3.org/2000/svg", "")


def test_answers_are_passed_on_and_a_failing_record_spoils_none(bundle_folder: Path, files: list[bytes]) -> None:
    seen = []

    def record(found) -> None:
        seen.append(found.decision)
        raise OSError("disk full")

    with serving(bundle_folder, on_answer=record) as found:
        assert httpx.post(f"{found.url}/predict", content=files[0]).status_code == 200
        assert "verdict" in Visitor(found.url).look([("a.png", files[1])])
    assert len(seen) == 2


@pytest.mark.slow
def test_kinds_of_cancer_are_listed_where_the_bundle_tells_them_apart(
    phantoms: Path, tmp_path: Path, files: list[bytes]
) -> None:
    make_bundle(tmp_path / "four", phantoms, ("normal", "adenocarcinoma", "large_cell", "squamous"))
    with serving(tmp_path / "four") as found:
        html = Visitor(found.url).look([("a.png", files[0])])
        assert "Which kind" in html
        assert "squamous cell carcinoma" in html


@pytest.mark.slow
def test_twenty_clients_with_good_and_bad_files_get_what_is_theirs(
    bundle_folder: Path, files: list[bytes], examples: dict[str, bytes]
) -> None:
    with serving(bundle_folder) as found:
        expected = [found.predictor.predict(data).score for data in files]

        def client(i: int) -> list[str]:
            wrong = []
            visitor = Visitor(found.url) if i % 4 == 0 else None
            for turn in range(5):
                kind, own = (i + turn) % 5, (i * 5 + turn) % 6
                if kind == 3:
                    answer = httpx.post(f"{found.url}/predict", content=b"rubbish %d" % i, timeout=60)
                    wrong += [] if answer.status_code == 422 else [f"{answer.status_code} for rubbish"]
                elif kind == 4:
                    answer = httpx.post(f"{found.url}/predict", content=examples["hills.jpg"], timeout=60)
                    wrong += [] if answer.json().get("decision") == "refused" else [answer.text]
                elif visitor:
                    html = visitor.look([(f"of-{i}-{turn}.png", files[own])])
                    percent = f"{100 * expected[own]:.1f}%"
                    wrong += [] if f"of-{i}-{turn}.png" in html and f"width:{percent}" in html else [html[:300]]
                else:
                    answer = httpx.post(f"{found.url}/predict", content=files[own], timeout=60)
                    if answer.status_code != 200 or abs(answer.json()["score"] - expected[own]) > 1e-4:
                        wrong.append(answer.text)
            return wrong

        with ThreadPoolExecutor(20) as pool:
            assert [wrong for wrong in pool.map(client, range(20)) if wrong] == []
        assert not found.left()
