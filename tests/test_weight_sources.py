"""Tests of utils/weight_sources.py: what --checkpoint and --model may name, through the scripts.

    python -m pytest tests/test_weight_sources.py
"""
import contextlib
import functools
import http.server
import json
import logging
import os
import shutil
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from models import create_model_from_options, load_weights, read_checkpoint, resolve_name
from models.timm_versions import SAVES_ARGUMENTS
from models.weights.formats import recorded_classes, recorded_input
from options.parser import parse_options
from options.scripts import train_parser
from tests.conftest import evaluated, run_script, succeeded
from tools import checkpoint
from utils.errors import UserError
from utils.weight_sources import BEST, LAST, find_weights, read_weights

CLASSES = ['ant', 'bee', 'cat']
# Input settings that are not the models' own.
INPUT = {'mean': (0.5, 0.4, 0.3), 'std': (0.3, 0.2, 0.25), 'crop_pct': 0.6, 'interpolation': 'bilinear'}

CROP = 0.7  # recorded by runs

needs_arguments = pytest.mark.skipif(not SAVES_ARGUMENTS, reason='before timm 1.0.31 no arguments are saved')


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)
    print('seed 42')  # shown by pytest when a test fails


def tiny(name: str = 't2t_vit_7', **kwargs) -> torch.nn.Module:
    shrunk = {'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'img_size': 64} if name.startswith('t2t') else {}
    model = timm.create_model(name, **{'num_classes': 3, **shrunk, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # so that pictures make a difference
    return model


def photo(folder: Path) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((140, 100))
    image.save(folder / 'photo.png')
    return image


def predicted(folder: Path, *options, name: str = 'result') -> dict[str, float]:
    """Probabilities of the classes of photo.png, by the command line."""
    succeeded(run_script('predict.py', 'photo.png', *options, '--device', 'cpu', '-o', name, cwd=folder))
    record = json.loads((folder / f'{name}.json').read_text())
    return {guess['class']: guess['probability'] for guess in record['images'][0]['classes']}


def expected(model: torch.nn.Module, image: Image.Image, settings: dict = INPUT, size: int = 64) -> dict[str, float]:
    """The same by timm alone."""
    config = resolve_data_config({**settings, 'input_size': (3, size, size)}, pretrained_cfg=model.pretrained_cfg)
    with torch.inference_mode():
        probabilities = model(create_transform(**config)(image)[None]).softmax(1)[0].tolist()
    return dict(zip(CLASSES, probabilities, strict=True))


def refused(folder: Path, *options, script: str = 'predict.py') -> str:
    result = run_script(script, *(['photo.png'] if script == 'predict.py' else []), *options, '--device', 'cpu',
                        cwd=folder)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    return result.stderr.splitlines()[-1]


# --- A run's folder ---------------------------------------------------------------------------------------------------

def write_run(folder: Path, **models: torch.nn.Module) -> None:
    folder.mkdir(parents=True)
    for name, model in models.items():
        torch.save({'state_dict': model.state_dict(), 'arch': 't2t_vit_7', 'classes': CLASSES, 'img_size': 64, 'args': {
            'model_kwargs': ['embed_dim=32', 'depth=2', 'num_heads=2'], 'crop_pct': CROP}}, folder / f'{name}.pth.tar')


def test_the_folder_of_a_run(tmp_path, caplog):
    best, last, older = tiny(), tiny(), tiny()
    image = photo(tmp_path)
    runs = tmp_path / 'output/train'
    write_run(runs / 'b-older', model_best=older, last=older)
    write_run(runs / 'a-newer', model_best=best, last=last)
    for path in (runs / 'b-older').iterdir():
        os.utime(path, (1, 1))
    for given, model in (('output/train/latest', best), ('output/train/b-older', older)):
        assert evaluated(tmp_path / 'photo.png', '--checkpoint', given) == pytest.approx(
            expected(model, image, {'crop_pct': CROP}), abs=1e-5)
    assert predicted(tmp_path, '--checkpoint', 'output/train/b-older') == pytest.approx(
        expected(older, image, {'crop_pct': CROP}), abs=1e-5)
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['checkpoint'] == 'output/train/b-older/model_best.pth.tar'
    (runs / 'a-newer' / BEST).unlink()
    assert evaluated(tmp_path / 'photo.png', '--checkpoint', 'output/train/latest') == pytest.approx(
        expected(last, image, {'crop_pct': CROP}), abs=1e-5)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        find_weights(runs / 'latest')
    assert caplog.messages == [f'{runs}/a-newer: taking last.pth.tar']

    printed = succeeded(run_script('tools/checkpoint.py', 'inspect', 'output/train/latest', cwd=tmp_path))
    assert printed.splitlines()[0].startswith('file           output/train/a-newer/last.pth.tar (')
    succeeded(run_script('tools/report', 'output/train/latest', '--device', 'cpu', cwd=tmp_path))
    assert (runs / 'a-newer/report.html').exists()
    assert 'output/train holds 2 runs; give one of them, such as output/train/b-older, or output/train/latest' in (
        refused(tmp_path, '--checkpoint', 'output/train'))
    for given, message in ((tmp_path / 'latest', f'no run in {tmp_path} has a checkpoint'), (tmp_path, 'is a folder')):
        with pytest.raises(UserError, match=message):
            read_weights(given)


def test_a_run_s_folder_for_the_other_scripts(tmp_path, image_folder):
    write_run(tmp_path / 'run', model_best=tiny())
    succeeded(run_script('validate.py', image_folder, '--checkpoint', 'run', '--device', 'cpu', '-j', '0',
                         '--results-file', 'a', cwd=tmp_path))
    photo(tmp_path)
    succeeded(run_script('visualize.py', 'photo.png', '--checkpoint', 'run', '--figures', 'attention', cwd=tmp_path))
    succeeded(run_script('export.py', '--checkpoint', 'run', '--format', 'safetensors', '-o', 'out', cwd=tmp_path))
    # With config.json, and without it.
    wanted = evaluated(tmp_path / 'photo.png', '--checkpoint', 'run')
    assert evaluated(tmp_path / 'photo.png', '--checkpoint', 'out/timm') == wanted
    os.remove(tmp_path / 'out/timm/config.json')
    assert evaluated(tmp_path / 'photo.png', '--checkpoint', 'out/timm') == wanted
    target = tiny()
    load_weights(target, tmp_path / 'run')
    assert torch.equal(target.cls_token, read_checkpoint(tmp_path / 'run' / BEST)['state_dict']['cls_token'])


def test_the_newest_of_numbered_checkpoints(tmp_path):
    write_run(tmp_path / 'run', **{f'checkpoint-{step:08d}': tiny() for step in (5, 40)})
    assert find_weights(tmp_path / 'run').name == 'checkpoint-00000040.pth.tar'
    assert find_weights(f'local-dir:{tmp_path}/run').name == 'checkpoint-00000040.pth.tar'


def test_a_folder_with_one_file(tmp_path):
    (tmp_path / 'notes.txt').touch()
    torch.save(tiny().state_dict(), tmp_path / 'epoch=3.ckpt')
    assert find_weights(tmp_path) == tmp_path / 'epoch=3.ckpt'
    shutil.copy(tmp_path / 'epoch=3.ckpt', tmp_path / 'epoch=4.ckpt')
    with pytest.raises(UserError, match='is a folder; give the path'):  # the choice is the user's
        read_weights(tmp_path)


# --- config.json beside the weights -----------------------------------------------------------------------------------

def save_folder(model: torch.nn.Module, folder: Path, **config) -> None:
    """As timm does for the Hub."""
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_config={
        'label_names': CLASSES, 'label_descriptions': {'ant': 'an insect'},
        'pretrained_cfg': {**INPUT, 'crop_mode': 'border'}, **config})


@needs_arguments
@pytest.mark.parametrize('name, kwargs', [('t2t_vit_7', {'global_pool': 'avg'}), ('resnet18', {}),
                                          ('vit_tiny_patch16_224', {
                                              'img_size': 64, 'class_token': False, 'global_pool': 'avg'})])
def test_input_and_names_of_config_json(name, kwargs, tmp_path):
    model = tiny(name, **kwargs)
    image = photo(tmp_path)
    model.pretrained_cfg['input_size'] = (3, 64, 64)
    save_folder(model, tmp_path / 'hub')
    wanted = expected(model, image, {**INPUT, 'crop_mode': 'border'})
    assert wanted != pytest.approx(expected(model, image, {}), abs=1e-3)
    for options in (('--checkpoint', 'hub'), ('--model', 'local-dir:hub', '--pretrained')):
        assert evaluated(tmp_path / 'photo.png', *options) == pytest.approx(wanted, abs=1e-5), options
    for given in ('hub', 'hub/model.safetensors'):
        assert find_weights(tmp_path / given) == find_weights(f'local-dir:{tmp_path}/hub')
    # What is given on the command line comes first.
    assert evaluated(tmp_path / 'photo.png', '--checkpoint', 'hub', '--crop-pct', '1.0') == pytest.approx(
        expected(model, image, {**INPUT, 'crop_mode': 'border', 'crop_pct': 1.0}), abs=1e-5)
    if name == 't2t_vit_7':
        assert predicted(tmp_path, '--checkpoint', 'hub') == pytest.approx(wanted, abs=1e-5)
        record = json.loads((tmp_path / 'result.json').read_text())
        assert (record['model'], record['img_size'], record['crop_pct']) == (name, [64, 64], 0.6)


def test_config_json_of_older_files(tmp_path):
    """One level, as timm wrote it for the Hub at first; numbered names; what cannot be used is left out."""
    model = tiny('resnet18')
    torch.save(model.state_dict(), tmp_path / 'pytorch_model.bin')
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({'architecture': 'resnet18', 'num_classes': 3, 'labels': CLASSES, 'crop_pct': 7,
                                'input_size': [3, 64, 64], 'mean': [0.5, 0.4, 0.3], 'std': 'none'}))
    content = read_weights(tmp_path)
    assert recorded_classes(content) == CLASSES and content['img_size'] == [64, 64]
    assert recorded_input(content) == {'mean': [0.5, 0.4, 0.3]}
    path.write_text(json.dumps({'architecture': 'resnet18', 'num_classes': 4, 'label_names': CLASSES}))
    assert recorded_classes(read_weights(tmp_path)) is None  # of another classifier
    path.write_text(json.dumps({'architecture': 'resnet18', 'label_names': {'1': 'bee', '0': 'ant', '2': 'cat'},
                                'pretrained_cfg': {}}))
    assert recorded_classes(read_weights(tmp_path)) == CLASSES
    for text in ('{"model_type": "vit", "image_size": 224}', '{"architecture": 3}', '[]', 'no JSON'):
        path.write_text(text)
        assert read_weights(tmp_path).keys() == model.state_dict().keys()


def test_json_with_a_byte_order_mark(tmp_path):
    """As Windows' editors save it."""
    state = tiny().state_dict()
    folder = tmp_path / 'parts'
    write_parts(state, folder, 'model.safetensors')
    (folder / 'config.json').write_text('{"architecture": "t2t_vit_7", "label_names": ["ä", "b"]}', encoding='utf-8')
    for path in folder.glob('*.json'):
        path.write_bytes(path.read_text(encoding='utf-8').encode('utf-8-sig'))
    found = read_weights(folder)
    assert found['classes'] == ['ä', 'b'] and found['state_dict'].keys() == state.keys()


@needs_arguments
def test_training_from_a_folder_of_timm(tmp_path, image_folder):
    model = tiny(num_classes=5)
    save_folder(model, tmp_path / 'hub', label_names=list('abcde'))
    command = ('--model', 'local-dir:hub', '--pretrained', '--img-size', '32', '-b', '6', '-j', '0', '--epochs', '1',
               '--warmup-epochs', '0', '--cooldown-epochs', '0', '--lr', '0', '--device', 'cpu', '--no-tensorboard',
               '--experiment', 'run', '--weight-decay', '0', '--warmup-lr', '0', '--min-lr', '0')
    result = run_script('train.py', image_folder, *command, cwd=tmp_path)
    succeeded(result)
    assert 'classifier not loaded: the weights have 5 classes, the model has 3 classes' in result.stdout
    content = read_checkpoint(tmp_path / 'output/train/run' / LAST)
    assert content['arch'] == 't2t_vit_7'
    assert torch.equal(content['state_dict']['cls_token'], model.state_dict()['cls_token'])
    options = content['args']
    assert options['mean'] == [0.5, 0.4, 0.3] and options['crop_pct'] == 0.6 and options['model'] == 't2t_vit_7'
    assert {'embed_dim=32', 'depth=2', 'num_heads=2'} <= set(options['model_kwargs'])
    # Without --pretrained the architecture alone is taken.
    random = run_script('train.py', image_folder, *(word for word in command if word != '--pretrained'),
                        '--output', 'other', '--model-kwargs', 'depth=1', '--std', '0.5', cwd=tmp_path)
    succeeded(random)
    other = read_checkpoint(tmp_path / 'other/train/run' / LAST)
    assert other['args']['model_kwargs'][-1] == 'depth=1' and 'blocks.1.norm1.bias' not in other['state_dict']
    assert other['args']['std'] == [0.5] and other['args']['mean'] == [0.5, 0.4, 0.3]
    assert not torch.equal(other['state_dict']['cls_token'], model.state_dict()['cls_token'])
    assert 'names no architecture of timm' in refused(tmp_path, image_folder, '--model', 'local-dir:.',
                                                      script='train.py')


# --- Weights in parts -------------------------------------------------------------------------------------------------

def write_parts(state: dict, folder: Path, kind: str) -> None:
    """As accelerate and transformers write large models."""
    folder.mkdir()
    stem, suffix = kind.split('.')
    keys = list(state)
    weight_map = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f'{stem}-{number:05d}-of-00002.{suffix}'
        weights = {key: state[key].contiguous() for key in part}
        if suffix == 'bin':
            torch.save(weights, folder / name)
        else:
            safetensors.torch.save_file(weights, folder / name, {'format': 'pt'})
        weight_map |= dict.fromkeys(part, name)
    (folder / f'{kind}.index.json').write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': weight_map}))


@pytest.mark.parametrize('kind', ['model.safetensors', 'pytorch_model.bin'])
def test_weights_in_parts(kind, tmp_path):
    model, target = tiny(), tiny()
    write_parts(model.state_dict(), tmp_path / 'parts', kind)
    index = tmp_path / 'parts' / f'{kind}.index.json'
    for given in (tmp_path / 'parts', index, f'local-dir:{tmp_path}/parts'):
        load_weights(target, given)
        assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), model.state_dict().values(),
                                                     strict=True))
        torch.nn.init.zeros_(target.cls_token)
    stem, suffix = kind.split('.')
    part = tmp_path / 'parts' / f'{stem}-00002-of-00002.{suffix}'
    with pytest.raises(UserError, match=f'is one of 2 parts of the weights; give their folder, {tmp_path}/parts'):
        load_weights(target, part)
    content = json.loads(index.read_text())
    index.write_text(json.dumps({'weight_map': {**content['weight_map'], 'more': part.name}}))
    with pytest.raises(UserError, match='1 of .* weights are missing, such as more; copy all parts again'):
        load_weights(target, tmp_path / 'parts')
    part.unlink()
    with pytest.raises(UserError, match=f'{part.name} does not exist'):
        load_weights(target, tmp_path / 'parts')


