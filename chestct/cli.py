"""The commands: `chestct COMMAND`, also as `python -m chestct COMMAND`, train.py, evaluate.py and serve.py.

Whatever a command needs is imported when its settings are known to be right, so that `--help` is answered at once.
"""

import argparse
import json
import logging
import re
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

from chestct.config.compose import check_pipeline, in_home
from chestct.config.schema import Config
from chestct.config.schema_serving import BACKENDS
from chestct.errors import ChestCTError, ConfigError, Interrupted
from chestct.experiment import evaluate, export, train
from chestct.files import write_atomic
from chestct.program import errors_for_people, program


@program("serve")
def serve(cfg: Config, out: Path) -> None:
    """Opens a web page that reads chest CT slices, at http://127.0.0.1:7860, with an API next to it.

      python serve.py                                   the model in the package
      python serve.py bundle=FOLDER                     another bundle
      python serve.py bundle=hf://USER/NAME             one on the Hugging Face hub
      python serve.py bundle=models:/NAME@champion      one that is registered in MLflow
      python serve.py serve.host=0.0.0.0 serve.port=80  reachable from other machines by the address of this one
      python serve.py serve.host=0.0.0.0 'serve.hosts=[ct.example.org]'    and by that name

    CHESTCT_USERNAME and CHESTCT_PASSWORD in the environment ask visitors for them. SIGHUP loads the bundle again, and
    asks MLflow where its name points by now; SIGTERM ends the service when requests under way are answered.
    """
    from chestct.serving.monitor import Monitor
    from chestct.serving.server import serve

    def locate() -> str:
        from chestct.serving.model import bundle_folder  # torch with it, so not before the port is open

        return bundle_folder(cfg.bundle or "packaged", cfg)

    record = closing(Monitor(cfg.monitor.path, cfg.monitor.keep_days)) if cfg.monitor.enabled else nullcontext()
    with record as monitor:
        serve(cfg, locate, monitor.record if monitor else None)


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
    from chestct.data.prepare import describe, prepare_store
    from chestct.data.sources import sources_of

    check_pipeline(source.root for source in sources_of(cfg.data).values())
    print(describe(prepare_store(cfg, cfg.trainer.progress)))


@program("stage")
def sync(cfg: Config, out: Path) -> None:
    """Copies runs of the local MLflow store to a server; the same command again copies what is missing.

      chestct sync tracking.uri=https://SERVER
      chestct sync tracking=dagshub tracking.owner=OWNER tracking.repo=REPO

    User and token come from the environment: MLFLOW_TRACKING_USERNAME and _PASSWORD, or DAGSHUB_USER_TOKEN.
    """
    from chestct.tracking import sync

    sync(cfg)


