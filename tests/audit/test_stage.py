from dataclasses import replace
from types import SimpleNamespace

import pandas as pd

from chestct.audit import stage
from chestct.config.schema import Config
from tests.audit.conftest import run


def test_an_audit_is_kept_for_one_store_and_made_anew_for_another(tmp_path, monkeypatch, make_data):
    audit, made = run(make_data(30)), []
    monkeypatch.setattr(stage, "audit_store", lambda cfg, store: made.append(store) or audit)
    cfg = Config(cache_dir=str(tmp_path))
    skipped = [{"source": "s", "path": "Thumbs.db", "reason": "left by Windows"}]
    store = SimpleNamespace(
        data_hash="a", settings={"fit": "pad"}, manifest=make_data(30).manifest, skipped=skipped, disbelieved=[]
    )
    assert stage.kept_audit(cfg, store) == stage.kept_audit(cfg, store) == audit
    assert len(made) == 1
    joined = store.manifest.assign(group=store.manifest["group"] // 2)
    for other in (
        {"settings": {"fit": "body"}},  # other pixels
        {"manifest": joined},  # other groups, and so another split
        {"data_hash": "b"},
        {"skipped": []},
        {"disbelieved": ["PatientID is the same"]},
    ):
        stage.kept_audit(cfg, SimpleNamespace(**(vars(store) | other)))
    stage.kept_audit(replace(cfg, data=replace(cfg.data, split_seed=1)), store)
    with monkeypatch.context() as patch:  # the same settings, dealt by another rule
        patch.setattr(stage, "make_splits", lambda manifest, task, data: pd.Series("train", index=manifest.index))
        stage.kept_audit(cfg, store)
    (tmp_path / "stage.py").write_text("another audit", encoding="utf-8")
    monkeypatch.setattr(stage, "__file__", str(tmp_path / "stage.py"))
    stage.kept_audit(cfg, store)
    assert len(made) == 9
