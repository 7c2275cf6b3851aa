"""Packing under attack: kills at any moment, processes that die, a full disk. The shards are the same to the byte.

    python -m pytest tests/faults/test_pack.py              # a few kills
    python -m pytest tests/faults/test_pack.py -m faults    # 200 of them
"""
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from data.shards import packing
from tests.conftest import end_group
from tests.test_pack import content, loggers_of_the_tests, pack  # noqa: F401, a fixture
from tools.pack import main
from utils.errors import UserError

OPTIONS = ('--short-side', '64', '--samples', '4', '-j', '2')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """60 images that take a while to be resized."""
    root = tmp_path_factory.mktemp('images')
    print('seed 7')
    rng = np.random.default_rng(7)
    for index in range(60):
        path = root / 'in' / f'class{index % 3}' / f'{index}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        noise.resize((600 if index else 100, 400)).save(path, quality=90)
    return root / 'in'


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory) -> dict[str, bytes]:
    """What a packing leaves that nobody has interrupted."""
    out = tmp_path_factory.mktemp('whole')
    pack(folder, out, *OPTIONS)
    return content(out)


def start(folder: Path, out: Path, *, file_limit: int | None = None) -> int:
    """Packs in a process group of its own, whose leader says in `out`.said how it ended; returns its number."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)  # here as well as there: whoever comes first, the group is there when this returns
        return pid
    code = 1
    with open(f'{out}.said', 'w') as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            os.setpgid(0, 0)
            # The bars' lock is shared with this process, and with all later ones: a kill may leave it held for ever.
            tqdm.set_lock(threading.RLock())
            if file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
            main([str(folder), str(out), *OPTIONS])
            code = 0
        except UserError as error:
            code = 2
            print(error, end='')
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            said.flush()
            os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def group_is_gone(group: int) -> bool:
    """Whether all processes of a group end within 5 s; those that others have to bury are dead, too."""
    for _ in range(100):
        alive = [entry for entry in os.listdir('/proc') if entry.isdigit() and _is_alive_in(group, entry)]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def _is_alive_in(group: int, pid: str) -> bool:
    with contextlib.suppress(OSError):
        state, _, found = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[:3]
        return int(found) == group and state != 'Z'
    return False


def kill_until_done(folder: Path, whole: dict, out: Path, kills: int, seed: int) -> int:
    """Packs, killed at random moments, and again, until it is done; returns how many kills there were."""
    print('seed', seed)
    rng, count = random.Random(seed), 0
    started = time.monotonic()
    pack(folder, out, *OPTIONS)
    seconds = time.monotonic() - started
    shutil.rmtree(out)
    while count < kills:
        pid = start(folder, out)
        # Early ones hit the plan, late ones the manifest; progress is made in small steps, so that many are needed.
        time.sleep(rng.uniform(0, seconds / rng.choice((1, 2, 5))))
        # The whole group at once, or its leader alone: then the others have to find out by themselves.
        (os.killpg if rng.random() < 0.5 else os.kill)(pid, signal.SIGKILL)
        try:
            ended(pid)
            assert group_is_gone(pid)
        finally:
            end_group(pid)
        count += 1
        if (out / 'manifest.json').exists():
            left = {name: data for name, data in content(out).items() if not name.startswith('.packing')}
            assert left == whole, 'there is a manifest, and not all that it says'
            shutil.rmtree(out)
    assert ended(start(folder, out)) == 0, Path(f'{out}.said').read_text()
    assert content(out) == whole
    return count


def test_killed_at_random_moments(folder, whole, tmp_path):
    kill_until_done(folder, whole, tmp_path / 'out', 5, seed=1)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_killed_at_200_random_moments(folder, whole, tmp_path, record_property):
    record_property('kills', kill_until_done(folder, whole, tmp_path / 'out', 200, seed=2))


def test_a_process_that_is_killed(folder, whole, tmp_path, monkeypatch):
    """As by a system that has run out of memory: said in one line, and the same command goes on."""
    def prepare(content, name, *arguments, **options):
        if name.endswith('/33.jpg'):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(content, name, *arguments, **options)

    original = packing.prepare
    monkeypatch.setattr(packing, 'prepare', prepare)
    out = tmp_path / 'out'
    assert ended(start(folder, out)) == 2
    said = Path(f'{out}.said').read_text()
    assert 'one of the --jobs has ended with exit code -9' in said and said.count('\n') <= 1
    monkeypatch.undo()
    assert ended(start(folder, out)) == 0
    assert content(out) == whole


def test_a_full_disk(folder, whole, tmp_path):
    out, largest = tmp_path / 'out', max(len(data) for name, data in whole.items() if name.endswith('.tar'))
    shards = sorted(len(data) for name, data in whole.items() if name.endswith('.tar'))
    assert ended(start(folder, out, file_limit=shards[len(shards) // 2])) == 2
    said = Path(f'{out}.said').read_text()
    assert 'File too large; what is whole stays: make room, and the same command goes on' in said, said
    assert said.count('\n') == 0 and not (out / 'manifest.json').exists() and not list(out.glob('.*.tmp'))
    for path in out.glob('*.tar'):
        assert path.read_bytes() == whole[path.name]
    assert ended(start(folder, out, file_limit=largest)) == 0
    assert content(out) == whole


def test_ctrl_c(folder, whole, tmp_path):
    out = tmp_path / 'out'
    pid = start(folder, out)
    while not [*out.glob('.shard-*.tmp'), *out.glob('shard-*.tar')]:  # the first is being written
        time.sleep(0.001)
    os.killpg(pid, signal.SIGINT)
    code, said = ended(pid), Path(f'{out}.said').read_text()
    assert code == 130, said
    assert said.endswith('interrupted; the same command goes on\n')
    assert group_is_gone(pid) and not list(out.glob('.*.tmp')) and not (out / 'manifest.json').exists()
    assert ended(start(folder, out)) == 0
    assert content(out) == whole
