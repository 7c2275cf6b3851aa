"""What several test files share: where the project is, its scripts as a user starts them, small data."""
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from data.pipeline import resolve_input
from engine.checkpoint import save_checkpoint
from models import open_trained_model
from options.parser import parse_options
from options.scripts import predict_parser
from tests.browser import visit  # noqa: F401, a fixture

pytest.register_assert_rewrite('tests.golden')  # so that its assertions show their values, as those of tests do

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240  # the longest that any one command of a test may take


def run_command(command: list, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """Runs a command in its own process group, which is gone when this returns, however it ends."""
    env = {**os.environ, 'PYTHON': sys.executable, 'HF_HUB_OFFLINE': '1', **environment}
    process = subprocess.Popen([str(word) for word in command], cwd=cwd, env=env, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        end_group(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end_group(number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # every process of the group has ended by itself
        os.killpg(number, signal.SIGKILL)


class Warm:
    """A process that has imported what scripts import, and runs them; see tests/warm.py.

    Attributes:
        python: a command that stands for an interpreter whose programs it runs.
    """

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix='warm-')
        self._socket = f'{self._folder.name}/socket'
        self._server = subprocess.Popen([sys.executable, ROOT / 'tests/warm.py', self._socket], stdin=subprocess.PIPE,
                                        env={**os.environ, 'HF_HUB_OFFLINE': '1'})
        self.python = Path(self._folder.name, 'python')
        self.python.write_text(f'#!/bin/sh\n'
                               f'exec {sys.executable} -IS {ROOT}/tests/warm_client.py {self._socket} "$@"\n')
        self.python.chmod(0o755)
        end = time.monotonic() + SECONDS
        while not os.path.exists(self._socket):
            assert self._server.poll() is None and time.monotonic() < end
            time.sleep(0.05)

    def run(self, words, cwd: Path, *, executable=sys.executable, **environment) -> subprocess.CompletedProcess:
        """python WORDS…, as `run_command`, which itself starts programs by `executable`."""
        words = [str(word) for word in words]
        request = {'words': words, 'cwd': str(cwd), 'executable': str(executable),
                   'environment': {**os.environ, 'PYTHON': sys.executable, 'HF_HUB_OFFLINE': '1', **environment}}
        with (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server, open(os.devnull) as nothing,
              tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err):
            server.connect(self._socket)
            socket.send_fds(server, [json.dumps(request).encode()], [nothing.fileno(), out.fileno(), err.fileno()])
            pid = int(server.recv(99))
            try:
                in_time = select.select([server], [], [], SECONDS)[0]
            finally:
                end_group(pid)
            code = int(server.recv(99))
            for file in (out, err):
                file.seek(0)
            assert in_time, f'{words}: not done after {SECONDS} s\n{out.read()}\n{err.read()}'
            return subprocess.CompletedProcess(words, code, out.read(), err.read())


warm = functools.cache(Warm)


def run_script(script: str, *options, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """SCRIPT OPTIONS…, from another folder than the project's, without the wait for torch."""
    return warm().run([ROOT / script, *options], cwd, **environment)


def run_module(module: str, *options, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """python -m MODULE OPTIONS…, as `run_script`; nor do the processes wait that a benchmark starts."""
    words = ('-P', '-m', module, *options)
    return warm().run(words, cwd, executable=warm().python, PYTHONPATH=str(ROOT), **environment)


def run_script_cold(script: str, *options, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """python SCRIPT OPTIONS…: all that a user starts; 4 s more than `run_script`."""
    return run_command([sys.executable, ROOT / script, *options], cwd, **environment)


def launch(num_proc, *options, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """./distributed_train.sh NUM_PROC OPTIONS…, whose launcher and ranks do not wait for torch."""
    return launch_cold(num_proc, *options, cwd=cwd, PYTHON=str(warm().python), **environment)


def launch_cold(num_proc, *options, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """./distributed_train.sh NUM_PROC OPTIONS…: all that a user starts; 6 s more than `launch`."""
    return run_command([ROOT / 'distributed_train.sh', num_proc, *options], cwd, **environment)


def succeeded(result: subprocess.CompletedProcess) -> str:
    """What the command printed; fails the test with its output if the command failed."""
    assert result.returncode == 0, f'{result.args}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}'
    return result.stdout


def evaluated(picture: Path, *options: str) -> dict[str, float]:
    """Probabilities of the classes of a picture, as predict.py PICTURE OPTIONS… opens, crops and normalises it.

    Without the script, which takes seconds, and with timm's transforms. OPTIONS name weights relative to the picture.
    """
    with contextlib.chdir(picture.parent):
        model, args, classes = open_trained_model(parse_options(predict_parser(), [picture.name, *options]))
        config = resolve_input(args, model.pretrained_cfg)
        settings = config._asdict()
        transform = create_transform(input_size=(3, *settings.pop('img_size')), **settings)
        with torch.inference_mode():
            probabilities = model(transform(Image.open(picture).convert('RGB'))[None]).softmax(1)[0].tolist()
    return dict(zip(classes or (), probabilities, strict=True))


def assert_same(a, b, where='state'):
    """Equal to the bit, through dicts, lists and tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f'{where}[{i}]')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def write_images(root: Path, splits: dict[str, int], classes=('ant', 'bee', 'cat'), size=(40, 36), seed=0) -> Path:
    """An image folder: JPEG files of noise around a colour for each class, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    for split, count in splits.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                colour = np.zeros(3)
                colour[label % 3] = 160
                pixels = np.clip(colour + rng.normal(60, 30, (*size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f'{name}_{index}.jpg', quality=90)
    return root


def write_checkpoint(content: dict, path: Path) -> None:
    """A whole checkpoint, with its checksum, under any name."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        os.replace(save_checkpoint(content, Path(folder), global_step=0, keep=2, is_best=False), path)


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory) -> Path:
    """train/ and val/ of three classes, 12 and 5 images in each."""
    return write_images(tmp_path_factory.mktemp('images'), {'train': 12, 'val': 5})
