"""DICOM files to slices: pydicom reads the elements and decodes the frames; the limits and the window are here.

pydicom inflates, expands and hands to codecs whatever a file claims, so a compressed frame is decoded only after its
own header agrees with the dataset's. Rescale and window are done in float32 (pydicom's go through float64).

Grey level: HU = RescaleSlope * stored + RescaleIntercept (PS3.3 C.11.1.1.2), then the LINEAR function of PS3.3
C.11.2.1.2.1 with output range [0, 1]: 0 up to c - 0.5 - (w - 1) / 2, 1 above c - 0.5 + (w - 1) / 2, in between
(x - (c - 0.5)) / (w - 1) + 0.5. Lookup tables and floating-point pixel data are not used: CT has integers.
"""

import logging
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filereader import read_dataset, read_sequence
from pydicom.multival import MultiValue
from pydicom.pixels import get_decoder
from pydicom.pixels.utils import as_pixel_options

from chestct.config.schema import WindowConfig
from chestct.imaging.slice import BudgetedFile, Limits, MissingDecoderError, Position, RefusedError, Slice, windowed

# It logs each odd value and a traceback of what it then raises; `decode` says what matters.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

MAX_READS = 100_000  # pieces that pydicom walks through in Python, two or three an element: enough for 1,000 frames
MAX_RLE_BYTES = 1 << 24  # of one frame: every two can stand for 128, expanded before lengths are compared
MAX_TILES = 4096  # of a JPEG 2000 frame: the decoder keeps several kB for each before it reads any
MAX_SCANS = 100  # of a JPEG frame: each costs a pass over the whole of it

AXIAL = 0.8  # cosine of the angle to the patient's axis from which a slice is axial; gantries tilt up to 30 degrees

SCAN, CODESTREAM = b"\xff\xda", b"\xff\x4f\xff\x51"
FRAME_HEADER = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7](.{8})", re.DOTALL)


