"""The machines (nodes) of a job: how their launchers find one another, and what they tell one another.

They meet at a store that one of them has, by torch's c10d rendezvous; the same store is their notice board.
"""
import contextlib
import fcntl
import ipaddress
import json
import math
import os
import socket
import struct
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from utils.errors import UserError

LOOK_SECONDS = 0.5  # between two looks at what the others have told
# How long nodes that may be fewer wait for more, from when the fewest have come.
LAST_CALL_SECONDS = 5
TOLD = ('stop', 'join', 'failed', 'hang')
LONG_SECONDS = 10.0  # to wait without a word
HEARTBEATS = 5  # within NODE_TIMEOUT
HEARING_SECONDS = 5.0  # for the others to hear how the job has ended, before this launcher and its store are gone
SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface


def alone(silence: float) -> 'Nodes':
    """Those of a job of one machine."""
    return Nodes(dist.HashStore(), timeout=silence)


def find(host: str, port: int, *, name: str, patience: int, silence: float) -> tuple[list[str], 'Nodes']:
    """Where the launchers of a job meet, as options of torchrun, and what they tell one another.

    Args:
        host, port: of the store, which the launcher on the machine `host` has.
        name: of the job.
        patience: seconds in which enough machines have to come.
        silence: seconds without a word after which one is lost.
    Raises:
        UserError: `host` cannot be reached.
    """
    with _said_if_long(f'waiting for the name {host} (RDZV_ENDPOINT) to be known'):
        address = _own_address(host, port, patience)
    # gloo would take the interface that belongs to the name of this machine. NCCL chooses well, and may use several.
    if 'GLOO_SOCKET_IFNAME' not in os.environ and (interface := _interface_of(address)):
        os.environ['GLOO_SOCKET_IFNAME'] = interface
    hosted = _host_store(host, port)
    with _said_if_long(f'waiting for the launcher at {host}:{port}'):
        store = _connect(host, port, patience)
    nodes = Nodes(dist.PrefixStore(f'nodes/{name}', store), hosted, timeout=silence)
    beat = max(1, int(silence / HEARTBEATS))
    settings = dict(is_host=0, join_timeout=patience, last_call_timeout=LAST_CALL_SECONDS, keep_alive_interval=beat,
                    keep_alive_max_attempt=math.ceil(silence / beat))
    at = f'[{host}]' if ':' in host else host
    return ['--rdzv-backend=c10d', f'--rdzv-endpoint={at}:{port}', f'--rdzv-id={name}', f'--local-addr={address}',
            '--rdzv-conf=' + ','.join(f'{key}={value}' for key, value in settings.items())], nodes


