"""data/decode.py on kinds of files that people have: TIFF as scanners write it, further endings, large metadata."""
import io
import os
import struct
import threading
import time

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from data.decode import EXTENSIONS, FORMATS, ImageError, decode_rgb, read_file
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
    numbers = {'photometric': 262, 'orientation': 274, 'planes': 284, 'format': 339, 'compression': 259,
               'extra': 338}
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
    deep = planes.astype('<u2') * 257
    read = np.asarray(decode_rgb(tiff(deep.tobytes(), (16, 16, 16), photometric=2, planes=2), 'a'))
    assert (read == COLOUR).all()


def test_a_single_plane_is_read_as_if_it_were_interleaved(levels):
    assert (decoded(tiff((255 - levels).tobytes(), 8, photometric=0, planes=2)) == levels).all()
    assert (decoded(tiff((levels.astype('<u2') * 257).tobytes(), 16, planes=2)) == levels).all()


def test_grey_multiplied_by_alpha_is_read_as_colours_are(levels):
    opaque = tiff(np.dstack([levels, np.full_like(levels, 255)]).tobytes(), (8, 8), extra=1)
    assert Image.open(io.BytesIO(opaque)).mode == 'La' and (decoded(opaque) == levels).all()


def jpeg_2000(levels: np.ndarray, depth: int) -> bytes:
    """Return a JPEG 2000 file whose components claim `depth`: their bits less one, plus 128 if they are signed."""
    file = io.BytesIO()
    Image.fromarray(levels).save(file, 'JPEG2000', no_jp2=True)
    content = bytearray(file.getvalue())
    components = content[41]
    content[42:42 + 3 * components:3] = bytes([depth]) * components
    return bytes(content)


def test_greyscale_of_jpeg_2000_keeps_its_levels(levels):
    file = io.BytesIO()
    Image.fromarray(levels.astype(np.uint16) * 257).save(file, 'JPEG2000')
    assert Image.open(file).mode == 'I;16' and (decoded(file.getvalue()) == levels).all()


def jpeg_of(bits: int, marker: int) -> bytes:
    """Return the beginning of a JPEG of another kind: its frame, and some bytes."""
    frame = struct.pack('>HBHHB', 17, bits, SIDE, SIDE, 3) + bytes((1, 0x11, 0, 2, 0x11, 1, 3, 0x11, 1))
    return b'\xff\xd8\xff' + bytes([marker]) + frame + b'\xff\xda' + bytes(64) + b'\xff\xd9'


