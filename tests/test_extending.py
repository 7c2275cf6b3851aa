"""docs/extending.md: every change on the page is made in a copy of the project, and its commands do what it says."""
import csv
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_command, succeeded, warm, write_images

PAGE = (ROOT / 'docs/extending.md').read_text()
BLOCK = re.compile(r'(?:^`([\w/.]+)`:\n\n)?^```(\w+)\n(.*?)^```$', re.M | re.S)
SECTIONS = {title: BLOCK.findall(text)
            for title, text in re.findall(r'^## ([^\n]+)\n(.*?)(?=^## |\Z)', PAGE, re.M | re.S)}


def apply_diff(file: Path, diff: str) -> None:
    """Replace the lines of a diff that begin with a space or - by those that begin with a space or +."""
    lines = [line or ' ' for line in diff.splitlines()]
    before, after = (''.join(f'{line[1:]}\n' for line in lines if line[0] in signs) for signs in (' -', ' +'))
    text = file.read_text()
    assert text.count(before) == 1, f'{file}: {text.count(before)} places are\n{before}'
    file.write_text(text.replace(before, after))


def follow(folder: Path, title: str, *, commands: bool = True) -> str:
    """Do what a section says in `folder`, with or without its commands, and return what they print."""
    printed, name = '', ''
    for path, language, block in SECTIONS[title]:
        name = path or name
        if language == 'sh':
            for command in block.splitlines() if commands else ():
                program, *words = shlex.split(command)
                printed += succeeded(run_command([warm().python if program == 'python' else program, *words], folder))
        elif language == 'diff':
            apply_diff(folder / name, block)
        elif language == 'text':
            for line in block.splitlines():
                assert re.search(re.escape(line).replace('…', '.+'), printed), f'{line!r} is not in\n{printed}'
        else:
            assert not (folder / name).exists(), f'{name} exists already'
            (folder / name).write_text(block)
    return printed


@pytest.fixture
def copy(tmp_path) -> Path:
    folder = tmp_path / 'project'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        '.*', 'tests', 'docs', 'results', 'output', 'findings', '__pycache__', '*venv*'))
    write_images(folder / 'flowers', {'train': 16, 'val': 5})
    for split in ('train', 'val'):
        images = sorted((folder / 'flowers' / split).rglob('*.jpg'))
        with open(folder / f'flowers/{split}.csv', 'w', newline='') as file:
            csv.writer(file).writerows([('path', 'label'), *(
                (image.relative_to(folder / 'flowers'), image.parent.name) for image in images)])
        # So that only the lists say which class an image is of.
        (folder / 'flowers' / split).rename(folder / f'flowers/{split}_images')
        text = (folder / f'flowers/{split}.csv').read_text()
        (folder / f'flowers/{split}.csv').write_text(text.replace(f'{split}/', f'{split}_images/'))
    return folder


def training_losses(folder: Path, run: str) -> list[float]:
    records = map(json.loads, (folder / f'output/train/{run}/metrics.jsonl').read_text().splitlines())
    return [record['loss'] for record in records if record['kind'] == 'train']


def test_every_section_is_tested():
    assert list(SECTIONS) == list(EXAMPLES)


def check_recipe(folder: Path, printed: str) -> None:
    assert (folder / 'output/train/recipe/model_best.pth.tar').exists()


def check_model(folder: Path, printed: str) -> None:
    assert (folder / 'output/train/model/model_best.pth.tar').exists()


def check_data(folder: Path, printed: str) -> None:
    assert json.loads(printed[printed.index('{'):printed.rindex('}') + 1])['count'] == 15
    check_mistakes(folder)


def check_mistakes(folder: Path) -> None:
    """The opener's errors end the script in one line."""
    val = folder / 'flowers/val.csv'
    for text, message in ((val.read_text() + 'x.jpg,wolf\n', "no label 'wolf'"), (None, 'No such file')):
        val.unlink() if text is None else val.write_text(text)
        ended = run_command([warm().python, 'train.py', 'flowers', '--dataset', 'csv', '--device', 'cpu'], folder)
        assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count('\n') == 1
    ended = run_command([warm().python, 'train.py', 'nowhere', '--dataset', 'csv', '--device', 'cpu'], folder)
    assert ended.returncode == 2 and "'nowhere' does not exist" in ended.stderr


def check_loss(folder: Path, printed: str) -> None:
    poly, plain = training_losses(folder, 'loss'), training_losses(folder, 'cross_entropy')
    assert len(poly) == len(plain) > 0 and all(map(math.isfinite, poly)) and poly[0] > plain[0] + 1


def check_option(folder: Path, printed: str) -> None:
    assert 'zero_classifier: true' in (folder / 'output/train/option/args.yaml').read_text()


def check_tracker(folder: Path, printed: str) -> None:
    last = json.loads((folder / 'output/train/tracker/metrics.jsonl').read_text().splitlines()[-1])
    assert f't2t_top1 {last["top1"]}\n' in (folder / 'output/train/tracker/run.prom').read_text()


EXAMPLES = {'A recipe': check_recipe, 'A model': check_model, 'A data set': check_data, 'A loss': check_loss,
            'An option': check_option, 'A tracker': check_tracker}


@pytest.mark.parametrize('title', EXAMPLES)
def test_example(title, copy):
    if title != 'A recipe':
        follow(copy, 'A recipe', commands=False)
    EXAMPLES[title](copy, follow(copy, title))
