"""Measures chestct on this machine, prints a table, and writes the values as JSON and the table as a page.

python -m benchmarks                                   phantoms, twelve minutes on two cores
python -m benchmarks --data FOLDER --keras PYTHON      FOLDER/train|valid|test/CLASS, beside the Keras recipe
python -m benchmarks --quick                           whether everything runs; its figures say little
python -m benchmarks --from benchmarks.json --write docs/benchmarks.md
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from chestct.files import write_atomic

PACKAGES = ("torch", "torchvision", "lightning", "openvino", "nncf", "onnxruntime", "mlflow", "gradio")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def machine() -> dict[str, Any]:
    """Processor, cores, vector instructions and versions; the load, since a busy machine measures itself."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    known = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in text.split()],
        "load before": round(os.getloadavg()[0], 1),
        "date": str(date.today()),
        "versions": {"python": platform.python_version()} | known,
    }


def measured(given: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import measure
    from chestct.config.schema import PhantomConfig
    from chestct.models.bundle import load_bundle
    from chestct.phantom.dataset import write

    facts = {"command": " ".join(["python -m benchmarks", *sys.argv[1:]]), **machine()}
    os.environ["PYTHONPATH"] = str(measure.ROOT)
    installed = [name for name in ("openvino", "openvino_int8") if importlib.util.find_spec("openvino")]
    backends = ("torch", *installed)
    with tempfile.TemporaryDirectory() as folder:
        root = given.data.resolve() if given.data else Path(folder, "phantoms")
        settings: tuple[str, ...] = ("data=chest_ct", "data.split=official", "data.allow_leakage=true")
        if not given.data:
            write(root, PhantomConfig(slices=24 if given.quick else 200))
            settings = ()
        bundle = str(given.bundle.resolve()) if given.bundle else "packaged"
        verified = [name for name in backends if name in load_bundle(bundle).facts.get("backends", {})]
        plan = measure.Plan(
            root=root,
            settings=(*settings, f"data.root={root}"),
            scratch=Path(folder),
            backends=backends,
            training=backends[:1] if given.quick else backends,
            bundle=bundle,
            answering=("torch", *verified),
            keras=given.keras or (sys.executable if importlib.util.find_spec("tensorflow") else ""),
            baseline=str(Path(given.baseline).resolve()),
            turns=1 if given.quick else 5,
            passes=1 if given.quick or given.data else 2,
            slices=12 if given.quick else 200,
        )
        facts |= {"data": "real slices" if given.data else "phantoms", "rows": []}
        for part in (measure.features, measure.training, measure.answers, measure.batch):
            for row in part(plan):
                facts["rows"].append(row)
                print(" | ".join(cells(row)), flush=True)
    return facts


def cells(row: dict[str, Any]) -> list[str]:
    """What was measured, its median, least and most, turns, and its ratio to each rival's median in the same run."""
    values = row["values"]
    ratios = [
        f"{statistics.median(values) / statistics.median(of):.3g} of {name}" if of else f"{name}: not measured"
        for name, of in row["against"].items()
    ]
    spread = f"{min(values):.3g} to {max(values):.3g}" if len(values) > 1 else "-"
    return [row["what"], f"{statistics.median(values):.3g} {row['unit']}", spread, str(len(values)), "; ".join(ratios)]


def page(facts: dict[str, Any]) -> str:
    """The page: machine, versions and the table, from what a run wrote."""
    head = ("what", "median", "least to most", "turns", "ratio, in the same run")
    table = [head, ("---",) * len(head), *map(cells, facts["rows"])]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# Benchmarks\n",
        f"Written by `{facts['command']}` (`make bench`) on {facts['date']}, with {facts['data']}. Another machine "
        "gives other times: read the ratios, each to what took turns with it in the same run.\n",
        "PyTorch eager: the same convolutions in NCHW, run for every slice in each epoch; for answers, their pass "
        "alone. Matrix product: as many slices as the machine's rate of it allows. Keras: epochs of the usual recipe, "
        "and its bare `predict`. Bare loop: the same network on decoded slices, without a service.\n",
        f"{facts['processor']}, {facts['cores']} cores, {' '.join(facts['instructions']) or 'no known instructions'}; "
        f"load {facts['load before']} before it began. {versions}.\n",
        *(f"| {' | '.join(line)} |" for line in table),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, one turn each")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="real slices, in place of phantoms")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="what answers (the packaged one)")
    parser.add_argument("--keras", default="", metavar="PYTHON", help="one that has TensorFlow")
    parser.add_argument("--baseline", default="../shared/tools/seed_baseline.py", help="the recipe in Keras")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="what is written (benchmarks.json)")
    parser.add_argument("--from", dest="made", type=Path, metavar="JSON", help="measure nothing, take these values")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the page")
    given = parser.parse_args()
    facts = json.loads(given.made.read_text(encoding="utf-8")) if given.made else measured(given)
    if not given.made:
        write_atomic(given.json, json.dumps(facts, indent=1) + "\n")
    if given.write:
        write_atomic(given.write, page(facts))


if __name__ == "__main__":
    main()
