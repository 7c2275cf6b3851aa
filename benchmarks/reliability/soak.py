"""Run a tiny model for 310 epochs, once whole and once with random faults, and compare the final states.

    python -m benchmarks.reliability.soak --faults 50 --seed 1         # about a quarter of an hour on two cores
    python -m benchmarks.reliability.soak --faults 3 --epochs 12                   # a minute

The seed determines the faults: killed processes, signals, a full disk, and damage to the newest checkpoint between two
starts. After each fault, the same command runs again. benchmarks/results/reliability.md is renewed from the record.
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from benchmarks.reliability.scorecard import RECORD, write_scorecard
from benchmarks.shared.command import common_options, parse_command
from benchmarks.shared.records import save
from engine.log.metrics import read_metrics
from options.types import number, positive_int
from utils.checkpoint_reader import read_checkpoint
from utils.console import progress_bar
from utils.disk import ROOT
from utils.runtime import describe_environment
from utils.script import run_script

RUN = ('--dataset', 'digits', '--only-classes', '0-1', '--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu',
       '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2', 'token_dim=16',
       '-b', '16', '-j', '1', '--warmup-epochs', '2', '--cooldown-epochs', '10', '--lr', '1e-3',
       '--model-ema-decay', '0.99', '--drop', '0.1', '--log-interval', '4', '--checkpoint-steps', '5', '--keep', '3',
       '--no-tensorboard', '--timeout', '60')
EXPECTED_CODES = {0, 75, 130, 137, 143}  # done, interrupted, Ctrl-C, killed
TIMES = {'epoch_seconds', 'images_per_second'}
WHERE_KILLED = ('step', 'evaluate', 'save.started', 'save.written', 'save.synced', 'save.renamed', 'save.linked_last')


class Fault(NamedTuple):
    """A fault of one start: T2T_FAULTS, restarts that the launcher may make, and damage to the newest checkpoint."""
    plan: str
    restarts: int = 0
    damage: str = ''


def draw_fault(rng: random.Random, steps: int) -> Fault:
    """Return any fault, at a step up to `steps`."""
    kind = rng.choice(['kill', 'restart', 'kill-job', 'signal', 'launcher', 'save', 'full', 'damage'])
    at, rank = rng.randint(1, steps), rng.randint(0, 1)
    saved = max(1, at // 5)
    match kind:
        case 'kill' | 'kill-job':
            return Fault(f'step@{at}#{rank}={kind}')
        case 'restart':  # the launcher restarts the processes, and is stopped some steps later
            return Fault(f'step@{at}#{rank}=kill,step@{at + 7}#0!=launcher-term', restarts=3)
        case 'signal':
            return Fault(f'step@{at}#{rank}={rng.choice(["term", "usr1", "int"])}')
        case 'launcher':
            return Fault(f'step@{at}#0=launcher-{rng.choice(["term", "usr1", "int", "kill"])}')
        case 'save':
            return Fault(f'{rng.choice(WHERE_KILLED)}@{saved}#0={rng.choice(["kill", "kill-job"])}')
        case 'full':
            return Fault(f'save.started@{saved}#0=full,step@{at + 3}#{rank}=kill')
    return Fault(f'step@{at}#{rank}=kill-job', damage=rng.choice(['flip', 'cut', 'empty']))


def damage(folder: Path, how: str, rng: random.Random) -> str:
    """Damage the newest checkpoint of a run as a disk would; return its name."""
    newest = max(folder.glob('checkpoint-*.pth.tar'), default=None)
    if newest is None:
        return 'nothing'
    content = bytearray(newest.read_bytes())
    if how == 'flip':
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == 'cut':
        del content[rng.randrange(len(content)):]
    else:
        content.clear()
    newest.write_bytes(content)  # in place, since last.pth.tar is a hard link
    return newest.name


def start(folder: Path, name: str, epochs: int, restarts: int, faults: str = '') -> tuple[int, str, float]:
    """Run the command once and leave no process; return its exit code, output and seconds."""
    command = [ROOT / 'distributed_train.sh', '2', *RUN, '--epochs', str(epochs - 10), '--output', str(folder),
               '--experiment', name, '--resume', 'auto']
    environment = {**os.environ, 'PYTHON': sys.executable, 'MAX_RESTARTS': str(restarts), 'T2T_FAULTS': faults,
                   'OMP_NUM_THREADS': '1', 'T2T_SOAK': name}
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], env=environment, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        out, _ = process.communicate(timeout=1200)
    finally:
        leftovers = processes_of(name)
        for pid in leftovers:
            os.kill(pid, signal.SIGKILL)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return code, out, time.perf_counter() - started


def processes_of(name: str) -> list[int]:
    """Return the processes that `start` began, by their environment; those that are ending have a moment."""
    wanted = f'T2T_SOAK={name}'.encode()
    for _ in range(50):
        found = []
        for entry in Path('/proc').iterdir():
            try:
                if entry.name.isdecimal() and wanted in (entry / 'environ').read_bytes().split(b'\0'):
                    if (entry / 'stat').read_text().rpartition(')')[2].split()[0] != 'Z':
                        found.append(int(entry.name))
            except OSError:  # it has ended, or belongs to another user
                continue
        if not found:
            break
        time.sleep(0.2)
    return found


def metrics(folder: Path) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in read_metrics(folder)]


def differences(a, b) -> list[str]:
    """Return the places where two states differ in a bit."""
    (left, structure), (right, other) = tree_flatten_with_path(a), tree_flatten_with_path(b)
    if structure != other:
        return ['other keys or lengths']
    return [keystr(path) for (path, x), (_, y) in zip(left, right, strict=True)
            if type(x) is not type(y) or not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y)]


def run_faults(args, folder: Path, steps: int) -> list[dict]:
    """Run the command with one fault after the other, and to its end; return the faults."""
    rng = random.Random(args.seed)
    faults: list[dict] = []
    for index in progress_bar(iterable=range(args.faults), desc='faults'):
        fault = draw_fault(rng, max(2, 3 * steps // (2 * args.faults)))
        code, out, seconds = start(folder, 'faulty', args.epochs, fault.restarts, fault.plan)
        damaged = damage(folder / 'train/faulty', fault.damage, rng) if fault.damage else ''
        faults.append({**fault._asdict(), 'damaged': damaged, 'exit_code': code, 'seconds': round(seconds, 1)})
        print(f'{index + 1:3d}: {fault.plan:52s} exit code {code:3d}  {seconds:5.1f} s  {fault.damage} {damaged}',
              flush=True)
        if code not in EXPECTED_CODES:
            sys.exit(f'exit code {code} is none of {sorted(EXPECTED_CODES)}:\n{out[-3000:]}')
        if code == 0 and index < args.faults - 1:
            sys.exit('the run ended before its faults did; give more --epochs or fewer --faults')
    if code != 0 or faults[-1]['damage']:
        code, out, _ = start(folder, 'faulty', args.epochs, restarts=0)
    if code:
        sys.exit(f'the last start failed with exit code {code}:\n{out[-2000:]}')
    return faults


def soak_options(parser) -> None:
    add = parser.add_argument_group('What is run').add_argument
    add('--faults', type=positive_int, default=50, metavar='N', help='number of faults')
    add('--epochs', type=number(int, low=11), default=310, metavar='N', help='epochs, of which 10 are the cool-down')
    common_options(add, seed=1)


def main() -> None:
    args = parse_command('Compare a run with random faults with a whole one.', 'soak', soak_options)
    # A process in the background ignores these, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with tempfile.TemporaryDirectory(prefix='soak-') as temporary:
        folder = Path(temporary)
        runs = [folder / 'train' / name for name in ('whole', 'faulty')]
        code, out, seconds = start(folder, 'whole', args.epochs, restarts=0)
        if code:
            sys.exit(f'the run without faults failed with exit code {code}:\n{out[-2000:]}')
        steps = [record['global_step'] for record in metrics(runs[0]) if record['kind'] == 'train'][-1]
        print(f'without faults: {steps} steps in {seconds:.0f} s; seed {args.seed}', flush=True)
        begun = time.perf_counter()
        faults = run_faults(args, folder, steps)
        seconds = time.perf_counter() - begun
        states = [{key: value for key, value in read_checkpoint(run / 'last.pth.tar').items() if key != 'args'}
                  for run in runs]
        logs = [metrics(run) for run in runs]
    unequal = differences(*states)
    lines = sum(a != b for a, b in zip(*logs, strict=False)) + abs(len(logs[0]) - len(logs[1]))
    command = f'python -m benchmarks.reliability.soak --faults {args.faults} --seed {args.seed}'
    text = '\n'.join([f'{len(faults)} faults, {steps} steps, {len(logs[0])} log lines of which {lines} differ',
                      f'OTHER final state: {unequal[:10]}' if unequal or lines else 'same final state'])
    save(args, {'command': command, 'epochs': args.epochs, 'steps': steps, 'seconds': round(seconds), 'faults': faults,
                'tensors_that_differ': unequal, 'log_lines': len(logs[0]), 'log_lines_that_differ': lines,
                **describe_environment(torch.device('cpu'))}, text + '\n')
    if RECORD.exists():
        write_scorecard()
    print(text)
    sys.exit(bool(unequal or lines))


if __name__ == '__main__':
    run_script(main)
