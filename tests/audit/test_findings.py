"""What the audit concludes from what it measured, on made-up slices with planted faults."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from chestct.audit import stage
from chestct.audit.findings import KINDS, SEVERITIES, VERDICTS, Audit
from chestct.audit.stage import audit_store
from chestct.config.schema import Config
from tests.audit.conftest import run


def kinds(audit: Audit) -> dict[str, str]:
    """The worst severity of each kind of finding."""
    return {finding.kind: finding.severity for finding in reversed(audit.findings)}


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


def test_the_json_tells_everything_without_nan_and_gives_the_same_audit_back(faulty, official):
    values = json.loads(official.to_json(), parse_constant=pytest.fail)
    assert values["leakage"]["official"]["test"]["copies"] == 1
    assert values["verdict"]["severity"] == values["findings"][0]["severity"] == "error"
    assert Audit.from_json(official.to_json()) == official == run(faulty, "official")


def test_an_audit_is_kept_for_one_store_and_made_anew_for_another(tmp_path, monkeypatch, make_data):
    store, made = make_data(30), []
    audit = run(store)
    monkeypatch.setattr(stage, "audit_store", lambda cfg, store: made.append(store) or audit)
    cfg = Config(cache_dir=str(tmp_path))
    assert stage.kept_audit(cfg, store) == stage.kept_audit(cfg, store) == audit
    assert len(made) == 1
    joined = store.manifest.assign(group=store.manifest["group"] // 2)
    for other in (
        {"settings": {"fit": "body"}},  # other pixels
        {"manifest": joined},  # other groups, and so another split
        {"manifest": store.manifest.assign(content="b" + store.manifest["content"])},
        {"skipped": [{"source": "s", "path": "Thumbs.db", "reason": "left by Windows"}]},
        {"disbelieved": ["PatientID is the same"]},
        {"unreadable": [{"source": "s", "path": "a.png", "reason": "damaged"}]},
        {"manifest": store.manifest.assign(file_hash="b" + store.manifest["file_hash"])},  # the same, saved anew
    ):
        stage.kept_audit(cfg, replace(store, **other))
    stage.kept_audit(replace(cfg, data=replace(cfg.data, split_seed=1)), store)
    with monkeypatch.context() as patch:  # the same settings, dealt by another rule
        patch.setattr(stage, "make_splits", lambda manifest, *_, **__: pd.Series("train", index=manifest.index))
        stage.kept_audit(cfg, store)
    (tmp_path / "stage.py").write_text("another audit", encoding="utf-8")
    monkeypatch.setattr(stage, "__file__", str(tmp_path / "stage.py"))
    stage.kept_audit(cfg, store)
    assert len(made) == 11
