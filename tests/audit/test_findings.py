"""What the audit concludes from what it measured, on made-up slices with planted faults."""

import json
from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from chestct.audit import stage
from chestct.audit.findings import KINDS, SEVERITIES, VERDICTS, Audit
from chestct.audit.stage import audit_store
from chestct.config.schema import Config
from chestct.data.store import STORE
from tests.audit.conftest import run


def kinds(audit: Audit) -> dict[str, str]:
    """The worst severity of each kind of finding."""
    return {finding.kind: finding.severity for finding in reversed(audit.findings)}


def test_what_training_refuses_is_an_error_whichever_split_or_class_it_is(make_data):
    data = make_data(120)
    manifest, splits = data.manifest, data.splits["grouped"]
    data.splits["grouped"] = splits.mask((manifest["label"] == "normal") & (splits == "valid"), "test")
    audit = run(data)
    (told,) = (finding.text for finding in audit.findings if finding.kind == "imbalance")
    assert told == "There are no normal slices in valid, which training cannot do without."
    assert audit.verdict == ("error", VERDICTS["imbalance"])
    data.splits["grouped"] = splits.replace("test", "train")
    assert run(data).lacking == ["slices in test"]
    data.splits["grouped"] = splits.mask((manifest["label"] == "normal") & (splits == "test"), "train")
    assert run(data).lacking == []  # a test of cancers alone, such as a held-out source, is one of sensitivity
    manifest.loc[manifest["subtype"] == "squamous", "subtype"] = "large_cell"
    missing = ["squamous slices in train", "squamous slices in valid"]
    assert audit_store(Config(task="subtype"), data).lacking == missing


def test_sources_of_one_class_in_train_are_named_next_to_others(make_data):
    data = make_data(120)
    label, train = data.manifest["label"], data.splits["grouped"] == "train"
    data.manifest["source"] = np.where(label == "cancer", "b", np.where(train, "a", "b"))
    text, *_ = (finding.text for finding in run(data).findings if finding.text.startswith("Of these sources"))
    assert "one class alone: b (cancer), a (normal)" in text or "one class alone: a (normal), b (cancer)" in text
    data.manifest["source"] = np.where(data.manifest.index % 2, "a", "b")
    assert not [finding for finding in run(data).findings if finding.text.startswith("Of these sources")]


def test_phantoms_beside_patients_count_in_no_finding(make_data):
    data = make_data(200)
    data.manifest["source"] = np.where(data.manifest.index < 120, "clinic", "phantom")
    data.splits["grouped"][[0, *range(120, 200)]] = "train"
    data.manifest.loc[120:, ["label", "subtype"]] = "normal"
    data.manifest.loc[150:, "content"] = "drawn twice"
    data.pairs = pd.DataFrame({"a": [0, 121, 2], "b": [122, 123, 3], "similarity": 0.99, "kind": "near"})
    audit = run(data)
    patients = copy(data)
    patients.manifest, patients.pairs = data.manifest[:120], data.pairs[2:]
    patients.splits = {"grouped": data.splits["grouped"][:120]}
    alone = run(patients)
    assert (audit.phantoms, alone.phantoms) == (80, 0)
    assert (audit.duplicates["files"], audit.duplicates["near_pairs"]) == (120, 1)
    assert (audit.balance, audit.duplicates) == (alone.balance, alone.duplicates)
    assert [finding.kind for finding in audit.findings] == [finding.kind for finding in alone.findings]


def test_the_example_of_contradicting_labels_is_a_slice_of_each(make_data):
    data = make_data(20)
    alike = ["large_cell", "large_cell", "cancer", "squamous"]
    data.manifest.loc[range(4), ["content", "subtype", "label"]] = [["x", name, "cancer"] for name in alike]
    data.manifest["path"] = [f"{i}.png" for i in range(20)]
    first = next(finding.text for finding in run(data).findings if finding.kind == "label_conflict")
    assert first.endswith(" For example 0.png and 3.png.")
    data.manifest.loc[4, ["content", "subtype", "label"]] = ["x", "normal", "normal"]
    first = next(finding.text for finding in run(data).findings if finding.kind == "label_conflict")
    assert first.endswith(" For example 0.png and 4.png.")


def test_where_there_are_several_sources_every_file_is_named_with_its_own(faulty):
    data = copy(faulty)
    data.manifest = faulty.manifest.assign(source=np.where(faulty.manifest.index == 1, "a", "b"))
    audit = run(data, "official")
    first, second = data.manifest["path"][:2]
    known = [(row["path"], row["twin_path"]) for row in audit.leakage["official"]["list"]]
    assert (f"a/{second}", f"b/{first}") in known
    assert [f"b/{first}", f"a/{second}"] in [row["paths"] for row in audit.conflicts]
    assert "s/<b>broken</b>.png" in next(finding.text for finding in audit.findings if finding.kind == "unreadable")


