"""DICOM files to slices: header, codestream checks, modality rescale, window.

Elements are taken as raw bytes and converted here instead of by pydicom, whose converters warn through the process-wide
warning filter about every odd value that real archives are full of. Pixel data go frame by frame through pydicom's
decoders, each told only what has been checked, because a header may claim any size and a codestream another.

Grey level: HU = RescaleSlope * stored + RescaleIntercept (PS3.3 C.11.1.1.2), then the LINEAR function of PS3.3
C.11.2.1.2.1 with output range [0, 1]: 0 up to c - 0.5 - (w - 1) / 2, 1 above c - 0.5 + (w - 1) / 2, in between
(x - (c - 0.5)) / (w - 1) + 0.5. VOI LUT sequences and other VOI functions are not used.
"""

import logging
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filereader import read_dataset, read_sequence
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    RLELossless,
)

from chestct.config.schema import WindowConfig
from chestct.imaging import headers
from chestct.imaging.decode import Limits, Slice, check_pixels
from chestct.imaging.headers import RefusedError

# It logs the traceback of each exception that it then raises; a user's damaged file is not worth a page.
logging.getLogger("pydicom.pixels.decoders.base").addFilter(lambda record: record.exc_info is None)

ELEMENTS = (
    *("Modality", "PatientID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelData"),
)

MAX_READS = 100_000
"""Pieces of a file that pydicom walks through in Python, two or three for each element: enough for 1,000 frames."""

MAX_RLE_BYTES = 1 << 24
"""One RLE frame: every two bytes can stand for 128, and pydicom expands them before it compares lengths."""

MAX_TILES = 4096
"""Tiles of a JPEG 2000 frame: the decoder keeps several kB for each before it reads any."""


def slices(data: bytes, window: WindowConfig, limits: Limits, every: bool) -> Iterator[Slice]:
    """Slices of the DICOM file `data`: every frame, or the middle one only.

    CT is windowed in HU: `window`, or the file's own first window with `window.from_file`. Where the values are no HU
    (another modality, or unsigned values without a rescale) the file's own window is used, or else the whole range
    of its stored bits. MONOCHROME1 is inverted; padding (PixelPaddingValue) is black; RGB becomes luma.

    Raises RefusedError and whatever pydicom raises.
    """
    dataset, syntax = _read(data, limits)
    pixels = _raw(dataset, "PixelData")
    if not pixels:
        what = _text(dataset, "Modality") or "unknown"
        raise RefusedError(f"no pixel data (modality {what}): a report, a plan or a header, not an image")
    layout = _layout(dataset)
    check_pixels(layout["columns"], layout["rows"], limits)
    count = int(_text(dataset, "NumberOfFrames") or 1)
    if count < 1:
        raise RefusedError(f"NumberOfFrames is {count}")
    shared = _items(dataset, "SharedFunctionalGroupsSequence")[:1]
    per_frame = _items(dataset, "PerFrameFunctionalGroupsSequence")
    for frame in range(count) if every else (count // 2,):
        stored = _frame(pixels, frame, count, layout, syntax)
        # Enhanced multi-frame CT keeps rescale and window in functional groups, for all frames or for each.
        macros = [
            item
            for group in per_frame[frame : frame + 1] + shared
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence")
            for item in _items(group, macro)[:1]
        ]
        yield _slice(stored, [dataset, *macros], layout, window, frame)


def _read(data: bytes, limits: Limits) -> tuple[Dataset, UID]:
    """The dataset with ELEMENTS still as raw bytes, and its transfer syntax."""
    file = headers.BudgetedFile(data, MAX_READS)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 != 2)
    syntax = UID(_text(meta, "TransferSyntaxUID") or _guess_syntax(data[file.tell() : file.tell() + 6]))
    if syntax == DeflatedExplicitVRLittleEndian:
        # pydicom would inflate without a limit.
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[file.tell() :], limits.max_bytes + 1)
        if len(inflated) > limits.max_bytes:
            raise RefusedError(f"inflates to more than data.max_bytes ({limits.max_bytes:,})")
        file = headers.BudgetedFile(inflated, MAX_READS)
    dataset = read_dataset(
        file,
        is_implicit_VR=syntax == ImplicitVRLittleEndian,
        is_little_endian=syntax != ExplicitVRBigEndian,
        specific_tags=[tag_for_keyword(keyword) for keyword in ELEMENTS],
    )
    return dataset, syntax


