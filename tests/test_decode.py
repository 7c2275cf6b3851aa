"""data/decode.py: every kind of image file gives its RGB pixels, every bad one a line that names it."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import decode
from data.decode import EncodedImage, ImageError, decode_rgb, read_file
from utils.errors import UserError

SEED = 20211010


def load_rgb(path) -> Image.Image:
    return decode_rgb(read_file(path), str(path))


@pytest.fixture
def pixels():
    """uint8 [24, 32, 3], smooth enough that JPEG stays close to it."""
    print('seed', SEED)
    small = np.random.default_rng(SEED).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((32, 24), Image.Resampling.BILINEAR))


def decode_array(content, name, rows=None):
    return EncodedImage(content, name).pixels(rows)


def decoded(path):
    """The file's pixels, uint8 [H, W, 3], the same as an image and as an array; warnings are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        image = load_rgb(path)
        array = decode_array(path.read_bytes(), str(path))
    assert image.mode == 'RGB'
    np.testing.assert_array_equal(array.permute(1, 2, 0).numpy(), np.asarray(image))
    return np.asarray(image)


@pytest.mark.parametrize('ending', ['png', 'bmp', 'tiff', 'ppm'])
def test_lossless_formats_give_the_pixels_that_were_saved(tmp_path, pixels, ending):
    path = tmp_path / f'image.{ending}'
    Image.fromarray(pixels).save(path)
    np.testing.assert_array_equal(decoded(path), pixels)


@pytest.mark.parametrize('ending', ['jpg', 'webp'])
def test_lossy_formats_give_the_pixels_of_pil(tmp_path, pixels, ending):
    path = tmp_path / f'image.{ending}'
    Image.fromarray(pixels).save(path, quality=90)
    np.testing.assert_array_equal(decoded(path), np.asarray(Image.open(path).convert('RGB')))
    assert np.abs(decoded(path).astype(int) - pixels).mean() < 6


def test_the_ending_of_a_name_does_not_matter(tmp_path, pixels):
    path = tmp_path / 'image.JPEG'  # one of ImageNet's training images is such a file
    Image.fromarray(pixels).save(path, format='PNG')
    np.testing.assert_array_equal(decoded(path), pixels)


def test_cmyk_is_converted(tmp_path, pixels):
    path = tmp_path / 'image.jpg'
    cmyk = Image.fromarray(pixels).convert('CMYK')
    cmyk.save(path, quality=100, subsampling=0)
    assert Image.open(path).mode == 'CMYK'
    assert np.abs(decoded(path).astype(int) - np.asarray(cmyk.convert('RGB'))).mean() < 3


def test_alpha_is_dropped_not_blended(tmp_path, pixels):
    path = tmp_path / 'image.png'
    alpha = np.full((*pixels.shape[:2], 1), 7, dtype=np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(path)
    np.testing.assert_array_equal(decoded(path), pixels)


def test_grey_with_alpha(tmp_path, pixels):
    path = tmp_path / 'image.png'
    grey_alpha = np.stack([pixels[..., 0], np.zeros_like(pixels[..., 0])], axis=2)
    Image.fromarray(grey_alpha).save(path)
    assert Image.open(path).mode == 'LA'
    np.testing.assert_array_equal(decoded(path), np.repeat(pixels[..., :1], 3, axis=2))


@pytest.mark.parametrize('transparency', [None, 3, b'\x00\x80\xff'], ids=['opaque', 'one colour', 'a table'])
def test_palette_gives_its_colours(tmp_path, pixels, transparency):
    path = tmp_path / 'image.png'
    palette = Image.fromarray(pixels).quantize(16)
    options = {} if transparency is None else {'transparency': transparency}
    palette.save(path, **options)
    assert Image.open(path).mode == 'P'
    np.testing.assert_array_equal(decoded(path), np.asarray(palette.convert('RGB')))


def test_one_bit_becomes_black_and_white(tmp_path, pixels):
    path = tmp_path / 'image.png'
    bits = pixels[..., 0] > 128
    Image.fromarray(bits).save(path)
    assert Image.open(path).mode == '1'
    np.testing.assert_array_equal(decoded(path), np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))


