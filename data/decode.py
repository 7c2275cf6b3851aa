"""Image files to RGB, by one rule for every kind of file, with one line of explanation for a bad one.

The pixels are those of PIL's `convert('RGB')`, as in the published code: alpha is dropped, orientation ignored, only
the first frame of an animation is used. There are two exceptions. Greyscale of more than 8 bits is scaled by the range
that the file declares; `convert` would make it white. TIFF files are not turned either; PIL turns only these.

`decode_rgb` returns a PIL image. `EncodedImage` returns the same pixels as a tensor, and faster if only some rows are
needed: simplejpeg decodes JPEG files with the same libjpeg-turbo. PIL decodes everything else, and all files if
simplejpeg is not installed.
"""
import io
import os
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, TiffTags, UnidentifiedImageError

from utils.errors import UserError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None  # type: ignore[assignment]  # what an import that failed leaves

Image.init()  # PIL registers its formats; versions before 11.3 have no AVIF
# PIL's names of the formats that are read; the most frequent is tried first.
FORMATS = tuple(name for name in ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'AVIF', 'JPEG2000')
                if name in Image.OPEN)
# Endings, in lower case, by which image files are found; decoding depends on the content alone.
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm', '.pbm', '.pnm',
              '.jpe', '.jfif', '.jif', '.mpo', '.apng', '.dib', '.avif', '.avifs', '.jp2', '.j2k', '.jpf', '.jpx',
              '.j2c', '.jpc')
# Images with more pixels are refused: a quarter of a GiB as RGB, where PIL warns.
MAX_PIXELS = 89_478_485
# Larger files are refused before they are read: 256 MiB, more than `MAX_PIXELS` take uncompressed.
MAX_BYTES = 1 << 28
# Images with longer edges, relative to the shorter one, are refused: resized by the shorter edge they fill the memory.
MAX_RATIO = 200
# The most that a PNG's colour profile and texts may grow to. PIL's own limit of 1 MiB stops healthy files.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26
# PIL's own reader of uncompressed TIFF files takes colours in separate planes of 16 bits for others; libtiff does not.
TiffImagePlugin.READ_LIBTIFF = True
# A thread for each image, as for all other formats: PIL's default is all cores, in every worker process.
if 'AVIF' in FORMATS:
    from PIL import AvifImagePlugin
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
# Compressions of TIFF that PIL's table lacks, or that its libtiff is built without.
OTHER_COMPRESSIONS = {33003: 'JPEG 2000', 33004: 'JPEG 2000', 33005: 'JPEG 2000', 34712: 'JPEG 2000', 34887: 'LERC',
                      34933: 'PNG', 34934: 'JPEG XR', 50001: 'WebP', 50002: 'JPEG XL', 52546: 'JPEG XL'}
# Beginnings of formats that are not read, at the offset given first, and their names.
OTHER_FORMATS = ((4, b'ftyphei', 'HEIC'), (4, b'ftyphev', 'HEIC'), (4, b'ftypmif1', 'HEIF'), (4, b'ftypmsf1', 'HEIF'),
                 (0, b'\xff\x0a', 'JPEG XL'), (4, b'JXL ', 'JPEG XL'), (0, b'II\xbc\x01', 'JPEG XR'),
                 (0, b'<svg', 'SVG'), (0, b'8BPS', 'Photoshop'), (0, b'%PDF', 'PDF'), (0, b'qoif', 'QOI'),
                 (0, b'\x76\x2f\x31\x01', 'OpenEXR'), (128, b'DICM', 'DICOM'))
# The remedy for healthy files of kinds that are not read.
CONVERT = 'convert it to JPEG or PNG of 8 bits'
# What PIL does to a TIFF image of each orientation, undone.
UPRIGHT_UNDONE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270}
# JPEG files with more scans are refused, since each takes as long as a whole image. libjpeg's tools write at most 100.
MAX_SCANS = 100
# JPEG markers that may precede the first scan: frames, tables, applications, comments.
SEGMENTS = frozenset((*range(0xc0, 0xd0), 0xdb, 0xdd, *range(0xe0, 0xf0), 0xfe))
# libjpeg's message for data that it did not need.
LEFT_OVER = 'extraneous bytes before marker'