def predict() -> None:
    """Scores chest CT slices and scans into a table. Research use only.

    Files (PNG, JPEG, TIFF, BMP, WebP, DICOM), NIfTI volumes, and folders and zip archives of them. DICOM slices of one
    series, and those of a volume, make a scan: they stand in the table in the order of their positions, and the scores
    of scans are printed and written next to it, as JSON.

    One row a slice, so one for each frame or page of a file: path, frame, score (calibrated P(cancer)), decision
    (cancer, normal, uncertain, refused, or unreadable for a file), reason, possible (classes that cannot be excluded),
    a probability for each class, novelty (distance to the training data; beyond 1 unfamiliar), known (the slice was in
    the training data), bundle, format, file_hash, frames, series, position. The same command again goes on where the
    last one ended, and reads only what changed.

    Exit status: 0 every file scored, 1 some files unreadable, 2 nothing scored, 130 interrupted.
    """
    parser = _parser(predict)
    parser.add_argument("sources", nargs="+", type=_path, metavar="PATH", help="files, and folders to look through")
    parser.add_argument("--bundle", default="packaged", help="folder, hf://, models:/ or runs:/ name (packaged)")
    parser.add_argument("--out", type=_path, default=Path("scores.csv"), metavar="CSV", help="the table (scores.csv)")
    parser.add_argument("--viewer", type=_path, metavar="FOLDER", help="DICOM of overlays and reports, for a viewer")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what computes, see serve.backend (auto)")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="and where (auto)")
    args = parser.parse_args()
    from chestct.imaging.slice_files import describe_skipped
    from chestct.serving.batch import describe, find_files, predict_files
    from chestct.serving.model import bundle_folder
    from chestct.serving.predictor import Predictor
    from chestct.serving.scan import describe_scans, scans_in

    _log_messages()
    began = time.perf_counter()
    paths, skipped = find_files(args.sources, args.out)
    if args.viewer:  # what is missing for it shows before everything is scored
        from chestct.serving.viewer import export, import_highdicom

        import_highdicom()
        args.viewer.mkdir(parents=True, exist_ok=True)
    predictor = Predictor(
        bundle_folder(args.bundle), backend=args.backend, accelerator=args.accelerator, whole_process=True
    )
    try:
        rows, reused = predict_files(paths, args.out, predictor, progress=True)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"Interrupted. The same command goes on from {args.out}.partial.") from None
    print(f"Scored by bundle {rows[0]['bundle']} in {time.perf_counter() - began:,.0f} s: {args.out}")
    listed = args.out.with_suffix(".scans.json")
    listed.unlink(missing_ok=True)  # it may be of other files
    if scans := scans_in(rows):
        write_atomic(listed, json.dumps([scan.as_dict() for scan in scans], indent=1) + "\n")
        print(f"{describe_scans(scans)}\nAll of them: {listed}")
    if args.viewer:
        made, failed = export(rows, paths, predictor, args.viewer)
        left_out = f"; {describe_skipped([*failed.items()])}" if failed else ""
        print(f"For a viewer: {len(made)} DICOM files in {args.viewer}{left_out}")
    print(describe(rows, reused, skipped))
    unreadable = sum(row["decision"] == "unreadable" for row in rows)
    sys.exit(2 if unreadable == len(rows) else min(unreadable, 1))


def embed() -> None:
    """Writes the features of slices, one row a file, to a Parquet file: path, file_hash, content, features.

    Exit status: 0 every file embedded, 1 some files unreadable, 2 nothing written.
    """
    parser = _parser(embed)
    parser.add_argument("sources", nargs="+", type=_path, metavar="PATH", help="files, folders and zip archives")
    parser.add_argument("--bundle", default="packaged", help="whose preprocessing and convolutions are used (packaged)")
    parser.add_argument("--block", default="", help="of VGG16: 3, 4, 5, or several joined as in 3+4 (the bundle's own)")
    parser.add_argument("--pool", default="mean", choices=["mean", "max", "mean+max"], help="over the map (mean)")
    parser.add_argument(
        "--out", type=_path, default=Path("features.parquet"), metavar="PARQUET", help="(features.parquet)"
    )
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="what computes (auto)")
    args = parser.parse_args()
    from chestct.config.schema import BLOCKS

    if args.block and not re.fullmatch(BLOCKS, args.block):
        raise ConfigError(f"--block {args.block}: give 3, 4 or 5, or several joined as in 3+4.")
    from chestct.serving.batch import find_files
    from chestct.serving.embed import SHOWN
    from chestct.serving.embed import embed as write
    from chestct.serving.model import bundle_folder

    _log_messages()
    files, _ = find_files(args.sources, args.out)
    unread = write(files, args.out, bundle_folder(args.bundle), args.block, args.pool, args.accelerator)
    print(f"Features of {len(files) - len(unread):,} of {len(files):,} files: {args.out}")
    for reason in unread[:SHOWN]:
        print(f"Not read: {reason}", file=sys.stderr)
    sys.exit(min(len(unread), 1))


def data() -> None:
    """Public collections: where they live, and whether what you downloaded of one is whole. Downloads nothing.

    chestct data fetch                       all of them
    chestct data fetch chest_ct              where it lives, under which licence, what to download
    chestct data fetch chest_ct FOLDER       checks FOLDER, and copies it to where data=hospitals looks for it
    chestct data fetch chest_ct FOLDER --out data    or to where data=chest_ct does, and data.dvc
    """
    parser = _parser(data)
    parser.add_argument("command", choices=["fetch"])
    parser.add_argument("name", nargs="?", help="which collection")
    parser.add_argument("folder", nargs="?", type=_path, help="where you unzipped it")
    parser.add_argument("--out", type=_path, metavar="FOLDER", help="where to copy it")
    args = parser.parse_args()
    from chestct.data.public import SETS, describe, fetch, settings_of

    if args.folder is None:
        print("\n\n".join(map(describe, [args.name] if args.name else SETS)))
        return
    target = fetch(args.name, args.folder, args.out, progress=True)
    print(f"Whole: {target}. Now: chestct audit {settings_of(args.name, target)}")


