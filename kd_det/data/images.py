"""Reading of images, telling which file is at fault."""

import numpy as np
from detectron2.data import detection_utils as utils

from kd_det.errors import InputError


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Detectron2's `read_image`: (H, W, C), turned as its EXIF data says.

    Raises:
        InputError: If the file is missing or not an image.
    """
    try:
        return utils.read_image(file_name, image_format)
    except Exception as error:  # broken files raise anything from OSError to SyntaxError
        raise InputError(f"{file_name}: not an image that can be read: {error}") from error
