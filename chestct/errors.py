"""Errors for people: the text says what was looked for, where, and how to mend it, and is printed alone.

Any other exception is a bug of ours and keeps its traceback.
"""

import errno
from pathlib import Path


class ChestCTError(Exception):
    """A mistake that the user can mend; shown without a traceback."""


class ConfigError(ChestCTError):
    """A setting that is misspelt, out of range or impossible together with another."""


class DataError(ChestCTError):
    """Data that is missing, empty, unmapped or unfit for the task."""


class DecodeError(DataError):
    """A file that cannot be turned into pixels; `lasting` where no other machine or moment would change that."""

    def __init__(self, path: Path | str, reason: str, lasting: bool = True) -> None:
        super().__init__(str(path), reason, lasting)  # as `args`, so that it pickles: files are decoded by workers
        self.path, self.reason, self.lasting = str(path), reason, lasting

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class WeightsError(ChestCTError):
    """Weights or a checkpoint that are missing, altered or made for something else."""


class BundleError(ChestCTError):
    """A bundle that is missing, altered, unsafe, or of a newer version."""


class BusyError(ChestCTError):
    """More is asked of the service than can be answered in time, or whoever asked has gone."""

    def __init__(self, message: str = "The service is busy. Try again in a few seconds.") -> None:
        super().__init__(message)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, after what had to be kept was kept. Not an Exception, so that nothing swallows it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch, which is not imported here, has no class for that of the processor."""
    if isinstance(error, RuntimeError):
        return any(words in f"{error!r}" for words in NO_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


NO_MEMORY = ("MemoryError", "DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")
"""In the names or words of torch's errors: of its pool on a GPU, the processor, CUDA outside that pool, and cuBLAS."""