class ImageError(UserError):
    """An image file that cannot be decoded. The message names the file and says why."""


class _NotReadError(ValueError):
    """A healthy file that is not read. The message says why, and gives the remedy."""


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
    1 : `MAX_RATIO`, or if its brightness has no defined scale. The message says what is wrong and what to do.
    """
    try:
        with warnings.catch_warnings():
            # PIL only warns up to twice its limit; the check below always refuses.
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if max(image.size) > MAX_RATIO * min(image.size):
                    raise _NotReadError(f'{image.width} × {image.height} pixels; cut it to at most 1 × {MAX_RATIO}')
                if (scans := count_scans(data)) > MAX_SCANS:
                    raise _NotReadError(f'a JPEG of {scans:,} scans; save it anew, with at most {MAX_SCANS}')
                if isinstance(image, TiffImagePlugin.TiffImageFile):
                    return _tiff_to_rgb(image)
                if image.format == 'JPEG2000':
                    _check_jpeg_2000(data, image.mode)
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

    def whole(self) -> 'EncodedImage':
        """Return this image with all its pixels decoded, for several uses."""
        self._whole = self.pixels()
        return self

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
    within_limits = (height * width <= MAX_PIXELS and max(height, width) <= MAX_RATIO * min(height, width)
                     and count_scans(data) <= MAX_SCANS)
    return (height, width) if colors in ('YCbCr', 'RGB', 'Gray') and within_limits else None


def count_scans(data: bytes) -> int:
    """Return how many scans of a JPEG file a decoder may read; 0 for a file of another format."""
    if not data.startswith(b'\xff\xd8'):
        return 0
    at, components = 2, b''
    while data[at:at + 1] == b'\xff' and int.from_bytes(data[at + 1:at + 2]) in SEGMENTS:
        if data[at + 1] in (0xc0, 0xc1):  # the frame of sequential coding
            components = data[at + 9:at + 10]
        at += 2 + int.from_bytes(data[at + 2:at + 4])
    # A decoder stops after a sequential scan of all components. Within a scan, no byte 0xff precedes this marker.
    is_complete = components and data[at:at + 2] == b'\xff\xda' and data[at + 4:at + 5] == components
    return 1 if is_complete else data.count(b'\xff\xda', at)


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


def _tiff_to_rgb(image: TiffImagePlugin.TiffImageFile) -> Image.Image:
    """Return an open TIFF image in mode RGB, with its levels as the tags declare them, and as it is stored."""
    tags = image.tag_v2
    orientation = tags.get(ExifTags.Base.Orientation)  # PIL removes it when it turns the image
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    if 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise _NotReadError(f'signed brightness has no defined scale; {CONVERT}')
    if bits > 16 and image.mode != 'F':
        raise _NotReadError(f'brightness of {bits} bits has no common scale; {CONVERT}')
    image.load()
    # PIL inverts only up to 8 bits.
    is_negative = bits > 8 and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    rgb = _to_rgb(image, 2**bits - 1, is_negative=is_negative)
    undo = UPRIGHT_UNDONE.get(orientation or 1)
    return rgb if undo is None else rgb.transpose(undo)


def _check_jpeg_2000(data: bytes, mode: str) -> None:
    """Raise an error for levels that PIL misreads: signed ones, and more than 8 bits if not as 16-bit greyscale."""
    start = data.find(b'\xff\x4f\xff\x51') + 42  # the first component in the header of the codestream
    depths = data[start:start + 3 * int.from_bytes(data[start - 2:start]):3]
    if any(depth & 128 for depth in depths):
        raise _NotReadError(f'signed brightness has no defined scale; {CONVERT}')
    if mode != 'I;16' and (bits := max(depths, default=0) + 1) > 8:
        raise _NotReadError(f'a JPEG 2000 file of {bits} bits, which Pillow misreads; {CONVERT}')


def _to_rgb(image: Image.Image, white: int = 65_535, *, is_negative: bool = False) -> Image.Image:
    """Return the loaded `image` in mode RGB: itself if it has that mode, as nearly every JPEG has.

    white: the brightest level of greyscale of more than 8 bits. is_negative: this level is black.
    """
    if image.mode == 'RGB':
        return image
    if image.mode == 'F':
        raise _NotReadError(f'floating-point brightness has no defined scale; {CONVERT}')
    if image.mode.startswith('I'):  # 'I;16' and its byte orders from PNG and TIFF, 'I' from PGM
        levels = (np.asarray(image).astype(np.int64) * 255 + white // 2) // white  # to the nearest
        image = Image.fromarray((255 - levels if is_negative else levels).astype(np.uint8))
    if image.mode == 'La':  # grey, multiplied by its alpha
        image = image.convert('LA')
    # convert('RGB') drops a palette's transparency, and warns if it is recorded.
    image.info.pop('transparency', None)
    return image.convert('RGB')


def _reason(data: bytes, error: Exception) -> str:
    """Return why decoding `data` raised `error`, in words that fit after a colon."""
    if isinstance(error, Image.DecompressionBombError):
        return f'more than {MAX_PIXELS:,} pixels; scale it down or remove it'
    if not data:
        return 'the file is empty; restore or remove it'
    if isinstance(error, _NotReadError):
        return str(error)
    if 'MAX_TEXT' in str(error):  # PIL's name of its limit
        return f'more than {PngImagePlugin.MAX_TEXT_CHUNK >> 20} MiB of text or colour profile; save it without these'
    if kind := _kind_not_read(data, error):
        return f'{kind} is not read; {CONVERT}'
    if isinstance(error, UnidentifiedImageError):
        return f'damaged, or none of {", ".join(FORMATS)}; restore or remove it'
    return f'cannot be decoded ({" ".join(str(error).split()) or type(error).__name__}); restore or remove it'


def _kind_not_read(data: bytes, error: Exception) -> str | None:
    """Return what a healthy file is that PIL cannot read, as far as its header tells; None for any other file."""
    for start, magic, name in OTHER_FORMATS:
        if data[start:start + len(magic)] == magic:
            return f'a file of the format {name}'
    if data.startswith(b'\xff\xd8'):
        return _kind_of_jpeg(data)
    if data[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
        return _kind_of_tiff(data, error)
    return None


def _kind_of_jpeg(data: bytes) -> str | None:
    at = 2
    while data[at:at + 1] == b'\xff' and len(data) > at + 4:
        marker = data[at + 1]
        if marker == 0xf7:
            return 'a JPEG-LS file'
        if marker in SEGMENTS and 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):  # a frame
            kinds = {3: 'a lossless JPEG', 7: 'a lossless JPEG', 11: 'a lossless JPEG', 15: 'a lossless JPEG',
                     5: 'a hierarchical JPEG', 6: 'a hierarchical JPEG'}
            return f'a JPEG of {data[at + 4]} bits' if data[at + 4] != 8 else kinds.get(marker & 15)
        at += 2 + int.from_bytes(data[at + 2:at + 4])
    return None


def _kind_of_tiff(data: bytes, error: Exception) -> str | None:
    """Return the kind of a TIFF file if PIL has no way to read it, rather than none of its pixels."""
    if data.startswith(b'MM\0+'):
        return 'a BigTIFF of big-endian byte order'
    file = io.BytesIO(data)
    try:
        with warnings.catch_warnings(action='ignore'):
            tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if data[2] == 43 else 8))
            file.seek(tags.next)
            tags.load(file)
            if TiffImagePlugin.IMAGEWIDTH not in tags or TiffImagePlugin.IMAGELENGTH not in tags:
                return None
            number = tags.get(TiffImagePlugin.COMPRESSION, 1)
            if number not in OTHER_COMPRESSIONS and not isinstance(error, UnidentifiedImageError):
                return None
            compression = OTHER_COMPRESSIONS.get(number) or TiffImagePlugin.COMPRESSION_INFO.get(number, number)
            photometric = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0)
            meanings = {value: name for name, value in TiffTags.lookup(262).enum.items()}
            bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
            samples = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
            kind = 'floats' if 3 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()) else 'levels'
    except Exception:  # the header is damaged
        return None
    return (f'a TIFF of {samples} × {bits}-bit {kind} ({meanings.get(photometric, photometric)}, '
            f'compression {compression})')
