"""Damaged files by the ten thousand: nothing but a valid slice or a DecodeError may come out.

Decoders are C code that a damaged file can crash or hang, which no `except` sees; so the cases run in a child process
with a limit on memory and on CPU time for each case, and the case that kills it is known and can be repeated.
"""

import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate

from chestct.config.schema import WindowConfig
from chestct.errors import DecodeError
from chestct.imaging.decode import decode_frames
from chestct.imaging.slice import Limits, Slice

CASES = 40_000
SECONDS = 5
MEMORY = 768 << 20  # beyond what the imports take; 256 MB would do for an image of `LIMITS`
LIMITS = Limits(max_bytes=1 << 20, max_pixels=1 << 20)
INTERESTING = np.array([0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], "<u4")


def raster_seeds() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 255, (24, 32)).astype(np.uint8)
    rgba = Image.fromarray(rng.integers(0, 255, (24, 32, 4)).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    exif[270] = "a chest"
    images = {
        "gray.png": (Image.fromarray(gray), {}),
        "rgba.png": (rgba, {"exif": exif, "icc_profile": bytes(300)}),
        "palette.png": (Image.fromarray(gray).quantize(16), {"transparency": 3}),
        "16bit.png": (Image.fromarray(gray.astype(np.uint16) * 200), {}),
        "gray.jpg": (Image.fromarray(gray), {}),
        "color.jpg": (rgba.convert("RGB"), {"progressive": True, "exif": exif, "icc_profile": bytes(300)}),
        "cmyk.jpg": (rgba.convert("CMYK"), {}),
        "gray.bmp": (Image.fromarray(gray), {}),
        "lossy.webp": (rgba, {}),
        "lossless.webp": (rgba, {"lossless": True, "exif": exif}),
        "raw.tiff": (Image.fromarray(gray.astype(np.uint16) * 200), {"exif": exif}),
        "float.tiff": (Image.fromarray(gray.astype(np.float32) / 255), {}),
        "lzw.tiff": (rgba, {"compression": "tiff_lzw"}),
        "deflate.tiff": (Image.fromarray(gray), {"compression": "tiff_adobe_deflate"}),
        "jpeg.tiff": (rgba.convert("RGB"), {"compression": "jpeg"}),
        "fax.tiff": (Image.fromarray(gray > 100), {"compression": "group4"}),
        "pages.tiff": (Image.fromarray(gray), {"save_all": True, "append_images": [Image.fromarray(255 - gray)]}),
    }
    formats = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "webp": "WEBP", "tiff": "TIFF"}
    seeds = {}
    for name, (image, options) in images.items():
        file = io.BytesIO()
        image.save(file, formats[name.rpartition(".")[2]], **options)
        seeds[name] = file.getvalue()
    return seeds


def dicom_seeds() -> dict[str, bytes]:
    stored = np.random.default_rng(1).integers(-1000, 1000, (2, 32, 32)).astype(np.int16)
    dataset = pydicom.Dataset()
    dataset.update(
        {
            "Modality": "CT",
            "PatientID": "P1",
            "StudyInstanceUID": "1.2.3",
            "SeriesInstanceUID": "1.2.3.4",
            "SOPInstanceUID": "1.2.3.4.5",
            "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
            "RescaleSlope": "1",
            "RescaleIntercept": "-24",
            "WindowCenter": "40",
            "WindowWidth": "400",
        }
    )
    dataset.add_new("PixelPaddingValue", "SS", -1000)
    seeds = {}
    for name, syntax in {
        "implicit": pydicom.uid.ImplicitVRLittleEndian,
        "explicit": pydicom.uid.ExplicitVRLittleEndian,
        "deflated": pydicom.uid.DeflatedExplicitVRLittleEndian,
        "rle": pydicom.uid.RLELossless,
        "j2k": pydicom.uid.JPEG2000Lossless,
        "jpeg": pydicom.uid.JPEGBaseline8Bit,
    }.items():
        frames = stored if syntax != pydicom.uid.JPEGBaseline8Bit else (stored[:1] // 16 + 128).astype(np.uint8)
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.set_pixel_data(frames, "MONOCHROME2", 8 * frames.itemsize, generate_instance_uid=False)
        if syntax in (pydicom.uid.RLELossless, pydicom.uid.JPEG2000Lossless):
            dataset.compress(syntax, generate_instance_uid=False)
        elif syntax == pydicom.uid.JPEGBaseline8Bit:
            stream = io.BytesIO()
            Image.fromarray(frames[0]).save(stream, "JPEG")
            dataset.PixelData = encapsulate([stream.getvalue()])
            dataset["PixelData"].VR = "OB"
            dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
        file = io.BytesIO()
        dataset.save_as(file, enforce_file_format=True)
        seeds[f"{name}.dcm"] = file.getvalue()
    seeds["headless.dcm"] = seeds["explicit.dcm"][132:]
    # No encoder for these is installed; they come with pydicom.
    for name in (
        "JPEGLSNearLossless_08.dcm",
        "JPEGLSNearLossless_16.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "SC_rgb_jpeg_gdcm.dcm",  # JPEG lossless
        "SC_rgb_small_odd_jpeg.dcm",
        "JPGExtended.dcm",
    ):
        seeds[name] = Path(str(get_testdata_file(name, download=False))).read_bytes()
    return seeds


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
        for index, item in enumerate(decode_frames(data, WindowConfig(), LIMITS)):
            assert isinstance(item, Slice)
            assert item.gray.dtype == np.float32
            assert item.gray.ndim == 2
            assert item.gray.flags.c_contiguous
            assert item.gray.min() >= 0
            assert item.gray.max() <= 1
            assert 0 <= item.color <= 1
            if index == 8:
                break
    except DecodeError as error:
        if isinstance(error.__cause__, MemoryError):  # more than the limits allow
            raise error.__cause__ from None
        return False
    return True


def run_cases(first: int, count: int, kind: str) -> None:
    """Child process: cases `first` to `first + count`, the current number always on standard output."""
    seeds = list((dicom_seeds() if kind == "dicom" else raster_seeds()).values())
    for seed in seeds:
        assert check(seed), "the seeds themselves have to decode"
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    good = 0
    for case in range(first, first + count):
        sys.stdout.write(f"{case}\n")
        sys.stdout.flush()
        rng = np.random.default_rng([case, len(kind)])
        data = mutate(seeds[case % len(seeds)], seeds, rng)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # CPU time; SIGPROF ends the process, also within C code
        good += check(data)
        signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.write(f"done {good}\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize("kind", ["raster", "dicom"])
def test_damaged_files_end_in_a_slice_or_a_decode_error(kind: str) -> None:
    command = [sys.executable, "-W", "ignore", __file__, "0", str(CASES // 2), kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    last = child.stdout.rstrip().rpartition("\n")[2]
    assert child.returncode == 0, f"case {last} ({kind}) ended with {child.returncode}: {child.stderr[-3000:]}"
    good = int(last.removeprefix("done "))
    assert 0.02 < good / (CASES // 2) < 0.9, "mutations have to break some files and not all"


if __name__ == "__main__":
    run_cases(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