@pytest.mark.parametrize('ending', ['png', 'tiff', 'pgm'])
def test_sixteen_bit_grey_is_scaled(tmp_path, ending):
    path = tmp_path / f'ramp.{ending}'
    ramp = np.linspace(0, 65_535, 512).round().astype(np.uint16).reshape(16, 32)
    if ending == 'pgm':
        path.write_bytes(b'P5 32 16 65535\n' + ramp.astype('>u2').tobytes())
    else:
        Image.fromarray(ramp).save(path)
    assert Image.open(path).mode.startswith('I')
    expected = np.round(ramp / 257).astype(np.uint8)
    np.testing.assert_array_equal(decoded(path), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize('levels', [np.float32([[0.0, 1.0]]), np.int32([[0, 70_000]])], ids=['float', '32 bits'])
def test_brightness_without_a_scale_is_refused(tmp_path, levels):
    path = tmp_path / 'image.tiff'
    Image.fromarray(levels).save(path)
    with pytest.raises(ImageError, match='brightness'):
        load_rgb(path)


@pytest.mark.parametrize('ending', ['gif', 'webp', 'png'])
def test_an_animation_gives_its_first_frame(tmp_path, ending):
    path = tmp_path / f'image.{ending}'
    frames = [Image.new('RGB', (16, 8), colour) for colour in ('red', 'blue')]
    options = {'lossless': True} if ending == 'webp' else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 2
    np.testing.assert_array_equal(decoded(path), np.asarray(frames[0]))
    # The image must live on after its file was closed.
    assert load_rgb(path).crop((0, 0, 4, 4)).getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_ignored(tmp_path, pixels):
    plain, turned = tmp_path / 'plain.jpg', tmp_path / 'turned.jpg'
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(pixels).save(plain)
    Image.fromarray(pixels).save(turned, exif=exif)
    np.testing.assert_array_equal(decoded(turned), decoded(plain))


def png_header(width, height):
    """A PNG file that claims a size and has next to nothing in it."""
    chunks = b'\x89PNG\r\n\x1a\n'
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    for name, body in ((b'IHDR', header), (b'IDAT', b''), (b'IEND', b'')):
        chunks += struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    return chunks


def jpeg_bytes():
    file = io.BytesIO()
    noise = np.random.default_rng(SEED).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, format='JPEG')
    return file.getvalue()


BAD_FILES = {
    'empty': (b'', 'empty'),
    'text': (b'<html>404 Not Found</html>', 'none of JPEG'),
    'truncated JPEG': (jpeg_bytes()[:-900], 'truncated'),
    'half of a PNG header': (png_header(8, 8)[:20], 'cannot be decoded'),
    'PNG without data': (png_header(8, 8), 'cannot be decoded'),
    'bomb at which PIL warns': (png_header(10_000, 10_000), 'more than 89,478,485 pixels'),
    'bomb at which PIL raises': (png_header(60_000, 60_000), 'more than 89,478,485 pixels'),
    'EPS, which PIL would open': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n', 'none of JPEG'),
}


@pytest.mark.parametrize('content, reason', BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_one_line_with_its_path(tmp_path, content, reason):
    path = tmp_path / 'bad.jpg'
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ImageError, match=reason) as caught:
            load_rgb(path)
        with pytest.raises(ImageError) as of_array:
            decode_array(content, str(path))
    assert isinstance(caught.value, UserError) and str(of_array.value) == str(caught.value)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def jpeg_kinds(pixels):
    """JPEG files of every kind that Pillow writes."""
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels).convert('L')
    for image, options in [
        *((image, {'subsampling': subsampling, **more}) for image in (colour, grey) for subsampling in (0, 1, 2)
          for more in ({}, {'progressive': True}, {'restart_marker_blocks': 2}, {'optimize': True})),
        (colour, {'subsampling': 0, 'keep_rgb': True}),
    ]:
        file = io.BytesIO()
        image.save(file, format='JPEG', quality=85, **options)
        yield file.getvalue()


def pixels_or_error(decode_function, content):
    """(uint8 [H, W, 3] or None, the message of an ImageError or None)."""
    try:
        levels = decode_function(content, 'image.jpg')
    except ImageError as error:
        return None, str(error)
    return levels.permute(1, 2, 0).numpy() if decode_function is decode_array else np.asarray(levels), None


def assert_as_pil(content):
    """What PIL decodes has the same pixels, in all rows and in the first few; where PIL fails so does the other, or has
    looked at less."""
    array, error = pixels_or_error(decode_array, content)
    expected, expected_error = pixels_or_error(decode_rgb, content)
    assert error in (None, expected_error)
    if expected_error is None:
        np.testing.assert_array_equal(array, expected)
        for rows in range(1, len(expected), 5):
            part = decode_array(content, 'image.jpg', rows)[:, :rows]
            np.testing.assert_array_equal(part.permute(1, 2, 0), expected[:rows])


def test_arrays_of_every_kind_of_jpeg_are_those_of_pil(pixels, monkeypatch):
    kinds = list(jpeg_kinds(np.tile(pixels, (3, 1, 1))[:67, :29]))
    for content in kinds:
        assert_as_pil(content)
    # A part takes less: of a baseline file the rest is not decoded.
    assert decode_array(kinds[0], 'image.jpg', 5).shape == (3, 8, 29)
    # And these did not go the long way.
    monkeypatch.setattr(decode, 'decode_rgb', None)
    for content in kinds:
        decode_array(content, 'image.jpg')


