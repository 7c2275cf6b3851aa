"""validate.py on ImageNet's evaluation sets, with several views and several models, against direct computations.

The sets are small, and have the folders and names of the originals. Images are put where the model is right on some.
"""
import csv
import importlib
import importlib.util
import json
import logging
import math
import pkgutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.data.real_labels import RealLabelsImagenet
from torch import nn
from torchvision.transforms.functional import five_crop

from data.evaluation_sets import ALEXNET_ERRORS, ImageSet, columns_of
from engine.calibration import calibration_error, wilson_interval
from models import TrainedModel, average_weights, create_model
from options.parser import Options
from tests.conftest import launch, succeeded
from utils.errors import UserError

SYNSETS = ImageNetInfo().label_names()
TINY = dict(embed_dim=32, depth=1, num_heads=2)
MODEL = ('--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '3', '--model-kwargs',
         *(f'{name}={value}' for name, value in TINY.items()))


def info(name: str) -> list[str]:
    return pkgutil.get_data('timm.data', f'_info/{name}').decode().split()


def tiny_model(seed: int, size: int = 32) -> nn.Module:
    """A model of ImageNet's classes whose guesses differ from image to image."""
    torch.manual_seed(seed)
    model = create_model('t2t_vit_7', num_classes=1000, img_size=size, **TINY).eval()
    for name, weights in model.named_parameters():
        if weights.dim() > 1 and not name.endswith('.w') and name != 'cls_token':  # w: of the Performer's kernel
            nn.init.normal_(weights, std=0.5)
    return model


def picture(number: int) -> Image.Image:
    """Wider or taller than high, so that its corners differ."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, 3) + rng.normal(0, 60, (40 + 7 * (number % 5), 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def normalised(image: Image.Image, size: int = 32) -> torch.Tensor:
    """The image as validate.py takes it, by timm's own transform: [1, 3, size, size]."""
    return create_transform((3, size, size), crop_pct=0.9, interpolation='bicubic')(image)[None]


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format='PNG')  # without loss, whatever its name


class Sets:
    """A folder with two models and small evaluation sets; logits of the first model for each set's images.

    Attributes:
        logits: of each set, by the path of an image in it: [1000].
    """

    def __init__(self, root: Path):
        self.root = root
        models = [tiny_model(seed) for seed in (1, 2)]
        for number, model in enumerate(models):
            torch.save({'arch': 't2t_vit_7', 'state_dict': model.state_dict()}, root / f'{number}.pth')
        self.model = models[0]
        # The same model with its classes in another order, which its checkpoint names.
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
        state = {name: tensor[order] if name.startswith('head.') else tensor
                 for name, tensor in self.model.state_dict().items()}
        torch.save({'arch': 't2t_vit_7', 'state_dict': state, 'classes': [SYNSETS[k] for k in order]},
                   root / 'other_order.pth')
        self.logits = {name: {} for name in ('val', 'v2', 'a', 'r', 'sketch', 'c')}
        self._write_validation_images()
        for name, outputs in (('v2', range(1000)), ('sketch', range(1000)), *(
                (name, [int(k) for k in info(f'imagenet_{name}_indices.txt')]) for name in 'ar')):
            for number in range(4):
                image = picture(100 + number)
                logits = self._logits_of(image)
                target = outputs[int(logits[list(outputs)].argmax() if number % 2 else (37 * number + 5) % 200)]
                folder = str(target) if name == 'v2' else SYNSETS[target]
                self._add(name, f'{folder}/{number}.jpeg', image, logits)
        for corruption, number in ((corruption, number) for corruption in ('fog', 'contrast') for number in range(3)):
            for strength in '12345':
                image = picture(200 + 10 * number + int(strength))
                logits = self._logits_of(image)
                is_easy = int(strength) < (3 if corruption == 'fog' else 5) and number
                target = int(logits.argmax()) if is_easy else number
                self._add('c', f'{corruption}/{strength}/{SYNSETS[target]}/{number}.JPEG', image, logits)

    def _write_validation_images(self) -> None:
        """Image 1 has no ReaL label, image 2 another; of others, one of the labels is the model's guess."""
        labels = json.loads(' '.join(info('imagenet_real_labels.json')))
        assert not labels[0]
        for number in range(1, 8):
            image = picture(number)
            logits = self._logits_of(image)
            guess = int(logits.argmax())
            place = {1: 1, 2: 4}.get(number) or 1 + next(
                place for place, own in enumerate(labels) if place > 5000 * number and guess in own)
            target = guess if number % 3 == 0 else 11
            self._add('val', f'{SYNSETS[target]}/ILSVRC2012_val_{place:08d}.JPEG', image, logits)

    def _logits_of(self, image: Image.Image) -> torch.Tensor:
        with torch.no_grad():
            return self.model(normalised(image))[0]

    def _add(self, name: str, path: str, image: Image.Image, logits: torch.Tensor) -> None:
        save(image, self.root / name / path)
        self.logits[name][path] = logits

    def validate(self, *options, model=MODEL) -> dict:
        """The JSON that validate.py OPTIONS… MODEL… writes, in this process: importing torch takes seconds."""
        previous = sys.argv, logging.getLogger().handlers[:]
        sys.argv = ['validate.py', *map(str, options), *model, '--results-file', str(self.root / 'result.json')]
        try:
            importlib.import_module('validate').main()
        finally:
            sys.argv, logging.getLogger().handlers[:] = previous
        return json.loads((self.root / 'result.json').read_text())


