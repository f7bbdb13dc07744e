"""dvc.yaml against the code: a stage depends on what it imports, on what it reads, and on the settings that it uses."""

import ast
from pathlib import Path

import pytest
import yaml

from chestct.config.compose import CONF
from chestct.config.schema import Config, leaves

ROOT = CONF.parent
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]
ENTRIES = {
    "ingest": ["data/prepare.py"],
    "validate": ["audit/stage.py", "reporting/audit_report.py"],
    "train": ["training/train.py"],
    "evaluate": [
        "evaluation/evaluate.py",
        "evaluation/protocol.py",
        "evaluation/sections.py",
        "evaluation/split_policies.py",
        "reporting/render.py",
    ],
    "export": ["evaluation/export.py", "reporting/render.py", "evaluation/sections.py", "evaluation/split_policies.py"],
}
NO_RESULT = (
    "config",
    "errors.py",
    "files.py",
    "progress.py",
    "pyfunc.py",
    "tracking",
    "sweep.py",
    "version.py",
    "__init__.py",
)
"""What passes settings on or keeps records: it decides no output."""

NOT_THE_PIPELINES = (
    *("ckpt", "cache_dir", "bundle", "compare", "loggers", "trust", "seeds", "runs_dir", "tracking", "serve"),
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


def imported(path, seen):
    """Files of the package that a file imports, at its top or anywhere, and what those import."""
    if path in seen:
        return seen
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT.joinpath(*name.split("."))
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if name.startswith("chestct") and file.is_file():
                    imported(file, seen)
    return seen


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_runs_again_when_a_module_that_it_uses_changes(stage):
    deps = {ROOT / path for name in upstream(stage) for path in paths(STAGES[name]["deps"])}
    unseen = {
        str(path.relative_to(ROOT))
        for path in set().union(*(imported(ROOT / "chestct" / entry, set()) for entry in ENTRIES[stage]))
        if not deps & {path, *path.parents}
        and not set(path.relative_to(ROOT / "chestct").parts[:1]) & set(NO_RESULT)
        and path.name != "__init__.py"
    }
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


def test_every_plot_and_metric_is_an_output():
    made = {p for s in STAGES.values() for p in paths(s.get("outs", []) + s.get("metrics", []))}
    assert {next(iter(plot)) for plot in PIPELINE["plots"]} < made
