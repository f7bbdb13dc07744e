"""The page behind its looks: what it answers, to whom, and what stays afterwards."""

import base64
import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from chestct.serving.prediction import NOT_MEDICAL, Prediction
from chestct.serving.sentences import HEADLINES
from tests.serving.conftest import Served, make_bundle, serving, zipped
from tests.serving.visitor import Visitor

pytestmark = pytest.mark.slow  # a service is started


@pytest.fixture
def visitor(served: Served) -> Visitor:
    return Visitor(served.url)


def picture(value: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(value["url"].split(",")[1]))), int)


@pytest.mark.parametrize("decision", ["cancer", "normal"])
def test_a_slice_gets_its_decision_its_reasons_and_its_pictures(visitor, served, files, decision: str) -> None:
    predictions = [served.predictor.predict(data) for data in files]
    i = next(i for i, one in enumerate(predictions) if one.decision == decision)
    visitor.look([("mine.png", files[i])])
    values, visible = visitor.values, visitor.visible
    assert "cancers in the validation set were found" in values["verdict"]
    assert "mine\\.png" in values["verdict"]
    assert "Distance to the training slices" in values["why"]
    bars = {bar["label"]: bar["confidence"] for bar in values["score"]["confidences"]}
    assert bars["Score"] == pytest.approx(min(0.99, max(0.01, predictions[i].score)), abs=1e-3)
    assert visible["slice"]
    assert np.abs(picture(values["slice"]) - predictions[i].gray).mean() < 5
    assert bool(values["heat"]["url"]) == (decision == "cancer")  # never on a slice called normal
    visitor.send((None, "load"), [])
    assert "It has only seen **phantoms**" in values["caveats"]  # from the card
    assert NOT_MEDICAL in values["caveats"]
    assert "Trying things out" in values["card"]


def test_the_page_has_no_address_that_a_client_makes_up(served) -> None:
    made_up = {"x-forwarded-host": "evil.example.com", "x-forwarded-proto": "https"}
    for headers in (made_up, {"x-gradio-server": "http://evil.example.com"}):
        assert httpx.get(f"{served.url}/config", headers=headers).json()["root"] == served.url


def test_examples_are_answered_and_one_that_is_no_ct_is_refused(visitor: Visitor, served, examples) -> None:
    visitor.example(0)
    assert visitor.headline == HEADLINES[served.predictor.predict(examples["large-lesion.png"]).decision]
    visitor.example(3)
    assert visitor.headline == "No answer for this image"
    assert "colour image" in visitor.values["verdict"]
    assert "robability" not in visitor.values["verdict"]
    assert not visitor.visible["score"]
    assert not visitor.values["heat"]["url"]
    text = visitor.values["why"]  # behind "Show the score anyway"
    assert text.index("means nothing") < text.index("Score")


def test_a_series_is_in_order_with_the_most_suspicious_slice_shown_and_a_bad_file_spoils_no_other(
    visitor, served, files
) -> None:
    scan = {f"scan/{i}.png": files[i % 6] for i in (10, 9, 2, 1)} | {
        "__MACOSX/x": b"no",
        "scan/3<img src=x>.png": b"rubbish",
    }
    visitor.look([("scan.zip", zipped(scan))])
    predictions = [served.predictor.predict(files[i % 6]) for i in (1, 2, 9, 10)]
    decisions = [one.decision for one in predictions]
    captions = [item["caption"] for item in visitor.values["slices"]]
    expected = [*decisions[:2], "unreadable", *decisions[2:]]
    assert captions == [f"{i}: {decision}" for i, decision in enumerate(expected, start=1)]
    names = ["scan/1.png", "scan/2.png", "scan/9.png", "scan/10.png"]
    best = max(range(4), key=lambda i: (decisions[i] != "refused", predictions[i].score))
    assert names[best].replace(".", "\\.") in visitor.values["verdict"]
    visitor.choose(2)
    visitor.choose(99)  # which is none
    assert visitor.headline == "This file was not read"
    assert "scan/3\\<img src=x\\>\\.png" in visitor.values["verdict"]


def test_nothing_of_a_request_stays_on_disk_and_no_path_of_this_machine_is_in_an_answer(visitor, served, files) -> None:
    visitor.look([("a.png", files[0]), ("b.png", b"rubbish")])
    assert not served.left()
    assert str(served.uploads) not in str(visitor.values)
    assert served.uploads.name not in visitor.http.get("/config").text
    gone = {"path": "0" * 32, "orig_name": "x", "meta": {"_type": "gradio.FileData"}}
    visitor.send(("upload", "upload"), [[gone]])
    assert "no longer there" in visitor.values["status"]


