"""Image files to RGB: one function, one rule for every kind of file, one line of explanation for a bad one.

The pixels are those of PIL's `convert('RGB')`, as in the published code: alpha is dropped rather than
blended, EXIF orientation is ignored, an animation gives its first frame. The one exception is 16-bit
greyscale, which `convert` saturates to white: here it is scaled.
"""

import os
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.errors import UserError

FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
"""PIL's names of the formats that are read; JPEG comes first because it is tried first."""

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm', '.pbm',
              '.pnm')
"""Endings, in lower case, by which image files are found; how they are read depends on the content alone."""

MAX_PIXELS = 89_478_485
"""More pixels than this in one image are refused: a quarter of a GiB as RGB. It is where PIL warns."""


MAX_RATIO = 200
"""Longer images, by edge to edge, are refused: resized by their shorter edge they would fill the memory."""


class ImageError(UserError):
    """An image file that cannot be decoded. The message names the file and says why."""


def load_rgb(path: str | os.PathLike) -> Image.Image:
    """Decodes the image file `path` to a PIL image of mode RGB.

    Raises ImageError if the file is missing, unreadable, truncated, of none of `FORMATS`, of more than
    `MAX_PIXELS` pixels or edges of more than 1 : `MAX_RATIO`, or of a kind whose brightness has no defined scale.
    """
    try:
        with warnings.catch_warnings():
            # Between one and two times its limit PIL warns and goes on; the check below refuses always.
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if max(image.size) > MAX_RATIO * min(image.size):
                    raise ValueError(f'{image.width} × {image.height} pixels: cut it to at most 1 × {MAX_RATIO}')
                image.load()
                return _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make PIL's readers raise nearly anything
        raise ImageError(f'image {os.fspath(path)}: {_reason(path, error)}') from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """The loaded `image` in mode RGB: itself where it is in that mode already, as nearly every JPEG is."""
    if image.mode == 'RGB':
        return image
    if image.mode == 'F':
        raise ValueError('floating-point brightness has no defined scale: convert the file to 8 bits')
    if image.mode.startswith('I'):  # 'I;16' and its byte orders from PNG and TIFF, 'I' from PGM
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65_535:
            raise ValueError('brightness outside of 0…65535: convert the file to 8 or 16 bits')
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # to the nearest; 257 · 255 = 65535
    # convert('RGB') drops a palette's transparency whether it is recorded or not, but warns where it is.
    image.info.pop('transparency', None)
    return image.convert('RGB')


def _reason(path: str | os.PathLike, error: Exception) -> str:
    """Why `error` arose from decoding `path`, in words that fit after a colon."""
    if isinstance(error, Image.DecompressionBombError):
        return f'more than {MAX_PIXELS:,} pixels; scale it down or remove it'
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if os.path.getsize(path) == 0:
        return 'the file is empty; restore or remove it'
    if isinstance(error, UnidentifiedImageError):
        return f'damaged, or none of {", ".join(FORMATS)}; restore or remove it'
    return f'cannot be decoded ({" ".join(str(error).split()) or type(error).__name__}); restore or remove it'
