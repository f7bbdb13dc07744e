"""The commands: `chestct COMMAND`, also as `python -m chestct COMMAND`, train.py, evaluate.py and serve.py.

Each command's steps stand here; whatever they need is imported when the settings are known to be right, so that
`--help` and a misspelt key are answered at once.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from chestct.config.compose import PIPELINE, change_params, merge_settings
from chestct.config.schema import Config
from chestct.config.targets import check_trusted, foreign
from chestct.errors import ChestCTError, ConfigError, DataError
from chestct.models.checkpoint import REFITS, find_checkpoint, read_checkpoint
from chestct.program import errors_for_people, program, rank

if TYPE_CHECKING:
    from chestct.evaluation.evaluate import Evaluation
    from chestct.tracking import Run
    from chestct.training import Result

TRAIN = """
Trains VGG16 on chest CT slices and tests the best checkpoint.

  python train.py                                       phantoms, frozen convolutions
  python train.py data=chest_ct data.root=FOLDER        your class folders
  python train.py model.freeze=true optim.lr=1e-4       single settings
  python train.py experiment=two_stage                  a named experiment
  python train.py -m optim.lr=1e-3,1e-4 model.freeze=true,false    all combinations
  python train.py -m sweep=head                         a search; the same command goes on with it
  python train.py tracking.register=NAME                bundle=models:/NAME@champion then finds the bundle
  python train.py ckpt=last                             goes on with the newest run
  python train.py trainer=ddp trainer.devices=2         two processes, one training; see docs/clusters.md
"""

EVALUATE = """
Scores the valid and test slices of a checkpoint's data, or other data, and writes report, metrics, plots, model card.

  python evaluate.py ckpt=last                                 the newest run
  python evaluate.py ckpt=runs/.../checkpoints/best.ckpt       any run
  python evaluate.py ckpt=last evaluation.policies=true evaluation.folds=5    with other splits and folds
  python evaluate.py ckpt=last evaluation.phantoms=100 evaluation.novelty=24 evaluation.robustness=40
                                                               heat maps, refusals and robustness checked
  python evaluate.py bundle=FOLDER data.name=other data.root=FOLDER 'data.labels={healthy: normal, tumour: cancer}'
                                                               a bundle on slices that it never saw
  python evaluate.py bundle=models:/NAME@champion              a bundle by its name in MLflow
  python evaluate.py compare=[runs/A,runs/B]                   two models, slice by slice

Settings that are not given come from the checkpoint.
"""

EXPORT = """
Evaluates a checkpoint and writes its bundle: weights, preprocessing, threshold, calibration, model card.

  chestct export ckpt=last bundle=FOLDER

Settings that are not given come from the checkpoint; evaluation.threshold chooses the operating point, and the other
checks that evaluation.* switches on go into the model card.
"""

SERVE = """
Opens a web page that reads chest CT slices, at http://127.0.0.1:7860, with an API next to it.

  python serve.py                                   the model in the package
  python serve.py bundle=FOLDER                     another bundle
  python serve.py bundle=models:/NAME@champion      one that is registered in MLflow
  python serve.py serve.host=0.0.0.0 serve.port=80  reachable from other machines

CHESTCT_USERNAME and CHESTCT_PASSWORD in the environment ask visitors for them. SIGHUP loads the bundle again, and asks
MLflow where its name points by now; SIGTERM ends the service when requests under way are answered.
"""

AUDIT = """
Audits the data: report.html for people, report.json for machines. data.audit.fail_on makes findings fail it.

  chestct audit data=chest_ct data.root=FOLDER
"""

INGEST = """
Decodes every slice once into the store and finds copies and near-copies.

  chestct ingest data=chest_ct data.root=FOLDER
"""

PHANTOM = """
Draws the synthetic slices.

  chestct phantom data.phantom.slices=1000 data.phantom.defects=[exact,near]
"""

SHOW = """
Prints slices and groups by split and class.

  chestct show data=chest_ct data.root=FOLDER
"""

SYNC = """
Copies finished runs of the local MLflow store to a server; the same command again goes on, nothing is copied twice.

  chestct sync tracking.uri=https://SERVER
  chestct sync tracking=dagshub tracking.owner=OWNER tracking.repo=REPO

