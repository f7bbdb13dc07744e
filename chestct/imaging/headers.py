"""What a file says of itself, read before any decoder sees it.

Pillow and the JPEG codecs act on headers before a caller can look at them: they allocate what a header asks for and
read metadata that a few bytes can make as large as memory. So the few fields that decide about size and orientation
are read here, on plain bytes, and whatever claims too much is refused with a RefusedError.
"""

import io
import struct
from collections.abc import Iterator


class RefusedError(ValueError):
    """A file that is not decoded because of what its header says; the text tells what and what is allowed."""


SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
}

MAX_SEGMENTS = 10_000
"""JPEG segments, fill bytes and stray markers before the first scan."""

MAX_SCANS = 100
"""Progressive JPEGs have about ten scans; each further one costs a pass over the whole image."""

TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8}
MAX_TIFF_VALUES = 1 << 18
"""Numbers in one TIFF tag: four for each row of the tallest image; Pillow makes Python objects of them."""

SUB_IFDS = (34665, 34853, 40965)  # Exif, GPS, interoperability: Pillow reads these along with the image
ORIENTATION = 274


class BudgetedFile(io.BytesIO):
    """Bytes as a file that allows a number of reads: millions of empty chunks or elements take minutes to walk."""

    def __init__(self, data: bytes, reads: int) -> None:
        super().__init__(data)
        self.reads = reads

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads -= 1
        if self.reads < 0:
            raise RefusedError("too many pieces")
        return super().read(size)


def sniff(data: bytes) -> str:
    """Name of the format of `data` ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "DICOM") by its content, or "".

    DICOM comes first: its preamble may hold a TIFF header. Without a preamble (PS3.10 asks for one, old archives have
    none) a DICOM file starts with an element of group 0002 or 0008.
    """
    if data[128:132] == b"DICM":
        return "DICOM"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for signature, format in SIGNATURES.items():
        if data.startswith(signature):
            return format
    headless = data[:2] in (b"\x02\0", b"\x08\0") or data[:2] == b"\0\x08"
    return "DICOM" if headless and len(data) > 8 else ""


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment before the first scan and of that scan's header, which comes last.

    `start` is where the two bytes of the marker stand. Raises RefusedError if there is no scan.
    """
    at = 2
    for _ in range(MAX_SEGMENTS):
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            break
        marker = data[at + 1]
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # stand alone
            at += 2
        elif marker == 0xFF:  # fill byte
            at += 1
        else:
            end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
            yield marker, at, end
            if marker == 0xDA:
                return
            at = end
    raise RefusedError("JPEG without image data")


def check_jpeg(data: bytes) -> tuple[int, int, int]:
    """(rows, columns, components) of a JPEG or JPEG-LS stream; raises RefusedError for what only attacks have."""
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise RefusedError(f"more than {MAX_SCANS} scans")
    sizes = [
        struct.unpack_from(">xxxxxHHB", data, start)
        for marker, start, _ in jpeg_segments(data)
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7
    ]
    if len(sizes) != 1:
        raise RefusedError(f"{len(sizes)} frame headers in a JPEG stream, expected one")
    return sizes[0]


def bare_jpeg(data: bytes) -> tuple[bytes, int]:
    """The JPEG `data` without its metadata (Exif, ICC, thumbnails, comments), and its Exif orientation 1-8.

    Pillow reads Exif while it opens a JPEG, following offsets that can name the same bytes over and over.
    """
    check_jpeg(data)
    parts, orientation, body = [b"\xff\xd8"], 1, len(data)
    for marker, start, end in jpeg_segments(data):
        if marker == 0xDA:
            body = start
        elif marker == 0xE1 and data[start + 4 : start + 10] == b"Exif\0\0":
            orientation = exif_orientation(data[start + 10 : end])
        elif not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):  # APP0 and APP14 tell the colour space
            parts.append(data[start:end])
    return b"".join([*parts, data[body:]]), orientation


def _ifd(data: bytes, offset: int) -> Iterator[tuple[int, int, int, int]]:
    """(tag, type, count, where its value stands) of each entry of the image file directory at `offset`."""
    order = "<" if data[:2] == b"II" else ">"
    (entries,) = struct.unpack_from(order + "H", data, offset)
    for at in range(offset + 2, offset + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHL", data, at)
        inline = count * TIFF_TYPE_BYTES.get(kind, 1) <= 4
        yield tag, kind, count, at + 8 if inline else struct.unpack_from(order + "L", data, at + 8)[0]


def _number(data: bytes, where: int, kind: int) -> int:
    size = TIFF_TYPE_BYTES.get(kind, 4)
    return int.from_bytes(data[where : where + size], "little" if data[:2] == b"II" else "big")


def _next_ifd(data: bytes, offset: int) -> int:
    order = "<" if data[:2] == b"II" else ">"
    (entries,) = struct.unpack_from(order + "H", data, offset)
    after = data[offset + 2 + 12 * entries : offset + 6 + 12 * entries]
    return int.from_bytes(after, "little" if order == "<" else "big")


def exif_orientation(exif: bytes) -> int:
    """Orientation 1-8 of an Exif block (it starts with a TIFF header); 1 where there is none or it is damaged."""
    try:
        first = _number(exif, 4, 4)
        for tag, kind, _, where in _ifd(exif, first):
            if tag == ORIENTATION and 1 <= _number(exif, where, kind) <= 8:
                return _number(exif, where, kind)
    except struct.error:
        pass  # metadata does not decide whether an image is readable
    return 1


def tiff_pages(data: bytes) -> Iterator[int]:
    """Offset of each page's directory in turn, after a check that reading it costs no more than the file is long.

    Raises RefusedError for directories that claim the same bytes over and over or lie outside the file.
    """
    offset = _number(data, 4, 4)
    if not offset:
        raise RefusedError("TIFF without an image")
    while offset:
        _check_ifd(data, offset, depth=2)
        yield offset
        offset = _next_ifd(data, offset)


def _check_ifd(data: bytes, offset: int, depth: int) -> None:
    claimed = 0
    inner: dict[int, int] = {}
    try:
        for tag, kind, count, where in _ifd(data, offset):
            size = TIFF_TYPE_BYTES.get(kind, 0)
            claimed += count * size
            if claimed > 2 * len(data) or (size > 1 and count > MAX_TIFF_VALUES):
                raise RefusedError(f"TIFF tag {tag} claims {count} values")
            if tag in SUB_IFDS:
                inner[tag] = _number(data, where, kind)  # of a repeated tag the last one counts, as for Pillow
    except struct.error:
        raise RefusedError("TIFF directory outside the file") from None
    for inner_offset in inner.values() if depth else ():
        _check_ifd(data, inner_offset, depth - 1)


def webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a WebP canvas (RFC 9649); its decoder allocates the canvas as soon as it opens the file."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data.ljust(30, b"\0"), 26)
    return width & 0x3FFF, height & 0x3FFF


def jpeg2000_size(data: bytes) -> tuple[int, int, int, int]:
    """(rows, columns, components, tiles) from the SIZ segment at the start of a JPEG 2000 codestream (T.800 A.5.1)."""
    if data[:4] != b"\xff\x4f\xff\x51" or len(data) < 42:
        raise RefusedError("not a JPEG 2000 codestream")
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = struct.unpack_from(">8L", data, 8)
    (components,) = struct.unpack_from(">H", data, 40)
    if not (tile_width and tile_height and tile_left <= left < right and tile_top <= top < bottom):
        raise RefusedError("impossible JPEG 2000 image or tile size")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    return bottom - top, right - left, components, tiles
