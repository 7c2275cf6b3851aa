"""torchrun's agent, which starts the processes of this machine, and restarts them after a crash.

Unlike torch's own agent, this one
- restarts only after a crash, not after a deliberate exit (see utils/errors.py), and prints a line that says why;
- passes on every signal that asks to stop, and gives the processes `grace` seconds to save;
- gives processes time to end, and leaves no child of theirs behind;
- shows the stacks of processes that the others have waited for in vain;
- has all processes of the job save before it restarts them with a node that joins;
- notices within seconds that a node is lost, and ends the same way on all nodes (see launch/nodes.py).
"""
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
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

# How long the survivors of a crash may take to notice it, or to finish writing a checkpoint, before they are killed.
SURVIVAL_SECONDS = 4.0
# How long a process may take to print its stacks.
STACK_SECONDS = 0.5
# How long processes may take to save after their launcher has lost the others. Most likely they hang.
LAST_SECONDS = 30.0
# How long the launcher of the node at fault may take to say so.
HEARSAY_SECONDS = 3.0
INTERRUPTED = {EXIT_INTERRUPTED, EXIT_CTRL_C}


class JobStopped(SignalException):
    """A signal has stopped the job, and no process reported more than that."""

    def __init__(self, number: int, *, killed: bool):
        how = ('; processes that had not ended in the grace time were killed' if killed else
               ', before there was anything to save')
        super().__init__(f'stopped by {signal.Signals(number).name}{how}; --resume auto goes on from the last '
                         'checkpoint', signal.Signals(number))
        self.exit_code = 128 + number if killed else EXIT_CTRL_C if number == signal.SIGINT else EXIT_INTERRUPTED


