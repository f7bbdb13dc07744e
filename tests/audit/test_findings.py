"""What the audit concludes from what it measured, on made-up slices with planted faults."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from chestct.audit import Audit
from chestct.audit.findings import RULES, SEVERITIES
from chestct.errors import DataError
from tests.audit.conftest import run


def kinds(audit: Audit) -> dict[str, str]:
    """The worst severity of each kind of finding."""
    return {finding.kind: finding.severity for finding in reversed(audit.findings)}


def test_only_the_policy_in_force_can_be_in_error_for_leaking(faulty, official):
    assert kinds(official)["leakage"] == "error"
    assert kinds(run(faulty, "grouped"))["leakage"] == "info"


def test_findings_come_worst_first_and_each_says_what_to_do(official):
    assert {"leakage", "label_conflict", "unreadable", "duplicates", "sample_size"} <= set(kinds(official))
    ranks = [SEVERITIES.index(finding.severity) for finding in official.findings]
    assert ranks == sorted(ranks)
    for finding in official.findings:
        assert finding.kind in RULES
        assert finding.text.endswith(".")
        assert finding.action.endswith(".")


def test_a_large_clean_set_has_no_finding_but_notes(make_data):
    audit = run(make_data(500, cancer=0.5))
    assert audit.verdict.severity == "clean"
    assert all(finding.severity == "info" for finding in audit.findings)


@pytest.mark.parametrize(("cancer", "expected"), [(0.5, False), (0.9, True)])
def test_imbalance_is_judged_by_groups_of_train(make_data, cancer, expected):
    assert ("imbalance" in kinds(run(make_data(400, cancer=cancer)))) is expected


def test_few_groups_in_test_are_a_warning_with_the_numbers(make_data):
    data = make_data(500, cancer=0.5)
    data.manifest.loc[data.manifest["label"] == "normal", "group"] = 0
    finding = next(finding for finding in run(data).findings if finding.kind == "sample_size")
    assert finding.severity == "warning"
    assert "only 1 normal" in finding.text


def test_one_class_only_is_an_error_and_not_a_crash(make_data):
    audit = run(make_data(60, cancer=1))
    assert kinds(audit)["imbalance"] == "error"
    assert "one class only" in json.dumps(audit.shortcuts)


def test_no_slices_is_an_error_that_says_how_to_mend_it(make_data):
    data = make_data(20)
    data.manifest = data.manifest[:0]
    with pytest.raises(DataError, match="no readable slices"):
        run(data)


def test_the_index_of_the_manifest_does_not_matter_and_the_same_seed_gives_the_same_audit(faulty, official):
    index = faulty.manifest.index[::-1] + 7
    splits = {name: pd.Series(split.to_numpy(), index)[::-1] for name, split in faulty.splits.items()}
    assert run(replace(faulty, manifest=faulty.manifest.set_index(index), splits=splits), "official") == official


def test_the_json_tells_everything_without_nan_and_gives_the_audit_back(official):
    values = json.loads(official.to_json(), parse_constant=pytest.fail)
    assert values["leakage"]["official"]["test"]["copies"] == 1
    assert values["verdict"]["severity"] == values["findings"][0]["severity"] == "error"
    assert Audit.from_json(official.to_json()) == official
