"""export.py and models/runtimes.py: what is written is read back, in a fresh process too, and gives PyTorch's logits.

    python -m pytest tests/test_export.py
"""
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import export as script
from models import runtimes as exports
from models.runtimes import RUNTIME_FORMATS, Checks, RuntimeFormat, TracedModel, describe, write_format
from tests.conftest import ROOT, run_command, run_script, succeeded, warm
from utils.errors import UserError

CLASSES = ['ant', 'bee', 'cat']
SMALL = {'depth': 1, 'embed_dim': 64, 'num_heads': 2}

# Only onnxruntime, torch and timm: what a user of the files has. The project is needed where it registers the model.
FRESH = """
import json, sys, numpy as np, onnxruntime, torch
images = [torch.from_numpy(a) for a in np.load('images.npz').values()]
session = onnxruntime.InferenceSession('out/model.onnx')
told = session.get_modelmeta().custom_metadata_map
extra = {'config.json': ''}
program = torch.export.load('out/model.export.pt2', extra_files=extra).module()
logits = {'onnx': [session.run(['logits'], {'image': i.numpy()})[0] for i in images],
          'torch-export': [program(i).detach().numpy() for i in images]}
assert 'timm' not in sys.modules
sys.path.insert(0, ROOT)
import timm
from models.runtimes import read_int8
folder, int8 = timm.create_model('local-dir:out/timm', pretrained=True).eval(), read_int8('out/model.int8.pth')
with torch.no_grad():
    logits['safetensors'] = [folder(i).numpy() for i in images]
    logits['int8'] = [int8(i).numpy() for i in images]
print(json.dumps({'onnx': told, 'torch-export': json.loads(extra['config.json']), 'timm': folder.pretrained_cfg['mean'],
                  'linear': str(int8.blocks[0].attn.qkv.weight().dtype),
                  'logits': {name: [l.tolist() for l in ls] for name, ls in logits.items()}}))
"""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(42)


def small_model(name='t2t_vit_7', img_size=(32, 32), **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=img_size, num_classes=3, **{**SMALL, **kwargs}).eval()


def traced_model(model, img_size=(32, 32)) -> TracedModel:
    return TracedModel(model, describe(model, classes=CLASSES, input_size=(3, *img_size)), img_size)


@pytest.fixture(scope='module')
def exported(tmp_path_factory, image_folder):
    """A run of the script: the folder it ran in, the model, what it printed, its results by format."""
    cwd = tmp_path_factory.mktemp('export')
    model = small_model()
    torch.save({'arch': 't2t_vit_7', 'classes': CLASSES, 'state_dict': model.state_dict(), 'args': {
        'model': 't2t_vit_7', 'model_kwargs': [f'{k}={v}' for k, v in SMALL.items()], 'mean': [0.4, 0.5, 0.6],
        'crop_pct': 1.0}}, cwd / 'run.pth.tar')
    printed = succeeded(run_script(
        'export.py', '--checkpoint', 'run.pth.tar', '--data', image_folder, '-j', '0', '-o', 'out',
        '--format', 'safetensors', 'onnx', 'torch-export', 'int8', cwd=cwd))
    record = json.loads((cwd / 'out' / 'export.json').read_text())
    return cwd, model, printed, {row['format']: row for row in record['exports']}


def test_each_form_gives_the_logits_of_pytorch(exported):
    cwd, _, printed, rows = exported
    assert list(rows) == ['pytorch', 'safetensors', 'onnx', 'torch-export', 'int8']
    for name in ('safetensors', 'onnx', 'torch-export'):
        assert max(rows[name]['difference_random'], rows[name]['difference_real']) <= 1e-4
        assert rows[name]['same_top1'] == 100 and rows[name]['ms_per_image'] > 0
    for name in ('onnx', 'torch-export'):
        axes = re.fullmatch(r'batch, height ≥ (\d+), width ≥ (\d+)', rows[name]['axes'])
        assert axes and all(16 <= int(smallest) <= 19 for smallest in axes.groups())
    assert rows['onnx']['note'].startswith('opset ')
    files = {row['file'] for name, row in rows.items() if name != 'pytorch'}
    assert {path.name for path in (cwd / 'out').iterdir()} == files | {'export.json', 'export.csv'}
    table = [line.split()[0] for line in printed.splitlines() if line]
    assert table[-6:] == ['format', *rows]


def test_accuracy_that_int8_costs_is_of_the_whole_data_set(exported):
    _, _, _, rows = exported
    assert rows['int8']['count'] == rows['pytorch']['count'] == 15
    # A random model has no confident answers to lose; but the losses are of two models, and near.
    assert 0 < abs(rows['int8']['loss'] - rows['pytorch']['loss']) < 0.05
    assert 0 < rows['int8']['difference_random'] < 0.2
    assert rows['int8']['note'] == '14 of 14 layers in 8 bits'