User and token come from the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or DAGSHUB_USER_TOKEN.
"""

DAGSHUB = """
Writes DVC's remotes for a DagsHub repository; the token comes from DAGSHUB_USER_TOKEN.

  chestct dagshub-remote tracking.owner=OWNER tracking.repo=REPO
"""


def _resumed_folder(cfg: Config) -> Path | None:
    """Where a resumed run began, and goes on."""
    path = find_checkpoint(cfg.ckpt, cfg.runs_dir, cfg.tracking).resolve() if cfg.ckpt else None
    return path.parent.parent if path and path.parent.name == "checkpoints" else None


@program("train", TRAIN, _resumed_folder)
def train(cfg: Config, out: Path) -> float:
    if cfg.seeds == 1:
        return _train(cfg, out)[cfg.trainer.monitor]
    from chestct.training.seeds import train_seeds

    table = train_seeds(cfg, out, _train)
    if not rank():
        print(f"\n{cfg.seeds} seeds, mean and standard deviation (each: {out / 'seeds.csv'})")
        print(table.map("{:.4f}".format).to_string())
    return float(table["mean"][cfg.trainer.monitor])


def _train(cfg: Config, out: Path) -> dict[str, float]:
    """One training with its report and its MLflow run; the metrics of the best checkpoint."""
    from chestct.tracking import open_run, sole_writer
    from chestct.training import train as fit

    if cfg.ckpt:
        cfg = from_checkpoint(cfg)
    if rank():  # takes part, and leaves all else to the first process
        return fit(cfg, out).metrics
    with sole_writer(out), open_run(cfg, out) as run:
        result = fit(cfg, out, run)
        run.artifacts(out / "settings.yaml", "config")
        if cfg.tracking.log_model:
            run.artifacts(result.best, "checkpoints")
        message = _report(cfg, out, run, result) if cfg.evaluation.report else ""
    objective = result.metrics[cfg.trainer.monitor]
    print(f"{message}best checkpoint  {result.best}  ({cfg.trainer.monitor} {objective:.4f})")
    if run.run_id:
        print(f"MLflow run       {run.run_id} in {run.uri} (make ui)")
    return result.metrics


def _report(cfg: Config, out: Path, run: "Run", result: "Result") -> str:
    """Evaluates the best checkpoint, writes report and bundle to `out` and to the run; returns a summary."""
    import pandas as pd

    from chestct.evaluation.evaluate import evaluate
    from chestct.evaluation.export import export
    from chestct.pyfunc import log_bundle
    from chestct.reporting.figures import draw_history
    from chestct.reporting.render import flat, model_card, write
    from chestct.reporting.text import summary

    own = foreign(dataclasses.asdict(cfg))  # named by who trains, or trusted by who resumes
    trust = [*cfg.trust, *(target.split(".", 1)[0] for target in own)]
    evaluation = evaluate(dataclasses.replace(cfg, ckpt=str(result.best), trust=trust), result.data)
    write(evaluation, out / "evaluation")
    bundled = not foreign(cfg.model.head)
    if bundled:
        export(evaluation, out / "bundle", model_card(evaluation))
    draw_history(pd.read_csv(out / "history.csv"), out / "evaluation" / "curves.png")
    values = flat(evaluation)
    run.evaluation("best", {split: values[split] for split in evaluation.metrics}, out / "evaluation")
    if bundled and cfg.tracking.log_model:
        log_bundle(run, out / "bundle")
    bundle = f"bundle           {out / 'bundle'}  (python serve.py bundle={out / 'bundle'})"
    if not bundled:
        bundle = "No bundle: it holds no code, and the head is of code that is not in this package or torch."
    return f"{summary(evaluation)}\n\nreport           {out / 'evaluation' / 'report.html'}\n{bundle}\n"


@program("evaluate", EVALUATE)
def evaluate(cfg: Config, out: Path) -> None:
    import pandas as pd

    from chestct.evaluation.compare import compare_runs
    from chestct.evaluation.external import evaluate_bundle
    from chestct.evaluation.sections import optional_sections
    from chestct.reporting.figures import draw_history
    from chestct.reporting.render import flat, write
    from chestct.reporting.text import summary
    from chestct.tracking import fetch_bundle, run_of

    if cfg.compare:
        print(compare_runs(cfg, out))
        return
    if cfg.bundle:
        evaluation = evaluate_bundle(dataclasses.replace(cfg, bundle=fetch_bundle(cfg.bundle, cfg)))
    else:
        cfg = from_checkpoint(cfg) if cfg.ckpt else cfg
        evaluation = _evaluate_with_refits(cfg, out)
    evaluation.sections |= optional_sections(evaluation)
    write(evaluation, out)
    print(f"{summary(evaluation)}\n\nreport  {out / 'report.html'}")
    if cfg.ckpt and _as_trained(evaluation):
        if (history := Path(cfg.ckpt).parent.parent / "history.csv").is_file():
            draw_history(pd.read_csv(history), out / "curves.png")
        values = flat(evaluation)
        with run_of(cfg, Path(cfg.ckpt)) as run:
            run.evaluation(Path(cfg.ckpt).stem, {split: values[split] for split in evaluation.metrics}, out)


def _evaluate_with_refits(cfg: Config, out: Path) -> "Evaluation":
    """The checkpoint's evaluation, with a row for each other split, fold or permutation that the settings ask for."""
    from chestct.evaluation.evaluate import evaluate
    from chestct.evaluation.split_policies import refits
    from chestct.training import train as fit

    evaluation = evaluate(cfg)
    evaluation.rows += refits(cfg, lambda name, cfg, data: fit(cfg, out / REFITS / name, data=data).predictions)
    return evaluation


