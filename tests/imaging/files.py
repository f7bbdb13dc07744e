"""Files as they are made for tests: rasters, DICOM, and the window of the standard."""

import io
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom import uid

from chestct.config.schema import WindowConfig

LUNG = WindowConfig()
RAMP = np.arange(24 * 40, dtype=np.uint8).reshape(24, 40)
SMALL = np.zeros((4, 4), np.int16)
COLORS = np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def dicom(stored: np.ndarray, syntax: str = uid.ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A DICOM file of `stored`, [H, W] or [frames, H, W]; an element of None is left out, bytes are written raw."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3.4.5"
    dataset.Modality, dataset.PatientID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "CT", "P 1", "1.2", "1.3"
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.BitsAllocated = 8 * stored.itemsize
    dataset.BitsStored = elements.get("BitsStored", dataset.BitsAllocated)
    dataset.HighBit = max(0, (dataset.BitsStored or 0) - 1)
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    if stored.ndim == 3:
        dataset.NumberOfFrames = len(stored)
    little = syntax != uid.ExplicitVRBigEndian
    dataset.PixelData = stored.astype(stored.dtype.newbyteorder("<" if little else ">")).tobytes()
    dataset["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    if syntax in (uid.RLELossless, uid.JPEG2000Lossless):
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = syntax
    for keyword, value in elements.items():
        if value is None:
            delattr(dataset, keyword)
        elif keyword.startswith("PixelPadding"):
            dataset.add_new(keyword, "US", value and value % 65536)  # as many writers do for negative values, too
        else:
            setattr(dataset, keyword, value)
        if keyword == "PixelData" and value is not None:
            dataset["PixelData"].VR = "OB"
            dataset["PixelData"].is_undefined_length = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    file = io.BytesIO()
    dataset.save_as(
        file, enforce_file_format=True, implicit_vr=syntax == uid.ImplicitVRLittleEndian, little_endian=little
    )
    return file.getvalue()


def windowed(values: np.ndarray, center: float = -600, width: float = 1500) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1 as it is printed there, with y from 0 to 1."""
    x = values.astype(np.float64)
    y = (x - (center - 0.5)) / (width - 1) + 0.5
    y[x <= center - 0.5 - (width - 1) / 2] = 0
    y[x > center - 0.5 + (width - 1) / 2] = 1
    return y