@pytest.mark.parametrize('damage', ['cut', 'cut, with an end mark', 'bit in the header', 'bit in the data', 'zeros'])
def test_damage_is_seen_in_arrays_as_by_pil(pixels, damage):
    generator = np.random.default_rng(SEED)
    kinds = list(jpeg_kinds(pixels))
    for number in range(90):
        content = bytearray(kinds[number % len(kinds)])
        data = content.find(b'\xff\xda') + 12
        if damage.startswith('cut'):
            del content[generator.integers(1 if damage == 'cut' else data, len(content)):]
            content += b'' if damage == 'cut' else b'\xff\xd9'
        elif damage.startswith('bit'):
            part = (2, data) if damage == 'bit in the header' else (data, len(content))
            content[generator.integers(*part)] ^= 1 << generator.integers(8)
        else:
            first = generator.integers(data, len(content) - 12)
            content[first:first + 10] = bytes(10)
        assert_as_pil(bytes(content))


def test_where_the_data_breaks_off_nothing_is_made_up(pixels):
    """The rest of the pixels would be what was in memory before."""
    for content in jpeg_kinds(pixels):
        middle = (content.rfind(b'\xff\xda') + len(content)) // 2
        broken = content[:middle] + b'\xff\xc4\0\3\0' + content[middle:]  # Huffman tables that are none
        for rows in (None, 3):
            with pytest.raises(ImageError, match='broken data'):
                decode_array(broken, 'image.jpg', rows)


@pytest.mark.parametrize('marker', [b'\xff\xdb', b'\xff\xc0', b'\xff\xc4', b'\xff\xda'], ids=bytes.hex)
def test_odd_headers_are_read_as_by_pil(pixels, marker):
    exif = b'\xff\xe1' + (2 + len(jpeg_bytes())).to_bytes(2) + jpeg_bytes()  # with a frame and a scan of its own
    for content in jpeg_kinds(np.tile(pixels, (3, 1, 1))):
        for odd in (b'\xff\xff\xff' + marker[1:], b'\xff\0', b'\x00\x01' + marker, exif + marker):
            assert_as_pil(content.replace(marker, odd, 1))


def test_without_its_decoder_files_are_decoded_as_others_are(pixels, monkeypatch):
    content = next(jpeg_kinds(pixels))
    expected = decode_array(content, 'image.jpg')
    monkeypatch.setattr(decode, 'simplejpeg', None)
    assert torch.equal(decode_array(content, 'image.jpg'), expected)


@pytest.mark.parametrize('make', [lambda path: None, lambda path: path.mkdir()], ids=['missing', 'a folder'])
def test_a_path_that_is_no_file(tmp_path, make):
    path = tmp_path / 'image.jpg'
    make(path)
    with pytest.raises(ImageError, match='No such file|Is a directory'):
        load_rgb(path)


def test_the_pixel_cap_is_exact(tmp_path, monkeypatch):
    path = tmp_path / 'image.png'
    Image.new('RGB', (10, 10)).save(path)
    monkeypatch.setattr(decode, 'MAX_PIXELS', 100)
    load_rgb(path)
    monkeypatch.setattr(decode, 'MAX_PIXELS', 99)
    with pytest.raises(ImageError, match='more than 99 pixels'):
        load_rgb(path)


@pytest.mark.parametrize('name, value, reason', [('MAX_PIXELS', 24 * 32 - 1, 'more than 767 pixels'),
                                                 ('MAX_RATIO', 1, '1 × 1')])
def test_the_caps_hold_for_arrays(pixels, monkeypatch, name, value, reason):
    content = next(jpeg_kinds(pixels))
    decode_array(content, 'image.jpg')
    monkeypatch.setattr(decode, name, value)
    with pytest.raises(ImageError, match=reason):
        decode_array(content, 'image.jpg')


def test_a_jpeg_of_many_scans_is_refused_before_they_are_decoded(pixels):
    """Each scan of a progressive file takes as long as a whole image, however few bytes it has."""
    saved = io.BytesIO()
    Image.fromarray(pixels).save(saved, 'JPEG', progressive=True)
    jpeg = saved.getvalue()
    last = jpeg.rindex(b'\xff\xda')
    assert 5 < decode.count_scans(jpeg) < 20 and decode_rgb(jpeg, 'a.jpg').size == (32, 24)
    many = jpeg[:last] + 100 * jpeg[last:-2] + jpeg[-2:]
    assert decode.jpeg_size(many) is None
    with pytest.raises(ImageError, match=r'image a.jpg: .*a JPEG of 1\d\d scans; save it anew, with at most 100'):
        EncodedImage(many, 'a.jpg')
    # Of a sequential file only the first scan is read. The marks of scans may stand in what precedes it.
    saved = io.BytesIO()
    Image.fromarray(pixels).save(saved, 'JPEG', icc_profile=b'\xff\xda' * 200)
    assert decode.count_scans(saved.getvalue()) == 1 and decode.jpeg_size(saved.getvalue()) == (24, 32)
