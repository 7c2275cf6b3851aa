"""Image files to RGB: one function, one rule for every kind of file, one line of explanation for a bad one.

The pixels are those of PIL's `convert('RGB')`, as in the published code: alpha is dropped rather than
blended, EXIF orientation is ignored, an animation gives its first frame. The one exception is 16-bit
greyscale, which `convert` saturates to white: here it is scaled.

`decode_rgb` gives a PIL image. `EncodedImage` gives the same pixels as a tensor, sooner, to whom a part of the rows is
enough: JPEG files, which nearly all images are, go to simplejpeg's decoder, which has the same libjpeg-turbo in it, and
what that does not take, or all files where it is not installed, goes the way of all others.
"""

import io
import os
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from utils.errors import UserError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None  # type: ignore[assignment]  # what an import that failed leaves

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

SEGMENTS = frozenset((*range(0xc0, 0xd0), 0xdb, 0xdd, *range(0xe0, 0xf0), 0xfe))
"""JPEG's markers of frames, tables, applications and comments: what may come before the first scan."""

LEFT_OVER = 'extraneous bytes before marker'
"""What libjpeg says of data that it did not need."""


class ImageError(UserError):
    """An image file that cannot be decoded. The message names the file and says why."""


def load_rgb(path: str | os.PathLike) -> Image.Image:
    """Decodes the image file `path` to a PIL image of mode RGB. Raises ImageError as `read_file` and `decode_rgb`."""
    return decode_rgb(read_file(path), os.fspath(path))


def read_file(path: str | os.PathLike) -> bytes:
    """The content of the image file `path`. Raises ImageError if it cannot be read, or has more than `MAX_BYTES`."""
    try:
        with open(path, 'rb', buffering=0) as file:
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


class EncodedImage:
    """An image of known size that is decoded as far as it is needed: `height`, `width` and `pixels`.

    stored: the content of an image file, or a PIL image of mode RGB. name: says in messages which image it is.
    Making it and taking its pixels raise ImageError as `decode_rgb` does, but not for all damage below the rows in use.
    """

    def __init__(self, stored: bytes | Image.Image, name: str):
        self._jpeg, self._name = b'', name
        self._whole: torch.Tensor | None = None
        if isinstance(stored, bytes):
            if size := jpeg_size(stored):
                self.height, self.width = size
                self._jpeg = stored
                return
            stored = decode_rgb(stored, name)
        self._whole = as_array(stored)
        self.height, self.width = self._whole.shape[1:]

    def pixels(self, rows: int | None = None) -> torch.Tensor:
        """uint8 [3, H, W], a view of [H, W, 3] in memory, of which the first `rows` rows count (None: all)."""
        if self._whole is not None:
            return self._whole
        try:
            jpeg, height = (self._jpeg, self.height) if rows is None else _with_rows(self._jpeg, self.height, rows)
            levels = np.empty((height, self.width, 3), dtype=np.uint8)
            try:
                simplejpeg.decode_jpeg(jpeg, 'RGB', buffer=levels)
            except ValueError as error:
                # The data of the rows below is no damage. After any other, `levels` may hold what was in memory before.
                if height == self.height or LEFT_OVER not in str(error):
                    raise
            return torch.from_numpy(levels).permute(2, 0, 1)
        except Exception:  # decode_rgb makes of damaged data what it can, or says what is wrong
            return as_array(decode_rgb(self._jpeg, self._name))


def as_array(image: Image.Image) -> torch.Tensor:
    """A PIL image of mode RGB as uint8 [3, H, W], a view of [H, W, 3] in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a whole JPEG file of one or three components, within the limits of `decode_rgb`; None for all
    that is not."""
    # Without its end mark a file may be cut in the last row, of which the decoders do not say the same.
    if simplejpeg is None or not data.startswith(b'\xff\xd8') or not data.endswith(b'\xff\xd9'):
        return None
    try:
        rows, columns, colors, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except Exception:  # of a sampling that it does not know, KeyError
        return None
    height, width = int(rows), int(columns)
    within_limits = height * width <= MAX_PIXELS and max(height, width) <= MAX_RATIO * min(height, width)
    return (height, width) if colors in ('YCbCr', 'RGB', 'Gray') and within_limits else None


def _with_rows(jpeg: bytes, height: int, rows: int) -> tuple[bytes, int]:
    """The JPEG file of `height` with one in its header that ends its decoding soon behind `rows`, and that height; both
    as they are, if that cannot be.

    Rows are decoded from the top in groups of 8 or more. The colours of a row depend on those of the next one, so two
    more are taken along. The data of one scan holds all components, or a lower height would be none of the others.
    """
    at, frame = 2, None
    while jpeg[at] == 0xff and jpeg[at + 1] in SEGMENTS:  # each with a length that counts itself
        if jpeg[at + 1] in (0xc0, 0xc1):  # the frame of sequential Huffman coding
            frame = at
        at += 2 + int.from_bytes(jpeg[at + 2:at + 4])
    if frame is None or jpeg[at:at + 2] != b'\xff\xda' or jpeg[at + 4] != jpeg[frame + 9]:
        return jpeg, height
    components = range(jpeg[frame + 9])
    group = 8 * max(jpeg[frame + 11 + 3 * number] & 15 for number in components)
    shorter = -(-(rows + 2) // group) * group
    if shorter >= height:
        return jpeg, height
    return b''.join((jpeg[:frame + 5], shorter.to_bytes(2), jpeg[frame + 7:])), shorter


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
