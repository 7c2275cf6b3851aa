"""torchrun's agent, which starts the processes of this machine, and again after a crash; with better manners.

Unlike torch's own it
- restarts after a crash only, not after an end that was decided on (see utils/errors.py), and says in a line why;
- passes on every signal that asks to stop, and gives the processes `grace` seconds to save;
- leaves processes that are to end time to do so, and nothing of them behind;
- shows the stacks of those that the others have waited for in vain;
- has all processes of the job save before it starts them anew with a node that joins;
- notices within seconds that a node is lost, and ends on all nodes alike (see launch/nodes.py).
"""
import contextlib
import os
import signal
import sys
import time
from typing import NoReturn

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from launch.nodes import Ended, Nodes, OutOfReach
from utils.errors import DECISIONS, EXIT_BUG, EXIT_CTRL_C, EXIT_HANG, EXIT_INTERRUPTED, EXIT_PEER_LOST
from utils.exits import leave_at_once, report
from utils.signals import ECHO_SECONDS, stoppable

# How long a crash's survivors may take to notice it, or to finish a checkpoint that they write, before they are killed.
SURVIVAL_SECONDS = 4.0
INTERRUPTED = {EXIT_INTERRUPTED, EXIT_CTRL_C}
STACK_SECONDS = 0.5  # for one process to print its stacks
# Processes whose launcher has lost the others hang, most likely; they may save where these still live.
LAST_SECONDS = 30.0
HEARSAY_SECONDS = 3.0  # in which the launcher of a node that has ended for a reason of its own says so


class JobStopped(SignalException):
    """A signal has stopped the job, and no process of it had more to say than that."""

    def __init__(self, number: int, *, killed: bool):
        name = signal.Signals(number).name
        if killed:
            text = f'stopped by {name}; processes that had not ended in the grace time were killed'
        else:
            text = f'stopped by {name}, before there was anything to save'
        super().__init__(f'{text}; --resume auto goes on from the last checkpoint', signal.Signals(number))
        self.exit_code = 128 + number if killed else EXIT_CTRL_C if number == signal.SIGINT else EXIT_INTERRUPTED


