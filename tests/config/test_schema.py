import dataclasses
import shlex
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from chestct import experiment
from chestct.config.checks import resolve
from chestct.config.compose import CONF, compose, derived_files, idle_with_bundle, left_behind, merge_settings, readable
from chestct.config.fields import leaves
from chestct.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainerConfig
from chestct.data.prepare import is_synthetic
from chestct.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lrr=1", "Did you mean optim.lr?"),
        ("data.splt=grouped", "Did you mean data.split?"),
        ("batch_size=8", "Did you mean data.batch_size?"),
        ("trainer.gradient_clip_val=1", "Did you mean trainer.args.gradient_clip_val?"),
        ("trainer.args.fast_dev_run=true", "say debug=fast"),
        ("trainer.args.max_steps=5", "trainer.max_epochs=N"),
        ("trainer.args.check_val_every_n_epoch=2", "trainer.max_epochs=N"),
        ("trainer.args.val_check_interval=0.3", "trainer.max_epochs=N"),
        ("trainer.args.val_check_interval=1", "trainer.max_epochs=N"),  # an int counts batches
        ("trainer.args.limit_val_batches=0", "trainer.max_epochs=N"),
        ("trainer.args.limit_train_batches=0.0", "trainer.max_epochs=N"),
        ("trainer.args.overfit_batches=1", "say debug=overfit"),
        ("trainer.args.logger=true", "say loggers.NAME._target_"),
        ("trainer.args.max_epochs=3", "say trainer.max_epochs=VALUE"),
        ("trainer.max_steps=5", "Did you mean trainer.max_epochs?"),
        ("trainer.fast_dev_run=true", "Did you mean debug=fast?"),
        ("evaluation.folds=5", "Did you mean evaluation.protocol?"),
        ("banana=1", "There is no setting 'banana'. All settings: --help."),
        ("data.split=group", "Did you mean grouped?"),
        ("model.freeze=9", "out of range: 0 to 5"),
        ("model.hidden=[8,0]", "model.hidden[1]=0"),
        ("data.labels={healthy: nromal}", "Did you mean normal?"),
        ("data.sources={a: {labels: {healthy: helthy}}}", "data.sources.a.labels[healthy]='helthy'"),
        ("evaluation.threshold=yuden", "sensitivity>=0.95"),
        ("trainer.devices=two", "how many (2)"),
        ("optim.lr", "key=value"),
        ("serve.hosts=['*example.org']", "['*.example.org']"),
        ("serve.hosts=['ct.example.org:80']", "[ct.example.org]"),
        ("data.sources={a: {patient: 'A(1'}}", "data.sources.a.patient=A(1 is no regular expression"),
        ("data.sources={a: {patient: 'A1'}}", "give one group"),
        ("data.holdout=[elsewhere]", "there is no source elsewhere"),
        ("data.holdout=[phantom]", "leaves no source to train on"),
        ("model.pool=gap", "model.pool=gap leaves none: set model.pool=topk, or take experiment=head"),
        ("task=subtype", "experiment=subtype"),
        ("data.views=0", "or data.lesions=0"),
        ("data.fold=1", "fold counts from 0"),
        ("data.sources={a: {root: /x, weight: 0.1}}", "works with data.balance=true"),
        ("cache_dir=c\udcff", r"cache_dir='c\udcff' is not UTF-8"),
        ("runs_dir=c\udcff", r"runs_dir='c\udcff' is not UTF-8"),
        ("data.split_seed=-1", "out of range: 0 to 4294967295"),
        ("seed=99999999999", "out of range: 0 to 4294967295"),
        ("bundle=", "bundle= is empty"),
        ("data.root=", "data.root= is empty"),
        ("serve.host=", "serve.host= is empty"),
        ("serve.port=7860,7861", "give one, or, to train with each, add -m."),
        ("model.hidden=8,16", "a list as in 'model.hidden=[8,16]'"),
        ("data.holdout=b", "give a list, as in 'data.holdout=[A,B]'"),
        ("data.holdout=[[b]]", "['b'] stands where one value belongs"),
        ("data.labels={a: [cancer]}", "['cancer'] stands where one value belongs"),
        ("data.labels={0: normal, 1: cancer}", "Give each alone, as data.labels.NAME=VALUE"),
        ("data.sources={2024_11: {root: /x}}", "Give each alone, as data.sources.NAME.root=FOLDER"),
        ("data.sources={a: /x}", "give each alone, as data.sources.a.root=FOLDER"),
        ("data.sources=[/x]", "a table in braces (several collections at once: {name: {root: ..., labels: ...}})"),
        ("data.sources.a=null", "data.sources.a: null is no value here"),
        ("data.sources.a.rot=/x", "Did you mean data.sources.a.root?"),
        ("data.sources.a.root=null", "data.sources.a.root: give str (folder"),
        ("data.window=40", "data.window is a group of settings, no int: give each alone, as data.window.NAME=VALUE"),
        ("data=", "There is no data=: the options are the files in conf/data/"),
        ("+data.size=64", "leave out the +"),
    ],
)
def test_a_wrong_setting_is_named_with_the_way_out(override, says):
    with pytest.raises(ConfigError) as error:
        compose(override)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.weights=none",),
        ("trainer.unfreeze_epoch=3", "model.freeze=false"),
        ("trainer.unfreeze_epoch=50",),
        ("data.folds=5", "data.split=official"),
        ("data.folds=5", "data.fold=5"),
        ("data.valid_fraction=0.5", "data.test_fraction=0.5"),
        ("data.root=/x", "data.sources={a: {root: /y}}"),
        ("data=hospitals", "data.holdout=[lidc]", "data.split=official"),
        ("trainer.devices=2",),
        ("trainer.num_nodes=2",),
        ("seed=4294967295", "seeds=2"),
        ("trainer.devices=0",),
        ("trainer=ddp", "trainer.accelerator=mps"),
        ("experiment=head", "optim.places=10"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides):
    with pytest.raises(ConfigError):
        compose(*overrides)


