#!/usr/bin/env bash
# Pillow reads colour JPEG 2000 files of more than 8 bits with white as black: the top level wraps round to 0.
#
# A ViT for slides, scans or satellite images is often trained on JPEG 2000, whose samples have 10, 12 or 16 bits. Pillow
# shortens them to 8 bits with rounding, and the rounding of the brightest levels overflows the byte. The file opens as
# RGB without a warning, and every overexposed or paper-white pixel is black. Grey files are not hit, since they keep
# their bits (I;16), and neither are colour files of 8 bits: a test picture of these two kinds shows nothing.
#
#     bash findings/jpeg2000_white_turns_black.sh       # half a minute; needs a package index and 300 MB for a while
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pillow==13.0.0 numpy==2.4.3 imagecodecs==2026.3.6
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$folder/earlier" pillow==10.4.0
cd "$folder"
cat > try.py <<'PYTHON'
import io

import imagecodecs
import numpy as np
import PIL
from PIL import Image

print(f'Pillow {PIL.__version__}, imagecodecs {imagecodecs.__version__}; a row from black to white, without loss:')
for bits in (8, 12, 16):
    levels = np.linspace(0, 2 ** bits - 1, 9).round().astype(np.uint8 if bits == 8 else np.uint16)
    pixels = np.repeat(np.tile(levels, (9, 1))[..., None], 3, axis=2)
    stored = imagecodecs.jpeg2k_encode(pixels, bitspersample=bits, reversible=True, level=0, codecformat='jp2')
    assert (imagecodecs.jpeg2k_decode(stored) == pixels).all(), 'the file is valid'
    image = Image.open(io.BytesIO(stored))
    read = np.asarray(image)[0, :, 0].tolist()
    print(f'  {bits:2} bits, {image.mode}: {read}')
    assert image.mode == 'RGB' and read[:2] == [0, 32] and read[-1] == (255 if bits == 8 else 0), \
        'the behaviour has changed'
print('As found: white is 255 with 8 bits, and 0 with more.')
PYTHON
"$folder/venv/bin/python" try.py
PYTHONPATH="$folder/earlier" "$folder/venv/bin/python" try.py
