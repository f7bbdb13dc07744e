"""One experiment, step by step: train it, measure it, write its bundle; the commands of these names.

Whatever a step needs is imported when the settings are known to be right, so that `--help` and a misspelt key are
answered at once.
"""

import dataclasses
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from chestct.config.compose import PARTS, PIPELINE, idle_with_bundle, left_behind, merge_settings
from chestct.config.schema import SPLITS as POLICIES
from chestct.config.schema import Config
from chestct.config.targets import check_trusted, foreign
from chestct.errors import ConfigError, WeightsError
from chestct.files import sole_writer, write_atomic
from chestct.models.checkpoint import REFITS, find_checkpoint, goes_on_elsewhere, read_checkpoint
from chestct.program import program, rank
from chestct.progress import phase

if TYPE_CHECKING:
    import pandas as pd

    from chestct.data.datamodule import SliceModule
    from chestct.evaluation.evaluate import Evaluation
    from chestct.models.bundle import Bundle
    from chestct.tracking import Run
    from chestct.training import Result


CODELESS = "No bundle: it holds no code, and the head is of code that is not in this package or torch."


def _resumed_folder(given: dict[str, str], sweep: bool) -> Path | None:
    """Where a resumed run began, and goes on. Raises ConfigError where the command line has another place for it."""
    ckpt = given.get("ckpt", "null")
    path = None if ckpt in ("null", "") else find_checkpoint(ckpt, given.get("runs_dir", Config.runs_dir)).resolve()
    folder = path.parent.parent if path and path.parent.name == "checkpoints" else None
    if path and folder and (sweep or Path(given.get("hydra.run.dir", folder)).resolve() != folder):
        raise goes_on_elsewhere(path)
    return folder


@program("train", _resumed_folder)
def train(cfg: Config, out: Path) -> float:
    """Trains VGG16 on chest CT slices and tests the best checkpoint.

    python train.py                                       the packaged model's recipe, on phantoms
    python train.py data=chest_ct data.root=FOLDER        your class folders
    python train.py model.freeze=true optim.lr=1e-4       single settings
    python train.py experiment=head                       a named experiment: one linear layer, the quickest
    python train.py -m optim.lr=1e-3,1e-4 model.freeze=true,false    all combinations
    python train.py -m sweep=head                         a search; the same command goes on with it
    python train.py ckpt=last                             goes on with the newest run
    """
    if cfg.seeds == 1:
        return train_and_report(cfg, out)[cfg.trainer.monitor]
    import pandas as pd

    if cfg.ckpt:
        raise ConfigError("seeds=N starts N trainings anew; leave out ckpt, or go on with one of them.")
    rows = {}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):  # they share one split, see data.split_seed
        rows[seed] = train_and_report(dataclasses.replace(cfg, seed=seed, seeds=1), out / f"seed-{seed}")
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("seed")
        write_atomic(out / "seeds.csv", table.to_csv())
    if not rank():
        print(f"\n{cfg.seeds} seeds, mean and standard deviation (each: {out / 'seeds.csv'})")
        print(pd.DataFrame({"mean": table.mean(), "sd": table.std(ddof=1)}).map("{:.4f}".format).to_string())
    return float(table[cfg.trainer.monitor].mean())


def train_and_report(cfg: Config, out: Path) -> dict[str, float]:
    """One training with its report and its MLflow run; the metrics of the best checkpoint."""
    from chestct.tracking import open_run
    from chestct.training import train as fit

    if cfg.ckpt:
        cfg = from_checkpoint(cfg, best=False)
        ckpt = Path(cfg.ckpt or "")
        folder = ckpt.resolve().parent
        # Only the first process is given the run's folder as `out`; the others go by the name of the checkpoint's.
        in_place = folder.name == "checkpoints" if rank() else folder == (out / "checkpoints").resolve()
        if not (rank() or in_place) and (folder.name == "checkpoints" or (out / "checkpoints").exists()):
            raise goes_on_elsewhere(ckpt)
        if ckpt.name == "best.ckpt" and in_place:  # epochs are never thrown away
            with suppress(WeightsError, ConfigError):  # no last one, or damaged
                cfg = from_checkpoint(dataclasses.replace(cfg, ckpt=str(ckpt.with_name("last.ckpt"))), best=False)
                print("Going on with last.ckpt, not with best.ckpt: no epoch is thrown away.")
    if rank():  # takes part, and leaves all else to the first process
        return fit(cfg, out).metrics
    anew = [f"evaluation.{name}" for name in ("policies", "protocol") if getattr(cfg.evaluation, name)]
    if anew and cfg.evaluation.report:
        later = f"python evaluate.py {shlex.quote(f'ckpt={out}')}"
        print(f"{' and '.join(anew)}: more heads, trained after this run by {later}")
    if cfg.optim.optimizer and "weight_decay" not in cfg.optim.optimizer:  # that of a recipe, as often as not
        print(f"optim.weight_decay={cfg.optim.weight_decay} has no effect: optim.optimizer.weight_decay would have.")
    if "lr" in cfg.optim.optimizer:
        print(f"optim.optimizer.lr={cfg.optim.optimizer['lr']} has no effect: optim.lr={cfg.optim.lr} has.")
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
    from chestct.evaluation.export import export
    from chestct.pyfunc import log_bundle
    from chestct.reporting.render import flat, model_card, write
    from chestct.reporting.text import summary

    phase("Measuring the best checkpoint, writing its report and bundle", cfg.trainer.progress)
    targets = foreign(dataclasses.asdict(cfg))  # named by who trains, or trusted by who resumes
    trust = [*cfg.trust, *(target.split(".", 1)[0] for target in targets)]
    evaluation = _evaluate_checkpoint(dataclasses.replace(cfg, ckpt=str(result.best), trust=trust), out, result.data)
    write(evaluation, out / "evaluation")
    bundle = CODELESS
    if not foreign(cfg.model.head):
        export(evaluation, out / "bundle", model_card(evaluation))
        bundle = f"bundle           {out / 'bundle'}  (python serve.py {shlex.quote(f'bundle={out}/bundle')})"
        if cfg.tracking.log_model:
            log_bundle(run, out / "bundle", code=bool(cfg.tracking.register))
    run.evaluation(flat(evaluation).get("test", {}), out / "evaluation")
    phase("", cfg.trainer.progress)  # the result stands apart from the phases
    return f"{summary(evaluation)}\n\nreport           {out / 'evaluation' / 'report.html'}\n{bundle}\n"