@pytest.fixture(scope='module')
def sets(tmp_path_factory) -> Sets:
    return Sets(tmp_path_factory.mktemp('sets'))


def places(sets: Sets, *names: str) -> list[str]:
    return [f'{name}={sets.root / name}' for name in names]


def direct(logits: torch.Tensor, targets: list[int]) -> dict[str, float]:
    """The numbers of logits [n, K], by their definitions, image by image."""
    probabilities = logits.double().softmax(1)
    confidence, guesses = (values.tolist() for values in probabilities.max(1))
    right = [guess == target for guess, target in zip(guesses, targets, strict=True)]
    error = 0.0
    for low in range(15):
        own = [k for k, value in enumerate(confidence) if low / 15 < value <= (low + 1) / 15]
        if own:
            gap = sum(confidence[k] for k in own) / len(own) - sum(right[k] for k in own) / len(own)
            error += len(own) / len(targets) * abs(gap)
    recalls = [np.mean([right[k] for k in range(len(targets)) if targets[k] == target]) for target in set(targets)]
    return {'top1': 100 * float(np.mean(right)), 'ece': 100 * error, 'balanced_accuracy': 100 * float(np.mean(recalls)),
            'loss': float(np.mean([-math.log(probabilities[k, target]) for k, target in enumerate(targets)]))}


def test_each_set_is_judged_as_timm_and_its_authors_do(sets):
    given = places(sets, 'v2', 'a', 'r', 'sketch', 'c')
    result = sets.validate(sets.root / 'val', '--checkpoint', sets.root / '0.pth', '--data', *given, '--sets', 'val',
                           'real', 'v2', 'a', 'r', 'sketch', 'c', '--per-image', sets.root / 'images.csv')
    rows = {row['set']: row for row in result['results']}
    assert list(rows) == ['val', 'real', 'v2', 'a', 'r', 'sketch', 'c', 'c/fog', 'c/contrast']
    for name in ('val', 'v2', 'a', 'r', 'sketch', 'c'):
        paths = sorted(sets.logits[name])
        folders = [path.split('/')[-2] for path in paths]
        logits = torch.stack([sets.logits[name][path] for path in paths])
        targets = [int(folder) if name == 'v2' else SYNSETS.index(folder) for folder in folders]
        if name in 'ar':
            indices = [int(k) for k in info(f'imagenet_{name}_indices.txt')]
            logits, targets = logits[:, indices], [indices.index(target) for target in targets]
        expected = direct(logits, targets)
        assert 0 < expected['top1'] < 100, name
        assert {key: rows[name][key] for key in expected} == pytest.approx(expected, rel=1e-4), name
        assert rows[name]['count'] == len(paths)
    _check_real(sets, rows['real'])
    _check_corruptions(sets, rows)
    images = list(csv.DictReader(open(sets.root / 'images.csv')))
    assert [row['set'] for row in images] == [name for name, row in rows.items() if '/' not in name
                                              for _ in range(row['count'])]
    for name, row in rows.items():
        own = [image for image in images if image['set'] == name]
        if own:
            assert sum(image['right'] == 'True' for image in own) == pytest.approx(row['top1'] * row['count'] / 100)
            assert sum(float(image['loss']) for image in own) / len(own) == pytest.approx(row['loss'], rel=1e-5)


