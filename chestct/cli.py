"""The commands: `chestct COMMAND`, also as `python -m chestct COMMAND`, train.py, evaluate.py and serve.py.

Each command's steps stand here; whatever they need is imported when the settings are known to be right, so that
`--help` and a misspelt key are answered at once.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from chestct.config.compose import change_params
from chestct.config.schema import Config
from chestct.errors import ChestCTError, ConfigError, DataError
from chestct.models.checkpoint import find_checkpoint
from chestct.program import errors_for_people, program, rank


def _resumed_folder(cfg: Config) -> Path | None:
    """Where a resumed run began, and goes on."""
    path = find_checkpoint(cfg.ckpt, cfg.runs_dir, cfg.tracking).resolve() if cfg.ckpt else None
    return path.parent.parent if path and path.parent.name == "checkpoints" else None


@program("train", _resumed_folder)
def train(cfg: Config, out: Path) -> float:
    """Trains VGG16 on chest CT slices and tests the best checkpoint.

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
    from chestct.experiment import train_and_report

    if cfg.seeds == 1:
        return train_and_report(cfg, out)[cfg.trainer.monitor]
    from chestct.training.seeds import train_seeds

    table = train_seeds(cfg, out, train_and_report)
    if not rank():
        print(f"\n{cfg.seeds} seeds, mean and standard deviation (each: {out / 'seeds.csv'})")
        print(table.map("{:.4f}".format).to_string())
    return float(table["mean"][cfg.trainer.monitor])


@program("evaluate")
def evaluate(cfg: Config, out: Path) -> None:
    """Scores the valid and test slices of a checkpoint's data, or other data, and writes a report and a model card.

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
    from chestct.experiment import measure

    measure(cfg, out)


@program("evaluate")
def export(cfg: Config, out: Path) -> None:
    """Evaluates a checkpoint and writes its bundle: weights, preprocessing, threshold, calibration, model card.

      chestct export ckpt=last bundle=FOLDER

    Settings that are not given come from the checkpoint; evaluation.threshold chooses the operating point, and the
    other checks that evaluation.* switches on go into the model card.
    """
    from chestct.experiment import write_bundle

    write_bundle(cfg, out)


@program("serve")
def serve(cfg: Config, out: Path) -> None:
    """Opens a web page that reads chest CT slices, at http://127.0.0.1:7860, with an API next to it.

      python serve.py                                   the model in the package
      python serve.py bundle=FOLDER                     another bundle
      python serve.py bundle=models:/NAME@champion      one that is registered in MLflow
      python serve.py serve.host=0.0.0.0 serve.port=80  reachable from other machines

    CHESTCT_USERNAME and CHESTCT_PASSWORD in the environment ask visitors for them. SIGHUP loads the bundle again, and
    asks MLflow where its name points by now; SIGTERM ends the service when requests under way are answered.
    """
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


@program("stage")
def audit(cfg: Config, out: Path) -> None:
    """Audits the data: report.html for people, report.json for machines. data.audit.fail_on makes findings fail it.

    chestct audit data=chest_ct data.root=FOLDER
    """
    from chestct.reporting.audit_report import validate

    validate(cfg, out)


@program("stage")
def ingest(cfg: Config, out: Path) -> None:
    """Decodes every slice once into the store and finds copies and near-copies.

    chestct ingest data=chest_ct data.root=FOLDER
    """
    from chestct.data.ingest import describe
    from chestct.data.prepare import prepare_store

    print(describe(prepare_store(cfg, cfg.trainer.progress)))


@program("stage")
def phantom(cfg: Config, out: Path) -> None:
    """Draws the synthetic slices.

    chestct phantom data.phantom.slices=1000 data.phantom.defects=[exact,near]
    """
    from chestct.data.prepare import draws_phantoms, located
    from chestct.phantom.dataset import write

    if not draws_phantoms(cfg.data) and cfg.data.name != "phantom":
        raise DataError(f"data={cfg.data.name} is not drawn. Use data=phantom.")
    root = Path(located(cfg).root or "")
    write(root, cfg.data.phantom, cfg.trainer.progress)
    print(f"Phantoms (synthetic): {root}")


@program("stage")
def show(cfg: Config, out: Path) -> None:
    """Prints slices and groups by split and class.

    chestct show data=chest_ct data.root=FOLDER
    """
    from chestct.data.datamodule import SliceModule

    data = SliceModule(cfg)
    data.prepare_data()
    data.setup()
    columns = {"slices": ("path", "size"), "groups": ("group", "nunique"), "leaked": ("leaked", "sum")}
    print(data.manifest.groupby(["source", "split", "subtype"]).agg(**columns).to_string())
    assert data.store is not None
    print(f"\nstore  {data.store.folder}")


@program("stage")
def sync(cfg: Config, out: Path) -> None:
    """Copies finished runs of the local MLflow store to a server; the same command again copies what is missing.

      chestct sync tracking.uri=https://SERVER
      chestct sync tracking=dagshub tracking.owner=OWNER tracking.repo=REPO

    User and token come from the environment: MLFLOW_TRACKING_USERNAME and _PASSWORD, or DAGSHUB_USER_TOKEN.
    """
    from chestct.tracking import sync

    sync(cfg)


@program("stage")
def dagshub_remote(cfg: Config, out: Path) -> None:
    """Writes DVC's remotes for a DagsHub repository; the token comes from DAGSHUB_USER_TOKEN.

    chestct dagshub-remote tracking.owner=OWNER tracking.repo=REPO
    """
    from chestct.tracking.dagshub import dagshub_remotes

    dagshub_remotes(cfg.tracking)


def params() -> None:
    """Changes params.yaml, which DVC's stages read, by overrides; groups such as data=chest_ct are opened."""
    with errors_for_people():
        for key, old, new in change_params(sys.argv[1:]):
            print(f"{key}: {old} -> {new}")


def predict() -> None:
    from chestct.predict_command import main

    sys.exit(main(sys.argv[1:]))


def drift() -> None:
    from chestct.drift_command import main

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
