"""What users and files can get wrong, in bulk: one line each, before the data is scanned, and nothing is executed.

    python -m pytest tests/faults/test_fuzz.py                # a part, in seconds
    python -m pytest -m faults tests/faults/test_fuzz.py      # thousands of damaged recipes and pickles
"""

import copyreg
import importlib
import logging
import os
import pickle
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from models import create_model
from tests.conftest import ROOT, write_images
from tests.test_files import Hostile, attacks, write_checkpoint
from tests.test_options import parse
from utils.checkpoint_reader import read_checkpoint
from utils.errors import UserError

SEED = 20211012


# --- Command lines ----------------------------------------------------------------------------------------------------

SMALL = ('--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu', '-j', '0')
TRAIN = (*SMALL, '-b', '6', '--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--no-tensorboard')


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """A folder with what the mistakes below are about."""
    place = tmp_path_factory.mktemp('place')
    images = write_images(place / 'images', {'train': 12, 'val': 5})
    torch.save(create_model('t2t_vit_7', num_classes=3, img_size=32).state_dict(), place / 'weights.pth')
    Image.new('RGB', (8, 8)).save(place / 'image.pth', format='PNG')
    (place / 'folder').mkdir()
    (place / 'file').write_text('text')
    (place / 'latin.txt').write_bytes('bébé\n'.encode('latin1'))
    (place / 'list.yaml').write_text('- a\n')
    write_images(place / 'single', {'train': 2, 'val': 2}, classes=('ant',))
    shutil.copytree(images, place / 'flat')
    shutil.rmtree(place / 'flat/val')
    (place / 'flat/val').mkdir()
    shutil.copy(images / 'val/ant/ant_0.jpg', place / 'flat/val')
    shutil.copytree(images, place / 'extra')
    shutil.copytree(images / 'val/ant', place / 'extra/val/dog')
    (place / 'hollow/train/ant').mkdir(parents=True)
    (place / os.fsdecode(b'caf\xe9')).mkdir()  # a name that is no UTF-8
    return place