def _check_real(sets: Sets, row: dict) -> None:
    paths = sorted(sets.logits['val'])
    names = [Path(path).name for path in paths]
    others = {f'ILSVRC2012_val_{number:08d}.JPEG' for number in range(1, 50_001)} - set(names)
    timms = RealLabelsImagenet(names + sorted(others))
    logits = torch.stack([sets.logits['val'][path] for path in paths])
    timms.add_result(logits)
    assert row['count'] == len(timms.is_correct[1]) == len(paths) - 1
    assert 0 < row['top1'] < 100
    assert (row['top1'], row['top5']) == pytest.approx((timms.get_accuracy(1), timms.get_accuracy(5)))
    assert row['balanced_accuracy'] is row['macro_f1'] is None
    losses = [-math.log(sum(probabilities[label] for label in timms.real_labels[name]))
              for name, probabilities in zip(names, logits.double().softmax(1).tolist(), strict=True)
              if timms.real_labels[name]]
    assert row['loss'] == pytest.approx(np.mean(losses), rel=1e-4)


def _check_corruptions(sets: Sets, rows: dict) -> None:
    relative = {}
    for corruption in ('fog', 'contrast'):
        errors = [[int(logits.argmax()) != SYNSETS.index(path.split('/')[2])
                   for path, logits in sets.logits['c'].items() if path.startswith(f'{corruption}/{strength}/')]
                  for strength in range(1, 6)]
        relative[corruption] = np.mean([np.mean(of_strength) for of_strength in errors]) / ALEXNET_ERRORS[corruption]
        assert rows[f'c/{corruption}']['corruption_error'] == pytest.approx(100 * relative[corruption])
    assert relative['fog'] != relative['contrast']
    assert rows['c']['corruption_error'] == pytest.approx(100 * np.mean([*relative.values()]))


def test_alexnets_errors_are_those_of_the_paper():
    """Table 1 of Hendrycks and Dietterich (2019), in whole percent, in its order."""
    assert [round(100 * error) for error in ALEXNET_ERRORS.values()] == [
        89, 89, 92, 82, 83, 79, 80, 87, 83, 82, 56, 85, 65, 72, 61]


def test_the_order_of_a_models_classes_does_not_matter(sets):
    given = ('--data', *places(sets, 'v2', 'a', 'c'), f'real={sets.root / "val"}')
    plain, ordered = (sets.validate('--checkpoint', sets.root / file, *given)['results']
                      for file in ('0.pth', 'other_order.pth'))
    assert [row['set'] for row in plain] == ['real', 'v2', 'a', 'c', 'c/fog', 'c/contrast']
    assert [(row['set'], row['top1'], row['top5']) for row in plain] == [
        (row['set'], row['top1'], row['top5']) for row in ordered]
    assert [row['loss'] for row in plain] == pytest.approx([row['loss'] for row in ordered], rel=1e-5)


