"""Checkpoint files: which one `ckpt` names, and what is in it.

torch does not check the zip archives that it loads, so a flipped bit would give other weights or another optimiser
without a word. A checkpoint therefore ends with the SHA-256 of all that comes before. torch is imported where it is
needed: command lines look for a checkpoint before they know that their settings are right.
"""

import io
import shlex
from pathlib import Path
from typing import Any

from chestct.errors import ConfigError, WeightsError, out_of_memory
from chestct.files import digest

REFITS = "refits"
"""Folder below an evaluation's own, for heads that are trained again for a comparison; none of them is a run."""


def find_checkpoint(ckpt: str, runs_dir: str = "runs", best: bool = False) -> Path:
    """The checkpoint file that `ckpt` names.

    A file, a run folder, or `last` (the newest run). Of a run, `best` takes the best epoch, which evaluation measures,
    and else the last, where training goes on. Raises ConfigError where there is none.
    """
    path, name = Path(ckpt), "best.ckpt" if best else "last.ckpt"
    if ckpt == "last":
        paths = Path(runs_dir).glob("**/checkpoints/last.ckpt")
        runs = [p for p in paths if not any(part == REFITS or part[0] == "." for part in p.relative_to(runs_dir).parts)]
        if not runs:
            raise ConfigError(f"ckpt=last: no run with a checkpoint under {runs_dir}. Train first: python train.py")
        # Runs that end in the same instant are told apart by their names, which begin with the time.
        path = max(runs, key=lambda last: (last.stat().st_mtime_ns, last.parts)).with_name(name)
    elif path.is_dir():
        path = path / "checkpoints" / name
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.ckpt"))) or "no .ckpt file"
        raise ConfigError(
            f"ckpt={ckpt}: no checkpoint {path} (in that folder: {near}). Give a .ckpt file, a run folder, or "
            "ckpt=last for the newest run."
        )
    return path


def goes_on_elsewhere(ckpt: Path) -> ConfigError:
    """What is said where a training is to go on in another folder than its own."""
    checkpoints, this = shlex.quote(str(ckpt.parent)), shlex.quote(f"ckpt={ckpt}")
    return ConfigError(
        f"The training of {ckpt} goes on in its own folder: give {this} on the command line, without hydra.run.dir and "
        f"-m. Or branch it: mkdir -p NEW/checkpoints && cp {checkpoints}/*.ckpt NEW/checkpoints, and give ckpt=NEW."
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in a file, without running anything that is in it.

    Raises WeightsError where the file is missing, damaged, unsafe, or not a checkpoint of this project.
    """
    import torch

    content = path.read_bytes() if path.is_file() else b""
    if len(content) < 86 or content != sealed(content[:-66] + bytes(2)):
        raise WeightsError(
            f"The checkpoint {path} is missing or damaged: its checksum is wrong or not there. Take another copy, or "
            "the other one of best.ckpt and last.ckpt; one of a version that wrote no checksum is to be trained again."
        )
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler and its zip reader happen to raise
        if out_of_memory(error):
            raise
        reason = "it holds more than plain data and tensors" if "weights_only" in str(error) else "it is damaged"
        raise WeightsError(f"The checkpoint {path} cannot be read: {reason}.") from None
    try:
        hyper = checkpoint["hyper_parameters"]
        parts = [checkpoint["chestct"], checkpoint["state_dict"], hyper["settings"], hyper["data"]]
        if all(isinstance(part, dict) for part in parts):  # OmegaConf would read a text as YAML
            return checkpoint
    except (KeyError, TypeError):
        pass
    raise WeightsError(f"{path} is not a checkpoint of this project.")


def sealed(archive: bytes) -> bytes:
    """What torch.save made, with the SHA-256 of it as the zip archive's comment; torch.load reads it as before.

    An archive ends with the length of its comment, two bytes, which torch leaves at 0.
    """
    body = archive[:-2]
    return body + len(digest(body)).to_bytes(2, "little") + digest(body).encode()
