"""docs/look_inside.ipynb: kept with the outputs of one run from top to bottom, and every cell of it runs."""
import base64
import io
import json
import re

import pytest
import torch
from PIL import Image

from models import create_model
from tests.conftest import ROOT, write_checkpoint

NOTEBOOK = ROOT / 'docs/look_inside.ipynb'
FIGURES = 5


def test_notebook_is_kept_with_its_outputs():
    text = NOTEBOOK.read_text()
    cells = [cell for cell in json.loads(text)['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell['outputs']]
    assert {output['output_type'] for output in outputs} <= {'stream', 'execute_result', 'display_data'}
    assert all(output.get('name') != 'stderr' for output in outputs)
    pictures = [output['data']['image/png'] for output in outputs if 'image/png' in output.get('data', ())]
    assert len(pictures) == FIGURES
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert min(image.size) > 250 and len(image.convert('L').getcolors()) > 50
    said = ''.join(''.join(output.get('text', ())) for output in outputs)
    assert 't2t_vit_7 at 32 pixels' in said
    assert not re.search(r'(^|[\s\'"])/\w', said), 'a path of the machine that ran it'
    assert len(text) < 1_500_000


@pytest.mark.slow
def test_every_cell_runs_and_shows_its_figure(tmp_path, monkeypatch):
    nbclient = pytest.importorskip('nbclient', reason='no nbclient: pip install -r requirements-dev.txt')
    nbformat = pytest.importorskip('nbformat', reason='no nbformat: pip install -r requirements-dev.txt')
    pytest.importorskip('ipykernel', reason='no ipykernel: pip install -r requirements-dev.txt')
    torch.manual_seed(0)
    model = create_model('t2t_vit_7', num_classes=10, img_size=32)
    write_checkpoint({'arch': 't2t_vit_7', 'state_dict': model.state_dict(), 'classes': list('0123456789'),
                      'args': {'img_size': 32}}, tmp_path / 'model.pth.tar')
    monkeypatch.setenv('T2T_CHECKPOINT', str(tmp_path / 'model.pth.tar'))
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # In its own folder, as jupyter starts it; the first error of a cell ends it.
    nbclient.NotebookClient(notebook, timeout=120, resources={'metadata': {'path': NOTEBOOK.parent}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get('outputs', ())]
    assert sum('image/png' in output.get('data', ()) for output in shown) == FIGURES
    said = ''.join(output.get('text', '') for output in shown)
    assert 't2t_vit_7 at 32 pixels' in said and '359 images of 10 classes' in said and '% dead' in said
