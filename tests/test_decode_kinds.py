"""data/decode.py on kinds of files that people have: TIFF as scanners write it, further endings, large metadata."""
import io
import struct

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.decode import EXTENSIONS, ImageError, decode_rgb, read_file
from tools.doctor.images import DEEP, TRANSPARENT, look_closely

SEED = 11
SIDE = 16


@pytest.fixture
def levels():
    """uint8 [16, 16]: all levels from 0 to 255."""
    return np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)


def tiff(data: bytes, bits, **tags) -> bytes:
    """Return a TIFF file of 16 × 16 pixels: `tags` are those that differ from one plain strip of grey."""
    bits = bits if isinstance(bits, tuple) else (bits,)
    numbers = {'photometric': 262, 'orientation': 274, 'planes': 284, 'format': 339, 'compression': 259}
    values = {256: SIDE, 257: SIDE, 259: 1, 262: 1, 277: len(bits), 278: SIDE} | {
        numbers[name]: value for name, value in tags.items()}
    strips = len(bits) if tags.get('planes') == 2 else 1
    lists = {258: bits, 273: tuple(range(strips)), 279: (len(data) // strips,) * strips}
    entries = sorted([*values, *lists])
    beyond = 8 + 2 + 12 * len(entries) + 4
    extra, directory = b'', b''
    start = beyond + sum(4 * len(each) for each in lists.values() if len(each) > 1)
    for tag in entries:
        each = lists.get(tag) or (values[tag],)
        if tag == 273:
            each = tuple(start + k * (len(data) // strips) for k in range(strips))
        if len(each) == 1:
            directory += struct.pack('<HHII', tag, 4, 1, each[0])
        else:
            directory += struct.pack('<HHII', tag, 4, len(each), beyond + len(extra))
            extra += struct.pack(f'<{len(each)}I', *each)
    head = b'II*\0' + struct.pack('<I', 8) + struct.pack('<H', len(entries))
    return head + directory + bytes(4) + extra + data


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(data, 'a.tif'))[..., 0]


def packed12(levels: np.ndarray) -> bytes:
    """Return levels [H, W] of 12 bits, two in three bytes."""
    a, b = levels[:, 0::2].astype(int), levels[:, 1::2].astype(int)
    return np.dstack([a >> 4, (a & 15) << 4 | b >> 8, b & 255]).astype(np.uint8).tobytes()


def test_the_writer_of_this_file_is_sound(levels):
    assert (decoded(tiff(levels.tobytes(), 8)) == levels).all()
    assert (decoded(tiff((levels.astype('<u2') * 257).tobytes(), 16)) == levels).all()


def test_twelve_bits_are_scaled_by_their_own_range(levels):
    deep = -(-levels.astype(int) * 4095 // 255)
    assert (decoded(tiff(packed12(deep), 12)) == levels).all()


def test_where_white_is_zero_sixteen_bits_are_inverted_as_eight_are(levels):
    assert (decoded(tiff((255 - levels).tobytes(), 8, photometric=0)) == levels).all()
    inverted = (65_535 - levels.astype('<u2') * 257).astype('<u2')
    assert (decoded(tiff(inverted.tobytes(), 16, photometric=0)) == levels).all()


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('bits', [8, 16])
def test_no_format_is_turned(levels, orientation, bits):
    data = levels.tobytes() if bits == 8 else (levels.astype('<u2') * 257).tobytes()
    assert (decoded(tiff(data, bits, orientation=orientation)) == levels).all()
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(levels).save(file, 'PNG', exif=exif)
    assert (decoded(file.getvalue()) == levels).all()
    wide = np.repeat(levels[:8], 3, axis=1)
    file = io.BytesIO()
    Image.fromarray(wide).save(file, 'TIFF', tiffinfo={274: orientation}, compression='tiff_lzw')
    assert (decoded(file.getvalue()) == wide).all()


COLOUR = np.random.default_rng(SEED).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def test_colours_of_sixteen_bits():
    deep = COLOUR.astype('<u2') * 257
    read = np.asarray(decode_rgb(tiff(deep.tobytes(), (16, 16, 16), photometric=2), 'a'))
    assert (read == COLOUR).all()
    planes = COLOUR.transpose(2, 0, 1)
    read = np.asarray(decode_rgb(tiff(planes.tobytes(), (8, 8, 8), photometric=2, planes=2), 'a'))
    assert (read == COLOUR).all()


def jpeg_of(bits: int, marker: int) -> bytes:
    """Return the beginning of a JPEG of another kind: its frame, and some bytes."""
    frame = struct.pack('>HBHHB', 17, bits, SIDE, SIDE, 3) + bytes((1, 0x11, 0, 2, 0x11, 1, 3, 0x11, 1))
    return b'\xff\xd8\xff' + bytes([marker]) + frame + b'\xff\xda' + bytes(64) + b'\xff\xd9'


# What the file is, its content, words of the message.
NOT_READ = {
    'planes of 16 bits': (tiff(bytes(6 * SIDE * SIDE), (16, 16, 16), photometric=2, planes=2), 'planes of 16 bits'),
    'signed': (tiff(bytes(2 * SIDE * SIDE), 16, format=2), 'signed brightness'),
    'floats': (tiff(bytes(4 * SIDE * SIDE), 32, format=3), 'floating-point brightness'),
    'double': (tiff(bytes(8 * SIDE * SIDE), 64, format=3), 'floats of 64 bits.*convert it'),
    'white is zero, 12 bits': (tiff(bytes(3 * SIDE * SIDE // 2), 12, photometric=0), 'samples of 12 bits.*convert it'),
    'ten bits': (tiff(bytes(2 * SIDE * SIDE), 10), 'samples of 10 bits.*convert it'),
    'JPEG 2000 in TIFF': (tiff(bytes(64), 8, compression=34712), 'compression number 34712.*convert it'),
    'JPEG of 12 bits': (jpeg_of(12, 0xc1), 'JPEG of 12 bits is not read; convert it'),
    'lossless JPEG': (jpeg_of(8, 0xc3), 'lossless JPEG is not read; convert it'),
    'JPEG-LS': (b'\xff\xd8\xff\xf7' + bytes(64), 'JPEG-LS file is not read; convert it'),
    'HEIC': (bytes(4) + b'ftypheic' + bytes(64), 'HEIC is not read; convert it'),
    'JPEG XL': (b'\xff\x0a' + bytes(64), 'JPEG XL is not read; convert it'),
}


@pytest.mark.parametrize('kind', NOT_READ)
def test_a_healthy_file_that_is_not_read_is_not_called_damaged(kind):
    content, words = NOT_READ[kind]
    with pytest.raises(ImageError, match=words) as caught:
        decode_rgb(content, 'image')
    assert 'damaged' not in str(caught.value) and '\n' not in str(caught.value)


def test_damage_is_still_damage(levels):
    whole = tiff(levels.tobytes(), 8)
    for content in (whole[:len(whole) // 2], whole[:30], b'\xff\xd8\xff\xe0' + bytes(50)):
        with pytest.raises(ImageError, match='restore or remove it'):
            decode_rgb(content, 'image')


def test_metadata_of_some_mebibytes_keeps_no_image_out(levels):
    image = Image.fromarray(levels)
    info = PngInfo()
    info.add_text('XML:com.adobe.xmp', 'x' * 3_000_000, zip=True)
    for options in ({'icc_profile': bytes(2_000_000)}, {'pnginfo': info}):
        file = io.BytesIO()
        image.save(file, 'PNG', **options)
        assert (decoded(file.getvalue()) == levels).all()


@pytest.mark.parametrize(('ending', 'kind'), [
    ('jfif', 'JPEG'), ('JPE', 'JPEG'), ('avif', 'AVIF'), ('jp2', 'JPEG2000'), ('j2k', 'JPEG2000'), ('mpo', 'MPO'),
    ('apng', 'PNG')])
def test_all_endings_of_a_format_are_read(ending, kind, tmp_path):
    assert f'.{ending.lower()}' in EXTENSIONS
    path = tmp_path / f'image.{ending}'
    Image.fromarray(COLOUR).save(path, kind)
    expected = np.asarray(Image.open(path).convert('RGB'))
    assert (np.asarray(decode_rgb(read_file(path), str(path))) == expected).all()


def test_doctor_notes_transparency_and_depth_of_every_format():
    palette = Image.fromarray(COLOUR).convert('P')
    for kind in ('PNG', 'GIF'):
        file = io.BytesIO()
        palette.save(file, kind, transparency=palette.getpixel((0, 0)))
        assert TRANSPARENT in look_closely(file.getvalue(), 'a').notes, kind
    deep = tiff((COLOUR.astype('<u2') * 257).tobytes(), (16, 16, 16), photometric=2)
    assert DEEP in look_closely(deep, 'a').notes
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, 'PNG')
    assert look_closely(file.getvalue(), 'a').notes == ()
