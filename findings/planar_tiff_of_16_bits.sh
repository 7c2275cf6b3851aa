#!/usr/bin/env bash
# Pillow reads an uncompressed TIFF of 16 bits in separate colour planes as stripes: each byte becomes a pixel.
#
# Microscopes and satellites write their channels as planes of 16 bits, and a ViT fine-tuned on such files reads them
# through Pillow. For planes without compression, Pillow's own reader takes the 16 bits for 8: the left half of each row
# is stretched over the whole row, every second column holds the low bytes, and the right half is lost. Size and mode are
# right, and nothing is said. With compression, or with the colours of a pixel together, the same picture is read well,
# so a copy saved again by another program hides it.
#
#     bash findings/planar_tiff_of_16_bits.sh       # half a minute; needs a package index and 200 MB for a while
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pillow==13.0.0 numpy==2.4.3 tifffile==2026.3.3
cd "$folder"
cat > try.py <<'PYTHON'
import io

import numpy as np
import PIL
import tifffile
from PIL import Image

levels = np.linspace(0, 65535, 9).round().astype(np.uint16)
planes = np.stack([np.tile(row, (9, 1)) for row in (levels, levels[::-1], np.full(9, 32768, np.uint16))])
found = {}
for name, pixels, arrangement, compression in (
        ('planes', planes, 'separate', None), ('planes, compressed', planes, 'separate', 'zlib'),
        ('colours together', planes.transpose(1, 2, 0), 'contig', None)):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric='rgb', planarconfig=arrangement, compression=compression)
    file.seek(0)
    assert (tifffile.imread(file) == pixels).all(), 'the file is valid'
    image = Image.open(file)
    assert image.mode == 'RGB' and image.size == (9, 9), 'the behaviour has changed'
    found[name] = np.asarray(image)[0, :, 0].tolist()
print(f'Pillow {PIL.__version__}, tifffile {tifffile.__version__}; a row of red from 0 to 65535:')
for name, red in found.items():
    print(f'  {name:18} {red}')
right = [0, 32, 64, 96, 128, 159, 191, 223, 255]
assert found == {'planes': [0, 0, 0, 32, 0, 64, 0, 96, 0], 'planes, compressed': right, 'colours together': right}, \
    'the behaviour has changed'
print('As found: planes without compression are read as bytes, and half of the row is lost.')
PYTHON
"$folder/venv/bin/python" try.py
