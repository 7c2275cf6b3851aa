"""The machines (nodes) of a job: how their launchers find one another, and what they tell one another.

They meet by torch's c10d rendezvous at a store, which one of them hosts. The same store is their notice board.
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
import uuid
from concurrent.futures import Future, wait
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from utils.errors import UserError

# Between two looks at the notice board.
LOOK_SECONDS = 0.5
# How long the fewest nodes wait for more.
LAST_CALL_SECONDS = 5
NOTICES = ('stop', 'join', 'failed', 'hang')
# How long to wait without saying so.
LONG_SECONDS = 10.0
# Within NODE_TIMEOUT.
HEARTBEATS = 5
# How long an ended launcher, and its store, stay for the others to read how the job ended.
HEARING_SECONDS = 5.0
# The loopback interface of Linux and of macOS.
LOOPBACKS = ('lo', 'lo0')
# ioctl: the IPv4 address of an interface.
SIOCGIFADDR = 0x8915


def alone(silence: float) -> tuple[list[str], 'Nodes']:
    """Return torchrun's options for a job on one machine, whose processes talk over its loopback interface.

    The machine needs no name, and no other interface.

    Raises:
        UserError: there is no loopback interface.
    """
    address = _loopback_address()
    _talk_over(next((name for _, name in socket.if_nameindex() if name in LOOPBACKS), None))
    at = f'[{address}]' if ':' in address else address
    return ['--rdzv-backend=c10d', f'--rdzv-endpoint={at}:0', f'--rdzv-id={uuid.uuid4()}',
            f'--local-addr={address}'], Nodes(dist.HashStore(), timeout=silence)


def find(host: str, port: int, *, name: str, patience: int, silence: float) -> tuple[list[str], 'Nodes']:
    """Return torchrun's options for the rendezvous, and the launchers of the job.

    Args:
        host, port: address of the store, which the launcher on the machine `host` has.
        name: name of the job.
        patience: seconds in which enough machines have to join.
        silence: seconds without a heartbeat after which a machine is lost.
    Raises:
        UserError: `host` cannot be reached.
    """
    with _said_if_long(f'waiting for the name {host} (RDZV_ENDPOINT) to be known'):
        address = _own_address(host, port, patience)
    _talk_over(_interface_of(address))
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
    """Print what this block waits for, once, if it takes long."""
    timer = threading.Timer(LONG_SECONDS, print, (line,), {'file': sys.stderr, 'flush': True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- Addresses and the store ------------------------------------------------------------------------------------------

def _own_address(host: str, port: int, seconds: float) -> str:
    """Return the address of this machine in the network of `host`.

    Raises:
        UserError: the name is unknown for `seconds`, or there is no route.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            address = _source_address(host, port)
        except OSError as error:
            # In a cluster, a name may be known only some time after its machine has started.
            if isinstance(error, socket.gaierror) and time.monotonic() < end:
                time.sleep(1)
                continue
            raise UserError(f'RDZV_ENDPOINT {host}:{port}: {error.strerror or error}; give an address of one of the '
                            'machines that all of them reach') from None
        # Some systems give a machine's own name a loopback address, which leads the others to themselves.
        is_name = host != 'localhost' and not _is_address(host)
        if is_name and ipaddress.ip_address(address).is_loopback:
            with contextlib.suppress(OSError):
                return _source_address('192.0.2.1', port)  # any remote address; nothing is sent
        return address


def _source_address(host: str, port: int) -> str:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def _loopback_address() -> str:
    """Return the address under which this machine reaches itself, of IPv4 or else IPv6."""
    for family, address in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):
        with contextlib.suppress(OSError), socket.create_server((address, 0), family=family) as server:
            socket.create_connection(server.getsockname()[:2], timeout=2).close()
            return address
    raise UserError('this machine has no loopback interface (127.0.0.1 or ::1), over which its processes talk; turn it '
                    'on, as by ip link set lo up')


def _talk_over(interface: str | None) -> None:
    """Have the processes use this network interface, unless the user has chosen one.

    gloo would take the interface of this machine's name, which may be unknown. NCCL chooses well, and may use several.
    """
    if 'GLOO_SOCKET_IFNAME' not in os.environ and interface:
        os.environ['GLOO_SOCKET_IFNAME'] = interface


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _interface_of(address: str) -> str | None:
    """Return the name of the network interface with this IPv4 address; None if it has no name of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack('256s', name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def _host_store(host: str, port: int) -> dist.Store | None:
    """Return the store of the job, if `host` is this machine and no other launcher on it has the port; else None."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    except (OSError, RuntimeError):
        return None


