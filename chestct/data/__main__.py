"""python -m chestct.data COMMAND: the data half of the pipeline, one command a stage."""

import sys
from pathlib import Path

from chestct.cli import door
from chestct.config.schema import Config
from chestct.errors import DataError

USAGE = """
python -m chestct.data COMMAND [settings]

  phantom    draws the synthetic slices (data.phantom.slices=1000 data.phantom.defects=[exact,near] ...)
  ingest     decodes every slice once into the store and finds copies and near-copies
  validate   audits the data: report.html for people, report.json for machines
  show       prints slices and groups by split and class

  python -m chestct.data validate data=chest_ct data.root=FOLDER
"""


def phantom(cfg: Config, out: Path) -> None:
    """Draws the phantoms of the settings where they are not there yet."""
    from chestct.data.prepare import draws_phantoms, located
    from chestct.phantom.dataset import write

    if not draws_phantoms(cfg.data) and cfg.data.name != "phantom":
        raise DataError(f"data={cfg.data.name} is not drawn. Use data=phantom.")
    root = Path(located(cfg).root or "")
    write(root, cfg.data.phantom, cfg.trainer.progress)
    print(f"Phantoms (synthetic): {root}")


def ingest(cfg: Config, out: Path) -> None:
    """Brings the store up to date."""
    from chestct.data.prepare import prepare_store

    store = prepare_store(cfg, cfg.trainer.progress)
    copies = len(store.manifest) - store.manifest["content"].nunique()
    print(
        f"{len(store.manifest)} slices, {copies} of them copies, {store.manifest['group'].nunique()} groups, "
        f"{len(store.unreadable)} unreadable: {store.folder}"
    )


def validate(cfg: Config, out: Path) -> None:
    """Audits the data; fails on what data.audit.fail_on names."""
    # The audit stands a floor above this package; this door only calls it.
    from chestct.audit import stage

    stage.validate(cfg, out)


def show(cfg: Config, out: Path) -> None:
    """Prints slices and groups by split and class."""
    from chestct.data.datamodule import SliceModule

    data = SliceModule(cfg)
    data.prepare_data()
    data.setup()
    columns = {"slices": ("path", "size"), "groups": ("group", "nunique"), "leaked": ("leaked", "sum")}
    print(data.manifest.groupby(["source", "split", "subtype"]).agg(**columns).to_string())
    assert data.store is not None
    print(f"\nstore  {data.store.folder}")


COMMANDS = {"phantom": phantom, "ingest": ingest, "validate": validate, "show": show}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        command = COMMANDS[sys.argv.pop(1)]
        door("stage", USAGE)(command)()
    elif len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE.strip() + "\n\nCOMMAND --help lists every setting.")
    else:
        print(f"error: no command {sys.argv[1]!r}. Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
