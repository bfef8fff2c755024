"""Reads images with pixels of any kind, and names the file in every error."""

import io
import logging
import os
from functools import cache
from typing import IO, Any

import numpy as np
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import ExifTags, Image

from kd_det.errors import InputError

# Prefix of a file name that makes Detectron2 open the image through :class:`EightBitHandler`.
EIGHT_BITS = "8bit://"
# The largest values of pixels with the usual numbers of bits.
WHITES = (255, 1023, 4095, 16383, 65535)
# EXIF orientations that swap width and height.
TURNED = (5, 6, 7, 8)

# Types of pixels that this process has already reported.
_warned: set[str] = set()


def read_image(file_name: str | os.PathLike, image_format: str) -> np.ndarray:
    """Reads an image (H, W, C) as Detectron2's `read_image` does, turned as its EXIF data says.

    Grey images of more than 8 bits, whose values above 255 Detectron2 would clip, are first scaled by
    :func:`scale_to_8_bits`.

    Raises:
        InputError: If the file is missing or not an image.
    """
    try:
        return utils.read_image(EIGHT_BITS + os.fspath(file_name), image_format)
    except Exception as error:  # Broken files raise anything from OSError to SyntaxError.
        raise InputError(f"{file_name}: not an image that can be read: {error}") from error


def image_size(file_name: str | os.PathLike) -> tuple[int, int]:
    """Returns the width and the height of an image as :func:`read_image` would return it, without decoding it.

    Raises:
        InputError: If the file is missing or not an image.
    """
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(ExifTags.Base.Orientation) in TURNED else (width, height)
    except Exception as error:
        raise InputError(f"{file_name}: not an image that can be read: {error}") from error


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of the image files that can be read, in lower case and with the dot."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def scale_to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Scales grey values of 16 or 32 bits, or floating-point ones, to the range from 0 to 255.

    Zero stays black, and the white of the image's bit depth becomes 255. The depth is the smallest of 8, 10, 12, 14 and
    16 bits that holds the image's largest value, so that images of a 12-bit camera stored in 16 bits keep their
    contrast, and values up to 255 do not change. If the values exceed 16 bits, the largest one is white; if they are
    floating-point numbers up to 1, 1 is white. If there are negative values, the smallest one is black. Pixels that are
    not a number are black.

    Raises:
        ValueError: If no pixel is finite.
    """
    finite = pixels[np.isfinite(pixels)].astype(np.float64)
    if not finite.size:
        raise ValueError("no pixel has a finite value")
    black = min(finite.min(), 0.0)
    top = finite.max() - black
    whites = (1, *WHITES) if pixels.dtype.kind == "f" else WHITES
    white = next((white for white in whites if top <= white), top)
    values = np.nan_to_num(pixels.astype(np.float64), nan=black, posinf=finite.max(), neginf=black)
    return np.rint((values - black) * (255 / white)).astype(np.uint8)


class EightBitHandler(PathHandler):
    """Opens an image for Detectron2, or an 8-bit copy in memory if it has more than 8 bits per channel."""

    def _get_supported_prefixes(self) -> list[str]:
        return [EIGHT_BITS]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> IO[bytes]:
        path = path.removeprefix(EIGHT_BITS)
        file = PathManager.open(path, mode)
        image = Image.open(file)
        # These modes are I;16, I;16B, I and F; Pillow itself reads 16-bit colours as 8-bit ones.
        if not image.mode.startswith(("I", "F")):
            file.seek(0)
            return file
        with file:
            return _convert(image, path)


def _convert(image: Image.Image, path: str) -> IO[bytes]:
    if image.mode not in _warned:
        _warned.add(image.mode)
        logging.getLogger(__name__).warning(
            "%s has pixels of the type %s: such images are scaled to 8 bits, as datasets/README.md describes.",
            path,
            image.mode,
        )
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    buffer = io.BytesIO()
    Image.fromarray(scale_to_8_bits(np.asarray(image))).save(buffer, "PNG", exif=exif, compress_level=0)
    buffer.seek(0)
    return buffer


PathManager.register_handler(EightBitHandler())
