"""Writes one slice as a file: windowed 8-bit PNG, or DICOM with its Hounsfield units.

Both come from the same phantom, so that everything after decoding can be tested on either.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from chestct.phantom.thorax import Phantom, display

INTERCEPT = -1024


def write_png(path: Path, phantom: Phantom) -> None:
    """The slice in its display window, as an 8-bit grey PNG."""
    # Noise hardly compresses: level 1 takes a third of the default's time for an eighth more bytes.
    Image.fromarray(display(phantom.hu, phantom.window)).save(path, compress_level=1)


def write_mask(path: Path, mask: np.ndarray) -> None:
    """A lesion mask, bool [H, W], as a 1-bit PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def write_dicom(path: Path, phantom: Phantom, identity: str) -> None:
    """The slice as CT Image Storage, int16 with slope 1 and intercept -1024 (DICOM PS3.3, A.3).

    identity: what patient, study, series and instance are derived from; the same identity gives the same UIDs.
    """
    uid = {part: generate_uid(entropy_srcs=[identity, part]) for part in ("study", "series", "instance", "frame")}
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid["instance"]
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    height, width = phantom.hu.shape
    spacing = round(phantom.spacing, 5)
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, uid["instance"]
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uid["study"], uid["series"], uid["frame"]
    ds.PatientName = ds.PatientID = f"PHANTOM-{identity}"
    ds.Manufacturer, ds.Modality, ds.BodyPartExamined = "chestct phantom", "CT", "CHEST"
    ds.ImageType, ds.InstanceNumber = ["DERIVED", "SECONDARY", "AXIAL"], 1
    ds.SliceThickness, ds.PixelSpacing = 5, [spacing, spacing]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient = [round(-width / 2 * spacing, 3), round(-height / 2 * spacing, 3), 0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = height, width
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = INTERCEPT, 1, "HU"
    ds.WindowCenter, ds.WindowWidth = (round(value, 1) for value in phantom.window)
    ds.PixelData = (np.round(phantom.hu) - INTERCEPT).astype("<i2").tobytes()
    ds.save_as(path, enforce_file_format=True)
