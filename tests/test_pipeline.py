"""dvc.yaml against the code: a stage depends on what it imports, on what it reads, and on the settings that it uses."""

import re
from contextlib import nullcontext
from pathlib import Path

import grimp
import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from chestct.config.compose import CONF, check_pipeline, compose
from chestct.config.fields import leaves
from chestct.config.schema import Config
from chestct.data.sources import sources_of
from chestct.errors import ConfigError

ROOT = CONF.parent
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]
EVALUATED = ("evaluation.sections", "evaluation.split_policies", "reporting.render")
ENTRIES = {
    "ingest": ["data.prepare"],
    "validate": ["audit.stage", "reporting.audit_report"],
    "train": ["training.train"],
    "evaluate": ["evaluation.evaluate", "evaluation.protocol", *EVALUATED],
    "export": ["evaluation.export", *EVALUATED],
}
NO_RESULT = {"config", "errors", "files", "progress", "pyfunc", "tracking", "sweep", "version"}
"""What passes settings on or keeps records: it decides no output."""

NOT_THE_PIPELINES = (
    *("ckpt", "cache_dir", "bundle", "compare", "loggers", "trust", "runs_dir", "tracking", "serve"),
    *("monitor", "data.store", "data.workers"),
)
"""Settings that decide where things lie and who is told, not what comes out."""


def paths(items):
    """Paths of DVC's lists, whose items may be mappings."""
    return {next(iter(item)) if isinstance(item, dict) else item for item in items}


def upstream(name):
    """A stage with those whose outputs it takes, directly or through others."""
    made = {path: stage for stage, given in STAGES.items() for path in paths(given.get("outs", []))}
    found = {name}
    for path in paths(STAGES[name]["deps"]) & made.keys():
        found |= upstream(made[path])
    return found


@pytest.fixture(scope="module")
def imports():
    return grimp.build_graph("chestct", cache_dir=None)


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_runs_again_when_a_module_that_it_uses_changes(stage, imports):
    deps = {ROOT / path for name in upstream(stage) for path in paths(STAGES[name]["deps"])}
    used = {f"chestct.{entry}" for entry in ENTRIES[stage]}  # and what these import, at the top or in a function:
    used |= {name for entry in used for name in imports.find_upstream_modules(entry)}
    files = {
        ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in used if not NO_RESULT & {*name.split(".")[1:2]}
    }
    unseen = [path for path in files if path.exists() and not deps & {path, *path.parents}]
    assert not unseen


def test_every_dependency_is_there():
    made = {path for stage in STAGES.values() for path in paths(stage.get("outs", []))}
    for path in {path for stage in STAGES.values() for path in paths(stage["deps"])} - made:
        assert Path(ROOT, path).exists(), path


def test_every_setting_that_decides_a_result_belongs_to_a_stage():
    params = {key for stage in STAGES.values() for key in stage["params"]}
    for key, _, _ in leaves(Config):
        parts = key.split(".")
        prefixes = {".".join(parts[: n + 1]) for n in range(len(parts))}
        assert prefixes & (params | set(NOT_THE_PIPELINES)), key


@pytest.mark.parametrize("module", ["data/datamodule", "models/lightning_module"])
def test_what_training_itself_reads_are_its_own_settings(module):
    read = set(re.findall(r"\bcfg\.(\w+(?:\.\w+)?)", (ROOT / "chestct" / f"{module}.py").read_text(encoding="utf-8")))
    settings = {key for key, _, _ in leaves(Config)} & read
    assert settings
    params, elsewhere = STAGES["train"]["params"], ("data.workers", "ckpt")
    assert not [key for key in settings - {*elsewhere} if not {key, key.split(".")[0]} & {*params}]


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """pipeline(deps) stands for the stage ingest with these deps, run by DVC."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"job": {"config_name": "params"}}))

    def written(deps):
        (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"ingest": {"deps": ["chestct/data", *deps]}}}))
        (tmp_path / "params.yaml").write_text("data: {labels_file: labels.yaml, root: data/ct}")

    return written


def roots(*overrides):
    return [source.root for source in sources_of(compose(*overrides).data).values()]


@pytest.mark.parametrize(
    ("deps", "lacking"),
    [
        ([], "labels.yaml - data/ct"),
        (["labels.yaml"], "data/ct"),
        (["data", "labels.yaml"], ""),
        (["${data.root}", "labels.yaml"], ""),
    ],
)
def test_ingest_refuses_slices_whose_change_dvc_would_not_notice(pipeline, deps, lacking):
    pipeline(deps)
    with pytest.raises(ConfigError) if lacking else nullcontext() as refused:
        check_pipeline(roots("data.root=data/ct"))
    assert not lacking or " ".join(str(refused.value).split()).endswith(f"Add to its deps: - {lacking}")


def test_phantoms_need_no_line_in_dvc_yaml(pipeline):
    pipeline(["labels.yaml"])
    check_pipeline(roots("data.sources={phantom: {}}"))
    check_pipeline(roots())


@pytest.mark.parametrize("file", ["dvc.yaml", "params.yaml"])
def test_without_a_pipeline_there_is_nothing_to_refuse(pipeline, tmp_path, file):
    pipeline([])
    (tmp_path / file).unlink()
    check_pipeline(roots("data.root=data/ct"))


def test_the_training_whose_checkpoint_is_evaluated_is_of_one_seed():
    assert "seeds=1" in STAGES["train"]["cmd"].split()


def test_every_plot_and_metric_is_an_output():
    made = {p for s in STAGES.values() for p in paths(s.get("outs", []) + s.get("metrics", []))}
    assert {next(iter(plot)) for plot in PIPELINE["plots"]} < made
