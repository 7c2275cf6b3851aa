"""Tests of the benchmark of the paper's claims: its verdicts, its runs of train.py, and that a second start goes on."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import claims
from benchmarks.claims import CLAIMS, MODELS, Model, as_text, new_claims_record, recipe, train_models
from benchmarks.shared.claims import Claim, draw, judge
from benchmarks.shared.command import record_options, training_options
from benchmarks.shared.runs import Run
from engine.log.metrics import read_metrics
from models import create_model_from_options
from options.parser import create_parser, parse_options
from tests.conftest import ROOT, run_module, warm
from utils.errors import UserError

TINY = {'T2T': Model('t2t_vit_7', (1, 16, 2), ('token_dim=8',)), 'ViT': Model('vit_dn', (1, 16, 2))}


# --- Verdicts ---------------------------------------------------------------------------------------------------------

def scores(**of_models: list[float]) -> dict[str, list[float]]:
    """Top-1 of all models; those not given have the same as T2T-ViT."""
    names = {'vit': 'ViT', 'convolution': 'T2T-ViT, convolution tokens', 'wide': 'T2T-ViT, shallow-wide'}
    top1 = {name: [50., 51., 52.] for name in MODELS}
    return top1 | {names[name]: values for name, values in of_models.items()}


def verdicts(top1: dict[str, list[float]]) -> dict[str, str]:
    return {claim['text']: claim['verdict'] for claim in judge(top1, CLAIMS)['claims']}


def test_a_claim_is_decided_beyond_two_standard_errors():
    found = judge(scores(vit=[45., 46.5, 47.], convolution=[56., 57., 58.], wide=[49.7, 51.2, 51.5]), CLAIMS)
    error = found['standard_error']
    by_text = {claim['text']: claim for claim in found['claims']}
    assert by_text['T2T-ViT beats ViT']['verdict'] == 'yes'
    assert by_text['T2T-ViT beats ViT']['differences'] == [5., 4.5, 5.]
    assert by_text['Performer tokens beat convolution']['verdict'] == 'no'
    wide = by_text['Deep-narrow beats shallow-wide in T2T-ViT']
    assert wide['verdict'] == 'undecided' and 0 < wide['difference'] < 2 * error
    assert wide['deviation'] == pytest.approx(np.std([0.3, -0.2, 0.5], ddof=1))


def test_the_standard_error_is_that_of_a_fit_of_models_and_seeds():
    top1 = {name: list(50 + np.random.default_rng(index).normal(size=3)) for index, name in enumerate(MODELS)}
    values = np.array(list(top1.values()))
    models, seeds = (grid.ravel() for grid in np.indices(values.shape))
    design = np.concatenate((np.eye(len(values))[models], np.eye(3)[seeds][:, 1:]), axis=1)
    squares = np.linalg.lstsq(design, values.ravel(), rcond=None)[1].item()
    found = judge(top1, CLAIMS)
    assert found['degrees_of_freedom'] == values.size - np.linalg.matrix_rank(design) == 10
    assert found['standard_error'] == pytest.approx((squares / 10 * 2 / 3) ** 0.5)
    # What a seed adds to all models is no deviation of their differences.
    moved = judge({name: [a, b + 7, c - 3] for name, (a, b, c) in top1.items()}, CLAIMS)
    assert moved['standard_error'] == pytest.approx(found['standard_error'])
    assert [claim['difference'] for claim in moved['claims']] == pytest.approx(
        [claim['difference'] for claim in found['claims']])


def test_equal_models_decide_nothing():
    assert set(verdicts(scores()).values()) == {'undecided'}


def test_the_committed_record_follows_the_rule():
    record = json.loads((ROOT / 'benchmarks/results/claims.json').read_text())
    assert record['claims'] == judge(record['top1'], CLAIMS)['claims'] and len(record['results']) == 3 * len(MODELS)
    assert as_text(record) == (ROOT / 'benchmarks/results/claims.md').read_text()


def test_models_have_about_equal_parameters():
    sizes = {name: number_of_parameters(model) for name, model in MODELS.items()}
    assert all(0.93 < size / sizes['T2T-ViT'] < 1.02 for size in sizes.values()), sizes
    assert {name for claim in CLAIMS for name in (claim.better, claim.worse)} == set(MODELS)


def number_of_parameters(model: Model, img_size: int = 64, classes: int = 10) -> int:
    args = training_options(*model.options(), '--img-size', str(img_size))
    return sum(tensor.numel() for tensor in create_model_from_options(args, num_classes=classes).state_dict().values())


# --- Runs -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def start(tmp_path, image_folder, monkeypatch):
    """Returns the options and the results of a start with two tiny models and two seeds."""
    monkeypatch.setattr(claims, 'MODELS', TINY)
    monkeypatch.setattr(claims, 'CLAIMS', (Claim('T2T beats ViT', 'T2T', 'ViT', 3.4),))
    monkeypatch.setattr(sys, 'executable', str(warm().python))

    def call(*words: str):
        args = parse_options(create_parser('', (claims.claims_options, record_options), {'name': 'claims'}), [
            str(image_folder), '--images', '24', '--seeds', '2', '--img-size', '32', '-b', '8', '-j', '0', '--device',
            'cpu', '--runs', str(tmp_path), *words])
        return args, train_models(args)
    return call


def test_runs_become_a_record_and_a_second_start_reads_them(start, tmp_path, monkeypatch, capsys):
    args, results = start()
    assert [(result['model'], result['seed']) for result in results] == [
        ('T2T', 1), ('ViT', 1), ('T2T', 2), ('ViT', 2)]
    for result, name in zip(results, TINY | TINY, strict=False):
        assert result['parameters'] == number_of_parameters(TINY[name], 32, 3)
        assert result['images']['training'].startswith('24 images')
        assert result['images']['evaluation'].startswith('15 images')
    logged = [read_metrics(folder)[-1]['top1'] for folder in (tmp_path / 'train').iterdir()]
    assert sorted(logged) == sorted(result['top1'] for result in results)
    assert capsys.readouterr().out.count('top-1') == 4

    record = new_claims_record(args, torch.device('cpu'), results)
    text = as_text(json.loads(json.dumps(record)))
    assert record['top1'] == {name: [results[i]['top1'], results[i + 2]['top1']] for i, name in enumerate(TINY)}
    assert f'| T2T beats ViT | {record["claims"][0]["verdict"]} |' in text
    assert '24 training images, 1 epoch, 32 pixels, batch 8; 15 test images' in text
    assert str(tmp_path) not in text
    draw(record, tmp_path / 'claims.png')
    assert (tmp_path / 'claims.png').read_bytes().startswith(b'\x89PNG')

    monkeypatch.setattr(subprocess, 'Popen', None)  # nothing is trained
    assert start()[1] == results


def test_other_options_are_other_runs(tmp_path, image_folder):
    def folder(*words: str, images: str = 'a', seed: int = 1) -> Path:
        args = parse_options(create_parser('', (claims.claims_options,)), [str(image_folder), *words])
        return Run(args.runs, 'ViT', 'claims-vit', [*recipe(args), '--seed', str(seed)], images).folder
    assert folder() == folder('-j', '0') == folder('--seeds', '5')
    others = [folder(), folder('--lr', '0.1'), folder('--epochs', '2'), folder(images='b'), folder(seed=2),
              folder('--precision', 'bf16')]
    assert len(set(others)) == len(others)


def test_an_interrupted_start_goes_on_to_the_same_results(start, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, 'MODELS', {'ViT': TINY['ViT']})
    expected = start('--runs', str(tmp_path / 'whole'))[1]
    monkeypatch.setenv('T2T_FAULTS', 'step@2=term')
    with pytest.raises(UserError, match='interrupted by SIGTERM; the state is saved, in epoch 1, after step 2'):
        start()
    assert len(list((tmp_path / 'train').iterdir())) == 1
    monkeypatch.delenv('T2T_FAULTS')
    found = start()[1]
    for result in (*expected, *found):
        del result['seconds']
    assert found == expected
    starts = [len(json.loads((folder / 'environment.json').read_bytes())) for folder in (tmp_path / 'train').iterdir()]
    assert sorted(starts) == [1, 2]


@pytest.mark.parametrize('options, message', [
    (['--images', '60'], '--images 60: that is 20 of each class, and ant has 12; give 0 for all images'),
    (['--images', '2'], '--images 2: that is 0 of each class'),
    (['--seeds', '1'], 'argument --seeds: 1 is too small: at least 2'),
    (['--precision', 'fp16'], '--precision fp16: a CPU computes in fp32 or bf16')])
def test_a_mistake_is_one_line(tmp_path, image_folder, options, message):
    result = run_module('benchmarks.claims', image_folder, *options, '--device', 'cpu', '--output', tmp_path,
                        cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count('\n') == 1
    assert not list(tmp_path.iterdir())
