"""Tests of benchmarks/gpu_suite.sh and float16.py: every part on a CPU, and what is left when something is killed.

    python -m pytest tests/test_gpu_suite.py
"""
import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks import targets
from tests.conftest import ROOT, SECONDS, end_group, run_command, run_module, succeeded, warm
from utils.errors import UserError
from utils.runtime import find_commit

SUITE = ROOT / 'benchmarks/gpu_suite.sh'
PARTS = ['t14', 't14_train', 't14_inference', 'peer', 't_14', 'float16', 'tests', 'fidelity', 'scale', 'sizes',
         'batch_64', 'pixels_384', 'peers', 'compiled_errors']
STEP = ('t14', 't14_train', 't14_inference', 'peer', 't_14', 'sizes', 'batch_64', 'pixels_384', 'peers')


@contextlib.contextmanager
def started(folder: Path, log: Path, **settings):
    """A dry run of the suite in its own process group, which is gone in the end."""
    env = {**os.environ, 'PYTHON': str(warm().python), 'OUT': str(folder), 'OMP_NUM_THREADS': '1', **settings}
    with open(log, 'w') as file:
        process = subprocess.Popen(['bash', SUITE, '--dry-run'], env=env, stdout=file, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        end_group(process.pid)
        process.wait()


def run_suite(folder: Path, log: Path, seconds: float = SECONDS, **settings) -> tuple[int, str]:
    with started(folder, log, **settings) as process:
        return process.wait(timeout=seconds), log.read_text()


def read(path: Path) -> dict:
    """The suite's record, as far as there is one; half a file would be an error."""
    return json.loads(path.read_text()) if path.exists() else {'records': {}, 'parts': []}


def wait_for(condition, process) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)


def last_of(content: dict) -> dict[str, str]:
    """How each part ended."""
    return {part: ended for part, _, ended in content['parts']}


@pytest.mark.parametrize('options, settings, message', [
    ((), {'PARTS': 't14 t14_trian'}, 'PARTS: there is no part t14_trian; there are: t14 '),
    ((), {'LIMIT': 'abc'}, 'LIMIT=abc: give seconds'), ((), {'PYTHON': '/nowhere'}, 'PYTHON=/nowhere: no such command'),
    ((), {'PARTS': '*'}, 'PARTS: there is no part *; there are: t14 '),
    ((), {'NAME': '..'}, 'NAME=..: give a name without a folder'), ((), {'NAME': 'a/b'}, 'NAME=a/b: give a name'),
    (('--dryrun',), {}, '--dryrun: the only option is --dry-run')])
def test_a_mistake_is_one_line(tmp_path, options, settings, message):
    result = run_command(['bash', SUITE, *options], tmp_path, OUT=str(tmp_path / 'results'), **settings)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count('\n') == 1
    assert not (tmp_path / 'results').exists()


@pytest.mark.timeout(900)
def test_every_part_on_a_cpu(tmp_path):
    """All but its figures: each part ends well, its rows are there before the next ones are, and none runs twice."""
    record, log = tmp_path / 'results/proof.json', tmp_path / 'log'
    seen = []
    with started(tmp_path / 'results', log, NAME='proof') as process:
        while process.poll() is None:
            if seen[-1:] != [names := list(read(record)['records'])]:
                seen.append(names)
            time.sleep(0.1)
    assert process.returncode == 0, log.read_text()[-3000:]
    content = read(record)
    assert last_of(content) == dict.fromkeys(PARTS, 'well')
    assert list(content['records']) == [part for part in PARTS if part != 'tests']
    assert len(seen) > 8 and all(before == after[:len(before)] for before, after in zip(seen, seen[1:], strict=False))
    for part in STEP:
        for table in content['records'][part]['tables']:
            assert all(row['images_per_second'] > 0 and row['peak_bytes'] > 0 for row in table['rows'])
            assert 'unfinished' not in table
    assert {table['task'] for table in content['records']['t14']['tables']} == {'train', 'inference'}
    assert content['records']['float16']['lines'][-1]['step'] == 12
    assert sorted(path.name for path in (tmp_path / 'results').iterdir()) == [
        'proof-scale.png', 'proof.json', 'proof.log', 'proof.md']
    text = (tmp_path / 'results/proof.md').read_text()
    assert 'not finished' not in text and '| DistributedDataParallel at one rank' in text
    assert '\n## t2t_vit_7: training, fp32, batch 2, 32 pixels\n' in text

    code, said = run_suite(tmp_path / 'results', log, NAME='proof')
    assert code == 0 and said.count('was done before, and is not run again') == len(PARTS)
    assert read(record) == content and (tmp_path / 'results/proof.md').read_text() == text


def hanging(folder: Path) -> Path:
    """An interpreter whose benchmarks.step never gets beyond the tables of training; it leaves its process's id."""
    path = folder / 'python'
    code = ('import sys, time; import benchmarks.step as step; from utils.script import run_script; '
            'step.start_inference = lambda *_: time.sleep(600); sys.argv[0] = step.__file__; run_script(step.main)')
    path.write_text(f'''#!/bin/sh
if [ "$2" = benchmarks.step ]; then
    echo $$ > {folder}/pid
    shift 2
    exec {warm().python} -c '{code}' "$@"
fi
exec {warm().python} "$@"
''')
    path.chmod(0o755)
    return path


