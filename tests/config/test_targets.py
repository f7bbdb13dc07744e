"""What settings name with `_target_`: anything on the command line, a closed list in a file."""

import pytest
import torch

from chestct.config.targets import build, check_trusted
from chestct.errors import ConfigError


def test_arguments_of_the_settings_come_before_those_that_are_given():
    layer = torch.nn.Linear(3, 1)
    spec = {"_target_": "torch.optim.SGD", "lr": 0.5}
    given = {"lr": 0.1, "save_dir": "what the class does not take is left out"}
    optimizer = build(spec, torch.optim.Optimizer, "optim.optimizer", [{"params": layer.parameters()}], **given)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["params"][0] is layer.weight  # no copies


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, r"optim\.optimizer\._target_=PACKAGE\.CLASS"),
        ({"_target_": "torch.optim.Adamm"}, r"torch\.optim\.Adamm cannot be made"),
        ({"_target_": "nowhere.Class"}, r"nowhere\.Class cannot be made: No module named 'nowhere'.*PYTHONPATH=\."),
        ({"_target_": "brought_too.Klass"}, r"Are you sure that 'Klass' is importable from module 'brought_too'\?$"),
        ({"_target_": "brought.Class"}, r"brought\.Class cannot be made: No module named 'not_installed'"),
        ({"_target_": "brought_too.Class"}, r"cannot be made: one line and another$"),
        ({"_target_": "torch.optim.SGD", "momentun": 1}, "momentun"),
    ],
)
def test_a_bad_target_is_named_with_its_setting_and_the_reason(spec, says, tmp_path, monkeypatch):
    (tmp_path / "brought.py").write_text("import not_installed", "utf-8")
    (tmp_path / "brought_too.py").write_text("def Class(groups): raise OSError('one line\\nand another')", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=says):
        build(spec, torch.optim.Optimizer, "optim.optimizer", [torch.nn.Parameter(torch.ones(1))])


def test_a_file_may_name_parts_of_models_and_runs():
    for name in ("torch.optim.Adam", "torch.optim.lr_scheduler.StepLR", "torchvision.models.VGG"):
        check_trusted({"model": {"head": {"_target_": name}}}, "x.ckpt")
    check_trusted({"_target_": "chestct.models.head.Pool"}, "x.ckpt")


BAD = ("os.system", "builtins.exec", "torch.hub.load", "lightning.pytorch.callbacks.Timer", "torch.nn", "mine.Head", 7)
BAD += ("chestct.models.lightning_module.Classifier", "lightning.pytorch.callbacks.model_checkpoint.os.system")
BAD += ("torch.nn.modules.module.OrderedDict", "torch.nn.parallel.data_parallel", "torchvision.models.resnet18")
BAD += ("chestct.files.write_atomic", ["torch.nn.Linear"])


@pytest.mark.parametrize("target", BAD, ids=str)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": [{"_target_": "torch.nn.Sequential", "b": [x]}]}])
def test_a_file_never_chooses_code(target, wrap):
    with pytest.raises(ConfigError, match=r"x\.ckpt names code to run.*trust="):
        check_trusted(wrap({"_target_": target}), "x.ckpt")


def test_what_is_trusted_on_the_command_line_may_be_named(tmp_path, monkeypatch):
    code = "from torch import nn\nimport os\nclass Head(nn.Linear): pass\n"
    (tmp_path / "trusted_package.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    check_trusted({"_target_": "trusted_package.Head"}, "x.ckpt", ["trusted_package"])
    with pytest.raises(ConfigError):
        check_trusted({"_target_": "trusted_package.os.system"}, "x.ckpt", ["trusted_package"])


@pytest.mark.parametrize(
    "argument", [{"y": "${oc.create:'{_target_: builtins.print}'}"}, {"${oc.env:HOME}": 1}, {"y": [{"z": "\\${a}"}]}]
)
@pytest.mark.parametrize("place", ["model", "callbacks"])
def test_a_file_holds_no_expression_which_could_name_code_later(argument, place):
    with pytest.raises(ConfigError, match=r"x\.ckpt sets .*an expression"):
        check_trusted({place: {"head": {"_target_": "torch.nn.Identity", **argument}}}, "x.ckpt")


def test_what_no_file_decides_may_be_anything_but_a_part_s_arguments_may_not():
    named = {"_target_": "os.system"}
    check_trusted({"callbacks": {"a": named}, "loggers": {"b": named}, "trainer": {"args": {"c": named}}}, "x.ckpt")
    for name in ("callbacks", "loggers", "trainer"):
        with pytest.raises(ConfigError, match=r"os\.system"):  # the head of a bundle, for one
            check_trusted({"_target_": "torch.nn.Identity", name: {"args": named}}, "bundle")


def test_a_class_of_another_kind_is_refused_before_it_is_made(tmp_path):
    spec = {"_target_": "logging.FileHandler", "filename": str(tmp_path / "log.txt")}
    with pytest.raises(ConfigError, match=r"logging\.FileHandler is no .*Module"):
        build(spec, torch.nn.Module, "model.head")
    assert not list(tmp_path.iterdir())
