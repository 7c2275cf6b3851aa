"""docs/look_inside.ipynb: kept without outputs, and every cell of it runs."""
import json

import pytest
import torch

from models import create_model
from tests.conftest import ROOT, write_checkpoint

NOTEBOOK = ROOT / 'docs/look_inside.ipynb'
FIGURES = 5


def test_notebook_is_kept_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())['cells']:
        assert cell['cell_type'] == 'markdown' or (cell['outputs'] == [] and cell['execution_count'] is None)


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