@contextlib.contextmanager
def _said_if_long(line: str):
    """Says what this block waits for, once, if it is long."""
    timer = threading.Timer(LONG_SECONDS, print, (line,), {'file': sys.stderr, 'flush': True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _own_address(host: str, port: int, seconds: float) -> str:
    """The address of this machine under which those reach it that can be reached by way of `host`.

    Raises:
        UserError: the name is unknown for `seconds`, or there is no way.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            address = _source_address(host, port)
        except OSError as e:
            # In a cluster a name may be known only some time after the machine has started.
            if isinstance(e, socket.gaierror) and time.monotonic() < end:
                time.sleep(1)
                continue
            raise UserError(f'RDZV_ENDPOINT {host}:{port}: {e.strerror or e}; give an address of one of the machines '
                            'that all of them reach') from None
        # Some systems give a machine's own name a loopback address, which would lead the others to themselves.
        is_name = host != 'localhost' and not _is_address(host)
        if is_name and ipaddress.ip_address(address).is_loopback:
            with contextlib.suppress(OSError):
                return _source_address('192.0.2.1', port)  # any that is far away; nothing is sent
        return address


def _source_address(host: str, port: int) -> str:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _interface_of(address: str) -> str | None:
    """The name of the network interface with this IPv4 address, or None where it has no name of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack('256s', name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def _host_store(host: str, port: int) -> dist.Store | None:
    """The store of the job, where `host` is this machine and no other launcher of it has the port; else None."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    except (OSError, RuntimeError):
        return None


def _connect(host: str, port: int, seconds: float) -> dist.Store:
    """The store of the job, which the machine `host` has.

    Raises:
        UserError: it is not there for `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))
        except (OSError, RuntimeError) as e:
            if time.monotonic() > end:
                raise UserError(f'waited {seconds:g} s (RDZV_TIMEOUT) in vain for the launcher at {host}:{port} '
                                f'({str(e).splitlines()[0]}); start it there too, and see to the port') from None
        time.sleep(0.5)


class OutOfReach(Exception):
    """The store of the job, and with it the other nodes, cannot be reached."""


class Nodes:
    """The launchers of a job, as one of them sees the others.

    A call to a store may never return where the network is down. So a thread looks at what the others have told, twice
    a second, and whatever else needs the network is done by a thread too, while the main thread heeds signals.

    Args:
        store: that all share.
        hosted: where this launcher has it, the server behind it, for as long as this object lives.
        timeout: seconds without a word after which a node is lost.
    Attributes:
        members: of the group since the last rendezvous, by their names.
        round: how many groups there have been before it.
        ended: (exit code, line) with which a launcher has ended the job, or None.
        waiting: nodes that want to join.
        lost: a member is silent.
    """

    def __init__(self, store: dist.Store, hosted: dist.Store | None = None, *, timeout: float):
        self._store, self._hosted, self.timeout = store, hosted, timeout
        self.members: frozenset[str] = frozenset()
        self.round = 0
        self.ended: tuple[int, str] | None = None
        self._told: frozenset[str] = frozenset()
        self.waiting = 0
        self.lost = False
        self._has_heard = False
        self._lock = threading.Lock()
        self._looks = self._looks_known = 0
        self._is_gone = False
        self._silence, self._asked = 0.0, time.monotonic()
        threading.Thread(target=self._listen, name='nodes', daemon=True).start()

    def agree(self, name: str, value: str) -> str:
        """What the first of the launchers has said under `name`."""
        return self.wait_for(lambda: self._store.compare_set(name, '', value).decode())

    def watch(self, handler: DynamicRendezvousHandler) -> None:
        """Takes over from torch's agent to ask its rendezvous who wants to join."""
        self._handler, self._count_waiting = handler, handler.num_nodes_waiting
        handler.num_nodes_waiting = lambda: 0  # type: ignore[method-assign]  # torch has no other way to silence it

    # --- Rounds, each from one rendezvous to the next -----------------------------------------------------------------

    def meet(self, rendezvous) -> int:
        """Calls `rendezvous()`, which ends when enough nodes have come; returns how many restarts are counted so far.

        Raises:
            OutOfReach: the network is down.
        """
        before, number = self.members, self.round
        self.wait_for(self._begin_round, frozenset())  # from here on the thread leaves the handler alone
        with _said_if_long('waiting for other machines, or for a place among them'):
            self.wait_for(rendezvous)
        self.wait_for(self._begin_round, frozenset(map(str, self._handler._state_holder.state.participants)))
        # Where all are here again it was a crash that has ended the round before, and not the loss of a node.
        is_restart = bool(before) and before <= self.members and not self.wait_for(
            lambda: self._store.check([f'{number}/join']))
        if is_restart:
            self.wait_for(self._count_restart, number)
        return self.wait_for(self._store.add, 'restarts', 0)

    def _begin_round(self, members: frozenset) -> None:
        with self._lock:
            self.round, self.members = self._handler._state_holder.state.round, members
            self._told, self.waiting, self.lost = frozenset(), 0, False

    def _count_restart(self, number: int) -> None:
        """Of all nodes one counts."""
        me = f'{socket.gethostname()} {os.getpid()}'
        if self._store.compare_set(f'{number}/counted', '', me) == me.encode():
            self._store.add('restarts', 1)

    # --- What they tell one another -----------------------------------------------------------------------------------

    def tell(self, what: str) -> None:
        """Tells the others of this round: 'stop' or 'join', all processes are to save and end; 'failed', one has;
        'hang', it has waited for another."""
        with contextlib.suppress(OutOfReach, RuntimeError):
            self.wait_for(self._store.set, f'{self.round}/{what}', '1')

    def has_told(self, what: str) -> bool:
        return what in self._told

    def look(self) -> None:
        """Knows what has been told until now."""
        with contextlib.suppress(OutOfReach, RuntimeError, RendezvousError):
            self.wait_for(self._look)

    def end(self, exit_code: int, line: str) -> None:
        """Ends the job for all nodes, unless one has done so before, and waits until they have heard of it."""
        told = json.dumps([exit_code, line])
        with contextlib.suppress(OutOfReach, RuntimeError, RendezvousError):
            self.wait_for(self._store.compare_set, 'end', '', told)
            self.wait_for(self._handler.set_closed)
            self.wait_for(self._hear, told)
            end, others = time.monotonic() + HEARING_SECONDS, len(self.members) + self.waiting
            while self.wait_for(self._store.add, 'heard', 0) < others and time.monotonic() < end:
                time.sleep(0.1)

    def is_spare(self) -> bool:
        """Whether the others are at work without this node, which waits for a place."""
        state = self._handler._state_holder.state
        return state.complete and self._handler._this_node not in state.participants

    def is_out_of_reach(self) -> bool:
        """True where nothing was heard for the timeout, the pauses of this process apart; to be asked often."""
        now = time.monotonic()
        if self._looks != self._looks_known:
            self._looks_known, self._silence = self._looks, 0.0
        self._silence += min(now - self._asked, 1.0)
        self._asked = now
        return self._is_gone or self._silence > self.timeout

    def wait_for(self, function, *args):
        """What `function(*args)` returns or raises, without being deaf to signals.

        Raises:
            OutOfReach: the network is down.
        """
        outcome = {}

        def call():
            try:
                outcome['value'] = function(*args)
            except BaseException as e:
                outcome['error'] = e

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            if self.is_out_of_reach():
                raise OutOfReach
        if 'error' in outcome:
            raise outcome['error']
        return outcome['value']

    def _listen(self) -> None:
        while True:
            try:
                self._look()
            except Exception:  # of many kinds, and each means that the store has gone
                self._is_gone = True
                return
            self._looks += 1
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        with self._lock:
            if not self.ended and self._store.check(['end']):
                self._hear(self._store.get('end').decode())
            if self.members:
                told = [what for what in TOLD if self._store.check([f'{self.round}/{what}'])]
                self.waiting = self._count_waiting()
                state = self._handler._state_holder.state
                present = {*state.participants, *state.wait_list, self._handler._this_node}
                self.lost = not self.members <= set(map(str, present))
                self._told = frozenset(told)

    def _hear(self, told: str) -> None:
        exit_code, line = json.loads(told)
        self.ended = self.ended or (exit_code, line)
        if not self._has_heard:
            self._has_heard = True
            self._store.add('heard', 1)


class Ended(Exception):
    """The job has ended, and this node with it."""

    def __init__(self, exit_code: int, line: str):
        super().__init__(line)
        self.exit_code = exit_code
