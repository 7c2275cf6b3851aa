"""The linear probe: its classifier is the best one, its decay is chosen on training images, features are kept.

    python -m pytest tests/test_linear_probe.py
"""
import csv
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data.pipeline import InputConfig
from engine.linear_probe import _key, compute_features
from engine.logistic import HELD_OUT, fit_lbfgs, fit_sgd, hold_out
from models import create_model
from options.parser import Options
from tests.conftest import launch, run_script, succeeded
from utils.checkpoint_reader import read_checkpoint
from utils.runtime import Precision

CPU = torch.device('cpu')
SGD = {'lr': 0.1, 'momentum': 0.9, 'batch_size': 32, 'epochs': 60, 'seed': 0}


def problem(count: int = 150, classes: int = 4, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that overlap, in features of different sizes, one of them constant."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=generator)
    features = centres[targets] + torch.randn(count, width, generator=generator)
    features = features * torch.tensor([1, 10, 0.1, 1, 1, 1.0])[:width] + torch.tensor([0, 5, 0, 100, 0, 0.0])[:width]
    features[:, -1] = 7
    return features, targets


def objective(classifier, features, targets, decay: float) -> torch.Tensor:
    """The regularised loss in terms of its weights for standardised features, in float64."""
    scaled = (features.double() - classifier.mean) / classifier.std
    loss = F.cross_entropy(scaled @ classifier.weight.T + classifier.bias, targets)
    return loss + decay / 2 * classifier.weight.square().sum()


@pytest.mark.parametrize('decay', [1.0, 1e-2, 1e-4])
def test_the_classifier_is_that_of_scikit_learn(decay):
    from sklearn.linear_model import LogisticRegression
    features, targets = problem()
    ours = fit_lbfgs(features, targets, 4, decay)
    scaled = ((features.double() - ours.mean) / ours.std).numpy()
    assert np.allclose(scaled[:, :-1].mean(0), 0, atol=1e-6) and np.allclose(scaled[:, :-1].std(0), 1, atol=1e-5)
    theirs = LogisticRegression(C=1 / (decay * len(targets)), tol=1e-8, max_iter=5000).fit(scaled, targets.numpy())
    weight, bias = ours.of_features()
    logits = features.double() @ weight.T + bias
    assert np.allclose(logits.softmax(1).numpy(), theirs.predict_proba(scaled), atol=1e-4)
    assert ours.judge(features, targets) == pytest.approx(
        (100 * theirs.score(scaled, targets), F.cross_entropy(logits, targets).item()))


def test_its_gradient_is_zero_from_any_start_and_in_parts(monkeypatch):
    features, targets = problem()
    monkeypatch.setattr('engine.logistic.CHUNK', 64)
    far = fit_lbfgs(features, targets, 4, 1.0)
    for start in (None, far):
        found = fit_lbfgs(features, targets, 4, 1e-3, start)
        for parameter in (found.weight, found.bias):
            parameter.requires_grad_()
        objective(found, features, targets, 1e-3).backward()
        assert max(p.grad.abs().max().item() for p in (found.weight, found.bias)) < 2e-6


def test_sgd_comes_near_the_optimum_and_repeats_itself():
    features, targets = problem()
    best, found, again = fit_lbfgs(features, targets, 4, 1e-2), *(
        fit_sgd(features, targets, 4, 1e-2, **SGD) for _ in range(2))
    losses = [objective(one, features, targets, 1e-2).item() for one in (best, found)]
    assert losses[0] <= losses[1] < losses[0] + 0.01
    assert torch.equal(found.weight, again.weight)


def test_one_image_in_five_of_each_class_is_held_out():
    targets = torch.tensor([0] * 23 + [2] * 10 + [3] * 4)[torch.randperm(37)]
    first, again, other = (hold_out(targets, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert targets[first].bincount(minlength=4).tolist() == [4, 0, 2, 0] and HELD_OUT == 5


# --- The script -------------------------------------------------------------------------------------------------------

MODEL = ('--model', 't2t_vit_7', '--img-size', '32', '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2',
         '--device', 'cpu', '-j', '0')
DATA = ('--dataset', 'digits', '--only-classes', '0-4')
PROBE = ('--linear-probe', *DATA, *MODEL, '--transfer-model', 'start.pth')


@pytest.fixture(scope='module')
def probed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('probe')
    torch.manual_seed(0)
    torch.save(create_model('t2t_vit_7', num_classes=7, img_size=32, embed_dim=32, depth=2, num_heads=2).state_dict(),
               folder / 'start.pth')
    return folder, succeeded(run_script('transfer.py', *PROBE, '--experiment', 'first', '--probe-decays', '1', '0.01',
                                        '0.001', cwd=folder))


def test_a_probe_chooses_on_training_images_and_is_evaluated_once(probed):
    folder, printed = probed
    run = folder / 'output/transfer/first'
    with open(run / 'probe.csv') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['decay']) for row in rows] == [1, 0.01, 0.001]
    result = json.loads((run / 'probe.json').read_text())
    best = max(rows, key=lambda row: (float(row['top1']), -float(row['loss'])))
    assert result['decay'] == float(best['decay'])
    assert printed.count('on 143 training images held out') == 3 and printed.count('Test: [   1/') == 1
    assert 'cannot be written' not in printed and (run / 'curves.png').exists()
    [record] = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
    assert (record['top1'], record['decay']) == (result['top1'], result['decay'])
    assert result['top1'] > 80 and result['count'] == 180


def test_its_checkpoint_is_the_model_with_the_new_classifier(probed):
    folder, _ = probed
    run = folder / 'output/transfer/first'
    content, start = read_checkpoint(run / 'model_best.pth.tar'), torch.load(folder / 'start.pth')
    weights = content['state_dict']
    assert content['classes'] == list('01234') and content['args']['linear_probe']
    assert weights['head.weight'].shape == (5, 32)
    assert all(torch.equal(weights[name], start[name]) for name in start if not name.startswith('head.'))
    printed = succeeded(run_script('validate.py', *DATA, '--checkpoint', run, '--device', 'cpu', '-j', '0',
                                   '--results-file', 'again', cwd=folder))
    again, result = (json.loads(path.read_text()) for path in (folder / 'again.json', run / 'probe.json'))
    assert (again['top1'], again['count']) == (result['top1'], result['count'])
    assert again['loss'] == pytest.approx(result['loss'], rel=1e-6)  # in batches of another size
    assert 'Evaluated 180 images' in printed
    # Its classifier is the best one for the features of all training images, with the chosen decay.
    [file] = (folder / 'output/features').iterdir()
    kept = load_file(file)
    best = fit_lbfgs(kept['features'], kept['targets'], 5, result['decay'])
    assert torch.allclose(weights['head.weight'].double(), best.of_features()[0], atol=1e-4)


def test_features_are_found_again_unless_they_are_damaged(probed):
    folder, first = probed
    [file] = (folder / 'output/features').iterdir()
    content, before = file.read_bytes(), file.stat().st_mtime_ns
    options = ('--probe-decays', '0.01', '--probe-solver', 'sgd', '--epochs', '2', '--lr', '0.1', '--experiment')
    printed = succeeded(run_script('transfer.py', *PROBE, *options, 'sgd', cwd=folder))
    assert f'features of the training images: output/features/{file.name}' in printed and 'held out' not in printed
    assert file.stat().st_mtime_ns == before and 'are kept in' in first
    os.truncate(file, 100)
    printed = succeeded(run_script('transfer.py', *PROBE, *options, 'damaged', cwd=folder))
    assert f'{file.name} cannot be read' in printed and file.read_bytes() == content


def test_the_name_of_features_tells_all_that_they_depend_on():
    args = Options(fast_eval=False, model='t2t_vit_7', model_kwargs=None, gp=None)
    model = create_model('t2t_vit_7', num_classes=3, img_size=32, embed_dim=32, depth=1, num_heads=2)
    config = InputConfig((32, 32), 0.9, 'bicubic', 'center', (0.5,) * 3, (0.5,) * 3)

    def key(args=args, config=config, images='12 images', amp=False):
        loaders = SimpleNamespace(train_loader=SimpleNamespace(fingerprint=lambda: images), config=config)
        return _key(args, model, model.head, loaders, Precision(CPU, enabled=amp))

    first = key()
    others = {key(args.replacing(fast_eval=True)), key(config=config._replace(crop_pct=1.0)), key(images='13 images'),
              key(amp=True)}
    assert len({first} | others) == 5
    torch.nn.init.zeros_(model.head.weight)
    assert key() == first, 'the classifier makes no features'
    model.pos_embed[0, 0, 0] += 1
    assert key() != first


@pytest.mark.parametrize(('argv', 'message'), [
    (('--resume', 'auto'), '--resume auto beside --linear-probe'), (('--freeze', '1'), '--freeze 1 beside --linear-pr'),
    (('--model', 't2t_vit_24_token_labeling', '--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2'),
     '--linear-probe: T2TViT has several classifiers.*--freeze backbone'),
    (('--experiment', 'first'), '--experiment first: that run exists')])
def test_what_a_probe_cannot_do_is_one_line(probed, argv, message):
    folder, _ = probed
    weights = ('--transfer-model', 'start.pth') if '--model' not in argv else ()  # which fit one model
    refused = run_script('transfer.py', *PROBE[:-2], *weights, *argv, cwd=folder)
    assert refused.returncode == 2 and refused.stderr.count('\n') == 1, refused.stderr
    assert re.search(message, refused.stderr), refused.stderr


def test_a_probe_runs_in_one_process(probed):
    refused = launch(2, *PROBE, cwd=probed[0], SCRIPT='transfer.py')
    assert refused.returncode == 2 and '--linear-probe runs in one process, and these are 2' in refused.stderr


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'test_efficientnet', 'test_convnext'])
def test_features_are_what_the_classifier_of_any_model_sees(name):
    model = create_model(name, num_classes=3)
    head = model.get_classifier()
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])), (torch.randn(1, 3, 32, 32), torch.tensor([2]))]
    if name == 'test_vit':
        model.set_input_size((32, 32))
    features, targets = compute_features(model, head, batches, lambda *batch: batch, Precision(CPU, enabled=False))
    logits = torch.cat([model(images) for images, _ in batches])
    assert torch.allclose(F.linear(features, head.weight, head.bias), logits, atol=1e-6)
    assert targets.tolist() == [0, 1, 2]