def test_findings_come_worst_first_and_only_the_policy_in_force_can_be_in_error_for_leaking(faulty, official):
    assert kinds(official)["leakage"] == "error"
    assert kinds(run(faulty, "grouped"))["leakage"] == "info"
    assert {"leakage", "label_conflict", "unreadable", "duplicates", "sample_size"} <= set(kinds(official))
    ranks = [SEVERITIES.index(finding.severity) for finding in official.findings]
    assert ranks == sorted(ranks)
    assert official.verdict == ("error", VERDICTS[official.findings[0].kind])
    for finding in official.findings:
        assert finding.kind in KINDS
        assert finding.text.endswith(".")
        assert finding.action.endswith(".")


def test_a_large_clean_set_has_no_finding_but_notes(make_data):
    audit = run(make_data(500, cancer=0.5))
    assert audit.verdict == ("clean", "Nothing here would make a score on this split misleading.")
    assert all(finding.severity == "info" for finding in audit.findings)


def test_the_first_sentence_about_phantoms_alone_says_that_they_are_no_patients(make_data):
    data = make_data(60)
    data.manifest.loc[0, "source"] = "phantom"
    assert "hantoms" not in run(data).verdict.text
    data.manifest["source"] = "phantom"
    assert run(data).verdict.text.startswith("Phantoms, of which no score says anything about patients.")


def test_imbalance_and_few_groups_in_test_are_judged_by_groups(make_data):
    assert kinds(run(make_data(400, cancer=0.9)))["imbalance"] == "warning"
    data = make_data(500, cancer=0.5)
    data.manifest.loc[data.manifest["label"] == "normal", "group"] = 0
    audit = run(data)
    assert kinds(audit)["imbalance"] == kinds(audit)["sample_size"] == "warning"
    assert "only 1 normal" in next(finding.text for finding in audit.findings if finding.kind == "sample_size")


def test_one_class_only_is_an_error(make_data):
    audit = run(make_data(60, cancer=1))
    assert kinds(audit)["imbalance"] == "error"
    assert "one class only" in json.dumps(audit.shortcuts)
    for groups in (range(30), [0] * 30):  # what training refuses, the audit shows: one class, one group
        data = make_data(30, cancer=1)
        data.manifest["group"] = groups
        assert kinds(audit_store(Config(), data))["imbalance"] == "error"


@pytest.mark.parametrize(("width", "told"), [(0.0, ["error"]), (0.7, ["error", "warning"]), (0.92, ["error"])])
def test_metadata_taken_together_are_left_out_only_where_size_alone_is_as_bad(official, width, told):
    rows = [{"title": "Width", "family": "size", "auroc": width}, {"title": "All", "family": "metadata", "auroc": 0.97}]
    rows = [row | {"low": row["auroc"], "high": 1.0, "flagged": row["auroc"] > 0.6} for row in rows]
    found = [finding for finding in replace(official, shortcuts=rows).findings if finding.kind == "shortcut"]
    assert [finding.severity for finding in found] == told
    assert ("all alone" in found[0].text) == (width < 0.9)


def test_the_json_tells_everything_without_nan_and_gives_the_same_audit_back(faulty, official):
    values = json.loads(official.to_json(), parse_constant=pytest.fail)
    assert values["leakage"]["official"]["test"]["copies"] == 1
    assert values["verdict"]["severity"] == values["findings"][0]["severity"] == "error"
    assert Audit.from_json(official.to_json()) == official == run(faulty, "official")


def test_an_audit_is_kept_for_one_store_and_made_anew_for_another(tmp_path, monkeypatch, make_data):
    store, made = make_data(30), []
    audit = run(store)
    store.folder = tmp_path
    (tmp_path / STORE).write_text("one", encoding="utf-8")
    monkeypatch.setattr(stage, "audit_store", lambda cfg, store: made.append(store) or audit)
    cfg = Config(cache_dir=str(tmp_path))
    assert stage.kept_audit(cfg, store) == stage.kept_audit(cfg, store) == audit
    assert len(made) == 1
    (tmp_path / STORE).write_text("another", encoding="utf-8")  # other pixels, groups, files, or notes on them
    stage.kept_audit(cfg, store)
    stage.kept_audit(replace(cfg, data=replace(cfg.data, split_seed=1)), store)
    with monkeypatch.context() as patch:  # the same settings, dealt by another rule
        patch.setattr(stage, "make_splits", lambda manifest, *_, **__: pd.Series("train", index=manifest.index))
        stage.kept_audit(cfg, store)
    monkeypatch.setattr(stage, "__file__", str(tmp_path / "audit" / "stage.py"))
    for name in ("data/splits.py", "audit/stage.py", "stats/metrics.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"another {name}", encoding="utf-8")
        stage.kept_audit(cfg, store)
    assert len(made) == 7