class Agent(LocalElasticAgent):
    """As LocalElasticAgent, whose private methods of this version range (torch 2.11 to 2.14) it replaces.

    Args:
        grace: seconds from a signal that asks to stop until the processes that are left are killed.
        nodes: the other launchers of the job.
    """
    _rdzv_handler: DynamicRendezvousHandler
    _pcontext: SubprocessContext | None

    def __init__(self, *args, grace: float, nodes: Nodes, **kwargs):
        super().__init__(*args, **kwargs)
        self._grace, self._nodes = grace, nodes
        nodes.watch(self._rdzv_handler)
        self._watching = False
        self._signal = 0
        self._interrupted_at: float | None = None
        for number in stoppable():
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        if not self._watching:  # in a rendezvous, which may take minutes, and no process is there yet
            raise JobStopped(number, killed=False)
        self._signal = self._signal or number
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at > ECHO_SECONDS:
                self._kill()
                report('interrupted twice, ended at once; --resume auto goes on from the last checkpoint', EXIT_CTRL_C)

    def _rendezvous(self, worker_group) -> None:
        """Meets the other launchers; from then on the restarts that are left are those that are left to the job."""
        limit = worker_group.spec.max_restarts
        # torch would take the store of the first meeting again, though another node may be the first now.
        self._rdzv_handler._bootstrap_store_info = None
        try:
            restarts = self._nodes.meet(lambda: super(Agent, self)._rendezvous(worker_group))
        except JobStopped as e:
            if not self._nodes.is_spare():
                self._nodes.end(e.exit_code, str(e))
            raise
        except (RendezvousClosedError, RendezvousGracefulExitError):
            self._nodes.look()
            raise Ended(*(self._nodes.ended or (0, 'the job has ended without this machine'))) from None
        except RendezvousTimeoutError:
            _leave('not enough machines have come in RDZV_TIMEOUT; see to those that are missing, and to all clocks')
        except (RendezvousConnectionError, OutOfReach):
            self._leave_out_of_reach()
        self._remaining_restarts = limit - restarts
        if restarts > limit:
            line = f'another process of the job was lost, after {limit} restart(s)'
            self._nodes.end(EXIT_PEER_LOST, line)
            _leave(line)
        if self._nodes.round and self._rdzv_handler.settings.max_nodes > 1:
            _say(f'{len(self._nodes.members)} machine(s), {worker_group.workers[0].world_size} process(es) go on')

    def _leave_out_of_reach(self) -> NoReturn:
        if self._nodes.ended:
            raise Ended(*self._nodes.ended)
        _leave(f'the other machines are out of reach for {self._nodes.timeout:g} s (NODE_TIMEOUT), or the launcher at '
               'RDZV_ENDPOINT has ended')

    def _start_workers(self, worker_group):
        self._failures: dict[int, ProcessFailure] = {}
        self._killed = set()
        self._deadline = None
        self._is_first_to_tell = False
        self._watching = True
        # torch has every launcher count its own restarts; processes that meet must be of the same one.
        left, self._remaining_restarts = self._remaining_restarts, worker_group.spec.max_restarts - self._nodes.round
        try:
            return super()._start_workers(worker_group)
        finally:
            self._remaining_restarts = left

    def _monitor_workers(self, worker_group) -> RunResult:
        """What torch's agent asks ten times a second. After a failure it returns when all processes have ended."""
        self._pass_on()
        self._heed_the_others()
        running = self._poll()
        is_over = bool(self._failures) or self._is_over_elsewhere() or (
            self._deadline is not None and time.monotonic() > self._deadline)
        if running and not is_over:
            return RunResult(state=WorkerState.HEALTHY)
        if self._failures:
            self._tell_of_failures()
        if is_over:
            self._await_the_others()
            if EXIT_HANG in self._codes():  # which may have come after another process was aborted
                self._nodes.tell('hang')
            self._show_stacks(worker_group)
        self._kill()
        self._watching = False
        if not self._failures:
            return RunResult(state=WorkerState.SUCCEEDED,
                             return_values={worker.global_rank: None for worker in worker_group.workers})
        return self._judge(worker_group)

    def _pass_on(self) -> None:
        """Sends the signal that this process has got to all processes, once."""
        if self._signal and self._deadline is None:
            self._ask_to_stop(self._signal, self._grace)
            self._nodes.tell('stop')

    def _heed_the_others(self) -> None:
        """Has the processes save and end where another node asks for it, wants to join, or none can be reached."""
        if self._deadline is not None or self._failures:
            return
        if self._nodes.is_out_of_reach():
            self._ask_to_stop(signal.SIGTERM, min(self._grace, LAST_SECONDS))
        elif self._nodes.has_told('stop') or self._nodes.has_told('join'):
            self._ask_to_stop(signal.SIGTERM, self._grace)
        elif self._nodes.waiting and not self._is_over_elsewhere():
            self._nodes.tell('join')
            self._ask_to_stop(signal.SIGTERM, self._grace)

    def _ask_to_stop(self, number: int, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        for handler in self._handlers().values():
            if handler.proc.poll() is None:
                handler.proc.send_signal(number)

    def _tell_of_failures(self) -> None:
        self._nodes.look()
        if not self._codes() & INTERRUPTED:
            self._is_first_to_tell = not self._nodes.has_told('failed')
            if EXIT_HANG in self._codes():
                self._nodes.tell('hang')
            self._nodes.tell('failed')
        elif not self._nodes.has_told('join'):  # a process has got a signal, and they all save
            self._nodes.tell('stop')

    def _is_over_elsewhere(self) -> bool:
        nodes = self._nodes
        return nodes.lost or nodes.has_told('failed') or nodes.ended is not None

    def _handlers(self) -> dict:
        return self._pcontext.subprocess_handlers if self._pcontext else {}

    def _poll(self) -> list[int]:
        """The local ranks that are running; of those that have failed, notes how."""
        context, running = self._pcontext, []
        if context is None:
            return []
        for local_rank, handler in context.subprocess_handlers.items():
            code = handler.proc.poll()
            if code is None:
                running.append(local_rank)
            elif code != 0 and local_rank not in self._failures:
                self._failures[local_rank] = ProcessFailure(local_rank, handler.proc.pid, code,
                                                            context.error_files[local_rank])
                # Loader workers outlive it for seconds, and with them its connections, which they have inherited: as
                # long as these are open the other ranks wait.
                _kill_session(handler.proc.pid)
        return running

    def _await_the_others(self) -> None:
        """Waits for the processes that are left, as long as the way in which the first has ended allows."""
        failed = time.monotonic()
        while self._poll():
            self._pass_on()
            if self._deadline is None and self._codes() & INTERRUPTED:
                self._deadline = failed + self._grace  # one process has got a signal, and they all save
            if time.monotonic() > (self._deadline or failed + SURVIVAL_SECONDS):
                return
            time.sleep(0.05)

    def _codes(self) -> set[int]:
        return {failure.exitcode for failure in self._failures.values()}

    def _show_stacks(self, worker_group) -> None:
        """Has the processes print their stacks that did not come to the others; NCCL aborts those that have waited."""
        if not self._codes() & {EXIT_HANG, -signal.SIGABRT} and not self._nodes.has_told('hang'):
            return
        for local_rank in self._poll():
            process = self._handlers()[local_rank].proc
            rank = worker_group.workers[local_rank].global_rank
            _say(f'rank {rank} (process {process.pid}) did not come; its stack:')
            # In this order a stopped process shows where it was stopped.
            process.send_signal(signal.SIGUSR2)
            process.send_signal(signal.SIGCONT)
            time.sleep(STACK_SECONDS)

    def _kill(self) -> None:
        """Ends whatever is left of the processes, and what they have started."""
        for local_rank, handler in self._handlers().items():
            if handler.proc.poll() is None:
                self._killed.add(local_rank)
            _kill_session(handler.proc.pid)
        for local_rank in self._killed:
            self._handlers()[local_rank].proc.wait()
        self._poll()

    def _judge(self, worker_group) -> RunResult:
        """The failure that the others followed from, as torch's agent wants it; restarts are over if it was decided."""
        local_rank, failure = min(self._failures.items(), key=lambda item: self._blame(*item))
        rank, code = worker_group.workers[local_rank].global_rank, failure.exitcode
        was_stopped = bool(self._signal) and (local_rank in self._killed or code == -self._signal)
        is_consequence = (local_rank in self._killed or code in (EXIT_HANG, EXIT_PEER_LOST)
                          or code == -signal.SIGABRT and self._follows_from_others())
        nodes, result = self._nodes, RunResult(state=WorkerState.FAILED, failures={rank: failure})
        nodes.look()
        if was_stopped and code not in DECISIONS:
            raise self._stopped()
        is_to_join = nodes.has_told('join') and not nodes.has_told('stop') and (
            is_consequence or code == EXIT_INTERRUPTED)
        if self._signal or (code in DECISIONS and not is_to_join):
            return self._end(result, describe(rank, failure))
        if nodes.is_out_of_reach():
            self._leave_out_of_reach()
        if is_to_join or (len(nodes.members) > 1 and is_consequence):
            return self._follow_the_others(result, describe(rank, failure), is_to_join)
        if self._remaining_restarts <= 0:
            return self._end(result, describe(rank, failure))
        limit = worker_group.spec.max_restarts
        _say(f'{describe(rank, failure)}; restart {limit - self._remaining_restarts + 1} of {limit}')
        return result

    def _follows_from_others(self) -> bool:
        """Whether NCCL aborted this node's process because of a failure on another one, whose launcher tells it now."""
        nodes, end = self._nodes, time.monotonic() + HEARSAY_SECONDS
        if len(nodes.members) < 2:
            return False
        while self._is_first_to_tell and time.monotonic() < end:
            time.sleep(0.1)
            self._is_first_to_tell = not nodes.has_told('hang')
        return not self._is_first_to_tell

    def _stopped(self) -> JobStopped:
        stopped = JobStopped(self._signal, killed=bool(self._killed))
        self._nodes.end(stopped.exit_code, str(stopped))
        return stopped

    def _end(self, result: RunResult, line: str) -> RunResult:
        """Ends the job on all nodes."""
        self._remaining_restarts = 0
        [failure] = result.failures.values()
        self._nodes.end(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode, line)
        return result

    def _follow_the_others(self, result: RunResult, line: str, is_to_join: bool) -> RunResult:
        """After what other nodes have brought about: the end where they end, else another meeting with them."""
        nodes = self._nodes
        is_final = not (is_to_join or self._worker_group.spec.max_restarts)
        # The launcher that saw the hang reports first; those that saw only what it led to wait twice as long.
        end = time.monotonic() + HEARSAY_SECONDS * (1 if EXIT_HANG in self._codes() else 2)
        while is_final and not nodes.ended and time.monotonic() < end:
            time.sleep(0.1)
        if nodes.ended:
            raise Ended(*nodes.ended)
        if is_final:
            return self._end(result, line)
        if is_to_join:
            line = 'a machine joins: the state is saved' if self._codes() == {EXIT_INTERRUPTED} else 'a machine joins'
        elif nodes.has_told('failed') and not self._is_first_to_tell:
            line = 'a process on another machine has failed'
        elif nodes.lost:
            line = f'a machine has been silent for {nodes.timeout:g} s (NODE_TIMEOUT)'
        _say(f'{line}; meeting the others again')
        self._remaining_restarts = max(self._remaining_restarts, 1)  # what is counted, the meeting says
        return result

    def _exit_barrier(self) -> None:
        if self._nodes.is_out_of_reach():
            leave_at_once(0)
        with contextlib.suppress(OutOfReach):
            self._nodes.wait_for(super()._exit_barrier)

    def _blame(self, local_rank: int, failure: ProcessFailure) -> tuple:
        """Least for the failure to be reported: what was decided, then crashes, then what they have led to.

        Of those that weigh the same, the one noticed first is reported.
        """
        code = failure.exitcode
        if code in DECISIONS:  # a mistake or NaN of one rank weighs more than what the others made of it
            return 0, DECISIONS.index(code)
        if local_rank in self._killed:
            return 5, 0
        # NCCL's watchdog aborts whoever has lost another process, be it by a crash or by a report of a hang.
        return {EXIT_HANG: 1, -signal.SIGABRT: 3, EXIT_PEER_LOST: 4}.get(code, 2), 0


def _kill_session(leader: int) -> None:
    """Kills all processes that a process of ours has started, and itself: each has a session of its own."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # all had ended


def describe(rank: int, failure: ProcessFailure) -> str:
    """How a process has ended, in one line: in its own words where it had any."""
    if failure.exitcode == EXIT_BUG:
        return f'rank {rank} failed; its traceback is above'
    if failure.exitcode < 0:
        number = -failure.exitcode
        hint = ', as it is when memory runs out' if number == signal.SIGKILL else ''
        return f'rank {rank} was ended by {signal.Signals(number).name} (signal {number}{hint})'
    return failure.message


def _leave(line: str) -> NoReturn:
    """Ends this launcher alone, without another word to the rendezvous, which may be out of reach."""
    report(f'{line}; --resume auto goes on from the last checkpoint', EXIT_PEER_LOST)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