@program("evaluate")
def evaluate(cfg: Config, out: Path) -> None:
    """Scores the valid and test slices of a checkpoint's data, or other data, and writes a report.

      python evaluate.py ckpt=last                                 the newest run
      python evaluate.py ckpt=runs/RUN                             any run
      python evaluate.py ckpt=last evaluation.policies=true 'evaluation.protocol=[within]'    other splits, five folds
      python evaluate.py ckpt=last 'evaluation.protocol=[loso,matrix,within,probe]' seeds=3    across hospitals
      python evaluate.py ckpt=last evaluation.phantoms=100         heat maps held against known lesions
      python evaluate.py bundle=FOLDER data.root=FOLDER            a bundle on slices that it never saw
      python evaluate.py 'compare=[runs/A,runs/B]'                 two models, slice by slice

    Settings that are not given come from the checkpoint.
    """
    from hydra.core.hydra_config import HydraConfig

    from chestct.evaluation.compare import compare_runs
    from chestct.evaluation.external import evaluate_bundle
    from chestct.reporting.render import flat, write
    from chestct.reporting.text import summary
    from chestct.serving.model import bundle_folder
    from chestct.tracking import run_of

    given = [f"{name}={value}" for name in ("compare", "bundle", "ckpt") if (value := getattr(cfg, name))]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: an evaluation is of one of them. Leave out the other.")
    if cfg.compare:
        print(compare_runs(cfg, out))
        return
    if cfg.bundle:
        if cfg.evaluation.protocol or cfg.evaluation.policies:
            raise ConfigError(
                "evaluation.protocol and .policies train heads anew, which takes a run: give ckpt=, not bundle=."
            )
        if idle := idle_with_bundle(HydraConfig.get().overrides.task):
            print(f"{' '.join(idle)}: no effect, for a bundle has its own.")
        evaluation = evaluate_bundle(dataclasses.replace(cfg, bundle=bundle_folder(cfg.bundle, cfg)))
    else:
        cfg = from_checkpoint(cfg) if cfg.ckpt else cfg
        evaluation = _evaluate_checkpoint(cfg, out)
    write(evaluation, out)
    print(f"{summary(evaluation)}\n\nreport  {out / 'report.html'}")
    if cfg.ckpt and Path(cfg.ckpt).stem == "best":
        with run_of(cfg, Path(cfg.ckpt)) as run:
            run.evaluation(flat(evaluation).get("test", {}), out)


def _evaluate_checkpoint(cfg: Config, out: Path, data: "SliceModule | None" = None) -> "Evaluation":
    """The checkpoint's evaluation, with each other split, part of the protocol or check that the settings ask for.

    data: of the training that has just ended, whose own report has no model of another one.
    """
    from chestct.evaluation.evaluate import evaluate
    from chestct.evaluation.protocol import protocol
    from chestct.evaluation.sections import optional_sections
    from chestct.evaluation.split_policies import check_anew, policy_row
    from chestct.training import train as fit

    if data is None and cfg.ckpt:  # without one, `evaluate` says so
        check_anew(cfg)  # now, not after an evaluation and trainings of hours
    evaluation = evaluate(cfg, data)

    def again(name: str, cfg: Config, data: "SliceModule") -> "tuple[pd.DataFrame, list[Path]]":
        result = fit(cfg, out / REFITS / name, data=data)
        return result.predictions, [result.best]

    evaluation.sections |= optional_sections(evaluation)  # of minutes: what fails there fails before hours of training
    if data is None:
        others = [name for name in POLICIES if name != cfg.data.split] if cfg.evaluation.policies else []
        evaluation.rows += [policy_row(cfg, name, again) for name in others]
        if parts := protocol(evaluation, again):
            evaluation.sections["protocol"] = parts
    return evaluation