def _as_trained(evaluation: "Evaluation") -> bool:
    """Whether the checkpoint was measured on its own run's data and split, so that the numbers belong to the run."""
    assert evaluation.model is not None
    splitting = {name: getattr(evaluation.model.cfg.data, name) for name in evaluation.about["splitting"]}
    same_data = evaluation.model.hparams["data"]["hash"] == evaluation.about["data_hash"]
    return same_data and splitting == evaluation.about["splitting"]


@program("evaluate", EXPORT)
def export(cfg: Config, out: Path) -> None:
    from chestct.evaluation.export import export
    from chestct.evaluation.sections import optional_sections
    from chestct.reporting.render import model_card
    from chestct.tracking import run_of

    if not cfg.ckpt:
        raise ConfigError("Nothing to export: give a checkpoint with ckpt=last or ckpt=runs/.../checkpoints/best.ckpt.")
    cfg = from_checkpoint(cfg)
    folder = Path(cfg.bundle) if cfg.bundle else out / "bundle"
    evaluation = _evaluate_with_refits(cfg, out)
    evaluation.sections |= optional_sections(evaluation)
    bundle = export(evaluation, folder, model_card(evaluation))
    if cfg.tracking.log_model:
        from chestct.pyfunc import log_bundle

        with run_of(cfg, Path(cfg.ckpt or "")) as run:
            log_bundle(run, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"bundle {bundle.id}, {size / 1000:,.0f} kB  {folder}")


@program("serve", SERVE)
def serve(cfg: Config, out: Path) -> None:
    from chestct.serving.monitor import Monitor
    from chestct.serving.server import serve

    def locate() -> str:
        source = cfg.bundle or "packaged"
        if not source.startswith(("models:/", "runs:/")):
            return source
        try:
            from chestct.tracking.registry import fetch_bundle  # MLflow takes seconds to import

            return fetch_bundle(source, cfg)
        except ModuleNotFoundError as error:  # as in the image
            raise ConfigError(f"bundle={source} needs {error.name}, which is not installed. Give a folder.") from None

    monitor = Monitor(cfg.monitor.path, cfg.monitor.keep_days) if cfg.monitor.enabled else None
    try:
        serve(cfg, locate, monitor.record if monitor else None)
    finally:
        if monitor:
            monitor.close()


@program("stage", AUDIT)
def audit(cfg: Config, out: Path) -> None:
    from chestct.reporting.audit_report import validate

    validate(cfg, out)