@pytest.mark.parametrize('text', ['{', '[]', '{"weight_map": 3}', '{"weight_map": {"a": "../other/model.safetensors"}}',
                                  '{"weight_map": {"a": "/model.safetensors"}}', '{"weight_map": {"a": null}}'])
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / 'model.safetensors.index.json').write_text(text)
    with pytest.raises(UserError, match='is no index of weights') as caught:
        read_weights(tmp_path)
    assert '\n' not in str(caught.value)


# --- The Hugging Face Hub ---------------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The cache of the Hub, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    folder = tmp_path / 'cache/models--someone--t2t'
    (folder / 'refs').mkdir(parents=True)
    (folder / 'refs/main').write_text('0' * 40)
    return folder / 'snapshots' / ('0' * 40)


@needs_arguments
def test_a_model_in_the_cache_of_the_hub(hub, tmp_path):
    model, target = tiny(), tiny()
    save_folder(model, hub)
    for address in ('hf-hub:someone/t2t', 'hf_hub:someone/t2t', 'hf-hub:someone/t2t@main'):
        assert recorded_classes(read_weights(address)) == CLASSES
        load_weights(target, address)
        assert torch.equal(target.cls_token, model.cls_token)
    shutil.rmtree(hub)
    write_parts(model.state_dict(), hub, 'model.safetensors')
    (hub / 'config.json').write_text('{"architecture": "t2t_vit_7"}')
    assert torch.equal(read_weights('hf-hub:someone/t2t')['state_dict']['cls_token'], model.cls_token)