def test_files_are_read_by_a_fresh_process(exported):
    cwd, model, _, _ = exported
    images = [torch.randn(1, 3, 32, 32), torch.randn(5, 3, 32, 32), torch.randn(2, 3, 64, 48)]
    np.savez(cwd / 'images.npz', *images)
    told = json.loads(succeeded(run_command([sys.executable, '-c', FRESH.replace('ROOT', repr(str(ROOT)))], cwd)))
    with torch.no_grad():
        expected = [model(batch) for batch in images]
    for name, tolerance in (('safetensors', 1e-4), ('onnx', 1e-4), ('torch-export', 1e-4), ('int8', 0.2)):
        for ours, theirs in zip(expected, told['logits'][name], strict=True):
            torch.testing.assert_close(torch.tensor(theirs), ours, atol=tolerance, rtol=0)
    assert json.loads(told['onnx']['classes']) == CLASSES == told['torch-export']['label_names']
    assert json.loads(told['onnx']['mean']) == told['timm'] == [0.4, 0.5, 0.6]
    assert told['onnx']['img_size'] == '32x32' and told['torch-export']['pretrained_cfg']['crop_pct'] == 1.0
    assert told['linear'] == 'torch.qint8'


def test_transformer_tokens(tmp_path):
    model = small_model('t2t_vit_t_14', (32, 64))
    traced, checks = traced_model(model, (32, 64)), Checks(model, (32, 64), torch.randn(4, 3, 32, 64))
    row = write_format('onnx', traced, tmp_path, checks)
    assert 'failure' not in row and row['difference'] <= 1e-4 and 'height' in row['axes'], row


@pytest.mark.slow
def test_aotinductor(tmp_path):
    model = small_model()
    row = write_format('aotinductor', traced_model(model), tmp_path, Checks(model, (32, 32)))
    assert row['axes'] == 'batch' and row['difference'] <= 1e-4, row
    run = RUNTIME_FORMATS['aotinductor'].read(tmp_path / row['file'])
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(run(images), model(images).detach(), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match='takes'):  # the package by itself would return some numbers
        run(torch.randn(1, 3, 64, 64))


def test_int8_is_a_quarter_of_the_size(tmp_path):
    model = timm.create_model('t2t_vit_7', img_size=32, num_classes=3).eval()
    traced, checks = traced_model(model), Checks(model, (32, 32))
    exact, int8 = write_format('safetensors', traced, tmp_path, checks), write_format('int8', traced, tmp_path, checks)
    assert int8['megabytes'] < exact['megabytes'] / 3.5
    with pytest.raises(UserError, match='no int8 export'):
        exports.read_int8(tmp_path / 'timm' / 'model.safetensors')


def linear_model() -> tuple[torch.nn.Module, TracedModel]:
    """A model that is exported in no time, for images of any size."""
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5)).eval()
    return model, TracedModel(model, {'pretrained_cfg': {}}, (32, 32))


@pytest.mark.parametrize(('change', 'kept'), [
    (lambda logits: logits + 5e-5, True), (lambda logits: logits + 2e-4, False),
    (lambda logits: logits * (np.nan if len(logits) == 3 else 1), False), (lambda logits: logits.flip(0), False)])
def test_a_form_that_differs_is_not_kept(tmp_path, monkeypatch, change, kept):
    model, traced = linear_model()
    monkeypatch.setitem(RUNTIME_FORMATS, 'bent', RuntimeFormat(
        'bent.txt', lambda traced, path, graph: path.write_text(''), lambda path: lambda images: change(model(images))))
    (tmp_path / 'bent.txt').write_text('of another checkpoint')
    row = write_format('bent', traced, tmp_path, Checks(model, (32, 32), torch.randn(4, 3, 32, 32)))
    assert (tmp_path / 'bent.txt').exists() == kept == ('failure' not in row)
    assert kept or 'differ' in row['failure']
    assert {path.name for path in tmp_path.iterdir()} <= {'bent.txt'}


def test_large_logits_are_compared_by_their_size_and_none_may_be_nan(tmp_path, monkeypatch):
    model, traced = linear_model()
    torch.nn.init.constant_(model[2].bias, 1000)

    def exported_with(change, **form):
        monkeypatch.setitem(RUNTIME_FORMATS, 'bent', RuntimeFormat(
            'bent', lambda traced, path, graph: path.write_text(''),
            lambda path: lambda images: model(images) + change, **form))
        return write_format('bent', traced, tmp_path, Checks(model, (32, 32)))

    assert 'failure' not in exported_with(0.05) and 'differ' in exported_with(0.2)['failure']
    assert 'failure' not in exported_with(0.2, is_exact=False)
    assert 'differ' in exported_with(np.nan, is_exact=False)['failure']
    torch.nn.init.constant_(model[2].bias, np.nan)
    with pytest.raises(UserError, match='logits of the model itself are not finite'):
        Checks(model, (32, 32))


