#!/usr/bin/env bash
# Pillow decodes each AVIF image with as many threads as there are cores, in every worker of a data loader.
#
# Loaders have one worker for each core, and set the threads of torch and OpenMP to one, so that workers do not get in
# each other's way. A data set of AVIF files undoes that: Pillow gives its decoder all cores, for each image anew,
# whatever OMP_NUM_THREADS says. N workers on N cores start N × N threads, which compete with the training step. JPEG, PNG
# and WebP are decoded by one thread. Set PIL.AvifImagePlugin.DEFAULT_MAX_THREADS to 1 in the process of the workers.
#
#     bash findings/avif_decoding_takes_all_cores.sh       # half a minute; needs a package index, 200 MB, two cores
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.3
cd "$folder"
cat > try.py <<'PYTHON'
import io
import os
import threading
import time

import numpy as np
import PIL
from PIL import AvifImagePlugin, Image


def threads_while_reading(stored: bytes) -> int:
    """Return the most threads that ran beside those of this program while an image was decoded five times."""
    counts = []
    finished = threading.Event()

    def watch() -> None:
        while not finished.is_set():
            counts.append(len(os.listdir('/proc/self/task')))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    own = len(os.listdir('/proc/self/task'))
    for _ in range(5):
        Image.open(io.BytesIO(stored)).load()
    finished.set()
    watcher.join()
    return max(counts) - own


cores = len(os.sched_getaffinity(0))
assert cores > 1, 'with one core there is nothing to see'
coarse = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
picture = Image.fromarray(coarse).resize((1536, 1024))
stored = {}
for name in ('JPEG', 'PNG', 'WEBP', 'AVIF'):
    file = io.BytesIO()
    picture.save(file, name, **({'speed': 10} if name == 'AVIF' else {}))
    stored[name] = file.getvalue()
found = {name: threads_while_reading(content) for name, content in stored.items()}
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
found['AVIF, limited'] = threads_while_reading(stored['AVIF'])
print(f'Pillow {PIL.__version__}, {cores} cores, OMP_NUM_THREADS={os.environ["OMP_NUM_THREADS"]}; '
      f'threads of the decoder: {found}')
assert found.pop('AVIF') >= 2 and not any(found.values()), 'the behaviour has changed'
print('As found: AVIF alone is decoded by several threads, until DEFAULT_MAX_THREADS says otherwise.')
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" try.py
