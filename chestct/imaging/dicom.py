"""DICOM files to slices: pydicom reads the elements and decodes the frames; the limits and the window are here.

pydicom inflates, expands and hands to codecs whatever a file claims, so a compressed frame is decoded only after its
own header agrees with the dataset's. Rescale and window are one multiplication and one addition in float32: pydicom's
`apply_rescale` and `apply_windowing` go through float64 and take 16 bytes a pixel where these take 6.

Grey level: HU = RescaleSlope * stored + RescaleIntercept (PS3.3 C.11.1.1.2), then the LINEAR function of PS3.3
C.11.2.1.2.1 with output range [0, 1]: 0 up to c - 0.5 - (w - 1) / 2, 1 above c - 0.5 + (w - 1) / 2, in between
(x - (c - 0.5)) / (w - 1) + 0.5. VOI LUT sequences and other VOI functions are not used.
"""

import logging
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filereader import read_dataset, read_sequence
from pydicom.multival import MultiValue
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.pixels.utils import as_pixel_options
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
from chestct.imaging.slice import BudgetedFile, Limits, MissingDecoderError, RefusedError, Slice

# It logs each odd value, and a traceback of each exception that it then raises; `decode` says what matters.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

MAX_READS = 100_000
"""Pieces of a file that pydicom walks through in Python, two or three for each element: enough for 1,000 frames."""

MAX_RLE_BYTES = 1 << 24
"""One RLE frame: every two bytes can stand for 128, and pydicom expands them before it compares lengths."""

MAX_TILES = 4096
"""Tiles of a JPEG 2000 frame: the decoder keeps several kB for each before it reads any."""

MAX_SCANS = 100
"""Scans of a JPEG stream: each costs a pass over the whole frame."""

SCAN, FRAME_HEADER = b"\xff\xda", re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7](.{8})", re.DOTALL)


def slices(data: bytes, window: WindowConfig, limits: Limits, every: bool) -> Iterator[Slice]:
    """Slices of the DICOM file `data`: every frame, or the middle one only.

    CT is windowed in HU: `window`, or the file's own first window with `window.from_file`. Where the values are no HU
    (another modality, or unsigned values without a rescale) the file's own window is used, or else the whole range
    of its stored bits. Floating-point values of CT are taken as HU. MONOCHROME1 is inverted; padding
    (PixelPaddingValue) and what is not a number are black; RGB becomes luma.

    Raises RefusedError and whatever pydicom raises.
    """
    dataset, syntax = _read(data, limits)
    _, _, count = _size(dataset, limits)
    keyword = next((keyword for keyword in PIXELS if dataset.get(keyword)), None)
    if keyword is None:
        what = _text(dataset, "Modality") or "unknown"
        raise RefusedError(f"no pixel data (modality {what}): a report, a plan or a header, not an image")
    layout = _layout(dataset, keyword)
    shared = _items(dataset, "SharedFunctionalGroupsSequence")[:1]
    per_frame = _items(dataset, "PerFrameFunctionalGroupsSequence")
    for frame in range(count) if every else (count // 2,):
        stored = _frame(dataset[keyword].value, frame, layout, syntax)
        # Enhanced multi-frame CT keeps rescale and window in functional groups, for all frames or for each.
        macros = [
            item
            for group in per_frame[frame : frame + 1] + shared
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence")
            for item in _items(group, macro)[:1]
        ]
        yield _slice(stored, [dataset, *macros], layout, window, frame)


def declared_size(data: bytes, limits: Limits) -> tuple[int, int, int]:
    """(width, height, frames) that the header of the DICOM file `data` announces."""
    return _size(_read(data, limits)[0], limits)


def _size(dataset: Dataset, limits: Limits) -> tuple[int, int, int]:
    width, height = (int(dataset.get(keyword) or 0) for keyword in ("Columns", "Rows"))
    frames = dataset.get("NumberOfFrames")
    if any(keyword in dataset for keyword in PIXELS):
        limits.check(width, height)
    count = 1 if frames in (None, "") else int(frames)
    if count < 1:
        raise RefusedError(f"NumberOfFrames is {count}")
    return width, height, count


def _read(data: bytes, limits: Limits) -> tuple[Dataset, UID]:
    """The dataset and its transfer syntax."""
    file = BudgetedFile(data, MAX_READS)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 != 2)
    syntax = UID(meta.get("TransferSyntaxUID") or _guess_syntax(data[file.tell() : file.tell() + 6]))
    if syntax == DeflatedExplicitVRLittleEndian:
        # pydicom would inflate without a limit.
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[file.tell() :], limits.max_bytes + 1)
        if len(inflated) > limits.max_bytes:
            raise RefusedError(f"inflates to more than data.max_bytes ({limits.max_bytes:,})")
        file = BudgetedFile(inflated, MAX_READS)
    return read_dataset(file, syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian), syntax