def _connect(host: str, port: int, seconds: float) -> dist.Store:
    """Return the store of the job. Raises UserError if `host` does not serve it within `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))
        except (OSError, RuntimeError) as error:
            if time.monotonic() > end:
                raise UserError(f'waited {seconds:g} s (RDZV_TIMEOUT) in vain for the launcher at {host}:{port} '
                                f'({str(error).splitlines()[0]}); start it there too, and check the port') from None
        time.sleep(0.5)


# --- The launchers ----------------------------------------------------------------------------------------------------

class OutOfReach(Exception):
    """The store of the job, and so the other nodes, cannot be reached."""


class Ended(Exception):
    """The job has ended, and this node with it."""

    def __init__(self, exit_code: int, line: str):
        super().__init__(line)
        self.exit_code = exit_code


class Nodes:
    """The launchers of a job, as one of them sees the others.

    A call to a store may never return if the network is down. So a thread reads the notice board twice a second, and
    other network calls run in threads too, while the main thread handles signals.

    Args:
        store: the store that all share.
        hosted: the server of that store, if this launcher has it. It lives as long as this object.
        timeout: seconds without a heartbeat after which a node is lost.
    Attributes:
        members: names of the nodes since the last rendezvous.
        round: number of that rendezvous.
        ended: (exit code, line) with which a launcher has ended the job, or None.
        waiting: number of nodes that want to join.
        lost: whether a member is silent.
    """

    def __init__(self, store: dist.Store, hosted: dist.Store | None = None, *, timeout: float):
        self._store, self._hosted, self.timeout = store, hosted, timeout
        self.members: frozenset[str] = frozenset()
        self.round = 0
        self.ended: tuple[int, str] | None = None
        self.waiting = 0
        self.lost = False
        self._told: frozenset[str] = frozenset()
        self._has_heard = False
        self._lock = threading.Lock()
        self._looks = self._looks_known = 0
        self._is_gone = False
        self._silence, self._asked = 0.0, time.monotonic()
        threading.Thread(target=self._listen, name='nodes', daemon=True).start()

    def agree(self, name: str, value: str) -> str:
        """Return the value that the first launcher gave for `name`."""
        return self.wait_for(lambda: self._store.compare_set(name, '', value).decode())

    def watch(self, handler: DynamicRendezvousHandler) -> None:
        """Ask the rendezvous who wants to join, in place of torch's agent."""
        self._handler, self._count_waiting = handler, handler.num_nodes_waiting
        handler.num_nodes_waiting = lambda: 0  # type: ignore[method-assign]  # torch has no other way to silence it

    # --- Rounds, each from one rendezvous to the next -----------------------------------------------------------------

    def meet(self, rendezvous) -> int:
        """Call `rendezvous()`, which returns when enough nodes have joined; return the number of restarts so far.

        Raises:
            OutOfReach: the network is down.
        """
        before, number = self.members, self.round
        self.wait_for(self._begin_round, frozenset())  # from here on the thread leaves the handler alone
        with _said_if_long('waiting for other machines, or for a place among them'):
            self.wait_for(rendezvous)
        self.wait_for(self._begin_round, frozenset(map(str, self._handler._state_holder.state.participants)))
        # If all are here again, a crash has ended the round before, not the loss of a node.
        if before and before <= self.members and not self.wait_for(lambda: self._store.check([f'{number}/join'])):
            self.wait_for(self._count_restart, number)
        return self.wait_for(self._store.add, 'restarts', 0)

    def _begin_round(self, members: frozenset) -> None:
        with self._lock:
            self.round, self.members = self._handler._state_holder.state.round, members
            self._told, self.waiting, self.lost = frozenset(), 0, False

    def _count_restart(self, number: int) -> None:
        """Count a restart on one of the nodes."""
        me = f'{socket.gethostname()} {os.getpid()}'
        if self._store.compare_set(f'{number}/counted', '', me) == me.encode():
            self._store.add('restarts', 1)

    # --- The notice board ---------------------------------------------------------------------------------------------

    def tell(self, what: str) -> None:
        """Post a notice of this round: 'stop' or 'join', all processes are to save and end; 'failed', one has; 'hang',
        one has waited for another."""
        with contextlib.suppress(OutOfReach, RuntimeError):
            self.wait_for(self._store.set, f'{self.round}/{what}', '1')

    def has_told(self, what: str) -> bool:
        return what in self._told

    def look(self) -> None:
        """Read the notice board now."""
        with contextlib.suppress(OutOfReach, RuntimeError, RendezvousError):
            self.wait_for(self._look)

    def end(self, exit_code: int, line: str) -> None:
        """End the job for all nodes, unless one has done so before, and wait until they know."""
        told = json.dumps([exit_code, line])
        with contextlib.suppress(OutOfReach, RuntimeError, RendezvousError):
            self.wait_for(self._store.compare_set, 'end', '', told)
            self.wait_for(self._handler.set_closed)
            self.wait_for(self._hear, told)
            end, others = time.monotonic() + HEARING_SECONDS, len(self.members) + self.waiting
            while self.wait_for(self._store.add, 'heard', 0) < others and time.monotonic() < end:
                time.sleep(0.1)

    def is_spare(self) -> bool:
        """Tell whether the others work without this node, which waits for a place."""
        state = self._handler._state_holder.state
        return state.complete and self._handler._this_node not in state.participants

    def is_out_of_reach(self) -> bool:
        """Tell whether the store was silent for the timeout, pauses of this process excluded. Call it often."""
        now = time.monotonic()
        if self._looks != self._looks_known:
            self._looks_known, self._silence = self._looks, 0.0
        self._silence += min(now - self._asked, 1.0)
        self._asked = now
        return self._is_gone or self._silence > self.timeout

    def wait_for(self, function, *args):
        """Return or raise what `function(*args)` does, while signals are still handled.

        Raises:
            OutOfReach: the network is down.
        """
        outcome: Future = Future()

        def call():
            try:
                outcome.set_result(function(*args))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=call, daemon=True).start()
        while not wait([outcome], timeout=0.05).done:
            if self.is_out_of_reach():
                raise OutOfReach
        return outcome.result()

    def _listen(self) -> None:
        while True:
            try:
                self._look()
            except Exception:  # of many kinds; each means that the store is gone
                self._is_gone = True
                return
            self._looks += 1
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        with self._lock:
            if not self.ended and self._store.check(['end']):
                self._hear(self._store.get('end').decode())
            if self.members:
                told = [what for what in NOTICES if self._store.check([f'{self.round}/{what}'])]
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