class Agent(LocalElasticAgent):
    """LocalElasticAgent with some private methods replaced, which are those of torch 2.11 to 2.14.

    Args:
        grace: seconds from a signal that asks to stop until the remaining processes are killed.
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
        if not self._watching:  # in a rendezvous, which may take minutes, before any process exists
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
        """Meet the other launchers, and continue with the job's remaining restarts."""
        limit = worker_group.spec.max_restarts
        # torch would reuse the store of the first meeting, though another node may be first now.
        self._rdzv_handler._bootstrap_store_info = None
        try:
            restarts = self._nodes.meet(lambda: super(Agent, self)._rendezvous(worker_group))
        except JobStopped as error:
            if not self._nodes.is_spare():
                self._nodes.end(error.exit_code, str(error))
            raise
        except (RendezvousClosedError, RendezvousGracefulExitError):
            self._nodes.look()
            raise Ended(*(self._nodes.ended or (0, 'the job has ended without this machine'))) from None
        except RendezvousTimeoutError:
            _leave('too few machines joined within RDZV_TIMEOUT; check the missing ones and clock synchronisation')
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
        # Each launcher of torch counts its own restarts, but processes that meet must have the same number.
        left, self._remaining_restarts = self._remaining_restarts, worker_group.spec.max_restarts - self._nodes.round
        try:
            return super()._start_workers(worker_group)
        finally:
            self._remaining_restarts = left

    def _monitor_workers(self, worker_group) -> RunResult:
        """Return the state of the processes, ten times a second; after a failure, when all of them have ended."""
        self._pass_on()
        self._follow_notices()
        running = self._poll()
        is_over = bool(self._failures) or self._is_over_elsewhere() or (
            self._deadline is not None and time.monotonic() > self._deadline)
        if running and not is_over:
            return RunResult(state=WorkerState.HEALTHY)
        if self._failures:
            self._tell_of_failures()
        if is_over:
            self._await_the_others()
            if EXIT_HANG in self._codes():  # another process may have been aborted before
                self._nodes.tell('hang')
            self._show_stacks(worker_group)
        self._kill()
        self._watching = False
        if not self._failures:
            return RunResult(state=WorkerState.SUCCEEDED,
                             return_values={worker.global_rank: None for worker in worker_group.workers})
        return self._judge(worker_group)

    def _pass_on(self) -> None:
        """Send the signal that this process received to all processes, once."""
        if self._signal and self._deadline is None:
            self._ask_to_stop(self._signal, self._grace)
            self._nodes.tell('stop')

    def _follow_notices(self) -> None:
        """Have the processes save and end if another node asks for it or wants to join, or none can be reached."""
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
        elif not self._nodes.has_told('join'):  # a process received a signal, and all of them save
            self._nodes.tell('stop')

    def _is_over_elsewhere(self) -> bool:
        nodes = self._nodes
        return nodes.lost or nodes.has_told('failed') or nodes.ended is not None

    def _handlers(self) -> dict:
        return self._pcontext.subprocess_handlers if self._pcontext else {}

    def _poll(self) -> list[int]:
        """Return the local ranks that are running, and note how others have failed."""
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
                # Its loader workers live for seconds longer, and hold its connections, for which other ranks wait.
                _kill_session(handler.proc.pid)
        return running

    def _await_the_others(self) -> None:
        """Wait for the remaining processes, for as long as the end of the first one allows."""
        failed = time.monotonic()
        while self._poll():
            self._pass_on()
            if self._deadline is None and self._codes() & INTERRUPTED:
                self._deadline = failed + self._grace  # one process received a signal, and all of them save
            if time.monotonic() > (self._deadline or failed + SURVIVAL_SECONDS):
                return
            time.sleep(0.05)

    def _codes(self) -> set[int]:
        return {failure.exitcode for failure in self._failures.values()}

    def _show_stacks(self, worker_group) -> None:
        """Have the processes that did not respond print their stacks. NCCL aborts those that waited for them."""
        if not self._codes() & {EXIT_HANG, -signal.SIGABRT} and not self._nodes.has_told('hang'):
            return
        for local_rank in self._poll():
            process = self._handlers()[local_rank].proc
            rank = worker_group.workers[local_rank].global_rank
            _say(f'rank {rank} (process {process.pid}) did not respond; its stack:')
            # In this order, a stopped process shows where it was stopped.
            process.send_signal(signal.SIGUSR2)
            process.send_signal(signal.SIGCONT)
            time.sleep(STACK_SECONDS)

    def _kill(self) -> None:
        """Kill the remaining processes and their children."""
        for local_rank, handler in self._handlers().items():
            if handler.proc.poll() is None:
                self._killed.add(local_rank)
            _kill_session(handler.proc.pid)
        for local_rank in self._killed:
            self._handlers()[local_rank].proc.wait()
        self._poll()

    def _judge(self, worker_group) -> RunResult:
        """Return the failure that caused the others, for torch's agent. Decide whether to restart."""
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
        """Tell whether NCCL aborted this node's process because of a failure on another one, which is told by now."""
        if len(self._nodes.members) < 2:
            return False
        if self._is_first_to_tell and _wait_until(lambda: self._nodes.has_told('hang'), HEARSAY_SECONDS):
            self._is_first_to_tell = False
        return not self._is_first_to_tell

    def _stopped(self) -> JobStopped:
        stopped = JobStopped(self._signal, killed=bool(self._killed))
        self._nodes.end(stopped.exit_code, str(stopped))
        return stopped

    def _end(self, result: RunResult, line: str) -> RunResult:
        """End the job on all nodes."""
        self._remaining_restarts = 0
        [failure] = result.failures.values()
        self._nodes.end(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode, line)
        return result

    def _follow_the_others(self, result: RunResult, line: str, is_to_join: bool) -> RunResult:
        """Do as the other nodes, which caused this failure: end if they end, else meet them again."""
        nodes = self._nodes
        is_final = not (is_to_join or self._worker_group.spec.max_restarts)
        if is_final:
            # The launcher that saw the hang reports first. Those that saw only its consequences wait twice as long.
            _wait_until(lambda: nodes.ended, HEARSAY_SECONDS * (1 if EXIT_HANG in self._codes() else 2))
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
        self._remaining_restarts = max(self._remaining_restarts, 1)  # the meeting returns the job's count
        return result

    def _exit_barrier(self) -> None:
        if self._nodes.is_out_of_reach():
            leave_at_once(0)
        with contextlib.suppress(OutOfReach):
            self._nodes.wait_for(super()._exit_barrier)

    def _blame(self, local_rank: int, failure: ProcessFailure) -> tuple:
        """Return a key that is least for the failure to report: deliberate exits, crashes, then their consequences.

        Of equal ones, the first is reported.
        """
        code = failure.exitcode
        if code in DECISIONS:  # a mistake or NaN of one rank explains the failures of the others
            return 0, DECISIONS.index(code)
        if local_rank in self._killed:
            return 5, 0
        # NCCL's watchdog aborts processes that have lost another one, by a crash or by a report of a hang.
        return {EXIT_HANG: 1, -signal.SIGABRT: 3, EXIT_PEER_LOST: 4}.get(code, 2), 0


def _kill_session(leader: int) -> None:
    """Kill a worker and its children, which have a session of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(leader, signal.SIGKILL)


def describe(rank: int, failure: ProcessFailure) -> str:
    """Return how a process ended, in one line: in its own words if it had any."""
    if failure.exitcode == EXIT_BUG:
        return f'rank {rank} failed; its traceback is above'
    if failure.exitcode < 0:
        number = -failure.exitcode
        hint = ', as happens when memory runs out' if number == signal.SIGKILL else ''
        return f'rank {rank} was ended by {signal.Signals(number).name} (signal {number}{hint})'
    return failure.message


def _leave(line: str) -> NoReturn:
    """End this launcher alone, without the rendezvous, which may be out of reach."""
    report(f'{line}; --resume auto goes on from the last checkpoint', EXIT_PEER_LOST)


def _wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Wait for the condition, and tell whether it holds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