@program("stage", INGEST)
def ingest(cfg: Config, out: Path) -> None:
    from chestct.data.ingest import describe
    from chestct.data.prepare import prepare_store

    print(describe(prepare_store(cfg, cfg.trainer.progress)))


@program("stage", PHANTOM)
def phantom(cfg: Config, out: Path) -> None:
    from chestct.data.prepare import draws_phantoms, located
    from chestct.phantom.dataset import write

    if not draws_phantoms(cfg.data) and cfg.data.name != "phantom":
        raise DataError(f"data={cfg.data.name} is not drawn. Use data=phantom.")
    root = Path(located(cfg).root or "")
    write(root, cfg.data.phantom, cfg.trainer.progress)
    print(f"Phantoms (synthetic): {root}")


@program("stage", SHOW)
def show(cfg: Config, out: Path) -> None:
    from chestct.data.datamodule import SliceModule

    data = SliceModule(cfg)
    data.prepare_data()
    data.setup()
    columns = {"slices": ("path", "size"), "groups": ("group", "nunique"), "leaked": ("leaked", "sum")}
    print(data.manifest.groupby(["source", "split", "subtype"]).agg(**columns).to_string())
    assert data.store is not None
    print(f"\nstore  {data.store.folder}")


@program("stage", SYNC)
def sync(cfg: Config, out: Path) -> None:
    from chestct.tracking import sync

    sync(cfg)


@program("stage", DAGSHUB)
def dagshub_remote(cfg: Config, out: Path) -> None:
    from chestct.tracking.dagshub import dagshub_remotes

    dagshub_remotes(cfg.tracking)


def params() -> None:
    """Changes params.yaml, which DVC's stages read, by overrides; groups such as data=chest_ct are opened."""
    with errors_for_people():
        for key, old, new in change_params(sys.argv[1:]):
            print(f"{key}: {old} -> {new}")


def predict() -> None:
    from chestct.predict import main

    sys.exit(main(sys.argv[1:]))


def drift() -> None:
    from chestct.drift import main

    sys.exit(main(sys.argv[1:]))


COMMANDS: dict[str, tuple[Callable[[], None], str]] = {
    "train": (train, "train a model and test it"),
    "evaluate": (evaluate, "measure a checkpoint or a bundle, or compare two"),
    "predict": (predict, "score files and folders into a table"),
    "serve": (serve, "open the web page"),
    "audit": (audit, "find out what is wrong with the data"),
    "export": (export, "write the bundle of a checkpoint"),
    "drift": (drift, "compare what the service saw with what the model was trained on"),
    "sync": (sync, "copy local MLflow runs to a server"),
    "ingest": (ingest, "decode slices into a store, and group copies"),
    "phantom": (phantom, "draw synthetic slices"),
    "show": (show, "count slices and groups by split and class"),
    "params": (params, "change params.yaml, the settings of DVC's pipeline"),
    "dagshub-remote": (dagshub_remote, "let DVC keep data on DagsHub"),
}


def main() -> None:
    """The command `chestct`."""
    with errors_for_people():
        name = sys.argv[1] if len(sys.argv) > 1 else "--help"
        if name in ("-h", "--help"):
            print("chestct COMMAND [key=value ...]; COMMAND --help explains every setting.\n")
            print("\n".join(f"  {command:15} {text}" for command, (_, text) in COMMANDS.items()))
        elif name in COMMANDS:
            sys.argv[:2] = [f"{sys.argv[0]} {name}"]
            COMMANDS[name][0]()
        else:
            raise ChestCTError(f"no command {name!r}. Commands: {', '.join(COMMANDS)}")


def from_checkpoint(cfg: Config) -> Config:
    """The settings in the checkpoint cfg.ckpt, with those given on the command line laid over them."""
    from hydra.core.hydra_config import HydraConfig

    path = find_checkpoint(cfg.ckpt or "", cfg.runs_dir, cfg.tracking)
    stored = read_checkpoint(path)["hyper_parameters"]["settings"]
    check_trusted(stored, str(path), cfg.trust)
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().job.config_name == PIPELINE:  # params.yaml decides how the pipeline evaluates
        overrides.append("evaluation=params")
    return dataclasses.replace(merge_settings(cfg, overrides, stored), ckpt=str(path))
