"""chestct drift COMMAND: whether what the service sees still looks like what the model was trained on."""

import argparse
import importlib.util
import sys
from pathlib import Path

from chestct.errors import ChestCTError

STATUS = {"same": 0, "drift": 1, "few": 3}

EPILOG = """
The service keeps records with monitor.enabled=true monitor.path=FILE.

Exit status of report, for cron and CI: 0 no drift, 1 drift, 2 error, 3 too few records to judge.
"""


def main(argv: list[str]) -> int:
    """The program; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return _export(arguments) if arguments.command == "export" else _report(arguments)
    except ChestCTError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: Cannot write {error.filename}: {error.strerror}. Choose another --out.", file=sys.stderr)
    return 2


def _report(arguments: argparse.Namespace) -> int:
    from chestct.models.bundle import load_bundle  # torch takes a second: not before --help
    from chestct.reporting.drift_report import summary, write
    from chestct.serving.monitor import read_records
    from chestct.serving.shift import compare

    drift = compare(load_bundle(arguments.bundle), read_records(arguments.db, arguments.days))
    if arguments.out:
        write(drift, arguments.out)
    print(summary(drift))
    return STATUS[drift.verdict]


def _export(arguments: argparse.Namespace) -> int:
    import pandas as pd

    from chestct.serving.monitor import read_records

    if not importlib.util.find_spec("pyarrow"):
        raise ChestCTError("Parquet needs pyarrow, which this installation lacks. Run: pip install pyarrow")
    table = pd.DataFrame(read_records(arguments.db, arguments.days))
    table["time"] = pd.to_datetime(table["time"], unit="s", utc=True)
    table.to_parquet(arguments.out, index=False)
    print(f"{len(table):,} records: {arguments.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chestct drift",
        description=__doc__.split(": ", 1)[1].capitalize(),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="compare the records with a bundle's training data")
    report.add_argument(
        "--bundle", default="packaged", help="bundle folder; `packaged` (default): the one in the package"
    )
    report.add_argument("--out", type=Path, metavar="HTML", help="also write the report as a page")
    export = commands.add_parser("export", help="write the records as Parquet, for other tools")
    export.add_argument("--out", type=Path, metavar="PARQUET", required=True, help="file to write")
    for command in (report, export):
        command.add_argument("--db", type=Path, default=Path("monitor.sqlite"), help="records (monitor.sqlite)")
        command.add_argument("--days", type=float, help="only the last so many days")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