def slices(data: bytes, window: WindowConfig, limits: Limits, every: bool) -> Iterator[Slice]:
    """Slices of the DICOM file `data`: every frame, or the middle one only.

    CT is windowed in HU: `window`, or the file's own first window with `window.from_file`. Where the values are no HU
    (another modality, or unsigned values without a rescale) the file's own window is used, or else the whole range
    of its stored bits. MONOCHROME1 is inverted; padding (PixelPaddingValue) is black; RGB becomes luma.

    Raises RefusedError and whatever pydicom raises.
    """
    dataset, syntax, (_, _, count) = _read(data, limits)
    if not dataset.get("PixelData"):
        if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
            raise RefusedError("its pixels are floating-point numbers; export it with integers, as CT has them")
        what = _text(dataset, "Modality") or "unknown"
        raise RefusedError(f"no integer pixel data (modality {what}): a report, a plan or a header, not an image")
    layout = _layout(dataset)
    shared = _items(dataset, "SharedFunctionalGroupsSequence")[:1]
    per_frame = _items(dataset, "PerFrameFunctionalGroupsSequence")
    for frame in range(count) if every else (count // 2,):
        stored = _frame(dataset.PixelData, frame, layout, syntax)
        # Enhanced multi-frame CT keeps rescale and window in functional groups, for all frames or for each.
        macros = _macros(dataset, [*per_frame[frame : frame + 1], *shared])
        color = 0.0
        if stored.ndim == 3:
            rgb = (stored / np.float32(2 ** layout["bits_stored"] - 1)).astype(np.float32).clip(0, 1)
            gray, color = rgb @ np.array([0.299, 0.587, 0.114], np.float32), float(np.mean(np.ptp(rgb, axis=2)))
        else:
            gray = _windowed(stored, macros, layout, window)
        keywords = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
        patient, study, series = (_text(dataset, keyword) for keyword in keywords)
        spacing = numbers(macros, "PixelSpacing", 2)
        rows_columns = (spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None
        place, unfit = _position(macros), _unfit(macros)
        yield Slice(gray, "DICOM", "DICOM", color, patient, study, series, frame, rows_columns, place, unfit)


def declared_size(data: bytes, limits: Limits) -> tuple[int, int, int]:
    """(width, height, frames) that the header of the DICOM file `data` announces."""
    return _read(data, limits)[2]


def _macros(dataset: Dataset, groups: list[Dataset]) -> list[Dataset]:
    """Where elements of a frame stand: the dataset, and the items of its functional groups."""
    names = ("PixelValueTransformation", "FrameVOILUT", "PixelMeasures", "PlanePosition", "PlaneOrientation")
    return [dataset, *(item for name in names for group in groups for item in _items(group, f"{name}Sequence")[:1])]


def _position(macros: list[Dataset]) -> Position | None:
    """Position in mm along the normal of the slice (PS3.3 C.7.6.2.1.1), else InstanceNumber; None without either."""
    series = _text(macros[0], "SeriesInstanceUID")
    corner, normal = numbers(macros, "ImagePositionPatient", 3), _normal(macros)
    if corner and normal is not None:
        return series, "mm", float(normal @ np.asarray(corner))
    number = numbers(macros, "InstanceNumber", 1)
    return (series, "number", number[0]) if number else None


def axes(datasets: list[Dataset]) -> np.ndarray | None:
    """Where rows and columns run in the patient's coordinates, [2, 3]; None where no plane is given.

    Anonymising may leave zeros in the place of numbers.
    """
    plane = np.reshape(numbers(datasets, "ImageOrientationPatient", 6) or [0.0] * 6, (2, 3))
    return plane if np.linalg.norm(np.cross(*plane)) > 0.5 else None


def _normal(macros: list[Dataset]) -> np.ndarray | None:
    """The normal of the slice in the patient's coordinates, [3]."""
    plane = axes(macros)
    return None if plane is None else np.cross(*plane)


def _unfit(macros: list[Dataset]) -> str:
    """Why a DICOM image is no axial CT slice, in a sentence; "" where it may be one."""
    modality = _text(macros[0], "Modality")
    if modality not in ("", "CT"):
        return f"This DICOM file is not CT: its modality is {modality}."
    if "LOCALIZER" in str(macros[0].get("ImageType") or "").upper():
        return "This is a scout (localizer), not an axial slice."
    normal = _normal(macros)
    if normal is not None and abs(normal[2]) < AXIAL:
        return "This slice is not axial: its plane is that of a coronal, sagittal or oblique image."
    return ""


def numbers(datasets: list[Dataset], keyword: str, count: int) -> list[float] | None:
    """So many numbers from the first dataset that has them; None where they are missing or no numbers."""
    for dataset in datasets:
        try:
            numbers = np.asarray(dataset.get(keyword), float).reshape(-1)
        except (TypeError, ValueError):  # the pixels may be good all the same
            continue
        if len(numbers) == count and np.isfinite(numbers).all():
            return numbers.tolist()
    return None


def _read(data: bytes, limits: Limits) -> tuple[Dataset, uid.UID, tuple[int, int, int]]:
    """The dataset, its transfer syntax (guessed without file meta information), and (width, height, frames)."""
    file = BudgetedFile(data, MAX_READS)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 != 2)
    first = data[file.tell() : file.tell() + 6]
    explicit = uid.ExplicitVRBigEndian if first[:1] == b"\0" else uid.ExplicitVRLittleEndian
    guess = explicit if first[4:].isalpha() else uid.ImplicitVRLittleEndian
    syntax = uid.UID(meta.get("TransferSyntaxUID") or guess)
    if syntax == uid.DeflatedExplicitVRLittleEndian:  # pydicom would inflate without a limit
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[file.tell() :], limits.max_bytes + 1)
        if len(inflated) > limits.max_bytes:
            raise RefusedError(f"inflates to more than data.max_bytes ({limits.max_bytes:,})")
        file = BudgetedFile(inflated, MAX_READS)
    dataset = read_dataset(file, syntax == uid.ImplicitVRLittleEndian, syntax != uid.ExplicitVRBigEndian)
    width, height, frames = (int(dataset.get(name) or 0) for name in ("Columns", "Rows", "NumberOfFrames"))
    if "PixelData" in dataset:
        limits.check(width, height)
    if frames < 0:
        raise RefusedError(f"NumberOfFrames is {frames}")
    return dataset, syntax, (width, height, frames or 1)