def test_real_takes_the_images_in_one_folder(sets, tmp_path):
    """As ILSVRC2012_img_val.tar holds them; their order does not matter, their names do."""
    for path in sets.logits['val']:
        (tmp_path / Path(path).name).symlink_to(sets.root / 'val' / path)
    flat, nested = (sets.validate('--checkpoint', sets.root / '0.pth', '--data', f'real={folder}')
                    for folder in (tmp_path, sets.root / 'val'))
    assert flat['count'] == 6 and (flat['top1'], flat['loss']) == pytest.approx((nested['top1'], nested['loss']))


# --- Views ------------------------------------------------------------------------------------------------------------

def views(image: Image.Image, tta: str) -> list[torch.Tensor]:
    if tta == 'flip':
        return [normalised(image), normalised(image).flip(3)]
    if tta == 'multi-scale':
        return [normalised(image, size) for size in (16, 32, 48)]
    resize, _, *rest = create_transform((3, 32, 32), crop_pct=0.9, interpolation='bicubic').transforms
    crops = []
    for crop in five_crop(resize(image), (32, 32)):
        for step in rest:
            crop = step(crop)
        crops.append(crop[None])
    return crops


@pytest.mark.parametrize(('tta', 'fast'), [('flip', False), ('five', False), ('five', True), ('multi-scale', False),
                                           ('multi-scale', True)])
def test_views_are_averaged_as_probabilities(sets, tta, fast):
    """The fast form differs by single levels of some pixels."""
    tolerance = 2e-3 if fast else 1e-5
    file = sets.root / 'views.csv'
    sets.validate('--data', *places(sets, 'v2'), '--checkpoint', sets.root / '0.pth', '--tta', tta, '--per-image', file,
                  *(['--fast-eval'] if fast else []))
    rows = list(csv.DictReader(open(file)))
    assert len(rows) == 4
    for row in rows:
        with torch.no_grad():
            probabilities = torch.stack([sets.model(view).softmax(1)[0]
                                         for view in views(Image.open(row['path']), tta)])  # [views, 1000]
        mean = probabilities.mean(0)
        assert (mean - probabilities[0]).abs().max() > 5 * tolerance
        found = [(int(row[f'guess_{k}']), float(row[f'probability_{k}'])) for k in range(1, 6)]
        assert [value for _, value in found] == pytest.approx(mean.topk(5).values.tolist(), abs=tolerance)
        assert [value for _, value in found] == pytest.approx(
            [mean[guess].item() for guess, _ in found], abs=tolerance)
        assert float(row['loss']) == pytest.approx(-mean[int(row['target'])].log().item(), abs=20 * tolerance)


def test_a_model_of_one_size_takes_no_other(sets):
    vit = create_model('vit_tiny_patch16_224', num_classes=1000, img_size=32, **TINY)
    torch.save(vit.state_dict(), sets.root / 'vit.pth')
    with pytest.raises(UserError, match='vit_tiny_patch16_224 does not take images of 16 × 16 pixels .*choose --tta'):
        sets.validate(sets.root / 'val', '--checkpoint', sets.root / 'vit.pth', '--tta', 'multi-scale',
                      model=('--model', 'vit_tiny_patch16_224', *MODEL[2:]))


# --- Several models ---------------------------------------------------------------------------------------------------