def test_other_sizes_are_open_only_where_they_are_exact(tmp_path, monkeypatch):
    model, traced = linear_model()

    def read(path):
        return lambda images: model(images) + (images.shape[2] != 32)

    monkeypatch.setitem(RUNTIME_FORMATS, 'bent', RuntimeFormat(
        'bent', lambda traced, path, graph: path.write_text(''), read, TracedModel.graphs))
    assert write_format('bent', traced, tmp_path, Checks(model, (32, 32)))['axes'] == 'batch'
    monkeypatch.setitem(RUNTIME_FORMATS, 'bent', RUNTIME_FORMATS['bent']._replace(read=lambda path: model))
    assert write_format('bent', traced, tmp_path, Checks(model, (32, 32)))['axes'].startswith('batch, height')


def test_models_of_one_size_are_exported_for_it():
    model = timm.create_model('deit_tiny_patch16_224', img_size=32, depth=1).eval()
    config = describe(model)
    del config['pretrained_cfg']['fixed_input_size']  # a model that does not say so, too
    assert exports.open_axes(TracedModel(model, config, (32, 32)).graph) == {'batch': 1}


def test_what_is_missing_is_said(monkeypatch):
    assert tuple(RUNTIME_FORMATS) == script.FORMATS
    assert exports.missing('safetensors') is None
    monkeypatch.setattr(exports.importlib.util, 'find_spec', lambda name: None if name == 'onnxscript' else name)
    assert exports.missing('onnx') == 'onnxscript not installed; pip install -r requirements-export.txt'
    assert (ROOT / 'requirements-export.txt').read_text().count('onnx') >= len(RUNTIME_FORMATS['onnx'].packages)


def test_script_goes_on_without_a_compiler(exported):
    cwd: Path = exported[0]
    result = run_script('export.py', '--checkpoint', 'run.pth.tar', '-o', 'more', '--format', 'aotinductor',
                        'safetensors', cwd=cwd, CXX='no-such-compiler')
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert 'aotinductor was not exported: there is no C++ compiler no-such-compiler' in result.stderr
    assert (cwd / 'more' / 'timm' / 'config.json').exists() and not (cwd / 'more' / 'model.aoti.pt2').exists()


def test_what_no_export_has_written_is_left_alone(exported):
    cwd: Path = exported[0]
    (cwd / 'mine/timm').mkdir(parents=True)
    (cwd / 'mine/timm/patch.py').write_text('x')
    command = ('export.py', '--checkpoint', 'run.pth.tar', '--format', 'safetensors', '-o', 'mine')
    result = run_script(*command, cwd=cwd)
    assert result.returncode == 2 and 'mine/timm is there, and no export has written it' in result.stderr
    assert [path.name for path in (cwd / 'mine').rglob('*')] == ['timm', 'patch.py']
    succeeded(run_script(*command[:-1], 'ours', cwd=cwd))
    succeeded(run_script(*command[:-1], 'ours', cwd=cwd))


KILLED = """
import os, signal, sys
sys.path.insert(0, ROOT)
sys.argv = ['export.py', *sys.argv[1:]]
from models import runtimes
from utils.script import run_script
import export

def write(traced, path, _):
    path.write_text('half of it')
    os.kill(os.getpid(), signal.SIGKILL)

runtimes.RUNTIME_FORMATS['int8'] = runtimes.RUNTIME_FORMATS['int8']._replace(write=write)
run_script(export.main)
"""


def test_the_same_command_goes_on_after_an_export_that_was_killed(exported):
    cwd: Path = exported[0]
    command = ('--checkpoint', 'run.pth.tar', '--format', 'safetensors', 'int8', '-o', 'stopped')
    killed = run_command([warm().python, '-c', KILLED.replace('ROOT', repr(str(ROOT))), *command], cwd)
    out, weights = cwd / 'stopped', cwd / 'stopped/timm/model.safetensors'
    assert killed.returncode == -9 and {path.name for path in out.iterdir()} == {'timm', 'export.json', '.unfinished'}
    (row,) = (row for row in json.loads((out / 'export.json').read_text())['exports'] if row['format'] == 'safetensors')
    written = weights.stat().st_mtime_ns
    shutil.copytree(out, cwd / 'stopped2')
    assert 'timm is there, of an export that was stopped' in succeeded(run_script('export.py', *command, cwd=cwd))
    assert weights.stat().st_mtime_ns == written
    assert {path.name for path in out.iterdir()} == {'timm', 'model.int8.pth', 'export.json', 'export.csv'}
    record = json.loads((out / 'export.json').read_text())
    assert 'unfinished' not in record and record['exports'][1] == row
    # Another checkpoint under the same name is exported anew.
    os.utime(cwd / 'run.pth.tar')
    assert 'is there' not in succeeded(run_script('export.py', *command[:-1], 'stopped2', cwd=cwd))


def test_both_kinds_of_images_are_refused(tmp_path):
    for name in ('a.jpg', 'x.pth'):
        (tmp_path / name).touch()
    result = run_script('export.py', 'a.jpg', '--dataset', 'digits', '--checkpoint', 'x.pth', cwd=tmp_path)
    assert result.returncode == 2 and 'not both' in result.stderr
