#!/usr/bin/env bash
# timm caches a checkpoint under the last part of its URL, so another model of that file name is never fetched.
#
# People who compare fine-tuned ViTs give timm the URLs of their runs, and every run calls its file model.pth or
# model_best.pth.tar. timm's download helper looks for that name alone in its cache. So the second URL gives the weights
# of the first, of another host or run, without a word: with equal shapes they load, and the comparison is of one model
# with itself. A hash in the name, as timm's own files have, is the remedy, or one cache folder for each run.
#
#     bash findings/downloads_of_one_name.sh       # two minutes; needs a package index and 6 GB for a while
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$folder"
cat > try.py <<'PYTHON'
import functools
import http.server
import threading
from pathlib import Path

import timm
import torch
from timm.models._hub import download_cached_file

for run, value in (('a', 1.0), ('b', 2.0)):
    Path('served', run).mkdir(parents=True)
    torch.save({'weight': torch.full((1,), value)}, f'served/{run}/model.pth')


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Server, directory='served'))
threading.Thread(target=server.serve_forever, daemon=True).start()
torch.hub.set_dir('hub')
host = f'http://127.0.0.1:{server.server_port}'
found = {}
for run in 'ab':
    file = download_cached_file(f'{host}/{run}/model.pth', check_hash=False)
    found[run] = torch.load(file, weights_only=True)['weight'].item()
server.shutdown()
print(f'timm {timm.__version__}')
print(f'served: a 1.0, b 2.0; what timm gives: a {found["a"]}, b {found["b"]}')
assert found == {'a': 1.0, 'b': 1.0}, 'the behaviour has changed'
print('As found: the weights of b are those of a.')
PYTHON
"$folder/venv/bin/python" try.py