def _text(dataset: Dataset, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip(" \0")


def _number(datasets: list[Dataset], keyword: str) -> float | None:
    """The first value of a decimal string, from the first dataset that has one."""
    for value in (dataset.get(keyword) for dataset in datasets):
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


def _layout(dataset: Dataset) -> dict[str, Any]:
    """How stored values lie in the pixel data, as the keyword arguments of pydicom's decoders."""
    dataset.setdefault("SamplesPerPixel", 1)
    dataset.setdefault("PixelRepresentation", 0)
    dataset.setdefault("PhotometricInterpretation", "MONOCHROME2")
    layout = as_pixel_options(dataset, pixel_keyword="PixelData", pixel_vr=dataset["PixelData"].VR)
    layout.setdefault("planar_configuration", 0)
    bits = layout.setdefault("bits_stored", layout.get("bits_allocated"))
    if layout["photometric_interpretation"] == "PALETTE COLOR" or "ModalityLUTSequence" in dataset:
        raise RefusedError("PALETTE COLOR and modality lookup tables are not read; a CT slice is MONOCHROME1 or 2")
    if bits is not None and dataset.get("HighBit", bits - 1) != bits - 1:
        raise RefusedError("HighBit is not BitsStored - 1")
    return layout


def _frame(pixels: bytes, frame: int, layout: dict[str, Any], syntax: uid.UID) -> np.ndarray:
    """Stored values of one frame: [H, W], or [H, W, 3] for RGB."""
    decoder = get_decoder(syntax)  # raises for transfer syntaxes that are no images, such as video
    if not decoder.is_available:
        raise MissingDecoderError(f"{syntax.name} needs a decoder: pip install 'chestct[dicom]'")
    if syntax.is_encapsulated:
        places = {name: layout.get(name) for name in ("number_of_frames", "extended_offsets")}
        stream = get_frame(BudgetedFile(pixels, MAX_READS), frame, **places)
        pixels, frame = encapsulate([_checked(stream, layout, syntax)]), 0
        layout = {**layout, "number_of_frames": 1, "extended_offsets": None}
    return decoder.as_array(pixels, index=frame, **layout)[0]


def _checked(stream: bytes, layout: dict[str, Any], syntax: uid.UID) -> bytes:
    """A compressed frame after a check that decoding it takes no more than the dataset announces."""
    expected = [layout["rows"], layout["columns"], layout["samples_per_pixel"]]
    if syntax == uid.RLELossless:
        allowed = min(MAX_RLE_BYTES, int(np.prod(expected)) * layout["bits_allocated"] // 4 + 1024)
        if len(stream) > allowed:
            raise RefusedError(f"an RLE frame of {len(stream):,} bytes; {allowed:,} are allowed")
        return stream
    jpeg2000 = syntax in uid.JPEG2000TransferSyntaxes
    if jpeg2000:
        stream = stream[max(0, stream.find(CODESTREAM)) :]  # some writers wrap the codestream in a JP2 file
    size = _jpeg2000_size(stream) if jpeg2000 else _jpeg_size(stream)
    if size != expected:
        raise RefusedError(f"compressed data of {size} rows, columns, samples; the header says {expected}")
    return stream


def _jpeg_size(stream: bytes) -> list[int]:
    """Rows, columns, components from the one frame header of a JPEG (T.81 B.2.2) or JPEG-LS (T.87 C.2.2) stream."""
    headers = [struct.unpack(">HxHHB", match[1]) for match in FRAME_HEADER.finditer(stream[: stream.find(SCAN)])]
    sizes = [size for length, *size in headers if length == 8 + 3 * size[2]]
    if len(sizes) != 1 or stream.count(SCAN) > MAX_SCANS:
        raise RefusedError(f"{len(sizes)} frame headers in a JPEG stream, expected one, with {MAX_SCANS} scans at most")
    return sizes[0]


def _jpeg2000_size(stream: bytes) -> list[int]:
    """Rows, columns, components from the SIZ segment at the start of a JPEG 2000 codestream (T.800 A.5.1)."""
    if stream[:4] != CODESTREAM or len(stream) < 42:
        raise RefusedError("not a JPEG 2000 codestream")
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = struct.unpack_from(">8L", stream, 8)
    if not (tile_width and tile_height and tile_left <= left < right and tile_top <= top < bottom):
        raise RefusedError("impossible JPEG 2000 image or tile size")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > MAX_TILES:
        raise RefusedError(f"{tiles:,} JPEG 2000 tiles; {MAX_TILES:,} are allowed")
    return [bottom - top, right - left, *struct.unpack_from(">H", stream, 40)]


def _windowed(stored: np.ndarray, datasets: list[Dataset], layout: dict[str, Any], window: WindowConfig) -> np.ndarray:
    slope, intercept = (_number(datasets, keyword) for keyword in ("RescaleSlope", "RescaleIntercept"))
    signed = stored.dtype.kind == "i"
    rescaled = slope is not None or intercept is not None
    hounsfield = _text(datasets[0], "Modality") in ("CT", "") and (rescaled or signed)
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    if not slope:
        raise RefusedError("RescaleSlope is 0")
    center = width = None
    if window.from_file or not hounsfield:  # else a window that is no number spoils nothing
        center, width = (_number(datasets, keyword) for keyword in ("WindowCenter", "WindowWidth"))
    if center is None or width is None or width < 1:
        center, width = window.center, window.width
        if not hounsfield:  # the whole range
            bits = layout["bits_stored"]
            ends = [slope * (end - signed * 2 ** (bits - 1)) + intercept for end in (0, 2**bits - 1)]
            center, width = sum(ends) / 2 + 0.5, abs(ends[1] - ends[0]) + 1
    gray = windowed(stored.astype(np.float32) * np.float32(slope) + np.float32(intercept), WindowConfig(center, width))
    if layout["photometric_interpretation"] == "MONOCHROME1":
        gray = 1 - gray
    if padding := numbers(datasets[:1], "PixelPaddingValue", 1):  # outside the reconstructed circle
        padding += numbers(datasets[:1], "PixelPaddingRangeLimit", 1) or padding
        # As bit patterns of the pixels' own type: signed files often declare -2000 as the unsigned 63536.
        low, high = sorted((np.array(padding) % 65536).astype(np.uint16).astype(stored.dtype))
        gray[(stored >= low) & (stored <= high)] = 0
    return gray