def test_several_checkpoints_are_compared_averaged_and_combined(sets):
    file = sets.root / 'several.csv'
    paths = [sets.root / f'{number}.pth' for number in range(2)]
    result = sets.validate('--data', *places(sets, 'a'), '--checkpoint', *paths, '--per-image', file)
    rows = {row['checkpoint'].split()[0]: row for row in result['results']}
    assert list(rows) == [*map(str, paths), 'soup', 'ensemble']
    states = [torch.load(path)['state_dict'] for path in paths]
    torch.save({name: (states[0][name].double() + states[1][name]).div(2).float() for name in states[0]},
               sets.root / 'mean.pth')
    for name, path in {**{str(path): path for path in paths}, 'soup': sets.root / 'mean.pth'}.items():
        alone = sets.validate('--data', *places(sets, 'a'), '--checkpoint', path)
        assert [alone[key] for key in ('loss', 'top1', 'ece', 'macro_f1')] == pytest.approx(
            [rows[name][key] for key in ('loss', 'top1', 'ece', 'macro_f1')], rel=1e-5), name
    assert len({row['loss'] for row in rows.values()}) == 4
    images = {}
    for row in csv.DictReader(open(file)):
        images.setdefault(row['name'], {})[row['checkpoint'].split()[0]] = row
    for name, own in images.items():
        true = [math.exp(-float(own[str(path)]['loss'])) for path in paths]
        assert math.exp(-float(own['ensemble']['loss'])) == pytest.approx(sum(true) / 2, rel=1e-4), name
    assert rows['ensemble']['parameters'] == 2 * rows['soup']['parameters']


def test_weights_of_classes_in_another_order_are_not_averaged(caplog):
    model = tiny_model(5, 32)
    one = TrainedModel(model, Options(model='t2t_vit_7', model_kwargs=None, eval_checkpoint='a'), list('abcde'))
    other = one._replace(classes=list('edcba'))
    with caplog.at_level('INFO'):
        assert average_weights([one, other], [None, None]) is None
    assert 'their outputs are other classes, or in another order' in caplog.text
    assert average_weights([one, one._replace(classes=None)], [None, None]).classes == list('abcde')


def test_a_model_without_names_is_judged_on_any_folders_of_its_number():
    names = [f'thing{number}' for number in range(1000)]
    image_set = ImageSet('val', 'data', None, np.arange(1000), names, names)
    assert columns_of(image_set, Options(class_map=None, eval_checkpoint='a'), None, 1000) is None


def test_models_of_other_input_share_the_images(sets):
    """Another size and crop: each model sees what it would alone; there is no average of their weights."""
    torch.save({'arch': 't2t_vit_7', 'state_dict': tiny_model(5, 48).state_dict(), 'args': {
        'model': 't2t_vit_7', 'img_size': 48, 'crop_pct': 0.7, 'model_kwargs': [f'{k}={v}' for k, v in TINY.items()]}},
        sets.root / 'large.pth')
    paths = {'small': sets.root / '0.pth', 'large': sets.root / 'large.pth'}
    own_sizes = [word for word in MODEL if word not in ('--img-size', '32')]
    results = {name: sets.validate('--checkpoint', *files, '--data', *places(sets, 'v2'), model=own_sizes)
               for name, files in (('both', paths.values()), ('small', [paths['small']]), ('large', [paths['large']]))}
    small, large, ensemble = results['both']['results']
    assert (small['img_size'], large['img_size'], large['crop_pct']) == ([32, 32], [48, 48], 0.7)
    assert small['loss'] == pytest.approx(results['small']['loss'], rel=1e-5)
    assert large['loss'] == pytest.approx(results['large']['loss'], rel=1e-5)
    assert ensemble['checkpoint'].startswith('ensemble')
    assert (ensemble['img_size'], ensemble['model']) == (None, 't2t_vit_7')


# --- Processes --------------------------------------------------------------------------------------------------------

def test_two_processes_give_the_answers_of_one(sets):
    def options(name):
        return ('--data', *places(sets, 'c', 'r'), f'real={sets.root / "val"}', '--checkpoint', sets.root / '0.pth',
                sets.root / '1.pth', '--per-image', sets.root / f'{name}.csv')

    one = sets.validate(*options('one'))
    succeeded(launch(2, *options('two'), *MODEL, '--results-file', sets.root / 'two.json', cwd=sets.root,
                     SCRIPT='validate.py'))
    two = json.loads((sets.root / 'two.json').read_text())
    assert two['processes'] == 2
    exact = ('set', 'checkpoint', 'count', 'top1', 'top1_low', 'top5', 'macro_f1', 'corruption_error')
    for here, there in zip(one['results'], two['results'], strict=True):
        assert [here[key] for key in exact] == [there[key] for key in exact]
        assert (here['loss'], here['ece']) == pytest.approx((there['loss'], there['ece']), rel=1e-5)
    images = [list(csv.DictReader(open(sets.root / f'{name}.csv'))) for name in ('one', 'two')]
    for here, there in zip(*images, strict=True):
        assert [here[key] for key in ('set', 'checkpoint', 'path', 'guess_1', 'target', 'right')] == [
            there[key] for key in ('set', 'checkpoint', 'path', 'guess_1', 'target', 'right')]
        assert float(here['loss']) == pytest.approx(float(there['loss']), rel=1e-4)


