"""Makes PNGs quicker to decode: libdeflate inflates their image data in one piece.

Pillow has its zlib inflate one row at a time, which is most of the time that a slice takes. A PNG may also hold its
image data as it is, so the inflated data is handed to Pillow as such a PNG: what a PNG means, Pillow still decides.
"""

import struct

import deflate

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples of a pixel by PNG colour type."""

MAX_INFLATED = 1 << 25
"""Bytes of image data from which on the memory for two more copies counts for more than time."""

MAX_CHUNKS = 10_000
"""Chunks that are looked at; PNGs of the public set have a few dozen."""

BLOCK = 65535
"""Largest stored block of a deflate stream (RFC 1951, 3.2.4)."""


def inflated(data: bytes) -> bytes:
    """The same PNG with its image data stored; `data` itself where it is interlaced, large, damaged or odd.

    Pixels are the same: the data is taken only if it has the length that the header asks for and its checksum is
    right. Checksums of its chunks are not looked at; nor does Pillow look at them.
    """
    size, found = _inflated_size(data), _image_data(data)
    if not found or not 0 < size <= MAX_INFLATED:
        return data
    start, end, packed = found
    try:
        pixels = memoryview(deflate.zlib_decompress(packed, size))
    except deflate.DeflateError:
        return data
    if len(pixels) != size:
        return data
    stored: list[bytes | memoryview] = []
    for at in range(0, size, BLOCK):
        block = pixels[at : at + BLOCK]
        stored += [struct.pack("<BHH", at + BLOCK >= size, len(block), len(block) ^ 0xFFFF), block]
    length = struct.pack(">I", 2 + sum(map(len, stored)) + 4)
    checksum = struct.pack(">I", deflate.adler32(pixels))
    # The four bytes of the chunk's own checksum stay empty.
    return b"".join([data[:start], length, b"IDAT\x78\x01", *stored, checksum, bytes(4), data[end:]])


def _inflated_size(data: bytes) -> int:
    """Bytes of the image data once inflated, one for each row besides its pixels; 0 where it is laid out otherwise."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        return 0
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if interlaced or color not in CHANNELS:
        return 0
    return int(height * (1 + (width * depth * CHANNELS[color] + 7) // 8))


def _image_data(data: bytes) -> tuple[int, int, bytes] | None:
    """Where the first run of IDAT chunks starts and ends, and what they hold."""
    parts, start, at = [], 0, 8  # the signature comes first
    whole = memoryview(data)
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            start = start or at
            parts.append(whole[at + 8 : at + 8 + length])
        elif start:
            return start, at, b"".join(parts)
        at += 12 + length
    return None