def push() -> None:
    """Puts a bundle on the Hugging Face hub, model card and all; it is then called hf://USER/NAME everywhere.

    A token that may write is read from HF_TOKEN, or where `hf auth login` left it; HF_ENDPOINT names another server.
    """
    parser = _parser(push)
    parser.add_argument("bundle", help="folder, packaged, models:/ or runs:/ name")
    parser.add_argument("name", metavar="USER/NAME", help="repository, made where there is none")
    parser.add_argument("--private", action="store_true", help="a new one is for its owner alone")
    args = parser.parse_args()
    from chestct.models.bundle import bundle_path, load_bundle
    from chestct.serving.model import bundle_folder
    from chestct.tracking import hub

    source = bundle_folder(args.bundle)
    bundle = load_bundle(source)
    address = hub.push(bundle_path(source), args.name, args.private)
    print(f"bundle {bundle.id}  {address}\nNow: chestct serve bundle={hub.SCHEME}{args.name}")


def space() -> None:
    """Writes a Hugging Face Space that shows a bundle on chestct's page, and runs as it is.

    chestct space FOLDER && cd FOLDER && pip install -r requirements.txt && python app.py
    hf upload USER/NAME FOLDER --repo-type space
    """
    parser = _parser(space)
    parser.add_argument("folder", type=_path, help="a new folder")
    parser.add_argument("--bundle", default="packaged", help="folder, hf://, models:/ or runs:/ name (packaged)")
    args = parser.parse_args()
    from chestct.portable import write_space
    from chestct.serving.model import bundle_folder

    write_space(args.folder, bundle_folder(args.bundle))
    print(
        f"{args.folder}: python app.py there shows the page; as a Space: hf upload USER/NAME "
        f"{shlex.quote(str(args.folder))} --repo-type space"
    )


def drift() -> None:
    """Compares what the service saw with what the model was trained on.

    The service keeps records with monitor.enabled=true monitor.path=FILE.

    Exit status, for cron and CI: 0 no drift, 1 drift, 2 error, 3 too few records to judge.
    """
    parser = _parser(drift)
    parser.add_argument("command", choices=["report"])
    parser.add_argument("--bundle", default="packaged", help="folder, hf://, models:/ or runs:/ name (packaged)")
    parser.add_argument("--db", type=_path, default=Path("monitor.sqlite"), help="records (monitor.sqlite)")
    parser.add_argument("--days", type=float, help="only the last so many days")
    args = parser.parse_args()
    from chestct.reporting.drift_report import report
    from chestct.serving.model import bundle_folder

    sys.exit(report(args.db, bundle_folder(args.bundle), args.days))


def _log_messages() -> None:
    """What the package logs, such as what computes, is said as plain lines on the standard error."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("chestct").setLevel(logging.INFO)


def _parser(command: Callable[[], None]) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"chestct {command.__name__}", description=command.__doc__, formatter_class=form)


def _path(text: str) -> Path:
    """A path that is args. An empty one, as a variable that is not set leaves it, would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


COMMANDS = (train, evaluate, predict, embed, serve, audit, export, data, push, space, drift, sync, ingest)


def main() -> None:
    """The command `chestct`."""
    sys.argv[1:] = map(in_home, sys.argv[1:])
    with errors_for_people():
        commands = {command.__name__: command for command in COMMANDS}
        name = sys.argv[1] if len(sys.argv) > 1 else "--help"
        if name in ("-h", "--help"):
            print("chestct COMMAND [key=value ...]; COMMAND --help explains every setting.\n")
            for command in COMMANDS:
                print(f"  {command.__name__:10}{(command.__doc__ or '').splitlines()[0]}")
        elif name in commands:
            sys.argv[:2] = [f"{sys.argv[0]} {name}"]
            commands[name]()
        else:
            raise ChestCTError(f"no command {name!r}. Commands: {', '.join(commands)}")
