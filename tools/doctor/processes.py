"""Processes: a gradient summed over as many processes as the run has."""
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tools.doctor.findings import LOOK, OK, STOP, Finding
from utils.disk import ROOT
from utils.job import without_job

if TYPE_CHECKING:
    from tools.doctor.case import Case


ROUND_TRIP_SECONDS = 60


def look_at_processes(case: 'Case'):
    """Starts the processes by the launcher, as a run does, and has them add up a gradient."""
    count, device = case.together, case.world.device
    if count == 1:
        yield Finding(OK, 'Processes', 'One, which has nothing to exchange')
        return
    megabytes = (case.gradient_bytes or 86_000_000) / 1e6
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    found, problem = add_up(count, megabytes, device.type)
    if found is None:
        yield Finding(STOP, 'Round trip', f'{count} processes could not add up a gradient: {problem}',
                      'See to what is said there; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network to use, '
                      'NCCL_DEBUG=INFO tells more.')
        return
    seconds, share = found['seconds'], found['seconds'] / case.step_seconds if case.step_seconds else 0
    figure = (f'{count} processes add up {megabytes:,.1f} MB in {1000 * seconds:,.1f} ms '
              f'({found["bytes_per_second"] / 1e9:.2f} GB/s); the sum is right')
    if share:
        figure += f'; {100 * share:.0f} % of a step'
        # On a CPU it takes the cores that compute.
        figure += ', most of it while the gradient is computed' * (device.type == 'cuda')
    if share > 0.5 and case.processes > 1:
        yield Finding(LOOK, 'Round trip', figure, 'Larger -b or --accum-steps make it rarer; a faster link between the '
                      'processes makes it shorter.', numbers=found)
    else:
        yield Finding(OK, 'Round trip', figure, numbers=found)


def add_up(count: int, megabytes: float, kind: str) -> tuple[dict | None, str]:
    """What tools/doctor/round_trip.py has found with `count` processes here, or why it has not."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / 'found.json'
        command = [sys.executable, '-m', 'launch.launcher', str(count), str(ROOT / 'tools/doctor/round_trip.py'),
                   '--megabytes', f'{megabytes:.6f}', '--device', kind, '--timeout', str(ROUND_TRIP_SECONDS // 2),
                   '--json', str(result)]
        # Of a job that this process may itself be in, the others must know nothing.
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
    """Ends the launcher, which ends the processes that it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