@pytest.mark.parametrize(
    ("part", "given", "idle"),
    [
        ("model.head={_target_: torch.nn.LazyLinear}", "experiment=places", 5),
        ("model.head={_target_: torch.nn.LazyLinear}", "model.dropout=0.5", 1),
        ("optim.optimizer={_target_: torch.optim.Adam}", "optim=sgd", 1),
        ("optim.optimizer={_target_: torch.optim.Adam}", "optim.momentum=0.5", 1),
        ("optim.scheduler={_target_: torch.optim.lr_scheduler.StepLR}", "experiment=seed_recipe", 2),
        ("optim.scheduler={_target_: torch.optim.lr_scheduler.StepLR}", "optim.warmup=0", 1),
    ],
)
def test_what_a_part_of_ones_own_replaces_is_said_and_taken_back_as_the_message_says(part, given, idle):
    with pytest.raises(ConfigError, match="no effect") as error:
        compose("experiment=head", part, given)
    back = str(error.value).rpartition(": ")[2].split()
    assert len(back) == idle
    compose("experiment=head", part, given, *back, "optim.lr=0.1")


def test_every_experiment_composes_and_places_alone_is_the_default():
    default = compose()
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        assert (compose(f"experiment={path.stem}") == default) == (path.stem == "places"), path.stem


def test_another_experiment_keeps_nothing_of_the_default_one():
    plain = compose("experiment=head")
    assert (plain.model, plain.optim, plain.trainer) == (ModelConfig(), OptimConfig(), TrainerConfig())
    assert compose("experiment=head", "data=chest_ct").data.size == DataConfig.size
    for name in ("full_finetune", "two_stage", "seed_recipe", "subtype"):
        cfg = compose(f"experiment={name}")
        assert (cfg.model.block, cfg.data.lesions) == ("5", 0), name


def test_a_model_that_is_named_takes_the_place_of_the_default_one():
    assert compose("model=vgg16_flatten").model == ModelConfig(pool="flatten")


def test_freeze_is_a_switch_or_a_number_of_blocks_until_convolutions_join_in():
    assert compose("model.freeze=true").starts_frozen
    assert not compose("model.freeze=1").starts_frozen  # 1 == True in Python
    assert compose("model.freeze=5").starts_frozen
    cfg = compose("experiment=two_stage")
    assert (cfg.starts_frozen, cfg.always_frozen) == (True, False)
    assert [cfg.frozen_at(cfg.trainer.unfreeze_epoch + step) for step in (-1, 0)] == [True, False]


