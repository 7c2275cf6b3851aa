"""Named points at which tests make this program fail, controlled by the environment variable T2T_FAULTS.

    T2T_FAULTS='step@7#1=kill'                     rank 1 kills itself when it passes the point `step` for the 7th time
    T2T_FAULTS='save.renamed=kill,loss@3+=nan'     several; without @N the first time, with @N+ from the Nth time on

Without the variable, a point costs one dict lookup. Restarted processes skip faults, so that their job goes on;
`step@7!=kill` happens in restarted processes too.
"""
import errno
import os
import signal
from pathlib import Path

from utils import job

SIGNALS = {'kill': signal.SIGKILL, 'stop': signal.SIGSTOP, 'term': signal.SIGTERM, 'int': signal.SIGINT,
           'usr1': signal.SIGUSR1}
# Actions that the caller carries out.
RETURNED = ('nan', 'flip')

_passed: dict[str, int] = {}


def fault_point(name: str) -> str | None:
    """Carry out the action of T2T_FAULTS for this point, passing and rank; return the action, or None.

    Actions: a signal to this process (kill, stop, term, int, usr1) or to its launcher (launcher-term, …); SIGKILL to
    every process of the job (kill-job); the OSError of a full disk (full); nan and flip, which the caller carries out.
    """
    plan = os.environ.get('T2T_FAULTS')
    if not plan:
        return None
    _passed[name] = _passed.get(name, 0) + 1
    for fault in plan.split(','):
        where, _, action = fault.partition('=')
        always = where.endswith('!')
        where, _, rank = where.rstrip('!').partition('#')
        point, _, passing = where.partition('@')
        first = job.restart_count() == 0
        wanted = int(passing.rstrip('+') or 1)
        is_now = _passed[name] == wanted or (passing.endswith('+') and _passed[name] > wanted)
        if point == name and is_now and (first or always) and rank in ('', str(job.rank())):
            return _act(action)
    return None


def _act(action: str) -> str:
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action.removeprefix('launcher-') in SIGNALS:
        os.kill(os.getppid(), SIGNALS[action.removeprefix('launcher-')])
    elif action == 'kill-job':
        _kill_job()
    elif action == 'full':
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        assert action in RETURNED, f'T2T_FAULTS: no such action: {action}'
    return action


def _kill_job() -> None:
    """Send SIGKILL to the launcher, its other workers and this process, so that nobody is left to clean up."""
    me, launcher = os.getpid(), os.getppid()
    siblings = [int(pid) for task in Path(f'/proc/{launcher}/task').iterdir()
                for pid in (task / 'children').read_text().split()]
    if job.is_launched():  # otherwise the parent is not a launcher
        for pid in (launcher, *(pid for pid in siblings if pid != me)):
            os.kill(pid, signal.SIGKILL)
    os.kill(me, signal.SIGKILL)
