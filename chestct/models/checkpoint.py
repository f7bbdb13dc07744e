"""Checkpoint files: which one `ckpt` names, and what is in it.

torch does not check the zip archives that it loads, so a flipped bit would give other weights or another optimiser
without a word. A checkpoint therefore ends with the SHA-256 of all that comes before. torch is imported where it is
needed: command lines look for a checkpoint before they know that their settings are right.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chestct.errors import ConfigError, WeightsError
from chestct.files import digest

REFITS = "refits"
"""Folder below an evaluation's own, for heads that are trained again for a comparison; none of them is a run."""


END_OF_ARCHIVE = b"PK\x05\x06"
"""How the last 22 bytes of a zip archive begin. They end with the length of a comment, in which the seal is kept."""


def find_checkpoint(ckpt: str, runs_dir: str = "runs", best: bool = False) -> Path:
    """The checkpoint file that `ckpt` names.

    A file, a run folder, or `last` (the newest run). Of a run, `best` takes the best epoch, which evaluation measures,
    and else the last, where training goes on. Raises ConfigError where there is none.
    """
    path, name = Path(ckpt), "best.ckpt" if best else "last.ckpt"
    if ckpt == "last":
        # Runs that end in the same instant are told apart by their names, which begin with the time.
        runs = sorted(_last_of_runs(Path(runs_dir)), key=lambda last: (last.stat().st_mtime_ns, last.parts))
        if not runs:
            raise ConfigError(f"ckpt=last: no run with a checkpoint under {runs_dir}. Train first: python train.py")
        path = runs[-1].with_name(name)
    elif path.is_dir():
        path = path / "checkpoints" / name
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.ckpt"))) or "no .ckpt file"
        raise ConfigError(
            f"ckpt={ckpt}: no checkpoint {path} (in that folder: {near}). Give a .ckpt file, a run folder, or "
            "ckpt=last for the newest run."
        )
    return path


def _last_of_runs(runs_dir: Path) -> Iterator[Path]:
    """last.ckpt of every run and every job of a sweep; hidden folders and refits are none."""
    for path in runs_dir.glob("**/checkpoints/last.ckpt"):
        folders, real = path.relative_to(runs_dir).parts, path.resolve()
        if real.is_relative_to(runs_dir.resolve()):  # a link to a refit is one, too
            folders += real.relative_to(runs_dir.resolve()).parts
        if path.is_file() and not any(name == REFITS or name.startswith(".") for name in folders):
            yield path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint in a file, without running anything that is in it.

    Raises WeightsError where the file is missing, damaged, unsafe, or not a checkpoint of this project.
    """
    import torch

    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise WeightsError(
            f"No checkpoint {path}. "
            + (f"In that folder: {', '.join(near)}. " if near else "")
            + "Give the path of a .ckpt file, a run folder, or ckpt=last for the newest run under runs_dir."
        )
    content = path.read_bytes()
    if not _whole(content, path):
        raise WeightsError(
            f"The checkpoint {path} is damaged: its checksum is wrong. Take another copy of it, or the other one of "
            "best.ckpt and last.ckpt."
        )
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler and its zip reader happen to raise
        reason = "it holds more than plain data and tensors" if "weights_only" in str(error) else "it is damaged"
        raise WeightsError(f"The checkpoint {path} cannot be read: {reason}.") from None
    parts = [checkpoint, *(_part(checkpoint, name) for name in ("chestct", "state_dict", "hyper_parameters"))]
    parts += [_part(parts[-1], name) for name in ("settings", "data")]
    if not all(isinstance(part, dict) for part in parts):  # OmegaConf would read a text as YAML
        raise WeightsError(f"{path} is not a checkpoint of this project.")
    return checkpoint


def _part(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def sealed(archive: bytes) -> bytes:
    """What torch.save made, with the SHA-256 of it as the archive's comment; torch.load reads it as before."""
    body = archive[:-2]
    return body + len(digest(body)).to_bytes(2, "little") + digest(body).encode()


def _whole(content: bytes, path: Path) -> bool:
    """Whether a file is as it was written; of one without a seal, whether the checksums of its pieces are right."""
    if content[-86:-82] == END_OF_ARCHIVE:
        return content == sealed(content[:-66] + bytes(2))
    if content[-22:-18] != END_OF_ARCHIVE:
        return False
    print(f"{path} is of a version that wrote no checksum over a whole checkpoint: only its pieces are checked.")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises whatever a damaged header leads it to
        return False