def test_committed_files_follow_from_the_schema():
    for path, text in derived_files():
        assert path.read_text() == text, f"{path.name}: run `make params`"
    assert all(item.metadata.get("help") for _, _, item in leaves(Config))


def test_settings_survive_a_checkpoint_and_those_that_earlier_versions_had_are_left_out():
    cfg = compose("experiment=subtype", "model.freeze=3", "data.labels={a.b: cancer}")
    stored = dataclasses.asdict(cfg)
    stored["tracking"]["system_metrics"] = True
    stored["evaluation"]["folds"] = 5
    stored["data"]["phantom"]["defects"] = []
    assert resolve(stored) == cfg


def test_what_is_given_is_laid_over_a_checkpoints_settings_but_slices_are_seen_as_it_saw_them():
    base = dataclasses.asdict(compose("experiment=seed_recipe", "data=chest_ct", "data.root=/there"))
    merged = merge_settings(compose("optim.lr=0.5"), ["optim.lr=0.5"], base)
    assert (merged.optim.lr, merged.optim.name, merged.data.root) == (0.5, "sgd", "/there")
    other = merge_settings(compose("data=iq_oth"), ["data=iq_oth"], base).data
    assert (other.name, other.root, [*other.sources]) == ("iq_oth", None, ["iq_oth"])
    assert (other.fit, other.size, other.lesions) == ("stretch", 224, 0)


def test_a_checkpoint_describes_a_model_and_decides_nothing_about_this_machine():
    stored = dataclasses.asdict(compose("optim.lr=0.5"))
    stored["tracking"]["uri"] = "https://elsewhere.example"
    stored["data"]["store"] = "/home/somebody"
    stored["cache_dir"] = stored["runs_dir"] = "/somewhere"
    stored["trainer"]["accelerator"] = "gpu"
    stored["serve"]["host"] = "0.0.0.0"
    stored["trainer"]["args"] = {"default_root_dir": "https://elsewhere.example"}
    here = compose("tracking=off")
    cfg = merge_settings(here, [], stored)
    assert cfg.optim.lr == 0.5
    assert (cfg.tracking, cfg.serve, cfg.monitor) == (here.tracking, here.serve, here.monitor)
    assert (cfg.cache_dir, cfg.runs_dir, cfg.data.store) == (here.cache_dir, here.runs_dir, None)
    assert cfg.trainer.accelerator == "auto"
    assert cfg.trainer.args == {}
    assert merge_settings(compose("trainer.args.a=1"), ["trainer.args.a=1"], stored).trainer.args == {"a": 1}


@pytest.mark.parametrize("name", ["/home/me/x", "../../x", "..", ".", "", "a\\b", "a\0b"])
def test_no_source_of_a_checkpoint_is_called_like_a_path(name):
    here = Config()
    stored = dataclasses.asdict(here)
    one = stored | {"data": stored["data"] | {"name": name}}
    several = stored | {"data": stored["data"] | {"sources": {name: {"root": "/x"}}}}
    for settings in (one, several):
        with pytest.raises(ConfigError, match=r"without /|is empty"):
            merge_settings(here, [], settings)


def test_what_no_file_decides_is_said_again_by_what_can_be_pasted():
    given = (
        "callbacks.a={_target_: mine.A, words: [x, 2], path: 'a (1),b', n: '1_0', deep: {on: true}}",
        "trainer.args.b=0.5",
    )
    cfg = compose(*given, "trainer=gpu")
    assert cfg.trainer.args["benchmark"]  # which trainer=gpu says, and nothing that is trained hangs on
    groups = ("callbacks", "trainer.args")
    again = left_behind(dataclasses.asdict(cfg), groups)
    pasted = compose(*shlex.split(" ".join(again)))
    assert (pasted.callbacks, pasted.trainer.args) == (cfg.callbacks, {"b": 0.5})
    assert left_behind(dataclasses.asdict(cfg), groups, pasted) == []


def test_parts_that_are_left_out_knowingly_are_not_asked_for_again(monkeypatch):
    stored = {"settings": dataclasses.asdict(compose("callbacks.a._target_=mine.A"))}
    said = OmegaConf.create({"overrides": {"task": [readable("callbacks={}")]}, "job": {"config_name": "train"}})
    monkeypatch.setattr(HydraConfig, "get", lambda: said)
    monkeypatch.setattr(experiment, "find_checkpoint", lambda *_: Path("last.ckpt"))
    monkeypatch.setattr(experiment, "read_checkpoint", lambda _: {"hyper_parameters": stored})
    assert experiment.from_checkpoint(compose("ckpt=last"), best=False).callbacks == {}