# What the file is, its content, words of the message.
NOT_READ = {
    'signed': (tiff(bytes(2 * SIDE * SIDE), 16, format=2), 'signed brightness'),
    'signed, 8 bits': (tiff(bytes(SIDE * SIDE), 8, format=2), 'signed brightness'),
    '32 bits': (tiff(bytes(4 * SIDE * SIDE), 32), 'brightness of 32 bits'),
    'floats': (tiff(bytes(4 * SIDE * SIDE), 32, format=3), 'floating-point brightness'),
    'double': (tiff(bytes(8 * SIDE * SIDE), 64, format=3), '1 × 64-bit floats'),
    'white is zero, 12 bits': (tiff(bytes(3 * SIDE * SIDE // 2), 12, photometric=0), '1 × 12-bit levels .WhiteIsZero'),
    'ten bits': (tiff(bytes(2 * SIDE * SIDE), 10), '1 × 10-bit levels'),
    'JPEG 2000 in TIFF': (tiff(bytes(64), 8, compression=34712), 'compression JPEG 2000. is not read'),
    'WebP in TIFF': (tiff(bytes(64), 8, compression=50001), 'compression WebP. is not read'),
    'big-endian BigTIFF': (b'MM\0+' + bytes(60), 'BigTIFF of big-endian byte order is not read'),
    'JPEG 2000 of 12 bits': (jpeg_2000(COLOUR, 11), 'JPEG 2000 file of 12 bits, which Pillow misreads'),
    'signed JPEG 2000': (jpeg_2000(COLOUR[..., 0].copy(), 7 + 128), 'signed brightness'),
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
    message = str(caught.value)
    assert message.endswith('; convert it to JPEG or PNG of 8 bits') and '\n' not in message
    assert 'damaged' not in message and 'restore' not in message


def test_damage_is_still_damage(levels):
    whole = tiff(levels.tobytes(), 8)
    for content in (whole[:len(whole) // 2], whole[:30], b'\xff\xd8\xff\xe0' + bytes(50)):
        with pytest.raises(ImageError, match='restore or remove it'):
            decode_rgb(content, 'image')


def test_metadata_of_some_mebibytes_keeps_no_image_out(levels, monkeypatch):
    image = Image.fromarray(levels)
    info = PngInfo()
    info.add_text('XML:com.adobe.xmp', 'x' * 3_000_000, zip=True)
    for options in ({'icc_profile': bytes(2_000_000)}, {'pnginfo': info}):
        file = io.BytesIO()
        image.save(file, 'PNG', **options)
        assert (decoded(file.getvalue()) == levels).all()
        with monkeypatch.context() as patch:
            patch.setattr(PngImagePlugin, 'MAX_TEXT_CHUNK', 1 << 20)
            with pytest.raises(ImageError, match='more than 1 MiB of text or colour profile; save it without these'):
                decoded(file.getvalue())


def test_all_endings_of_pillow_are_known():
    """It has one more, for floating-point pixels, which are refused."""
    assert {ending for ending, name in Image.EXTENSION.items() if name in FORMATS} - {'.pfm'} < set(EXTENSIONS)


@pytest.mark.parametrize(('ending', 'kind'), [
    ('jfif', 'JPEG'), ('JPE', 'JPEG'), ('avif', 'AVIF'), ('jp2', 'JPEG2000'), ('j2k', 'JPEG2000'), ('mpo', 'MPO'),
    ('apng', 'PNG')])
def test_all_endings_of_a_format_are_read(ending, kind, tmp_path):
    assert f'.{ending.lower()}' in EXTENSIONS
    path = tmp_path / f'image.{ending}'
    Image.fromarray(COLOUR).save(path, kind)
    expected = np.asarray(Image.open(path).convert('RGB'))
    assert (np.asarray(decode_rgb(read_file(path), str(path))) == expected).all()


@pytest.mark.skipif('AVIF' not in FORMATS or not os.path.isdir('/proc/self/task') or os.cpu_count() == 1,
                    reason='needs AVIF, Linux and two cores')
def test_one_thread_decodes_an_image():
    """PIL would take all cores for each AVIF image, in every worker."""
    file = io.BytesIO()
    coarse = np.random.default_rng(SEED).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((1536, 1024)).save(file, 'AVIF', speed=10)
    counts, finished = [], threading.Event()

    def watch() -> None:
        while not finished.is_set():
            counts.append(len(os.listdir('/proc/self/task')))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = len(os.listdir('/proc/self/task'))
    for _ in range(5):
        decode_rgb(file.getvalue(), 'a')
    finished.set()
    watcher.join()
    assert max(counts) == before


def test_doctor_notes_transparency_and_depth_of_every_format():
    palette = Image.fromarray(COLOUR).convert('P')
    for kind in ('PNG', 'GIF'):
        file = io.BytesIO()
        palette.save(file, kind, transparency=palette.getpixel((0, 0)))
        assert TRANSPARENT in look_closely(file.getvalue(), 'a').notes, kind
    turned = io.BytesIO()
    Image.new('L', (8, 4)).save(turned, 'TIFF', tiffinfo={274: 6})
    assert look_closely(turned.getvalue(), 'a').size == (8, 4), 'it is read as it is stored'
    deep = tiff((COLOUR.astype('<u2') * 257).tobytes(), (16, 16, 16), photometric=2)
    assert DEEP in look_closely(deep, 'a').notes
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, 'PNG')
    assert look_closely(file.getvalue(), 'a').notes == ()