# What is known before the data is scanned: name → (script, options after the data, what the line must say).
EARLY = {
    'optimizer': ('train', '--opt adamww', 'did you mean adamw'),
    'second order': ('train', '--opt adahessian', 'second derivatives'),
    'one beta': ('train', '--opt-betas 0.9', 'give all of them'),
    'policy': ('train', '--aa rnd-m9', '--aa'),
    'policy section': ('train', '--aa rand-m9-foo5', '--aa'),
    'initial missing': ('train', '--initial-checkpoint no.pth', 'no.pth does not exist'),
    'initial image': ('train', '--initial-checkpoint {place}/image.pth', 'not a PyTorch checkpoint'),
    'initial folder': ('train', '--initial-checkpoint {place}/folder', 'is a folder'),
    'resume missing': ('train', '--resume no.pth', '--resume no.pth: no such checkpoint'),
    'resume folder': ('train', '--resume {place}/folder', 'no such checkpoint'),
    'device': ('train', '--device gpu', '--device gpu'),
    'device of none': ('train', '--device cuda:99', '--device cuda:99'),
    'other device': ('train', '--device meta', '--device meta'),
    'float16': ('train', '--amp --amp-dtype float16', '--amp-dtype'),
    'bad images': ('train', '--max-bad-images -1', '-1'),
    'bad val images': ('train', '--max-bad-val-images x', "'x' is not an integer"),
    'workers': ('train', '-j -1', '-1 is too small'),
    'epochs': ('train', '--epochs -1', '-1 is too small'),
    'many epochs': ('train', '--epochs 1' + '0' * 300, 'too large'),
    'rate': ('train', '--lr -1', '-1 is too small'),
    'infinite rate': ('train', '--lr inf', 'not a finite number'),
    'rate of nan': ('train', '--lr nan', 'nan'),
    'infinite mean': ('train', '--mean inf', 'not a finite number'),
    'decay': ('train', '--weight-decay -0.1', '-0.1 is too small'),
    'infinite mixup': ('train', '--mixup inf', 'not a finite number'),
    'no pixels': ('train', '--img-size 0', 'out of range'),
    'pixels': ('train', '--img-size 99999999', 'out of range'),
    'two means': ('train', '--mean 1 2', '--mean'),
    'std': ('train', '--std 0', '0 is too small'),
    'crop': ('train', '--crop-pct 2', '--crop-pct 2'),
    'scale': ('train', '--scale 1 0.5', 'scale'),
    'large scale': ('train', '--scale 3 5', 'scale'),
    'one split': ('train', '--aug-splits 1', '--aug-splits 1'),
    'splits and mixup': ('train', '--aug-splits 3', '--aug-splits 3'),
    'jsd': ('train', '--jsd --mixup 0 --cutmix 0', '--aug-splits'),
    'minmax': ('train', '--cutmix-minmax 0.8 0.2', '--cutmix-minmax'),
    'odd batch': ('train', '-b 5', 'even'),
    'noise': ('train', '--lr-noise 0.1 0.2 0.3', '--lr-noise'),
    'model tag': ('train', '--model resnet18.nope', "no weights 'nope'"),
    'model path': ('train', '--model /x/y', 'does not exist'),
    'no model': ('train', '--model=', 'does not exist'),
    'output file': ('train', '--output {place}/file', '--output: '),
    'output below a file': ('train', '--output {place}/file/x', '--output: '),
    'output nowhere': ('train', '--output /proc/x', '--output: '),
    'output transfer': ('transfer', '--dataset folder --output {place}/file/x', '--output: '),
    'recipe folder': ('train', '-c {place}/folder', 'directory'),
    'recipe image': ('train', '-c {place}/image.pth', 'not a recipe'),
    'recipe list': ('train', '-c {place}/list.yaml', 'a recipe is lines of'),
    'data file': ('train', '{place}/file', 'no option takes this value'),
    'transfer missing': ('transfer', '--dataset folder --transfer-learning --transfer-model no.pth', 'does not exist'),
    'transfer image': (
        'transfer', '--dataset folder --transfer-learning --transfer-model {place}/image.pth', 'not a PyTorch'),
    'transfer folder': (
        'transfer', '--dataset folder --transfer-learning --transfer-model {place}/folder', 'is a folder'),
    'transfer policy': ('transfer', '--dataset folder --aa rnd', '--aa'),
    'ratio': ('transfer', '--transfer-ratio -1', '-1 is too small'),
    'nothing to validate': ('validate', '', 'which weights?'),
    'validate image': ('validate', '--eval-checkpoint {place}/image.pth', 'not a PyTorch checkpoint'),
    'validate folder': ('validate', '--eval-checkpoint {place}/folder', 'is a folder'),
    'validate map': ('validate', '--eval-checkpoint {place}/weights.pth --class-map {place}/latin.txt', 'not UTF-8'),
    'validate map folder': (
        'validate', '--eval-checkpoint {place}/weights.pth --class-map {place}/folder', 'directory'),
    'validate results': (
        'validate', '--eval-checkpoint {place}/weights.pth --results-file {place}/file/x', '--results-file: '),
    'validate crop': ('validate', '--eval-checkpoint {place}/weights.pth --crop-pct 2', '--crop-pct'),
    'validate means': ('validate', '--eval-checkpoint {place}/weights.pth --mean 1 2', '--mean'),
}
# What the data says: (options before everything else, what the line must say).
LATE = {
    'no such data': ('{place}/nowhere', 'does not exist'),
    'data is a file': ('{place}/file', 'is not a folder'),
    'a folder without a name in UTF-8': ('{place}/' + os.fsdecode(b'caf\xe9'), 'no folder'),
    'a single class': ('{place}/single', 'at least two'),
    'flat': ('{place}/flat', 'no class folders'),
    'another class': ('{place}/extra', "'dog'"),
    'no images': ('{place}/hollow', 'no images'),
    'one level down': ('{place}/images/train', 'instead'),
    'one level up': ('{place}', 'did you mean'),
    'split': ('{place}/images --train-split nope', "'nope'"),
    'classes': ('{place}/images --only-classes x', "'x'"),
    'few classes': ('{place}/images --num-classes 2', '--num-classes 2'),
    'large batch': ('{place}/images -b 640', 'at most 36'),
    'other weights': ('{place}/images --model t2t_vit_10 --initial-checkpoint {place}/weights.pth', 't2t_vit_7'),
    'pooling': ('{place}/images --gp nope', 'nope'),
    'small image': ('{place}/images --img-size 15', 'at least 16'),
    'resume weights': ('{place}/images --resume {place}/weights.pth', 'weights.pth'),
    'no epoch left': ('{place}/images --start-epoch 100', 'nothing is left to train'),
    'CIFAR that is not there': ('{place} --dataset cifar10', 'cifar'),
}