def test_a_folder_without_a_name_takes_its_own_unless_it_holds_phantoms(tmp_path):
    clinic, drawn = tmp_path / "clinic" / "normal", tmp_path / "drawn" / "train" / "normal"
    for folder, name in ((clinic, "1.png"), (drawn, "phantom_00042.png")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    root = f"data.root={tmp_path}/clinic"
    assert compose(root).data.name == "clinic"
    assert not is_synthetic(compose(root).data)
    assert compose(root, "data.name=mine").data.name == "mine"
    assert compose(f"data.root={tmp_path}/drawn").data.name == compose().data.name == "phantom"
    (clinic.parent / ".cache").mkdir()
    (tmp_path / "drawn" / "train").rename(clinic.parent / ".cache" / "train")  # phantoms of a check, in no class folder
    assert compose(root).data.name == "clinic"
    stored = OmegaConf.to_container(OmegaConf.structured(Config(data=DataConfig(root=f"{tmp_path}/clinic"))))
    assert merge_settings(compose(), [], stored).data.name == "phantom"  # as it was when its slices were named
    assert compose("data.sources.phantom={}", "data.sources.b.root=x").data.name == "b and 1 more"
    assert compose(f"data.root={tmp_path}/gone").data.name == "gone"
    clinic.parent.rename(tmp_path / "phantom")
    assert not is_synthetic(compose(f"data.root={tmp_path}/phantom").data)


def test_settings_that_a_bundle_has_of_its_own_are_named():
    idle = ["evaluation.threshold=youden", "++data.window.center=40", "model.pool=gap"]
    assert idle_with_bundle(["bundle=packaged", *idle, "data.root=x", "evaluation.phantoms=9"]) == idle


TYPED = ("a b", "a=b", "a,b", "[old]", "runs (1)/x", "runs (1)\\", r"a=\\", "back\\slash", "'quoted, (1)'")
TYPED += ("it's", "健康", r"(LIDC-IDRI-\d+)", r"[A-Z]+-(\d{1,3})", r"LIDC(\d+)", r"(it\'s)")


@pytest.mark.parametrize("key", ["data.root", "data.sources.a.root"])
@pytest.mark.parametrize("value", TYPED)
def test_a_path_is_read_as_typed(key, value):
    data = compose(f"{key}={value}").data
    assert (data.root or data.sources["a"].root) == value.strip("'")


@pytest.mark.parametrize("value", ["2024_11_27", "007", "1e5", "12e4567", "1_000", "true", "On", "nan", "5", "3.50"])
def test_a_text_that_looks_like_a_number_is_read_as_typed(value):
    keys = ("cache_dir", "tracking.run_name", "data.sources.a.root")
    cfg = compose(*(f"{key}={value}" for key in keys), f"trust=[{value} ]")
    assert cfg.cache_dir == cfg.tracking.run_name == cfg.data.sources["a"].root == cfg.trust[0] == value


def test_numbers_switches_and_null_are_no_texts():
    assert readable("hydra.run.dir=2024_11_27") == "hydra.run.dir='2024_11_27'"
    for override in ("seed=1_0", "model.freeze=true", "data.root=null", "model.block=5", "optim.lr=1e-3"):
        assert readable(override) == override


def test_a_path_may_begin_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = compose("data.root=~/ct", "cache_dir=a~/b", "compare=[~/a,~/b]")
    assert (cfg.data.root, cfg.cache_dir, cfg.compare) == ("/home/me/ct", "a~/b", ["/home/me/a", "/home/me/b"])
    assert readable("data.root=~/a,~/b", sweep=True) == "data.root=/home/me/a,/home/me/b"


def test_a_params_yaml_with_a_group_or_a_misspelt_key_says_how():
    with pytest.raises(ConfigError, match=r"whatever else you set there: .*--cfg job data=chest_ct > params\.yaml"):
        resolve({"data": "chest_ct"})
    with pytest.raises(ConfigError, match=r"optim\.lrr.*Did you mean optim\.lr"):
        resolve({"optim": {"lrr": 1}})