# --- Numbers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('right', 'count'), [(0, 10), (8, 10), (10, 10), (1, 1), (37_215, 50_000)])
def test_the_ends_of_the_interval_are_as_far_as_wilson_says(right, count):
    """An end p within 0…1 solves (right / count − p)² = z² p (1 − p) / count."""
    share = right / count
    for end, is_bound in zip(wilson_interval(right, count), (right == 0, right == count), strict=True):
        p = end / 100
        assert 0 <= p <= 1 and (not is_bound or p == share)
        assert (share - p) ** 2 == pytest.approx(1.959964 ** 2 * p * (1 - p) / count, rel=1e-4, abs=1e-12)
    low, high = wilson_interval(right, count)
    assert low <= 100 * share <= high and low < high
    assert wilson_interval(8, 10) == pytest.approx((49.0162, 94.3318), abs=1e-3)  # as statsmodels 0.14 gives them


def test_calibration_error_against_its_definition():
    rng = np.random.default_rng(0)
    confidence = rng.random(500).astype(np.float32)
    confidence[:4] = 0, 1, 1 / 15, 0.5
    right = rng.random(500) < confidence ** 2
    expected = 0.0
    for low in range(15):
        own = (confidence > np.float32(low / 15)) & (confidence <= np.float32((low + 1) / 15))
        own |= (confidence == 0) & (low == 0)
        expected += own.sum() / 500 * abs(confidence[own].mean(dtype=np.float64) - right[own].mean())
    assert calibration_error(confidence, right) == pytest.approx(100 * expected, rel=1e-6)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    assert calibration_error(np.array([0.8] * 5), np.array([True, True, True, True, False])) == pytest.approx(0)
    assert math.isnan(calibration_error(np.array([0.5, math.nan]), np.array([True, False])))


# --- Mistakes ---------------------------------------------------------------------------------------------------------