class Scanned(Exception):
    """The data was looked at, which for the mistakes of EARLY is too late."""


def mistake(script, words, monkeypatch, tmp_path) -> UserError:
    """The error that a script ends with, run in this process from an empty folder, in which it leaves nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), 'handlers', [])
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', *words])
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        importlib.import_module(script).main()
    assert time.monotonic() - started < 5
    assert caught.value.exit_code == 2 and '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())
    return caught.value


@pytest.mark.parametrize('name', EARLY)
def test_a_mistake_is_one_line_before_the_data_is_scanned(name, place, monkeypatch, tmp_path):
    script, words, said = EARLY[name]

    def scan(*args):
        raise Scanned

    for function in ('data.datasets.ImageFolder', 'data.arrays.open_digits', 'data.arrays.open_cifar',
                     'data.places.require_folder'):
        if not (name.startswith('validate map') and function == 'data.places.require_folder'):
            monkeypatch.setattr(function, scan)
    options = SMALL if script == 'validate' else TRAIN
    words = [str(place / 'images'), *options, *words.format(place=place).split()]
    assert said in str(mistake(script, words, monkeypatch, tmp_path))


@pytest.mark.parametrize('name', LATE)
def test_a_mistake_that_the_data_tells_is_one_line(name, place, monkeypatch, tmp_path):
    words, said = LATE[name]
    first, *others = words.format(place=place).split()
    error = mistake('train', [first, *TRAIN, *others], monkeypatch, tmp_path)
    assert said in str(error)


# --- Recipes ----------------------------------------------------------------------------------------------------------

BAD_RECIPES = {
    'unknown key': 'learning_rate: 1',
    'key of another kind': '3: 4',
    'list as a key': '? [a, b]\n: 1',
    'mapping as a key': '? {a: b}\n: 1',
    'null as a key': '~: 1',
    'word for a number': 'lr: fast',
    'fraction for a count': 'epochs: 1.5',
    'truth for a count': 'epochs: yes',
    'list for a number': 'lr: [1, 2]',
    'mapping for a number': 'lr: {a: 1}',
    'number for a name': 'model: 14',
    'date for a name': 'model: 2021-10-11',
    'system': 'model: !!python/object/apply:os.system ["touch {canary}"]',
    'eval': 'model: !!python/object/apply:builtins.eval ["open({canary!r}, \'w\')"]',
    'new': 'model: !!python/object/new:os.mkdir ["{canary}"]',
    'name': 'model: !!python/name:os.system',
    'module': 'model: !!python/module:os',
    'tag on the whole': '!!python/object/apply:os.mkdir ["{canary}"]',
    'tag of its own': 'model: !run "touch {canary}"',
    'binary': 'model: !!binary aGVsbG8=',
    'set': 'model: !!set {a, b}',
    'duplicate key': 'lr: 1\nlr: 2',
    'duplicate key in two spellings': 'weight-decay: 1\nweight_decay: 2',
    'duplicate key in the other two': 'weight_decay: 1\nweight-decay: 2',
    'word without end': 'lr: ' + 'x' * 5000,
    'duplicate key far away': 'lr: 1\nepochs: 3\namp: true\nlr: 2',
    'bomb of anchors': 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
        f'{chr(98 + i)}: &{chr(98 + i)} [{", ".join(["*" + chr(97 + i)] * 9)}]\n' for i in range(12)),
    'bomb of anchors in one list': 'model:\n- &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
        f'- &{chr(98 + i)} [{", ".join(["*" + chr(97 + i)] * 9)}]\n' for i in range(5)),
    'anchor in itself': 'model: &a [*a]',
    'mapping in itself': '&a\nmodel: *a',
    'merge': '<<: {lr: 1}',
    'tabs': 'lr:\n\t- 1',
    'bytes': bytes(range(256)),
    'half of a character': 'model: é'.encode()[:-1],
    'zero': '\0',
    'list at the top': '- lr\n- 1',
    'word at the top': 'lr',
    'nan': 'lr: .nan',
    'infinity': 'lr: .inf',
    'huge integer': 'epochs: 1' + '0' * 400,
    'huge integer of text': 'epochs: 1' + '0' * 5000,
    'huge rate': 'lr: 1e999',
    'two documents': 'lr: 1\n---\nlr: 2',
    'open bracket': 'scale: [0.1, 0.5',
    'open quote': "model: 'a",
    'brackets in brackets': 'model: ' + '[' * 5000,
    'alias of nothing': 'lr: *nothing',
    'directive': '%YAML 9.9\n---\nlr: 1',
    'base 60': 'epochs: 1:30',
}


@pytest.mark.parametrize('name', BAD_RECIPES)
def test_a_bad_recipe_is_one_line_and_nothing_is_executed(name, tmp_path):
    content, canary = BAD_RECIPES[name], tmp_path / 'canary'
    if isinstance(content, str):
        content = content.replace('{canary!r}', repr(str(canary))).replace('{canary}', str(canary)).encode()
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(UserError, match='recipe.yaml') as caught:
        parse('-c', str(recipe), '/data')
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 500
    assert time.monotonic() - started < 5
    assert not canary.exists()


def test_a_key_that_is_no_name_is_called_that(tmp_path):
    for name in ('list as a key', 'mapping as a key', 'merge'):
        (tmp_path / 'r.yaml').write_text(BAD_RECIPES[name])
        with pytest.raises(UserError, match='line 1: not a recipe: a key is the name of an option'):
            parse('-c', str(tmp_path / 'r.yaml'), '/data')


def test_the_attacks_of_recipes_work_on_a_careless_reader(tmp_path):
    """So that they are refused for what they do."""
    for name in ('system', 'new', 'tag on the whole'):
        canary = tmp_path / f'canary of {name}'.replace(' ', '-')
        yaml.unsafe_load(BAD_RECIPES[name].replace('{canary}', str(canary)))
        assert canary.exists()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Some bytes of `content` changed, cut out, doubled or put elsewhere."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        first = rng.randrange(len(content))
        last = min(len(content), first + rng.randint(1, 20))
        part = content[first:last]
        content[first:last] = rng.choice((b'', part + part, part[::-1], rng.randbytes(len(part)), b'\t', b': ', b'- '))
        content = content or bytearray(b'x')
    return bytes(content)


@pytest.mark.parametrize('count', [50, pytest.param(3000, marks=pytest.mark.faults)])
def test_damaged_recipes_are_read_or_refused(count, tmp_path, record_property):
    """Whatever became of a recipe: options, or one line."""
    print('seed', SEED)
    rng, recipe = random.Random(SEED), tmp_path / 'recipe.yaml'
    whole = (ROOT / 'configs/demo.yaml').read_bytes()
    refused = 0
    for _ in range(count):
        recipe.write_bytes(damaged(whole, rng))
        try:
            parse('-c', str(recipe), '/data')
        except UserError as error:
            assert '\n' not in str(error), recipe.read_bytes()
            refused += 1
    assert refused > count / 5
    record_property('damaged recipes', count)


# --- Pickles ----------------------------------------------------------------------------------------------------------

def hostile_pickles(canary: Path) -> dict[str, bytes]:
    """Those of tests/test_files.py, and the same calls at other places of a checkpoint."""
    weights = {'head.weight': np.zeros((2, 2), np.float32)}
    call = Hostile(os.mkdir, str(canary))
    places = {
        'the whole': call,
        'a weight': {**weights, 'head.bias': call},
        'a key': {**weights, call: 1},
        'in a list': {'state_dict': weights, 'optimizer': {'param_groups': [{'params': [call]}]}},
        'in a tuple': {'state_dict': weights, 'ranks': (1, (2, (3, call)))},
        'in a set': {'state_dict': weights, 'classes': {call}},
        'in front of the weights': {'epoch': call, 'state_dict': weights},
        'an import': {**weights, 'a': Hostile(__import__, 'os'), 'b': call},
        'a file': {**weights, 'a': Hostile(open, str(canary), 'w')},
        'a process': {**weights, 'a': Hostile(importlib.import_module('subprocess').call, ['touch', str(canary)])},
        'a path': {**weights, 'a': Hostile(Path.touch, canary)},
        'beside a tensor': {**weights, 'a': np.ones(3), 'args': {'lr': 1.0, 'more': [call]}},
    }
    return attacks(canary) | {f'{where}, protocol {2 + index % 3}': pickle.dumps(content, protocol=2 + index % 3)
                              for index, (where, content) in enumerate(places.items())}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    path = tmp_path / 'canary'
    monkeypatch.setenv('CANARY', str(path))
    np.save(tmp_path / 'hostile.npy', np.array([Hostile(os.mkdir, str(path))], dtype=object), allow_pickle=True)
    copyreg.add_extension('os', 'system', 240)
    yield path
    copyreg.remove_extension('os', 'system', 240)
    copyreg.clear_extension_cache()


def test_there_are_thirty_pickles():
    assert len(hostile_pickles(Path('canary'))) >= 30


@pytest.mark.parametrize('name, container', [('a.pth', 'zip'), ('a.pth.tar', 'legacy'), ('a.pdparams', 'paddle')])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_no_pickle_is_executed(name, container, canary, tmp_path, record_property):
    pickles = hostile_pickles(canary)
    for attack, content in pickles.items():
        write_checkpoint(tmp_path / name, content, container)
        with pytest.raises(UserError, match=name) as caught:
            read_checkpoint(tmp_path / name)
        assert '\n' not in str(caught.value), attack
        assert not canary.exists(), attack
    record_property('pickles', len(pickles))


@pytest.mark.parametrize('name, container', [('a.pth', 'zip'), ('a.pth.tar', 'legacy'), ('a.pdparams', 'paddle')])
@pytest.mark.parametrize('count', [100, pytest.param(5000, marks=pytest.mark.faults)])
def test_damaged_pickles_are_read_or_refused(name, container, count, canary, tmp_path, record_property):
    """Hostile and sound ones, bytes of them changed: a dict, or one line, and nothing executed."""
    print('seed', SEED)
    rng = random.Random(SEED)
    sound = {'state_dict': {'head.weight': np.zeros((4, 4), np.float32)}, 'epoch': 3, 'classes': ['a', 'b']}
    contents = [*hostile_pickles(canary).values(), *(pickle.dumps(sound, protocol=n) for n in (2, 3, 4))]
    for _ in range(count):
        content = damaged(rng.choice(contents), rng)
        write_checkpoint(tmp_path / name, content, container)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                assert isinstance(read_checkpoint(tmp_path / name), dict)
        except UserError as error:
            assert '\n' not in str(error), content
        assert not canary.exists(), content
    record_property('damaged pickles', count)


def test_an_alias_is_one_value_never_a_list_that_could_grow(tmp_path):
    (tmp_path / 'r.yaml').write_text(BAD_RECIPES['bomb of anchors in one list'])
    with pytest.raises(UserError, match=r'line 2: not a recipe: an alias \(\*\) of more than one value'):
        parse('-c', str(tmp_path / 'r.yaml'), '/data')
    (tmp_path / 'r.yaml').write_text('lr: &rate 0.25\nwarmup_lr: *rate')
    assert parse('-c', str(tmp_path / 'r.yaml'), '/data').warmup_lr == 0.25