def test_a_model_that_the_hub_does_not_give(hub, tmp_path):
    with pytest.raises(UserError, match='hf-hub:someone/else could not be fetched .* give local-dir:FOLDER') as caught:
        find_weights('hf-hub:someone/else')
    assert '\n' not in str(caught.value)
    photo(tmp_path)
    for options in (('--checkpoint', 'hf-hub:someone/else'), ('--model', 'hf-hub:someone/else', '--pretrained'),
                    ('--model', 'hf-hub:?', '--pretrained')):
        assert 'could not be fetched' in refused(tmp_path, *options)
    for name, message in (('timm/resnet18', 'a model of the Hugging Face Hub is hf-hub:timm/resnet18, a folder'),
                          ('local-dir:a/b', 'local-dir:a/b is an address, not the name of a model')):
        with pytest.raises(UserError, match=message):
            resolve_name(name)


# --- URLs -------------------------------------------------------------------------------------------------------------

class Server(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if 'broken' in self.path:
            self.send_response(200)
            self.send_header('Content-Length', '1000000')
            self.end_headers()
            self.wfile.write(b'PK')
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def server(folder: Path):
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Server, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{running.server_port}'
        running.shutdown()


def test_weights_at_a_url(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    models = {name: tiny() for name in ('a', 'b')}
    for name, model in models.items():
        (tmp_path / 'www' / name).mkdir(parents=True)
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'www' / name / 'model.pth')
    (tmp_path / 'www/page.pth').write_text('<!DOCTYPE html><p>Log in</p>')
    target = tiny()
    with server(tmp_path / 'www') as address:
        for name, model in models.items():  # the same name of a file, from two places
            load_weights(target, f'{address}/{name}/model.pth?token=secret')
            assert torch.equal(target.cls_token, model.cls_token)
        for page, reason in (('page.pth', 'page.pth is a web page, not a checkpoint'), ('none.pth', 'HTTP Error 404'),
                             ('broken.pth', 'it broke off after 2 bytes')):
            with pytest.raises(UserError, match=reason) as caught:
                load_weights(target, f'{address}/{page}?token=secret')
            assert '\n' not in str(caught.value) and 'secret' not in str(caught.value)
            assert str(caught.value).startswith(f'{address}/{page}')
    # What was fetched once needs no server; what failed left nothing.
    with caplog.at_level(logging.INFO):
        load_weights(target, f'{address}/a/model.pth?token=secret')
    assert torch.equal(target.cls_token, models['a'].cls_token)
    assert 'was fetched before: taking' in caplog.text and 'secret' not in caplog.text
    assert len(list((tmp_path / 'hub/checkpoints').iterdir())) == 2
    photo(tmp_path)
    assert 'could not be fetched' in refused(tmp_path, '--checkpoint', f'{address}/c.pth')


# --- Channels ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['t2t_vit_7', 'resnet18', 'vit_tiny_patch16_224'])
def test_weights_for_grey_images(name, tmp_path):
    kwargs = {'img_size': 64} if 'vit' in name else {}
    model = tiny(name, in_chans=1, **kwargs)
    arguments = ['embed_dim=32', 'depth=2', 'num_heads=2'] if name.startswith('t2t') else None
    torch.save({'state_dict': model.state_dict(), 'arch': name, 'classes': CLASSES, 'img_size': 64, 'args': {
        'mean': [0.4], 'std': [0.2], 'crop_pct': 1.0, 'model_kwargs': arguments}}, tmp_path / 'grey.pth')
    image = photo(tmp_path).convert('L')
    image.convert('RGB').save(tmp_path / 'photo.png')
    config = resolve_data_config({'input_size': (1, 64, 64), 'mean': [0.4], 'std': [0.2], 'crop_pct': 1.0},
                                 pretrained_cfg=model.pretrained_cfg)
    with torch.inference_mode():
        wanted = model(create_transform(**config)(image)[None]).softmax(1)[0].tolist()
    given = ['grey.pth']
    if SAVES_ARGUMENTS:  # a folder, whose config.json has one mean and in_chans=1
        with contextlib.chdir(tmp_path):
            checkpoint.main(['convert', 'grey.pth', 'hub/'])
        given.append('hub')
    for path in given:
        assert evaluated(tmp_path / 'photo.png', '--checkpoint', path) == pytest.approx(
            dict(zip(CLASSES, wanted, strict=True)), abs=1e-4)
    if name == 'resnet18':
        assert predicted(tmp_path, '--checkpoint', 'grey.pth') == pytest.approx(
            dict(zip(CLASSES, wanted, strict=True)), abs=1e-4)


@pytest.mark.parametrize('name', ['t2t_vit_7', 'resnet18'])
def test_channels_that_are_not_served(name, tmp_path, image_folder):
    photo(tmp_path)
    torch.save({'state_dict': timm.create_model(name, num_classes=3, in_chans=4).state_dict(), 'arch': name},
               tmp_path / 'four.pth')
    assert 'four.pth: the weights take images of 4 channels; images are read as RGB' in refused(
        tmp_path, '--checkpoint', 'four.pth')
    for channels in (1, 4):
        for script, *given in (('train.py', image_folder), ('transfer.py', image_folder, '--dataset', 'folder'),
                               ('predict.py', '--pretrained')):
            line = refused(tmp_path, *given, '--model', name, '--model-kwargs', f'in_chans={channels}', script=script)
            assert f'--model-kwargs in_chans={channels}: images are read as RGB, with 3 channels' in line


@pytest.mark.parametrize('name, argument, reason', [
    ('resnet18', 'features_only=True', 'a list for an image'), ('t2t_vit_7', 'token_dim=0', 'not enough values'),
    ('vit_tiny_patch16_224', 'device=meta', 'device'), ('resnet18', 'checkpoint_path=none.pth', 'FileNotFoundError'),
    ('vit_tiny_patch16_224', 'norm_layer=none', "'none'"), ('resnet18', 'output_stride=7', 'AssertionError')])
def test_arguments_with_which_a_model_gives_no_logits(name, argument, reason, image_folder, tmp_path):
    assert reason in refused(tmp_path, image_folder, '--model', name, '--model-kwargs', argument, '--img-size', '32',
                             script='train.py')


def test_a_trial_of_arguments_changes_nothing():
    """Neither the random numbers nor the mode of the model, with which a training starts."""
    options = parse_options(train_parser(), ['--model', 'vit_tiny_patch16_224', '--img-size', '32', '--model-kwargs',
                                             'patch_size=8'])
    torch.manual_seed(1)
    model = create_model_from_options(options, num_classes=3)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    again = timm.create_model('vit_tiny_patch16_224', num_classes=3, img_size=32, patch_size=8, drop_path_rate=0.1)
    assert torch.equal(torch.rand(3), drawn) and model.training and again.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
