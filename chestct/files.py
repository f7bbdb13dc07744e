"""Files that are either whole or absent, and the one digest by which content is known."""

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chestct.errors import ChestCTError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which is then renamed to `path`, so that nobody sees half of it.

    The folder is made where it is missing. Where the block ends with an error, or the file cannot be renamed (OSError),
    nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.filename in (None, str(part)):  # a full disk names no file, and nobody knows the part
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> Path:
    """Writes `content`, text as UTF-8, to `path` as `whole` does, and returns that. Raises OSError."""
    with whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def digest(content: bytes | str) -> str:
    """SHA-256 of bytes or of UTF-8 text, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a file; never waits as on a pipe. Raises OSError, also for no regular file or a larger one."""
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, more than {limit:,}", str(path))
        return file.read(limit)


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Holds the folder `out` for this process. Raises ChestCTError where another training holds it."""
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise ChestCTError(
            f"Another training is writing to {out}. Wait for it or stop it, or start a run of its own: without ckpt, "
            "and in another folder."
        ) from None
