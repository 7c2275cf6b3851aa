"""Tests of the benchmark of teachers: students learn from the teacher that was trained; a second start reads them."""
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import teachers
from benchmarks.shared.command import record_options
from options.parser import create_parser, parse_options
from tests.conftest import ROOT, warm
from utils.checkpoint_reader import read_checkpoint

STUDENT = ('--model', 't2t_vit_7', '--model-kwargs', 'depth=1', 'embed_dim=16', 'num_heads=2', 'token_dim=8',
           'aux_head=True')


def test_students_learn_from_the_teacher_and_a_second_start_reads_them(tmp_path, image_folder, monkeypatch, capsys):
    monkeypatch.setattr(teachers, 'STUDENT', STUDENT)
    monkeypatch.setattr(teachers, 'TEACHER', STUDENT)
    monkeypatch.setattr(teachers, 'STUDENTS', {name: teachers.STUDENTS[name] for name in (
        teachers.ALONE, 'token labels', 'hard distillation')})
    monkeypatch.setattr(teachers, 'CLAIMS', [claim for claim in teachers.CLAIMS if {
        claim.better, claim.worse} <= teachers.STUDENTS.keys()])
    monkeypatch.setattr(sys, 'executable', str(warm().python))
    args = parse_options(create_parser('', (teachers.teachers_options, record_options), {'name': 'teachers'}), [
        str(image_folder), '--images', '24', '--seeds', '2', '--img-size', '32', '-b', '8', '-j', '0', '--device',
        'cpu', '--teacher-epochs', '1', '--epochs', '1', '--runs', str(tmp_path)])
    of_teacher, results = teachers.train_everything(args)
    assert [(result['model'], result['seed']) for result in results] == [
        (name, seed) for seed in (1, 2) for name in ('alone', 'token labels', 'hard distillation')]
    assert capsys.readouterr().out.count('top-1') == 7

    runs = {folder.name.rsplit('-', 1)[0]: read_checkpoint(folder / 'last.pth.tar')
            for folder in (tmp_path / 'train').iterdir()}
    assert len(runs) == 7
    assert runs['student-token-labels-1']['labels'].startswith('24 ')
    assert runs['student-hard-distillation-2']['teacher'] and not runs['student-alone-2']['teacher']
    first = [runs[f'student-{name}-1']['args']['seed'] for name in ('alone', 'token-labels', 'hard-distillation')]
    assert first == [1, 1, 1]

    record = json.loads(json.dumps(teachers.new_teachers_record(args, torch.device('cpu'), of_teacher, results)))
    text = teachers.as_text(record)
    assert f'| Token labels beat training alone | {record["claims"][0]["verdict"]} |' in text
    assert '24 training images, 1 epoch, 32 pixels, batch 8; 15 test images' in text and str(tmp_path) not in text

    monkeypatch.setattr(subprocess, 'Popen', None)  # nothing is trained
    assert teachers.train_everything(args) == (of_teacher, results)


def test_each_claim_names_students():
    assert {name for claim in teachers.CLAIMS for name in claim[1:3]} == teachers.STUDENTS.keys()


@pytest.mark.skipif(not (ROOT / 'benchmarks/results/teachers.json').exists(), reason='no record yet')
def test_the_committed_record_is_what_its_page_says():
    record = json.loads((ROOT / 'benchmarks/results/teachers.json').read_text())
    assert teachers.as_text(record) == (ROOT / 'benchmarks/results/teachers.md').read_text()
