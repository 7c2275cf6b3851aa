"""Image files to RGB, by one rule for every kind of file, with one line of explanation for a bad one.

The pixels are those of PIL's `convert('RGB')`, as in the published code: alpha is dropped, EXIF orientation ignored,
only the first frame of an animation is used. The exception is 16-bit greyscale, which is scaled; `convert` would make
it white.

`decode_rgb` returns a PIL image. `EncodedImage` returns the same pixels as a tensor, and faster if only some rows are
needed: simplejpeg decodes JPEG files with the same libjpeg-turbo. PIL decodes everything else, and all files if
simplejpeg is not installed.
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

# PIL's names of the formats that are read; the most frequent is tried first.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
# Endings, in lower case, by which image files are found; decoding depends on the content alone.
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm', '.pbm', '.pnm')
# Images with more pixels are refused: a quarter of a GiB as RGB, where PIL warns.
MAX_PIXELS = 89_478_485
# Larger files are refused before they are read: 256 MiB, more than `MAX_PIXELS` take uncompressed.
MAX_BYTES = 1 << 28
# Images with longer edges, relative to the shorter one, are refused: resized by the shorter edge they fill the memory.
MAX_RATIO = 200
# JPEG markers that may precede the first scan: frames, tables, applications, comments.
SEGMENTS = frozenset((*range(0xc0, 0xd0), 0xdb, 0xdd, *range(0xe0, 0xf0), 0xfe))
# libjpeg's message for data that it did not need.
LEFT_OVER = 'extraneous bytes before marker'


class ImageError(UserError):
    """An image file that cannot be decoded. The message names the file and says why."""


def read_file(path: str | os.PathLike) -> bytes:
    """Return the content of the image file `path`. Raises ImageError for an unreadable file, or over `MAX_BYTES`."""
    try:
        with open(path, 'rb', buffering=0) as file:
            # The size is 0 if this is no regular file. A buffer of MAX_BYTES for every file would be slow.
            data = file.read(min(os.fstat(file.fileno()).st_size or MAX_BYTES, MAX_BYTES) + 1)
    except OSError as error:
        raise ImageError(f'image {os.fspath(path)}: {error.strerror or error}') from None
    if len(data) > MAX_BYTES:
        raise ImageError(f'image {os.fspath(path)}: more than {MAX_BYTES >> 20} MiB; scale it down or remove it')
    return data


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Decode the content of an image file to a PIL image of mode RGB; messages call it `name`.

    Raises ImageError if it is truncated, of none of `FORMATS`, of more than `MAX_PIXELS` pixels or edges of more than
    1 : `MAX_RATIO`, or if its brightness has no defined scale.
    """
    try:
        with warnings.catch_warnings():
            # PIL only warns up to twice its limit; the check below always refuses.
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
    """An image of known `height` and `width` that is decoded as far as needed.

    stored: the content of an image file, or a PIL image of mode RGB. name: what messages call it.
    Construction and `pixels` raise ImageError as `decode_rgb`, but not for all damage below the rows in use.
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
        """Return uint8 [3, H, W], a view of [H, W, 3] in memory; only the first `rows` rows are valid (None: all)."""
        if self._whole is not None:
            return self._whole
        try:
            jpeg, height = (self._jpeg, self.height) if rows is None else _with_rows(self._jpeg, self.height, rows)
            levels = np.empty((height, self.width, 3), dtype=np.uint8)
            try:
                simplejpeg.decode_jpeg(jpeg, 'RGB', buffer=levels)
            except ValueError as error:
                # The data of the rows below is no damage. After any other error, `levels` may hold old memory.
                if height == self.height or LEFT_OVER not in str(error):
                    raise
            return torch.from_numpy(levels).permute(2, 0, 1)
        except Exception:  # decode_rgb tolerates some damage, or explains it
            return as_array(decode_rgb(self._jpeg, self._name))


def as_array(image: Image.Image) -> torch.Tensor:
    """Return a PIL image of mode RGB as uint8 [3, H, W], a view of [H, W, 3] in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a complete JPEG file within the limits of `decode_rgb`, None for anything else."""
    # Without an end mark the file may be cut in its last row, and the decoders differ on that.
    if simplejpeg is None or not data.startswith(b'\xff\xd8') or not data.endswith(b'\xff\xd9'):
        return None
    try:
        rows, columns, colors, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except Exception:  # KeyError for an unknown subsampling
        return None
    height, width = int(rows), int(columns)
    within_limits = height * width <= MAX_PIXELS and max(height, width) <= MAX_RATIO * min(height, width)
    return (height, width) if colors in ('YCbCr', 'RGB', 'Gray') and within_limits else None


def _with_rows(jpeg: bytes, height: int, rows: int) -> tuple[bytes, int]:
    """Return a JPEG file of `height` with a lower height in its header, so that decoding stops after `rows`, and that
    height. Both stay unchanged if the file does not allow it.

    Rows are decoded from the top in groups of 8 or more. The colours of a row depend on the next one, so two more are
    decoded. One scan must hold all components.
    """
    at, frame = 2, None
    while jpeg[at] == 0xff and jpeg[at + 1] in SEGMENTS:  # the length of a segment includes itself
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
    """Return the loaded `image` in mode RGB: itself if it has that mode, as nearly every JPEG has."""
    if image.mode == 'RGB':
        return image
    if image.mode == 'F':
        raise ValueError('floating-point brightness has no defined scale: convert the file to 8 bits')
    if image.mode.startswith('I'):  # 'I;16' and its byte orders from PNG and TIFF, 'I' from PGM
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65_535:
            raise ValueError('brightness outside of 0…65535: convert the file to 8 or 16 bits')
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # to the nearest; 257 · 255 = 65535
    # convert('RGB') drops a palette's transparency, and warns if it is recorded.
    image.info.pop('transparency', None)
    return image.convert('RGB')


def _reason(data: bytes, error: Exception) -> str:
    """Return why decoding `data` raised `error`, in words that fit after a colon."""
    if isinstance(error, Image.DecompressionBombError):
        return f'more than {MAX_PIXELS:,} pixels; scale it down or remove it'
    if not data:
        return 'the file is empty; restore or remove it'
    if isinstance(error, UnidentifiedImageError):
        return f'damaged, or none of {", ".join(FORMATS)}; restore or remove it'
    return f'cannot be decoded ({" ".join(str(error).split()) or type(error).__name__}); restore or remove it'
