"""Runs a tiny model for 310 epochs, whole and with random faults, and compares where the two end.

    python -m benchmarks.reliability.soak --faults 50 --seed 1         # about a quarter of an hour on two cores
    python -m benchmarks.reliability.soak --faults 3 --epochs 12                   # a minute

The faults are drawn from the seed: processes killed in a step, in every part of a save and in the evaluation, signals
to workers and to the launcher, a full disk, and damage to the newest checkpoint between two starts. After each the
same command is given again. The line at the end says `same final state`, or what differs. A record of the faults goes
to --output as JSON, and benchmarks/results/reliability.md is written anew from it and from the other results.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils.disk import ROOT

RUN = ('--dataset', 'digits', '--only-classes', '0-1', '--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu',
       '--model-kwargs', 'embed_dim=32', 'depth=2', 'num_heads=2', 'token_dim=16',
       '-b', '16', '-j', '1', '--warmup-epochs', '2', '--lr', '1e-3', '--model-ema-decay', '0.99', '--drop', '0.1',
       '--log-interval', '4', '--checkpoint-steps', '5', '--keep', '3', '--no-tensorboard', '--timeout', '60')
EXPECTED_CODES = {0, 75, 130, 137, 143}  # done, interrupted, Ctrl-C, killed
TIMES = {'epoch_seconds', 'images_per_second'}
WHERE_KILLED = ('step', 'evaluate', 'save.started', 'save.written', 'save.synced', 'save.renamed', 'save.linked_last')


class Fault(NamedTuple):
    """What happens to one start of the command."""
    plan: str  # for T2T_FAULTS
    restarts: int = 0  # that the launcher may make by itself
    damage: str = ''  # to the newest checkpoint, afterwards


def draw_fault(rng: random.Random, steps: int) -> Fault:
    """Any fault, at a step up to `steps`."""
    kind = rng.choice(['kill', 'restart', 'kill-job', 'signal', 'launcher', 'save', 'full', 'damage'])
    at, rank = rng.randint(1, steps), rng.randint(0, 1)
    save = max(1, at // 5)
    if kind == 'kill':
        return Fault(f'step@{at}#{rank}=kill')
    if kind == 'restart':  # the launcher starts the processes anew, and is stopped some steps later
        return Fault(f'step@{at}#{rank}=kill,step@{at + 7}#0!=launcher-term', restarts=3)
    if kind == 'kill-job':
        return Fault(f'step@{at}#{rank}=kill-job')
    if kind == 'signal':
        return Fault(f'step@{at}#{rank}={rng.choice(["term", "usr1", "int"])}')
    if kind == 'launcher':
        return Fault(f'step@{at}#0=launcher-{rng.choice(["term", "usr1", "int", "kill"])}')
    if kind == 'save':
        return Fault(f'{rng.choice(WHERE_KILLED)}@{save}#0={rng.choice(["kill", "kill-job"])}')
    if kind == 'full':
        return Fault(f'save.started@{save}#0=full,step@{at + 3}#{rank}=kill')
    return Fault(f'step@{at}#{rank}=kill-job', damage=rng.choice(['flip', 'cut', 'empty']))


def damage(folder: Path, how: str, rng: random.Random) -> str:
    """Damages the newest checkpoint of a run, as a disk would; returns its name."""
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
    newest.write_bytes(content)  # in place: last.pth.tar is another name of it
    return newest.name


def start(folder: Path, name: str, epochs: int, restarts: int, faults: str = '') -> tuple[int, str, float]:
    """Runs the command once; returns its exit code, what it printed, and the seconds it took. Leaves no process."""
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
    """The processes that `start` began, by their environment, after a moment for those that are ending."""
    wanted = f'T2T_SOAK={name}'.encode()
    for _ in range(50):
        found = []
        for entry in Path('/proc').iterdir():
            try:
                if entry.name.isdecimal() and wanted in (entry / 'environ').read_bytes().split(b'\0'):
                    if (entry / 'stat').read_text().rpartition(')')[2].split()[0] != 'Z':
                        found.append(int(entry.name))
            except OSError:  # gone meanwhile, or of another user
                continue
        if not found:
            break
        time.sleep(0.2)
    return found


def metrics(folder: Path) -> list[dict]:
    from engine.log.metrics import read_metrics
    return [{name: value for name, value in record.items() if name not in TIMES} for record in read_metrics(folder)]


def differences(a, b, where: str = '') -> list[str]:
    """The places where two states differ in a bit."""
    import torch
    if type(a) is not type(b):
        return [f'{where}: {type(a).__name__}, {type(b).__name__}']
    if isinstance(a, dict):
        unequal = [f'{where}: other keys'] if a.keys() != b.keys() else []
        return unequal + [found for key in a.keys() & b.keys()
                          for found in differences(a[key], b[key], f'{where}.{key}')]
    if isinstance(a, list | tuple):
        unequal = [f'{where}: other length'] if len(a) != len(b) else []
        return unequal + [found for i, (x, y) in enumerate(zip(a, b, strict=False))
                          for found in differences(x, y, f'{where}[{i}]')]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--faults', type=int, default=50)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--epochs', type=int, default=310, help='of the schedule with its 10 epochs of cool-down')
    parser.add_argument('--output', type=Path, default=ROOT / 'benchmarks/results/soak.json')
    parser.add_argument('--keep-runs', type=Path, help='folder for the two runs (default: a temporary one)')
    args = parser.parse_args()
    # Whoever starts this in the background has these ignored, which what it starts would inherit, and respect.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    rng = random.Random(args.seed)
    folder = args.keep_runs or Path(tempfile.mkdtemp(prefix='soak-'))
    runs = folder / 'train'

    code, out, seconds = start(folder, 'whole', args.epochs, restarts=0)
    if code:
        sys.exit(f'the run without faults failed with exit code {code}:\n{out[-2000:]}')
    steps = [record['global_step'] for record in metrics(runs / 'whole') if record['kind'] == 'train'][-1]
    print(f'without faults: {steps} steps in {seconds:.0f} s; seed {args.seed}', flush=True)

    faults, begun = [], time.perf_counter()
    for index in tqdm(range(args.faults), desc='faults', disable=not sys.stderr.isatty()):
        fault = draw_fault(rng, max(2, 3 * steps // (2 * args.faults)))
        code, out, seconds = start(folder, 'faulty', args.epochs, fault.restarts, fault.plan)
        damaged = damage(runs / 'faulty', fault.damage, rng) if fault.damage else ''
        faults.append({**fault._asdict(), 'damaged': damaged, 'exit_code': code, 'seconds': round(seconds, 1)})
        print(f'{index + 1:3d}: {fault.plan:52s} exit code {code:3d}  {seconds:5.1f} s  {fault.damage} {damaged}',
              flush=True)
        if code not in EXPECTED_CODES:
            sys.exit(f'exit code {code} is none of {sorted(EXPECTED_CODES)}:\n{out[-3000:]}')
        if code == 0 and index < args.faults - 1:
            sys.exit('the run ended before its faults did; give more --epochs or fewer --faults')
    if code != 0 or faults[-1]['damage']:
        code, out, seconds = start(folder, 'faulty', args.epochs, restarts=0)
        if code:
            sys.exit(f'the last start failed with exit code {code}:\n{out[-2000:]}')

    from utils.checkpoint_reader import read_checkpoint
    states = [{key: value for key, value in read_checkpoint(runs / name / 'last.pth.tar').items() if key != 'args'}
              for name in ('whole', 'faulty')]
    unequal = differences(states[0], states[1], 'state')
    logs = [metrics(runs / name) for name in ('whole', 'faulty')]
    lines = sum(a != b for a, b in zip(*logs, strict=False)) + abs(len(logs[0]) - len(logs[1]))
    import torch

    from utils.runtime import describe_environment
    command = f'python -m benchmarks.reliability.soak --faults {args.faults} --seed {args.seed}'
    record = {'command': command, 'epochs': args.epochs,
              'steps': steps, 'seconds': round(time.perf_counter() - begun), 'faults': faults,
              'tensors_that_differ': unequal, 'log_lines': len(logs[0]), 'log_lines_that_differ': lines,
              **describe_environment(torch.device('cpu'))}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + '\n')
    if not args.keep_runs:
        shutil.rmtree(folder)
    from benchmarks.reliability.scorecard import write_scorecard
    write_scorecard()
    print(f'{len(faults)} faults, {steps} steps, {len(logs[0])} log lines of which {lines} differ')
    print('same final state' if not unequal and not lines else f'OTHER final state: {unequal[:10]}')
    sys.exit(bool(unequal or lines))


if __name__ == '__main__':
    main()
