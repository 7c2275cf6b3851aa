"""Image files to RGB: one function, one rule for every kind of file, one line of explanation for a bad one.

The pixels are those of PIL's `convert('RGB')`, as in the published code: alpha is dropped rather than
blended, EXIF orientation is ignored, an animation gives its first frame. The one exception is 16-bit
greyscale, which `convert` saturates to white: here it is scaled.

`decode_rgb` gives a PIL image, `decode_array` the same pixels as a tensor, sooner: JPEG files, which nearly all images
are, go to torchvision's decoder, and what that does not take goes the way of all others.
"""

import io
import os
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

from utils.errors import UserError

FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
"""PIL's names of the formats that are read; JPEG comes first because it is tried first."""

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm', '.pbm',
              '.pnm')
"""Endings, in lower case, by which image files are found; how they are read depends on the content alone."""

MAX_PIXELS = 89_478_485
"""More pixels than this in one image are refused: a quarter of a GiB as RGB. It is where PIL warns."""

MAX_BYTES = 1 << 28
"""Larger files are refused before they are read: 256 MiB, beyond what `MAX_PIXELS` take uncompressed."""

MAX_RATIO = 200
"""Longer images, by edge to edge, are refused: resized by their shorter edge they would fill the memory."""


class ImageError(UserError):
    """An image file that cannot be decoded. The message names the file and says why."""


def load_rgb(path: str | os.PathLike) -> Image.Image:
    """Decodes the image file `path` to a PIL image of mode RGB. Raises ImageError as `read_file` and `decode_rgb`."""
    return decode_rgb(read_file(path), os.fspath(path))


def read_file(path: str | os.PathLike) -> bytes:
    """The content of the image file `path`. Raises ImageError if it cannot be read, or has more than `MAX_BYTES`."""
    try:
        with open(path, 'rb') as file:
            # Of what is no file the size is 0; a buffer of the largest size for each file would take its time.
            data = file.read(min(os.fstat(file.fileno()).st_size or MAX_BYTES, MAX_BYTES) + 1)
    except OSError as error:
        raise ImageError(f'image {os.fspath(path)}: {error.strerror or error}') from None
    if len(data) > MAX_BYTES:
        raise ImageError(f'image {os.fspath(path)}: more than {MAX_BYTES >> 20} MiB; scale it down or remove it')
    return data


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Decodes the content of an image file to a PIL image of mode RGB; `name` says in messages which file it is.

    Raises ImageError if it is truncated, of none of `FORMATS`, of more than `MAX_PIXELS` pixels or edges of more than
    1 : `MAX_RATIO`, or of a kind whose brightness has no defined scale.
    """
    try:
        with warnings.catch_warnings():
            # Between one and two times its limit PIL warns and goes on; the check below refuses always.
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if max(image.size) > MAX_RATIO * min(image.size):
                    raise ValueError(f'{image.width} × {image.height} pixels: cut it to at most 1 × {MAX_RATIO}')
                image.load()
                return _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged files make PIL's readers raise nearly anything
        raise ImageError(f'image {name}: {_reason(data, error)}') from None


def decode_array(data: bytes, name: str) -> torch.Tensor:
    """The pixels of `decode_rgb` as uint8 [3, H, W], a view of [H, W, 3] in memory. Raises ImageError as that does."""
    pixels = _decode_jpeg(data)
    return as_array(decode_rgb(data, name)) if pixels is None else pixels


def as_array(image: Image.Image) -> torch.Tensor:
    """A PIL image of mode RGB as uint8 [3, H, W], a view of [H, W, 3] in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _decode_jpeg(data: bytes) -> torch.Tensor | None:
    """A whole JPEG file of one or three components, within the limits of `decode_rgb`; None for all that is not."""
    # Without its end mark a file may be cut in the last row, of which the decoders do not say the same.
    if not data.startswith(b'\xff\xd8') or not data.endswith(b'\xff\xd9'):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # those of PIL, and torch's that bytes must not be written to
            with Image.open(io.BytesIO(data), formats=('JPEG',)) as image:
                if (image.mode not in ('RGB', 'L') or image.width * image.height > MAX_PIXELS
                        or max(image.size) > MAX_RATIO * min(image.size)):
                    return None
            return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)
    except Exception:  # decode_rgb says what is wrong, or takes what only PIL does
        return None


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


def _reason(data: bytes, error: Exception) -> str:
    """Why `error` arose from decoding `data`, in words that fit after a colon."""
    if isinstance(error, Image.DecompressionBombError):
        return f'more than {MAX_PIXELS:,} pixels; scale it down or remove it'
    if not data:
        return 'the file is empty; restore or remove it'
    if isinstance(error, UnidentifiedImageError):
        return f'damaged, or none of {", ".join(FORMATS)}; restore or remove it'
    return f'cannot be decoded ({" ".join(str(error).split()) or type(error).__name__}); restore or remove it'
