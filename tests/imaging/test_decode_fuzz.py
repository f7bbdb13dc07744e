"""Damaged files by the ten thousand: nothing but a valid slice or a DecodeError may come out.

Decoders are C code that a damaged file can crash or hang, which no `except` sees; so the cases run in a child process
with a limit on memory and on CPU time for each case, and the case that kills it is known and can be repeated.
"""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError
from chestct.imaging.decode import decode_frames
from chestct.imaging.slice import Limits
from tests.imaging.files import COLORS, RAMP, dicom, encoded
from tests.imaging.test_decode import WHOLE
from tests.imaging.test_raster import COPIES

CASES = 20_000
SECONDS = 5
MEMORY = 768 << 20  # beyond what the imports take; 256 MB would do for an image of `LIMITS`
LIMITS = Limits(max_bytes=1 << 20, max_pixels=1 << 20)
TELLING = np.array([0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], "<u4")


def raster_seeds() -> list[bytes]:
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a chest"
    pages = [Image.fromarray(RAMP + np.uint8(n)) for n in range(2)]
    return [
        *COPIES.values(),
        *(data for name, data in WHOLE.items() if name.isalpha()),
        encoded(COLORS, "JPEG", progressive=True, exif=exif, icc_profile=bytes(300)),
        encoded(COLORS, "WEBP", lossless=True, exif=exif),
        encoded(Image.fromarray(COLORS).convert("CMYK"), "JPEG"),
        *(encoded(COLORS, "TIFF", compression=name) for name in ("jpeg", "tiff_adobe_deflate")),
        encoded(RAMP > 100, "TIFF", compression="group4"),
        encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:], exif=exif),
    ]


def dicom_seeds() -> list[bytes]:
    stored = np.random.default_rng(1).integers(-1000, 1000, (2, 32, 32)).astype(np.int16)
    elements = {"WindowCenter": "40", "WindowWidth": "400", "PixelPaddingValue": -1000}
    syntaxes = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian)
    seeds = [dicom(stored, syntax, **elements) for syntax in (*syntaxes, uid.RLELossless, uid.JPEG2000Lossless)]
    jpeg = encapsulate([encoded((stored[0] // 16 + 128).astype(np.uint8), "JPEG")])
    seeds += [dicom(stored[0].astype(np.uint8), uid.JPEGBaseline8Bit, PixelData=jpeg), seeds[1][132:]]
    # No encoder for these is installed; they come with pydicom.
    names = ("JPEGLSNearLossless_08", "JPEGLSNearLossless_16", "MR_small_jpeg_ls_lossless")
    names += ("SC_rgb_jpeg_gdcm", "SC_rgb_small_odd_jpeg", "JPGExtended")
    return seeds + [Path(str(get_testdata_file(f"{name}.dcm", download=False))).read_bytes() for name in names]


def mutate(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """One to four damages, mostly in the header: flipped, random or telling bytes, repeats, pieces of others, cuts."""
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 700)))
        length, other = int(rng.integers(1, 64)), others[int(rng.integers(0, len(others)))]
        start, telling = int(rng.integers(0, len(other))), int(rng.choice(TELLING))
        pieces = (
            bytes([data[at] ^ 1 << int(rng.integers(0, 8))]),
            rng.bytes(length // 8 + 1),
            telling.to_bytes(4, str(rng.choice(["little", "big"]))),
            data[at : at + length] * int(rng.integers(0, 20)),
            other[start : start + length],
        )
        piece = pieces[int(rng.integers(0, len(pieces)))]
        rest = data[at + (len(piece) if rng.random() < 0.7 else length) :] if rng.random() < 0.95 else b""
        data = data[:at] + piece + rest or b"\0"
    return data


def check(data: bytes) -> bool:
    """Whether slices came out; anything but valid slices or a DecodeError is raised as it is."""
    try:
        for _, item in zip(range(8), decode_frames(data, WindowConfig(), LIMITS), strict=False):
            assert (item.gray.dtype, item.gray.ndim, item.gray.flags.c_contiguous) == (np.float32, 2, True)
            assert 0 <= item.gray.min() <= item.gray.max() <= 1
            assert 0 <= item.color <= 1
    except DecodeError as error:
        if isinstance(error.__cause__, MemoryError):  # more than the limits allow
            raise error.__cause__ from None
        return False
    return True


def run_cases(kind: str) -> None:
    """Child process: all cases, the current number always on standard output."""
    seeds = dicom_seeds() if kind == "dicom" else raster_seeds()
    assert all(map(check, seeds)), "the seeds themselves have to decode"
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    good = 0
    for case in range(CASES):
        print(case, flush=True)
        data = mutate(seeds[case % len(seeds)], seeds, np.random.default_rng([case, len(kind)]))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # CPU time; SIGPROF ends the process, also within C code
        good += check(data)
        signal.setitimer(signal.ITIMER_PROF, 0)
    print(f"done {good}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize("kind", ["raster", "dicom"])
def test_damaged_files_end_in_a_slice_or_a_decode_error(kind: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.imaging.test_decode_fuzz", kind]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    last = child.stdout.rstrip().rpartition("\n")[2]
    assert child.returncode == 0, f"case {last} ({kind}) ended with {child.returncode}: {child.stderr[-3000:]}"
    assert 0.02 < int(last.removeprefix("done ")) / CASES < 0.9, "mutations have to break some files and not all"


if __name__ == "__main__":
    run_cases(sys.argv[1])