@pytest.mark.timeout(600)
def test_what_was_measured_outlives_what_is_killed(tmp_path):
    folder, log, record = tmp_path / 'results', tmp_path / 'log', tmp_path / 'results/killed.json'
    settings = {'NAME': 'killed', 'PARTS': 't14 float16'}

    def rows(name: str) -> list[str]:
        tables = read(record)['records'].get(name, {'tables': []})['tables']
        return [row['contender'] for table in tables for row in table['rows'] if 'images_per_second' in row]

    # A part is killed: its rows stay, and the next one runs.
    with started(folder, log, PYTHON=str(hanging(tmp_path)), **settings) as process:
        wait_for(lambda: len(rows('t14')) == 2, process)
        os.kill(int((tmp_path / 'pid').read_text()), signal.SIGKILL)
        assert process.wait(timeout=SECONDS) == 1
    assert last_of(read(record)) == {'t14': 'killed', 'float16': 'well'}
    assert rows('t14') == ['published', 'default']
    text = (folder / 'killed.md').read_text()
    assert '| t14 | ' in text and '## t2t_vit_7: training, fp32' in text

    # All processes are killed at once, as where a machine goes; a part is in the process group of its timeout.
    (tmp_path / 'pid').unlink()
    with started(folder, log, PYTHON=str(hanging(tmp_path)), **settings) as process:
        wait_for(lambda: (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text() and rows('before/t14')
                 and last_of(read(record))['t14'] == 'begun, and not ended', process)
    end_group(os.getpgid(int((tmp_path / 'pid').read_text())))
    assert rows('before/t14') == ['published', 'default']
    assert read(record)['records']['float16']['lines'] and (folder / 'killed.md').exists()

    code, said = run_suite(folder, log, **settings)
    assert code == 0 and 'float16 was done before' in said and 't14 was done before' not in said
    assert last_of(read(record)) == {'t14': 'well', 'float16': 'well'}
    assert read(record)['records'].keys() == {'t14', 'float16'} and len(rows('t14')) == 4
    assert not list((ROOT / 'output/gpu_suite').glob('killed.*'))


def test_a_record_of_something_else_is_left_alone(tmp_path):
    (tmp_path / 'other.json').write_text('{"machine": {}}')
    result = run_command(['bash', SUITE, '--dry-run'], tmp_path, OUT=str(tmp_path), NAME='other')
    assert result.returncode == 2 and 'other.json is not of gpu_suite.sh; give another name' in result.stderr
    assert (tmp_path / 'other.json').read_text() == '{"machine": {}}'


def test_figures_of_another_commit_are_no_part_of_a_rerun(tmp_path, monkeypatch):
    monkeypatch.setenv('COMMIT', 'bbbbbbb')
    content = {'records': {'t14': {'machine': {'commit': 'aaaaaaa'}}}, 'texts': {}, 'parts': [['t14', '1', 'well']]}
    (tmp_path / 'all.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match='has figures of commit aaaaaaa, and this is bbbbbbb; give another name'):
        targets.unpack(tmp_path / 'all.json', tmp_path / 'unpacked')


def test_what_is_unfinished_is_kept_apart_until_its_part_has_ended_well(tmp_path):
    def packed(lines, **records):
        machines = {name: {'device': device, 'commit': find_commit()} for name, device in records.items()}
        return {'records': {name: {'machine': machine} for name, machine in machines.items()}, 'texts': {},
                'parts': [[part, '1', ended] for part, ended in lines]}

    (tmp_path / 'all.json').write_text(json.dumps(packed(
        [('a', 'well'), ('b', 'killed'), ('c', 'well'), ('c', 'killed')],
        **{'b': 'new', 'a': 'first', 'before/b': 'old', 'before/d': 'older'})))
    folder = tmp_path / 'unpacked'
    targets.unpack(tmp_path / 'all.json', folder)
    records = targets.Records(folder)
    assert {name: record['machine']['device'] for name, record in records.by_name.items()} == {
        'a': 'first', 'before/b': 'new', 'before/d': 'older'}
    with open(folder / targets.PARTS, 'a') as file:
        file.write('d\t1\twell\n')
    assert targets.Records(folder).by_name.keys() == {'a', 'before/b'}


@pytest.mark.parametrize('limit, steps', [(('--steps', 5), 5), (('--seconds', 0.001), 1)])
def test_float16_ends_in_time_and_saves_no_weights(tmp_path, limit, steps):
    succeeded(run_module('benchmarks.float16', '--model', 't2t_vit_7', '--img-size', 32, '-b', 16, '-j', 0,
                         '--device', 'cpu', '--log-interval', 2, *limit, '--output', tmp_path / 'out', cwd=tmp_path))
    record = json.loads((tmp_path / 'out/float16.json').read_text())
    assert [line['step'] for line in record['lines']] == [step for step in (1, 2, 4, 5) if step <= steps]
    assert record['finished'] and record['precision'] == 'bfloat16'
    assert all(1 < line['loss'] < 4 and line['skipped'] == 0 for line in record['lines'])
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['float16.json', 'float16.md']
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_float16_that_is_not_finite_is_in_the_record(tmp_path):
    result = run_module('benchmarks.float16', '--model', 't2t_vit_7', '--img-size', 32, '-b', 4, '-j', 0, '--device',
                        'cpu', '--steps', 90, '--output', tmp_path, cwd=tmp_path, T2T_FAULTS='loss@1+=nan')
    assert result.returncode == 3, result.stderr
    record = json.loads((tmp_path / 'float16.json').read_text())
    assert not record['finished'] and record['lines'][-1]['skipped'] > 5 and record['lines'][-1]['loss'] is None
