"""The page behind its looks: what it answers, to whom, and what stays afterwards."""

import base64
import csv
import io
import re
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from chestct.serving.page import SESSIONS
from chestct.serving.pictures import MODEL_WINDOW
from chestct.serving.predictor import NOT_MEDICAL
from chestct.serving.sentences import reliability
from tests.serving.conftest import Served, make_bundle, serving
from tests.serving.visitor import Visitor

pytestmark = pytest.mark.slow  # a service is started


@pytest.fixture
def visitor(served: Served) -> Visitor:
    return Visitor(served.url)


def picture(annotated: dict[str, Any]) -> Image.Image:
    """The base image of a gr.AnnotatedImage."""
    return decoded(annotated["image"]["url"])


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def zipped(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        for name, data in files.items():
            made.writestr(name, data)
    return archive.getvalue()


def by_decision(served: Served, files: list[bytes]) -> dict[str, bytes]:
    return {served.predictor.predict(data).decision: data for data in files}


def test_a_slice_gets_its_decision_its_reasons_and_its_pictures(visitor: Visitor, served: Served, files) -> None:
    prediction = served.predictor.predict(files[0])
    visitor.look([("mine.png", files[0])])
    assert visitor.visible["slice"]
    assert "cancers in the validation set were found" in visitor.values["verdict"]
    assert "mine\\.png" in visitor.values["verdict"]
    assert "Distance to the training slices" in visitor.values["why"]
    assert "It has only seen **phantoms**" in visitor.values["caveats"]  # from the card
    assert NOT_MEDICAL in visitor.values["caveats"]
    bars = {bar["label"]: bar["confidence"] for bar in visitor.values["score"]["confidences"]}
    assert bars["Probability of cancer"] == pytest.approx(min(0.99, max(0.01, prediction.score)), abs=1e-3)
    assert not visitor.visible["window"]  # there are no Hounsfield units in a PNG
    difference = np.asarray(picture(visitor.values["slice"]), int) - prediction.gray
    assert np.abs(difference).mean() < 5


@pytest.mark.parametrize("decision", ["cancer", "normal"])
def test_heat_is_shown_in_any_strength_but_never_on_a_slice_called_normal(visitor, served, files, decision) -> None:
    visitor.look([("a.png", by_decision(served, files)[decision])])
    assert visitor.visible["heat"] == visitor.visible["strength"] == (decision == "cancer")
    if decision == "cancer":
        hottest = {}
        for strength in (0, 30, 100):
            visitor.send(("strength", "input"), [None, None, MODEL_WINDOW, strength])
            layers = visitor.values["heat"]["annotations"]
            hottest[strength] = np.asarray(decoded(layers[0]["image"]["url"]))[..., 3].max() / 255 if layers else 0
        assert hottest == pytest.approx({0: 0, 30: 0.3, 100: 1}, abs=0.02)


def test_dicom_is_shown_through_other_windows_with_the_same_answer(visitor: Visitor, examples) -> None:
    from pydicom import dcmread

    visitor.look([("a.dcm", examples["no-lesion.dcm"])])
    assert visitor.visible["window"]
    headline = visitor.headline
    visitor.send(("window", "input"), [None, None, "Soft tissue", 60])
    dataset = dcmread(io.BytesIO(examples["no-lesion.dcm"]))
    hounsfield = dataset.pixel_array + float(dataset.RescaleIntercept)
    expected = 255 * ((hounsfield - 39.5) / 399 + 0.5).clip(0, 1)  # 40 / 400: DICOM PS3.3 C.11.2.1.2.1
    assert np.abs(np.asarray(picture(visitor.values["slice"]), float) - expected).mean() < 8  # a JPEG of noise
    assert visitor.headline == headline


def test_an_image_that_is_no_ct_is_refused_and_its_score_stands_behind_a_warning(visitor: Visitor, examples) -> None:
    visitor.look([("hills.jpg", examples["hills.jpg"])])
    assert visitor.headline == "No answer for this image"
    assert "colour image" in visitor.values["verdict"]
    assert "robability" not in visitor.values["verdict"]
    assert not visitor.visible["score"]
    assert not visitor.visible["heat"]
    text = visitor.values["refused-score"]
    assert text.index("means nothing") < text.index("Probability of cancer")


def test_examples_are_answered(visitor: Visitor) -> None:
    headlines = []
    for i in (0, 3):
        visitor.example(i)
        headlines.append(visitor.headline)
    assert headlines == ["The model sees signs of cancer", "No answer for this image"]


def test_a_series_is_in_the_order_of_the_scan_with_the_most_suspicious_slice_shown(visitor, served, files) -> None:
    visitor.look([("scan.zip", zipped({f"scan/{i}.png": files[i % 6] for i in (10, 9, 2, 1)} | {"__MACOSX/x": b"no"}))])
    names = [row[1] for row in reversed(visitor.values["visit"]["data"])]
    assert names == ["scan/1.png", "scan/2.png", "scan/9.png", "scan/10.png"]
    predictions = [served.predictor.predict(files[i % 6]) for i in (1, 2, 9, 10)]
    captions = [item["caption"] for item in visitor.values["slices"]]
    assert captions == [f"{i}: {one.decision}" for i, one in enumerate(predictions, start=1)]
    best = max(range(4), key=lambda i: (predictions[i].decision != "refused", predictions[i].score))
    assert names[best].replace(".", "\\.") in visitor.values["verdict"]
    visitor.choose((best + 1) % 4)
    visitor.choose(99)  # which is none
    assert names[(best + 1) % 4].replace(".", "\\.") in visitor.values["verdict"]


def test_one_bad_file_spoils_no_other(visitor: Visitor, files: list[bytes]) -> None:
    visitor.look([("a.png", files[0]), ("b.png", b"rubbish"), ("c.png", files[1])])
    assert [row[2] == "unreadable" for row in visitor.values["visit"]["data"]] == [False, True, False]
    visitor.choose(1)
    assert visitor.headline == "This file was not read"
    assert "cannot be read" in visitor.values["verdict"]


def test_names_are_shown_as_they_are(visitor: Visitor) -> None:
    visitor.look([("[x](http://example.org)<img src=x>.png", b"rubbish")])
    assert "\\[x\\]\\(http" in visitor.values["verdict"]
    assert "<img" not in visitor.values["verdict"].replace("\\<", "")


def test_too_many_slices_are_one_sentence(visitor: Visitor, files: list[bytes]) -> None:
    visitor.look([("many.zip", zipped({f"{i}.png": files[0] for i in range(21)}))])
    assert "21 slices at once; this service takes up to 20" in visitor.values["status"]


def test_the_visit_is_listed_and_comes_as_csv(visitor: Visitor, served: Served, files: list[bytes]) -> None:
    visitor.look([("=cmd()", files[0])])
    visitor.look([("second.png", files[1]), ("third.png", b"rubbish")])
    data = base64.b64decode(visitor.values["csv"]["url"].split(",")[1]).decode("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(data)))
    assert [row["File"] for row in rows] == ["'=cmd()", "second.png", "third.png"]
    assert [row["Decision"] == "unreadable" for row in rows] == [False, False, True]
    assert float(rows[0]["Probability"]) == pytest.approx(served.predictor.predict(files[0]).score, abs=1e-3)


def test_visitors_see_only_their_own(served: Served, files: list[bytes]) -> None:
    visitors = [Visitor(served.url) for _ in range(6)]
    start = threading.Barrier(6)

    def visit(i: int) -> set[str]:
        start.wait()
        pictures = set()
        for turn in range(3):
            visitors[i].look([(f"of-{i}-{turn}.png", files[i])])
            pictures.add(visitors[i].values["slice"]["image"]["url"])
        return pictures

    with ThreadPoolExecutor(6) as pool:
        pictures = list(pool.map(visit, range(6)))
    assert all(len(own) == 1 for own in pictures)
    assert len(set.union(*pictures)) == 6
    for i, visitor in enumerate(visitors):
        names = [row[1] for row in reversed(visitor.values["visit"]["data"])]
        assert names == [f"of-{i}-{turn}.png" for turn in range(3)]


def test_nothing_of_a_request_stays_on_disk_and_no_path_of_this_machine_is_in_an_answer(visitor, served, files) -> None:
    visitor.look([("a.png", files[0]), ("b.png", b"rubbish")])
    visitor.example(1)
    assert not served.left()
    assert str(served.uploads) not in str(visitor.values)
    assert served.uploads.name not in visitor.http.get("/config").text


NAME = "0" * 32
PATHS = (
    "/etc/passwd",
    "{uploads}/x",
    f"{{uploads}}/{NAME}/{NAME}",
    f"{NAME}/../passwd",
    f"{NAME}/{NAME}",
    "http://a.b/x",
)


@pytest.mark.parametrize("path", PATHS)
def test_only_uploads_can_be_named_and_no_other_file_is_touched(visitor: Visitor, served: Served, path: str) -> None:
    path = path.format(uploads=served.uploads)
    (other,) = visitor.upload([("other.png", b"x")])
    file = {"path": path, "orig_name": "x", "meta": {"_type": "gradio.FileData"}}
    error = visitor.send(("upload", "upload"), [[file], None])
    assert "headline" not in visitor.values
    assert "no file that was uploaded" in error or "no longer there" in visitor.values["status"]
    assert [left.name for left in served.left()] == [Path(other["path"]).parent.name]
    shutil.rmtree(served.left()[0])


def test_gradio_client_gets_plain_json_from_the_one_named_endpoint(served: Served, files, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    (tmp_path / "slice.png").write_bytes(files[2])
    client = Client(served.url, verbose=False)
    answer = client.predict(file=handle_file(str(tmp_path / "slice.png")), overlay=True, api_name="/predict")
    prediction = served.predictor.predict(files[2])
    assert answer["score"] == pytest.approx(prediction.score, abs=1e-5)
    assert answer["decision"] == prediction.decision
    assert answer["overlay"].startswith("data:image/png;base64,")
    assert not served.left()
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/predict"}
    (tmp_path / "slice.png").write_bytes(b"rubbish")
    with pytest.raises(Exception, match="neither PNG"):
        client.predict(file=handle_file(str(tmp_path / "slice.png")), api_name="/predict")


def test_the_page_about_the_model_says_what_its_bundle_knows(visitor: Visitor, served: Served) -> None:
    bundle = served.predictor.bundle
    visitor.send((None, "load"), [])
    assert "It has only seen **phantoms**" in visitor.values["card"]
    table = visitor.values["reliability"]
    assert table.count("\n| ") == 2 + len(bundle.facts["reliability"]["test"])
    assert reliability({}) == ""  # of an older bundle


def test_the_page_names_no_other_host(served: Served) -> None:
    html = httpx.get(f"{served.url}/").text
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']([^"']+)""", html)
    assert loaded
    assert not [address for address in loaded if re.match(r"(https?:)?//", address)]
    assert "http" not in httpx.get(f"{served.url}/theme.css").text.replace("http://www.w3.org/2000/svg", "")


def test_answers_are_passed_on_and_a_failing_record_spoils_none(bundle_folder: Path, files: list[bytes]) -> None:
    seen = []

    def record(prediction) -> None:
        seen.append(prediction.decision)
        raise OSError("disk full")

    with serving(bundle_folder, on_answer=record) as running:
        assert httpx.post(f"{running.url}/predict", content=files[0]).status_code == 200
        visitor = Visitor(running.url)
        visitor.look([("a.png", files[1])])
        visitor.example(0)  # which is not recorded
        assert visitor.headline
    assert len(seen) == 2


def test_kinds_of_cancer_are_listed_where_the_bundle_tells_them_apart(phantoms, tmp_path: Path, files) -> None:
    make_bundle(tmp_path / "four", phantoms, ("normal", "adenocarcinoma", "large_cell", "squamous"))
    with serving(tmp_path / "four") as running:
        visitor = Visitor(running.url)
        visitor.look([("a.png", files[0])])
        names = {bar["label"] for bar in visitor.values["kinds"]["confidences"]}
        assert {"normal", "adenocarcinoma", "squamous cell carcinoma"} <= names


def test_the_number_of_visitors_whose_answers_are_kept_is_bounded(bundle_folder: Path, files: list[bytes]) -> None:
    with serving(bundle_folder) as running:
        for _ in range(SESSIONS + 3):
            Visitor(running.url).send(("slices", "select"), [None], {"index": 0, "value": None})
        gradio_app = running.server.config.app.routes[-1].app
        assert 0 < len(gradio_app.state_holder.session_data) <= SESSIONS


def test_twenty_clients_with_good_and_bad_files_get_what_is_theirs(bundle_folder: Path, files, examples) -> None:
    with serving(bundle_folder) as running:
        expected = [running.predictor.predict(data) for data in files]

        def client(i: int) -> list[str]:
            wrong = []
            visitor = Visitor(running.url) if i % 4 == 0 else None
            for turn in range(5):
                kind, own = (i + turn) % 5, (i * 5 + turn) % 6
                if kind == 3:
                    answer = httpx.post(f"{running.url}/predict", content=b"rubbish %d" % i, timeout=60)
                    wrong += [] if answer.status_code == 422 else [f"{answer.status_code} for rubbish"]
                elif kind == 4:
                    answer = httpx.post(f"{running.url}/predict", content=examples["hills.jpg"], timeout=60)
                    wrong += [] if answer.json().get("decision") == "refused" else [answer.text]
                elif visitor:
                    visitor.look([(f"of-{i}-{turn}.png", files[own])])
                    row = visitor.values["visit"]["data"][0]
                    wrong += [] if row[1:3] == [f"of-{i}-{turn}.png", expected[own].decision] else [str(row)]
                else:
                    answer = httpx.post(f"{running.url}/predict", content=files[own], timeout=60)
                    if answer.status_code != 200 or abs(answer.json()["score"] - expected[own].score) > 1e-4:
                        wrong.append(answer.text)
            return wrong

        with ThreadPoolExecutor(20) as pool:
            assert [wrong for wrong in pool.map(client, range(20)) if wrong] == []
        assert not running.left()