@program("evaluate")
def export(cfg: Config, out: Path) -> None:
    """Evaluates a checkpoint and writes its bundle: weights, preprocessing, threshold, calibration, model card.

      chestct export ckpt=last bundle=FOLDER
      chestct export ckpt=last bundle=FOLDER format=openvino_int8+onnx    with backends beside torch, each verified
      chestct export bundle=FOLDER format=openvino_int8 data=...          into a bundle, with the data it was made with

    Settings that are not given come from the checkpoint; evaluation.threshold chooses the operating point, and the
    other checks that evaluation.* switches on go into the model card.
    """
    from chestct.evaluation.backends import add_backends, own_slices
    from chestct.evaluation.export import export
    from chestct.models.bundle import PACKAGED_BUNDLE, load_bundle
    from chestct.models.bundle_schema import check_target
    from chestct.pyfunc import log_bundle
    from chestct.reporting.render import model_card
    from chestct.serving.model import ELSEWHERE
    from chestct.tracking import run_of

    if cfg.bundle == "packaged":
        raise ConfigError(
            "bundle=packaged is the bundle in the package, which stays as it is. Give another folder with "
            f"bundle=FOLDER; to add a backend to it, one with a copy of {PACKAGED_BUNDLE}"
        )
    if cfg.bundle and cfg.bundle.startswith(ELSEWHERE):
        raise ConfigError(
            f"bundle={cfg.bundle}: an export goes into a folder. Give one with bundle=FOLDER; from there it goes to "
            "the hub with chestct push FOLDER USER/NAME, and to MLflow with tracking.register=NAME."
        )
    if cfg.bundle and not cfg.ckpt and cfg.format != "torch":
        folder, bundle = Path(cfg.bundle), load_bundle(cfg.bundle)
        check_target(folder)  # now, not after conversions of minutes
        _say(add_backends(bundle, folder, cfg, *own_slices(cfg, bundle)), folder)
        return
    if not cfg.ckpt:
        raise ConfigError(
            "Nothing to export: give a checkpoint with ckpt=last or ckpt=runs/.../checkpoints/best.ckpt, or a bundle "
            "and what it is to get: bundle=FOLDER format=openvino_int8 data=..."
        )
    cfg = from_checkpoint(cfg)
    if foreign(cfg.model.head):
        raise ConfigError(f"{CODELESS} Train with a head of torch.nn, or measure this one with python evaluate.py.")
    folder = Path(cfg.bundle) if cfg.bundle else out / "bundle"
    check_target(folder)  # now, not after an evaluation of minutes
    evaluation = _evaluate_checkpoint(cfg, out)
    bundle = export(evaluation, folder, model_card(evaluation))
    if cfg.format != "torch":
        bundle = add_backends(bundle, folder, cfg, evaluation.manifest, evaluation.images)
    if cfg.tracking.log_model:
        with run_of(cfg, Path(cfg.ckpt or "")) as run:
            log_bundle(run, folder, code=bool(cfg.tracking.register))
            for name, numbers in bundle.facts.get("backends", {}).items():
                metrics = {key: numbers[key] for key in ("slices", "logits", "decisions", "heat", "calibration")}
                run.child(f"export {name}", metrics | {"auroc_difference": numbers["auroc"]["value"]})
    _say(bundle, folder)


def _say(bundle: "Bundle", folder: Path) -> None:
    from chestct.config.schema_serving import CARD

    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"bundle {bundle.id}, {size / 1000:,.0f} kB  {folder}")
    if backends := bundle.facts.get("backends"):
        print(f"verified for {', '.join(backends)}, see its {CARD}")


def from_checkpoint(cfg: Config, best: bool = True) -> Config:
    """The settings in the checkpoint cfg.ckpt, with the command line's on top; `best` as for find_checkpoint."""
    from hydra.core.hydra_config import HydraConfig

    path = find_checkpoint(cfg.ckpt or "", cfg.runs_dir, best)
    stored = read_checkpoint(path)["hyper_parameters"]["settings"]
    check_trusted(stored, str(path), cfg.trust)
    overrides = list(HydraConfig.get().overrides.task)
    groups = PARTS if not best else []
    if best and (cfg.evaluation.policies or cfg.evaluation.protocol):
        groups = PARTS[:-1]  # heads that are trained anew have no logger
    unsaid = [name for name in groups if not any(override.lstrip("+").startswith(f"{name}=") for override in overrides)]
    if lacking := left_behind(stored, unsaid, cfg):
        raise ConfigError(
            f"{path} was trained with parts that no file may choose. Say them again: {' '.join(lacking)}; or leave "
            f"them out knowingly: {' '.join(f'{name}={{}}' for name in unsaid)}"
        )
    if HydraConfig.get().job.config_name == PIPELINE:  # params.yaml decides how the pipeline evaluates
        overrides.append("evaluation=params")
    return dataclasses.replace(merge_settings(cfg, overrides, stored), ckpt=str(path))