def _guess_syntax(first: bytes) -> UID:
    """Transfer syntax of a dataset without file meta information, from the first six bytes of its first element."""
    if not first[4:6].isalpha():
        return ImplicitVRLittleEndian
    return ExplicitVRBigEndian if first[:1] == b"\0" else ExplicitVRLittleEndian


def _text(dataset: Dataset, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip(" \0")


def _number(datasets: list[Dataset], keyword: str) -> float | None:
    """The first value of a decimal string, from the first dataset that has one."""
    for dataset in datasets:
        value = dataset.get(keyword)
        first = next(iter(value), None) if isinstance(value, MultiValue) else value
        if first not in (None, ""):
            if not abs(float(first)) < 1e9:  # NaN, or more than float32 can hold once it is scaled
                raise RefusedError(f"{keyword} is {first}")
            return float(first)
    return None


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """Items of a sequence, which pydicom has read already where its length was left open; else it is read here."""
    element = dataset.get_item(tag_for_keyword(keyword))
    if element is None or not isinstance(element.value, bytes):
        return list(element.value or ()) if element else []
    file = BudgetedFile(element.value, MAX_READS)
    return list(read_sequence(file, element.is_implicit_VR, element.is_little_endian, len(element.value), "iso8859"))


def _layout(dataset: Dataset, keyword: str) -> dict[str, Any]:
    """How stored values lie in the pixel data, as the keyword arguments of pydicom's decoders."""
    defaults = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": 0}
    for name, value in defaults.items():
        dataset.setdefault(name, value)
    layout = as_pixel_options(dataset, pixel_keyword=keyword, pixel_vr=dataset[keyword].VR)
    layout.setdefault("planar_configuration", 0)
    bits = layout.setdefault("bits_stored", layout.get("bits_allocated"))
    if layout["photometric_interpretation"] == "PALETTE COLOR":
        raise RefusedError("PALETTE COLOR is not read; a CT slice is MONOCHROME1 or MONOCHROME2")
    if keyword == "PixelData" and bits is not None and dataset.get("HighBit", bits - 1) != bits - 1:
        raise RefusedError("HighBit is not BitsStored - 1")
    return layout


def _frame(pixels: bytes, frame: int, layout: dict[str, Any], syntax: UID) -> np.ndarray:
    """Stored values of one frame: [H, W], or [H, W, 3] for RGB."""
    decoder = get_decoder(syntax)  # NotImplementedError for transfer syntaxes that are no images, such as video
    if not decoder.is_available:
        raise MissingDecoderError(f"{syntax.name} needs a decoder: pip install 'chestct[dicom]'")
    if syntax.is_encapsulated:
        offsets = layout.get("extended_offsets")
        file, count = BudgetedFile(pixels, MAX_READS), layout["number_of_frames"]
        stream = get_frame(file, frame, number_of_frames=count, extended_offsets=offsets)
        pixels, frame = encapsulate([_checked(stream, layout, syntax)]), 0
        layout = {**layout, "number_of_frames": 1, "extended_offsets": None}
    return decoder.as_array(pixels, index=frame, **layout)[0]


def _checked(stream: bytes, layout: dict[str, Any], syntax: UID) -> bytes:
    """A compressed frame after a check that decoding it takes no more than the dataset announces."""
    expected = (layout["rows"], layout["columns"], layout["samples_per_pixel"])
    if syntax == RLELossless:
        plain = layout["rows"] * layout["columns"] * layout["samples_per_pixel"] * layout["bits_allocated"] // 8
        allowed = min(MAX_RLE_BYTES, 2 * plain + 1024)
        if len(stream) > allowed:
            raise RefusedError(f"an RLE frame of {len(stream):,} bytes; {allowed:,} are allowed")
        return stream
    if syntax in JPEG2000TransferSyntaxes:
        stream = stream[max(0, stream.find(b"\xff\x4f\xff\x51")) :]  # some writers wrap the codestream in a JP2 file
        size = _jpeg2000_size(stream)
    else:
        size = _jpeg_size(stream)
    if size != expected:
        raise RefusedError(f"compressed data of {[*size]} rows, columns, samples; the header says {[*expected]}")
    return stream


def _jpeg_size(stream: bytes) -> tuple[int, int, int]:
    """(rows, columns, components) from the one frame header of a JPEG (T.81 B.2.2) or JPEG-LS (T.87 C.2.2) stream."""
    if stream.count(SCAN) > MAX_SCANS:
        raise RefusedError(f"more than {MAX_SCANS} scans")
    headers = (struct.unpack(">HxHHB", match[1]) for match in FRAME_HEADER.finditer(stream[: stream.find(SCAN)]))
    sizes = [size for length, *size in headers if length == 8 + 3 * size[2]]
    if len(sizes) != 1:
        raise RefusedError(f"{len(sizes)} frame headers in a JPEG stream, expected one")
    rows, columns, components = sizes[0]
    return rows, columns, components


def _jpeg2000_size(stream: bytes) -> tuple[int, int, int]:
    """(rows, columns, components) from the SIZ segment at the start of a JPEG 2000 codestream (T.800 A.5.1)."""
    if stream[:4] != b"\xff\x4f\xff\x51" or len(stream) < 42:
        raise RefusedError("not a JPEG 2000 codestream")
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = struct.unpack_from(">8L", stream, 8)
    (components,) = struct.unpack_from(">H", stream, 40)
    if not (tile_width and tile_height and tile_left <= left < right and tile_top <= top < bottom):
        raise RefusedError("impossible JPEG 2000 image or tile size")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > MAX_TILES:
        raise RefusedError(f"{tiles:,} JPEG 2000 tiles; {MAX_TILES:,} are allowed")
    return bottom - top, right - left, components


def _slice(
    stored: np.ndarray, datasets: list[Dataset], layout: dict[str, Any], window: WindowConfig, frame: int
) -> Slice:
    color = 0.0
    if stored.ndim == 3:
        rgb = (stored / np.float32(2 ** layout["bits_stored"] - 1)).astype(np.float32).clip(0, 1)
        gray, color = rgb @ np.array([0.299, 0.587, 0.114], np.float32), float(np.mean(np.ptp(rgb, axis=2)))
    else:
        gray = _windowed(stored, datasets, layout, window)
    keywords = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Modality")
    patient, study, series, modality = (_text(datasets[0], keyword) for keyword in keywords)
    return Slice(gray, "DICOM", "DICOM", color, patient, study, series, frame, modality)


def _windowed(stored: np.ndarray, datasets: list[Dataset], layout: dict[str, Any], window: WindowConfig) -> np.ndarray:
    slope, intercept = _number(datasets, "RescaleSlope"), _number(datasets, "RescaleIntercept")
    own_center, own_width = _number(datasets, "WindowCenter"), _number(datasets, "WindowWidth")
    table = next((dataset for dataset in datasets if dataset.get("ModalityLUTSequence")), None)
    values = stored if table is None else apply_modality_lut(stored, table)
    signed = stored.dtype.kind != "u"
    rescaled = slope is not None or intercept is not None or table is not None
    hounsfield = _text(datasets[0], "Modality") in ("CT", "") and (rescaled or signed)
    slope, intercept = (1.0 if slope is None else slope, intercept or 0.0) if table is None else (1.0, 0.0)
    if not slope:
        raise RefusedError("RescaleSlope is 0")
    if stored.dtype.kind == "f" and (slope, intercept) != (1, 0):
        rescale = f"slope {slope:g}, intercept {intercept:g}"
        raise RefusedError(
            f"{layout['pixel_keyword']} with a rescale ({rescale}): whether its values are Hounsfield units already "
            "cannot be known. Export it with integer pixel data"
        )
    if own_center is not None and own_width is not None and own_width >= 1 and (window.from_file or not hounsfield):
        center, width = own_center, own_width
    elif hounsfield:
        center, width = window.center, window.width
    elif values.dtype.kind == "f":
        raise RefusedError("floating-point values of unknown range: no CT, and the file names no window")
    else:
        bits = layout["bits_stored"] if table is None else 8 * values.itemsize
        lowest = -(2 ** (bits - 1)) if values.dtype.kind == "i" else 0
        ends = [slope * end + intercept for end in (lowest, lowest + 2**bits - 1)]
        center, width = sum(ends) / 2 + 0.5, abs(ends[1] - ends[0]) + 1

    # The formula above as one multiplication and one addition; a window of width 1 is a step.
    steepness = 1 / max(width - 1, 1e-6)
    with np.errstate(over="ignore", invalid="ignore"):  # doubles beyond float32 are white, what is no number is black
        gray = values.astype(np.float32)
        gray *= np.float32(slope * steepness)
        gray += np.float32((intercept - (center - 0.5)) * steepness + 0.5)
        np.clip(gray, 0, 1, out=gray)
    if layout["photometric_interpretation"] == "MONOCHROME1":
        np.subtract(1, gray, out=gray)
    gray[_padding(stored, datasets[0], layout["pixel_keyword"].removesuffix("PixelData")) | np.isnan(gray)] = 0
    return gray


def _padding(stored: np.ndarray, dataset: Dataset, kind: str) -> np.ndarray:
    """bool [H, W]: what lies outside the reconstructed circle, PixelPaddingValue to PixelPaddingRangeLimit.

    kind: "", "Float" or "DoubleFloat", as the names of the elements begin.
    """
    first = dataset.get(f"{kind}PixelPaddingValue")
    if first in (None, ""):
        return np.zeros(stored.shape, bool)
    last = dataset.get(f"{kind}PixelPaddingRangeLimit", first)
    if kind:
        ends = np.array([first, last], stored.dtype)
    else:  # as bit patterns of the pixels' own type: signed files often declare -2000 as the unsigned 63536
        ends = np.array([first % 65536, last % 65536], np.uint16).astype(stored.dtype)
    return (stored >= ends.min()) & (stored <= ends.max())
