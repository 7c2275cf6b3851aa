"""utils/results.py: files that are whole, names that nobody takes twice, cells that compute nothing."""
import csv
import json
import os

import pytest

from options.parser import parse_options
from options.scripts import train_parser
from utils import results
from utils.errors import UserError
from utils.results import write_results


def test_two_of_one_second_are_both_kept(tmp_path):
    stem = tmp_path / '20260101-120000-t2t_vit_7-32'
    for number in (1, 2, 3):
        write_results(stem, {'run': number}, [{'run': number}], '--results-file')
    names = [stem.name, f'{stem.name}-2', f'{stem.name}-3']
    assert [json.loads((tmp_path / f'{name}.json').read_text())['run'] for name in names] == [1, 2, 3]
    write_results(tmp_path / 'chosen', {'run': 1}, [{'run': 1}], '--results-file')
    write_results(tmp_path / 'chosen', {'run': 2}, [{'run': 2}], '--results-file')
    assert json.loads((tmp_path / 'chosen.json').read_text())['run'] == 2 and len(os.listdir(tmp_path)) == 8


def test_where_there_is_no_room_earlier_results_stay(tmp_path, monkeypatch):
    stem = tmp_path / 'a'
    write_results(stem, {'run': 1}, [{'run': 1}], '--results-file')

    def full(path, content):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(results, 'write_whole', full)
    with pytest.raises(UserError, match=r'cannot be written \(No space left on device\); earlier results are as they'):
        write_results(stem, {'run': 2}, [{'run': 2}], '--results-file')
    assert json.loads((tmp_path / 'a.json').read_text())['run'] == 1
    with pytest.raises(UserError):
        write_results(tmp_path / '20260101-120000-t2t_vit_14-32', {'run': 3}, [{'run': 3}], '--results-file')
    assert sorted(os.listdir(tmp_path)) == ['a.csv', 'a.json']


def test_names_are_no_formulas(tmp_path):
    names = ['=1+1', '+cat', '@sum', '-5', 'cat', '-cat']
    write_results(tmp_path / 'a', {}, [{'class': name, 'share': -0.5} for name in names], '--results-file')
    rows = list(csv.DictReader(open(tmp_path / 'a.csv')))
    assert [row['class'] for row in rows] == ["'=1+1", "'+cat", "'@sum", '-5', 'cat', "'-cat"]
    assert all(row['share'] == '-0.5' for row in rows)


@pytest.mark.parametrize('value', ['"a\\0b"', '"\\ud800x"'])
def test_a_recipe_with_a_letter_that_no_name_can_have(value, tmp_path):
    (tmp_path / 'a.yaml').write_text(f'experiment: {value}\n')
    with pytest.raises(UserError, match='experiment: .* holds a letter that no name can have'):
        parse_options(train_parser(), ['/data', '-c', str(tmp_path / 'a.yaml')])
