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
from tests.imaging.test_decode import dicom, encoded

CASES = 20_000
SECONDS = 5
MEMORY = 768 << 20  # beyond what the imports take; 256 MB would do for an image of `LIMITS`
LIMITS = Limits(max_bytes=1 << 20, max_pixels=1 << 20)
INTERESTING = np.array([0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], "<u4")


def raster_seeds() -> list[bytes]:
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 255, (24, 32)).astype(np.uint8)
    rgba = Image.fromarray(rng.integers(0, 255, (24, 32, 4)).astype(np.uint8))
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a chest"
    sixteen = gray.astype(np.uint16) * 200
    return [
        encoded(gray, "PNG"),
        encoded(rgba, "PNG", exif=exif, icc_profile=bytes(300)),
        encoded(Image.fromarray(gray).quantize(16), "PNG", transparency=3),
        encoded(sixteen, "PNG"),
        encoded(gray, "JPEG"),
        encoded(rgba.convert("RGB"), "JPEG", progressive=True, exif=exif, icc_profile=bytes(300)),
        encoded(rgba.convert("CMYK"), "JPEG"),
        encoded(gray, "BMP"),
        encoded(rgba, "WEBP"),
        encoded(rgba, "WEBP", lossless=True, exif=exif),
        encoded(sixteen, "TIFF", exif=exif),
        encoded(gray.astype(np.float32) / 255, "TIFF"),
        *(
            encoded(rgba.convert("RGB"), "TIFF", compression=name)
            for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate")
        ),
        encoded(gray > 100, "TIFF", compression="group4"),
        encoded(Image.fromarray(gray), "TIFF", save_all=True, append_images=[Image.fromarray(255 - gray)]),
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
    """One to four damages: flipped or telling bytes, mostly in the header, cuts, repeats, pieces of other files."""
    for _ in range(rng.integers(1, 5)):
        damaged = bytearray(data)
        at = int(rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 700)))
        length = int(rng.integers(1, 64))
        kind = rng.integers(0, 7)
        if kind == 0:
            damaged[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            damaged[at : at + 8] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 2:
            size = int(rng.choice([1, 2, 4]))
            value = int(rng.choice(INTERESTING)) & (256**size - 1)
            damaged[at : at + size] = value.to_bytes(size, str(rng.choice(["little", "big"])))
        elif kind == 3:
            del damaged[at : at + length]
        elif kind == 4:
            damaged[at:at] = damaged[at : at + length] * int(rng.integers(1, 20))
        elif kind == 5 and rng.random() < 0.3:
            del damaged[at:]
        else:
            other = others[int(rng.integers(0, len(others)))]
            start = int(rng.integers(0, len(other)))
            damaged[at : at + length] = other[start : start + length]
        data = bytes(damaged) or b"\0"
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
    for seed in seeds:
        assert check(seed), "the seeds themselves have to decode"
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
