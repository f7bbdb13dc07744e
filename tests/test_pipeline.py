"""dvc.yaml against the code: a stage depends on what it imports, on what it reads, and on the settings that it uses."""

from pathlib import Path

import grimp
import pytest
import yaml

from chestct.config.compose import CONF
from chestct.config.fields import leaves
from chestct.config.schema import Config

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


def test_the_training_whose_checkpoint_is_evaluated_is_of_one_seed():
    assert "seeds=1" in STAGES["train"]["cmd"].split()


def test_every_plot_and_metric_is_an_output():
    made = {p for s in STAGES.values() for p in paths(s.get("outs", []) + s.get("metrics", []))}
    assert {next(iter(plot)) for plot in PIPELINE["plots"]} < made