def _guess_syntax(first: bytes) -> UID:
    """Transfer syntax of a dataset without file meta information, from the first six bytes of its first element."""
    if not first[4:6].isalpha():
        return ImplicitVRLittleEndian
    return ExplicitVRBigEndian if first[:1] == b"\0" else ExplicitVRLittleEndian


def _raw(dataset: Dataset, keyword: str) -> bytes:
    tag = tag_for_keyword(keyword)
    value = dataset.get_item(tag).value if tag in dataset else None
    return value if isinstance(value, bytes) else b""


def _text(dataset: Dataset, keyword: str) -> str:
    # Latin-1 never fails; identifiers serve as keys and are ASCII by the standard.
    return _raw(dataset, keyword).decode("latin-1").strip(" \0")


def _number(datasets: list[Dataset], keyword: str) -> float | None:
    """The first value of a decimal string, from the first dataset that has one."""
    for dataset in datasets:
        if text := _text(dataset, keyword).split("\\")[0].strip():
            if not abs(float(text)) < 1e9:  # NaN, or more than float32 can hold once it is scaled
                raise RefusedError(f"{keyword} is {text}")
            return float(text)
    return None


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """Items of a sequence, which pydicom has read already where its length was left open."""
    element = dataset.get_item(tag_for_keyword(keyword))
    if element is None or not isinstance(element.value, bytes):
        return list(element.value or ()) if element else []
    file = headers.BudgetedFile(element.value, MAX_READS)
    return list(read_sequence(file, element.is_implicit_VR, element.is_little_endian, len(element.value), "iso8859"))