def test_answers_are_recorded_but_for_examples_and_kinds_of_cancer_are_listed(phantoms, tmp_path: Path, files) -> None:
    make_bundle(tmp_path / "four", phantoms, 4)
    seen: list[str] = []
    with serving(tmp_path / "four", on_answer=lambda prediction: seen.append(prediction.decision)) as running:
        visitor = Visitor(running.url)
        visitor.look([("a.png", files[0])])
        assert all(kind in visitor.values["why"] for kind in ("normal", "adenocarcinoma", "large cell", "squamous"))
        visitor.example(0)
    assert len(seen) == 1


def test_all_files_of_a_visit_are_answered_and_explained_by_one_bundle(bundle_folder, phantoms, tmp_path, files):
    make_bundle(tmp_path / "four", phantoms, 4)
    answers: list[str] = []

    def replace(prediction: Prediction) -> None:
        answers.append(prediction.bundle)
        running.predictor.reload(tmp_path / "four")

    with serving(bundle_folder, on_answer=replace) as running:
        before = running.predictor.bundle.id
        visitor = Visitor(running.url)
        visitor.look([(f"{i}.png", data) for i, data in enumerate(files[:3])])
        assert answers == [before] * 3 != [running.predictor.bundle.id] * 3
    assert "Which kind" not in visitor.values["why"]  # what the other one would say


def test_many_visitors_get_what_is_theirs_and_a_bounded_number_is_kept(bundle_folder: Path, files) -> None:
    from chestct.serving.page import SESSIONS  # Gradio with it: seconds, which no quick test has to wait for

    with serving(bundle_folder) as running:
        expected = [running.predictor.predict(data).gray for data in files]

        def visit(i: int) -> bool:
            visitor = Visitor(running.url)
            visitor.look([(f"of-{i}.png", files[i % 6])])
            close = np.abs(picture(visitor.values["slice"]) - expected[i % 6]).mean() < 5
            return close and f"of\\-{i}\\.png" in visitor.values["verdict"]

        with ThreadPoolExecutor(12) as pool:
            assert all(pool.map(visit, range(24)))
        assert not running.left()
        for _ in range(SESSIONS):
            Visitor(running.url).choose(0)
        page = running.server.config.app.routes[-1].app  # made behind the API, an app of its own
        gradio_app = page.app.result().routes[-1].app
        assert 0 < len(gradio_app.state_holder.session_data) <= SESSIONS


def test_a_scan_is_a_strip_of_scores_with_the_most_suspicious_slices_first(visitor, served, scan) -> None:
    files = scan(8)
    visitor.look([("scan.zip", zipped(files | {"1.2.3/readme.txt": b"no slice"}))])
    in_order = [served.predictor.predict(data) for _, data in sorted(files.items(), reverse=True)]
    assert visitor.visible["strip"]
    points = visitor.values["strip"]["data"]
    assert [point[0] for point in points] == list(range(1, 9))
    assert [point[1] for point in points] == pytest.approx([one.score for one in in_order], abs=1e-5)
    shown = [int(item["caption"].split(":")[0]) for item in visitor.values["slices"]]
    scores = [in_order[place - 1].score for place in shown[:8]]
    assert scores == sorted(scores, reverse=True)
    assert shown[8:] == [9]  # the text file
    assert "Not validated for patients" in visitor.values["status"]
    visitor.look(list(files.items())[:2])
    assert not visitor.visible["strip"]


def test_a_whole_scan_is_within_the_limits_of_a_request_and_in_order(bundle_folder, scan) -> None:
    from chestct.serving.page import PICTURES

    plain = np.zeros((512, 512), np.int16)  # as large as those of a scanner: 168 MB in all
    files = scan(320, Rows=512, Columns=512, BitsAllocated=16, BitsStored=16, HighBit=15, PixelData=plain.tobytes())
    files |= {name: data for name, data in scan(320).items() if name.endswith("7")}  # 32 that show a thorax
    with serving(bundle_folder) as service:
        visitor = Visitor(service.url)
        visitor.look([("scan.zip", zipped(files, zipfile.ZIP_STORED))])
        points = visitor.values["strip"]["data"]
        expected = {i + 1: service.predictor.predict(files[f"1.2.3/IM{320 - i:03}"]).score for i in range(3, 320, 10)}
    places = [place for place, _, _ in points]
    assert places == sorted(places)
    found = {place: score for place, score, _ in points}
    assert found.keys() >= expected.keys()
    assert [found[place] for place in expected] == pytest.approx(list(expected.values()), abs=1e-5)
    assert len(visitor.values["slices"]) == PICTURES
    assert f"Shown are the {PICTURES} most suspicious." in visitor.values["status"]
