"""Processes: a gradient that is summed over as many processes as the run has."""
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tools.doctor.case import Case, Setup, Steps
from tools.doctor.findings import LOOK, OK, STOP, Finding
from utils.disk import ROOT
from utils.job import without_job

ROUND_TRIP_SECONDS = 60
# Bytes of T2T-ViT-14's gradient, for when the model could not be made.
TYPICAL_BYTES = 86_000_000


def look_at_processes(case: Case, setup: Setup | None, steps: Steps | None) -> Iterator[Finding]:
    """Have the launcher start processes, as it does for a run, that add up a gradient."""
    count, is_gpu = case.together, case.world.device.type == 'cuda'
    if count == 1:
        yield Finding(OK, 'Processes', 'One, which has nothing to exchange')
        return
    megabytes = (setup.gradient_bytes if setup else TYPICAL_BYTES) / 1e6
    if is_gpu:
        torch.cuda.empty_cache()
    found, problem = add_up(count, megabytes, case.world.device.type)
    if found is None:
        yield Finding(STOP, 'Round trip', f'{count} processes could not add up a gradient: {problem}',
                      'Mend what that says; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network to use, '
                      'NCCL_DEBUG=INFO tells more.')
        return
    share = found['seconds'] / steps.seconds if steps else 0
    figure = (f'{count} processes add up {megabytes:,.1f} MB in {1000 * found["seconds"]:,.1f} ms '
              f'({found["bytes_per_second"] / 1e9:.2f} GB/s); the sum is right')
    if share:
        figure += f'; {100 * share:.0f} % of a step'
        # On a CPU it takes the cores that compute.
        figure += ', most of it while the gradient is computed' * is_gpu
    mark, remedy = OK, ''
    if share > 0.5 and case.processes > 1:
        mark = LOOK
        remedy = 'A larger -b or --accum-steps makes it rarer; a faster link between the processes makes it shorter.'
    yield Finding(mark, 'Round trip', figure, remedy, numbers=found)


def add_up(count: int, megabytes: float, kind: str) -> tuple[dict | None, str]:
    """Return what tools/doctor/round_trip.py measures with `count` processes, or None and why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / 'found.json'
        command = [sys.executable, '-m', 'launch.launcher', str(count), str(ROOT / 'tools/doctor/round_trip.py'),
                   '--megabytes', f'{megabytes:.6f}', '--device', kind, '--timeout', str(ROUND_TRIP_SECONDS // 2),
                   '--json', str(result)]
        # The doctor may itself run in a job, of which these processes are no part.
        environment = {**without_job(os.environ), 'GRACE': '2', 'MAX_RESTARTS': '0'}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        try:
            _, said = process.communicate(timeout=ROUND_TRIP_SECONDS)
        except subprocess.TimeoutExpired:
            return None, f'not done after {ROUND_TRIP_SECONDS} s'
        finally:
            _end(process)
        if process.returncode:
            return None, (said.strip().splitlines() or [f'exit code {process.returncode}'])[-1]
        return json.loads(result.read_text(encoding='utf-8')), ''


def _end(process: subprocess.Popen) -> None:
    """End the launcher, which ends the processes that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