def _uint16(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    raw = _raw(dataset, keyword)[:2]
    if len(raw) == 2:
        little = dataset.get_item(tag_for_keyword(keyword)).is_little_endian
        return int.from_bytes(raw, "little" if little else "big")
    if default is None:
        raise RefusedError(f"{keyword} is missing")
    return default


def _layout(dataset: Dataset) -> dict[str, Any]:
    """How stored values lie in the pixel data, as the keyword arguments of pydicom's decoders."""
    photometric = _text(dataset, "PhotometricInterpretation") or "MONOCHROME2"
    bits_allocated = _uint16(dataset, "BitsAllocated")
    layout: dict[str, Any] = {
        "rows": _uint16(dataset, "Rows"),
        "columns": _uint16(dataset, "Columns"),
        "samples_per_pixel": _uint16(dataset, "SamplesPerPixel", 1),
        "photometric_interpretation": photometric,
        "bits_allocated": bits_allocated,
        "bits_stored": _uint16(dataset, "BitsStored", bits_allocated),
        "pixel_representation": _uint16(dataset, "PixelRepresentation", 0),
        "planar_configuration": _uint16(dataset, "PlanarConfiguration", 0),
        "pixel_keyword": "PixelData",
        "number_of_frames": 1,
    }
    if photometric == "PALETTE COLOR":
        raise RefusedError("PALETTE COLOR is not read; a CT slice is MONOCHROME1 or MONOCHROME2")
    if "ModalityLUTSequence" in dataset:
        raise RefusedError("a modality lookup table is not read; a CT slice has RescaleSlope and RescaleIntercept")
    if _uint16(dataset, "HighBit", layout["bits_stored"] - 1) != layout["bits_stored"] - 1:
        raise RefusedError("HighBit is not BitsStored - 1")
    return layout


def _frame(pixels: bytes, frame: int, count: int, layout: dict[str, Any], syntax: UID) -> np.ndarray:
    """Stored values of one frame: integers [H, W], or [H, W, 3] for RGB."""
    decoder = get_decoder(syntax)  # NotImplementedError for transfer syntaxes that are no images, such as video
    if not decoder.is_available:
        raise RefusedError(f"{syntax.name} needs a decoder: pip install 'chestct[dicom]'")
    if syntax.is_encapsulated:
        stream = get_frame(headers.BudgetedFile(pixels, MAX_READS), frame, number_of_frames=count)
        source = encapsulate([_checked(stream, layout, syntax)])
    else:
        samples = layout["rows"] * layout["columns"] * layout["samples_per_pixel"]
        if layout["photometric_interpretation"] == "YBR_FULL_422":
            samples = samples // 3 * 2
        bits = samples * layout["bits_allocated"]
        if bits % 8 and count > 1:
            raise RefusedError("frames that do not start at a whole byte")
        size = -(-bits // 8)
        if len(pixels) < size * count:
            raise RefusedError(f"{len(pixels):,} bytes of pixel data; {count} frames of {size:,} bytes are announced")
        source = pixels[frame * size : (frame + 1) * size]
    return decoder.as_array(source, index=0, **layout)[0]


def _checked(stream: bytes, layout: dict[str, Any], syntax: UID) -> bytes:
    """A compressed frame after a check that decoding it takes no more than the header announces."""
    expected = [layout["rows"], layout["columns"], layout["samples_per_pixel"]]
    if syntax == RLELossless:
        plain = layout["rows"] * layout["columns"] * layout["samples_per_pixel"] * layout["bits_allocated"] // 8
        allowed = min(MAX_RLE_BYTES, 2 * plain + 1024)
        if len(stream) > allowed:
            raise RefusedError(f"an RLE frame of {len(stream):,} bytes; {allowed:,} are allowed")
        return stream
    if syntax in JPEG2000TransferSyntaxes:
        stream = stream[max(0, stream.find(b"\xff\x4f\xff\x51")) :]  # some writers wrap the codestream in a JP2 file
        *size, tiles = headers.jpeg2000_size(stream)
        if tiles > MAX_TILES:
            raise RefusedError(f"{tiles:,} JPEG 2000 tiles; {MAX_TILES:,} are allowed")
    else:
        size = list(headers.check_jpeg(stream))
    if size != expected:
        raise RefusedError(f"compressed data of {size} rows, columns, samples; the header says {expected}")
    return stream


def _slice(
    stored: np.ndarray, datasets: list[Dataset], layout: dict[str, Any], window: WindowConfig, frame: int
) -> Slice:
    color = 0.0
    if stored.ndim == 3:
        rgb = (stored / np.float32(2 ** layout["bits_stored"] - 1)).astype(np.float32).clip(0, 1)
        gray, color = rgb @ np.array([0.299, 0.587, 0.114], np.float32), float(np.mean(np.ptp(rgb, axis=2)))
    else:
        gray = _windowed(stored, datasets, layout, window)
    dataset = datasets[0]
    patient, study, series = (_text(dataset, key) for key in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID"))
    return Slice(gray, "DICOM", "DICOM", color, patient, study, series, frame, _text(dataset, "Modality"))


def _windowed(stored: np.ndarray, datasets: list[Dataset], layout: dict[str, Any], window: WindowConfig) -> np.ndarray:
    slope, intercept = _number(datasets, "RescaleSlope"), _number(datasets, "RescaleIntercept")
    own_center, own_width = _number(datasets, "WindowCenter"), _number(datasets, "WindowWidth")
    signed = layout["pixel_representation"] == 1
    rescaled = slope is not None or intercept is not None
    hounsfield = _text(datasets[0], "Modality") in ("CT", "") and (rescaled or signed)
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    if not slope:
        raise RefusedError("RescaleSlope is 0")
    if own_center is not None and own_width is not None and own_width >= 1 and (window.from_file or not hounsfield):
        center, width = own_center, own_width
    elif hounsfield:
        center, width = window.center, window.width
    else:
        lowest = -(2 ** (layout["bits_stored"] - 1)) if signed else 0
        ends = [slope * end + intercept for end in (lowest, lowest + 2 ** layout["bits_stored"] - 1)]
        center, width = sum(ends) / 2 + 0.5, abs(ends[1] - ends[0]) + 1

    # The formula above as one multiplication and one addition; a window of width 1 is a step.
    steepness = 1 / max(width - 1, 1e-6)
    gray = stored.astype(np.float32)
    gray *= np.float32(slope * steepness)
    gray += np.float32((intercept - (center - 0.5)) * steepness + 0.5)
    np.clip(gray, 0, 1, out=gray)
    if layout["photometric_interpretation"] == "MONOCHROME1":
        np.subtract(1, gray, out=gray)
    _blacken_padding(gray, stored, datasets[0])
    return gray


def _blacken_padding(gray: np.ndarray, stored: np.ndarray, dataset: Dataset) -> None:
    """Set to 0 what lies outside the reconstructed circle: PixelPaddingValue to PixelPaddingRangeLimit, inclusive."""
    if not _raw(dataset, "PixelPaddingValue"):
        return
    value = _uint16(dataset, "PixelPaddingValue")
    # As bit patterns of the pixels' own type: signed files often declare -2000 as the unsigned 63536.
    ends = np.array([value, _uint16(dataset, "PixelPaddingRangeLimit", value)], np.uint16).astype(stored.dtype)
    gray[(stored >= ends.min()) & (stored <= ends.max())] = 0