def mistakes(sets: Sets, tmp_path: Path) -> dict[str, tuple[tuple, str]]:
    """name → (options, what the line must say)."""
    root, first = sets.root, ('--checkpoint', sets.root / '0.pth')
    save(picture(1), tmp_path / 'names/cat/cat_1.jpg')
    save(picture(1), tmp_path / 'twice/a/ILSVRC2012_val_00000003.JPEG')
    save(picture(1), tmp_path / 'twice/b/ILSVRC2012_val_00000003.JPEG')
    save(picture(1), tmp_path / 'beyond/1000/1.jpeg')
    save(picture(1), tmp_path / 'beyond/3/1.jpeg')
    save(picture(1), tmp_path / f'weak/fog/1/{SYNSETS[0]}/1.jpeg')
    torch.save({'arch': 't2t_vit_7', 'state_dict': create_model('t2t_vit_7', num_classes=3, img_size=32,
                                                                **TINY).state_dict()}, tmp_path / 'three.pth')
    torch.save(torch.load(root / '0.pth') | {'args': {'val_fraction': 0.1, 'data': str(root / 'val')}},
               tmp_path / 'fraction.pth')
    return {
        'where': ((*first, '--sets', 'v2'), '--sets v2: where is it? give --data v2=DIR'),
        'where is val': ((*first, '--sets', 'real'), 'give --data real=DIR, or DIR before the options'),
        'no set': ((*first, '--data', '/imagenet'), "'/imagenet' is no evaluation set: give SET=DIR"),
        'not asked for': ((root / 'val', *first, '--sets', 'val', '--data', *places(sets, 'a')), 'does not name a'),
        'a set twice': ((*first, '--data', *places(sets, 'a'), *places(sets, 'a')), '--data a=… is given twice'),
        'val twice': ((root / 'val', *first, '--data', f'val={root}'), 'leave one of them out'),
        'names of files': ((*first, '--data', f'real={tmp_path / "names"}'), "'cat_1.jpg' is none of them"),
        'a name twice': ((*first, '--data', f'real={tmp_path / "twice"}'),
                         "'ILSVRC2012_val_00000003.JPEG' is there twice"),
        'other classes': ((*first, '--data', f'a={root / "v2"}'), 'of classes that ImageNet-A has not'),
        'no class': ((*first, '--data', f'v2={tmp_path / "beyond"}'), 'not in the class map'),
        'no corruption': ((*first, '--data', f'c={root / "a"}'), 'none of the corruptions of ImageNet-C'),
        'strengths': ((*first, '--data', f'c={tmp_path / "weak"}'), f'no folder {tmp_path / "weak/fog/2"}'),
        'a small model': (('--checkpoint', tmp_path / 'three.pth', '--data', *places(sets, 'r')),
                          "--sets r asks for ImageNet's 1,000 classes, the model has 3; leave the set out"),
        'other models': (('--checkpoint', root / '0.pth', tmp_path / 'three.pth', '--data', *places(sets, 'r')),
                         'its 3 classes are not those of the first model'),
        'subset': ((*first, '--data', *places(sets, 'r'), '--only-classes', '0-4'), '--only-classes 0-4 beside'),
        'twice': ((root / 'val', *first, '--checkpoint', root / '0.pth'), 'twice; name each once'),
        'table': ((root / 'val', *first, '--per-image', 'a.xlsx'), 'a name that ends in .csv or .parquet'),
        'parquet': ((root / 'val', *first, '--per-image', 'a.parquet'), 'pip install pyarrow'),
        'held out': ((root / 'val', '--checkpoint', root / '0.pth', tmp_path / 'fraction.pth'),
                     'trained with different --val-fraction'),
        'views': ((root / 'val', *first, '--tta', 'ten'), "invalid choice: 'ten'"),
    }


def test_every_mistake_is_one_line_that_helps(sets, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *more: name != 'pyarrow' and find(name, *more) or None)
    wrong = []
    for name, (options, said) in mistakes(sets, tmp_path).items():
        try:
            sets.validate(*options)
            wrong.append(f'{name}: no error')
        except UserError as error:
            if said not in str(error) or '\n' in str(error) or error.exit_code != 2:
                wrong.append(f'{name}: expected {said!r}, got {str(error)!r}')
    assert not wrong, '\n\n'.join(wrong)


def test_answers_as_parquet(sets):
    parquet = pytest.importorskip('pyarrow.parquet', reason='pyarrow is not installed: pip install pyarrow')
    options = (sets.root / 'val', '--checkpoint', sets.root / '0.pth', '--per-image')
    for ending in ('csv', 'parquet'):
        sets.validate(*options, sets.root / f'answers.{ending}')
    table = parquet.read_table(sets.root / 'answers.parquet').to_pylist()
    rows = list(csv.DictReader(open(sets.root / 'answers.csv')))
    assert len(table) == 7 and [{key: str(value) for key, value in row.items()} for row in table] == rows


def test_the_folder_may_stand_behind_a_checkpoint(sets):
    behind, before = (sets.validate(*options) for options in (
        ('--checkpoint', sets.root / '0.pth', sets.root / 'val'), (sets.root / 'val', '--checkpoint',
                                                                   sets.root / '0.pth')))
    assert behind['loss'] == before['loss'] and before['set'] == 'val' and before['top1_low'] < before['top1']
