"""Images in, PNG of one mode and size out; what cannot be that says why not."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 4096 * 4096  # decoded one at a time per thread: 50 MB
_GREY = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L"}
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
_HEADER = struct.Struct(">IIBBBBB")
_HARMLESS = {b"sRGB", b"gAMA", b"cHRM", b"pHYs", b"tIME", b"sBIT", b"bKGD"}


class ImageError(Exception):
    """Why an image cannot be used."""


class Want(NamedTuple):
    """What every image of the pool must be. `strict`: a colour image is a flaw where the pool is grey only because its first image is."""

    mode: str  # L or RGB
    width: int
    height: int
    resize: bool
    strict: bool


def wanted(blob: bytes, size: int | None, mode: str) -> Want:
    """What the pool's first image asks of all others. `mode` is auto, grey or rgb. Raises ImageError where it cannot be read."""
    image = _load(blob)
    grey = mode == "grey" or (mode == "auto" and image.mode in _GREY)
    width, height = (size, size) if size else image.size
    return Want("L" if grey else "RGB", width, height, bool(size), grey and mode == "auto")


def standard(blob: bytes, want: Want, *, pixels: bool) -> tuple[bytes, bytes]:
    """The image as PNG of the wanted mode and size, and its pixels before any resizing (empty unless `pixels`).

    A PNG that is that already is checked and given back unchanged. Raises ImageError.
    """
    # a PNG of the plain kind is checked whole without making an image of it: stricter than the decoder, and three times as fast
    if _plain_png(blob) == (want.mode, want.width, want.height) and not pixels:
        return blob, b""
    image = _load(blob, None if want.resize else (want.width, want.height))
    if want.strict and image.mode not in _GREY:
        raise ImageError("colour image in a pool whose first image is grey: set `mode` to rgb or grey")
    kept = image.format == "PNG" and image.mode == want.mode and "transparency" not in image.info
    flat = image if kept else _flat(image, want.mode)
    content = flat.tobytes() if pixels else b""
    if flat.size != (want.width, want.height):
        flat, kept = flat.resize((want.width, want.height)), False
    if kept:
        return blob, content
    out = io.BytesIO()
    flat.save(out, format="PNG")
    return out.getvalue(), content


def _load(blob: bytes, size: tuple[int, int] | None = None) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image: Any = Image.open(io.BytesIO(blob), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"image has more than {MAX_PIXELS} pixels")
        if image.format != "PNG":
            found = image.format
            image = ImageOps.exif_transpose(image)  # cameras store the turn beside the pixels
            image.format = found
        if size and image.size != size:
            raise ImageError(f"image is {_by(image.size)} pixels, the pool's first is {_by(size)}: set `size` to resize them")
        image.load()
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError("not a PNG, JPEG, WebP or BMP image") from None
    except Image.DecompressionBombError:
        raise ImageError(f"image has more than {MAX_PIXELS} pixels") from None
    except Exception:  # a decoder fed with damaged bytes raises almost anything
        raise ImageError("image is damaged or cut short") from None
    return image


def _flat(image: Any, mode: str) -> Any:
    """The image in the wanted mode: transparent parts white, 16 bits cut to 8."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _plain_png(blob: bytes) -> tuple[str, int, int] | None:
    """Mode, width and height of an 8-bit, not interlaced grey or RGB PNG that is whole: every chunk's checksum, the inflated length and
    the filters are right, and then its pixels cannot fail to decode. None for any other kind. Raises ImageError where it is damaged.
    """
    if blob[:8] != _SIGNATURE:
        return None
    at, header, data, kind = 8, (0, 0, 0, 0, 0, 0, 0), [], b""
    while kind != b"IEND":
        if at + 12 > len(blob):
            raise ImageError("image is damaged or cut short")
        length, kind = _CHUNK.unpack_from(blob, at)
        end = at + 8 + length
        if zlib.crc32(blob[at + 4 : end]) != int.from_bytes(blob[end : end + 4], "big"):
            raise ImageError("image is damaged or cut short")
        if kind == b"IDAT":
            data.append(blob[at + 8 : end])
        elif kind == b"IHDR" and length == _HEADER.size and at == 8:
            header = _HEADER.unpack_from(blob, at + 8)
        elif kind not in _HARMLESS and kind != b"IEND":
            return None
        at = end + 4
    width, height, depth, colour, *rest = header
    if depth != 8 or colour not in (0, 2) or any(rest) or not 0 < width * height <= MAX_PIXELS:
        return None
    stride = 1 + width * (1 if colour == 0 else 3)
    try:
        inflater = zlib.decompressobj()
        lines = inflater.decompress(b"".join(data), stride * height + 1)
    except zlib.error:
        raise ImageError("image is damaged or cut short") from None
    if len(lines) != stride * height or not inflater.eof or max(lines[::stride]) > 4:
        raise ImageError("image is damaged or cut short")
    return "L" if colour == 0 else "RGB", width, height


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
