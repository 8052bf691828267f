"""The lab's private network: sockets and a thread around a switch whose faults the test makes.

Each host's network card is one end of a pair of datagram sockets, one frame
each; this process has the other end. No interface of this machine is touched.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import os
import selectors
import socket
import threading
import time

from tests.lab.switch import Switch

FRAME = 1 << 16
BUFFER = 4 << 20
BATCH = 64
"""Frames taken from one port before the others have their turn."""
QUEUE = 4096
"""Frames that wait for a port at most; a host that is off or asleep loses the rest, as behind any switch."""


class Network:
    """Joins hosts by name; `addresses` has each one's, with prefix length.

    Faults act at once and on every frame from then on, also on those under way.
    """

    def __init__(self, addresses: dict[str, str]):
        self.addresses = addresses
        self._switch = Switch(list(addresses))
        self._lock = threading.Lock()  # guards _switch
        self._inner: dict[str, socket.socket] = {}
        self._outer: dict[str, socket.socket] = {}
        for name in addresses:
            self._inner[name], self._outer[name] = _pair()
        self._wake, wake = os.pipe()
        self._relay = _Relay(self._outer, self._switch, self._lock, wake)
        self._relay.start()

    def port(self, name: str) -> socket.socket:
        """The end that the host called `name` holds."""
        return self._inner[name]

    def cut(self, one: str, other: str) -> None:
        """Nothing passes between the two hosts, in either direction."""
        self._check(one, other)
        with self._lock:
            self._switch.faults.cut.add(frozenset((one, other)))

    def isolate(self, name: str) -> None:
        """Nothing passes between the host and any other."""
        for other in self.addresses:
            if other != name:
                self.cut(name, other)

    def delay(self, milliseconds: float) -> None:
        """Every frame takes this long, one way; 0 ends it."""
        with self._lock:
            self._switch.faults.delay_s = milliseconds / 1000

    def drop(self, fraction: float, seed: int) -> None:
        """Loses this part of all frames, 0 to 1, chosen by `seed`; 0 ends it."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"a fraction of {fraction} frames cannot be dropped; expected 0 to 1")
        with self._lock:
            self._switch.seed(seed)
            self._switch.faults.drop = fraction

    def heal(self) -> None:
        """Ends all cuts, drops and delays."""
        with self._lock:
            self._switch.faults.cut.clear()
            self._switch.faults.drop = 0.0
            self._switch.faults.delay_s = 0.0

    @property
    def dropped(self) -> int:
        """Frames lost so far by cuts and drops."""
        return self._switch.dropped

    def close(self) -> None:
        """Ends the relay; the hosts, if they still run, are alone."""
        os.close(self._wake)
        self._relay.join()
        for port in (*self._inner.values(), *self._outer.values()):
            port.close()

    def _check(self, *names: str) -> None:
        for name in names:
            if name not in self.addresses:
                raise ValueError(f"no host {name!r} on this network; it has {', '.join(self.addresses)}")


class _Relay(threading.Thread):
    """Moves frames between the ports until the pipe `wake` closes."""

    def __init__(self, ports: dict[str, socket.socket], switch: Switch, lock: threading.Lock, wake: int):
        super().__init__(name="lab-network", daemon=True)
        self._ports = ports
        self._switch = switch
        self._lock = lock
        self._wake = wake
        self._numbers = itertools.count()
        self._under_way: list[tuple[float, int, str, bytes]] = []  # a heap by time, then arrival
        self._waiting: dict[str, collections.deque[bytes]] = {name: collections.deque() for name in ports}
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        for name, port in self._ports.items():
            self._selector.register(port, selectors.EVENT_READ, name)
        while True:
            timeout = max(0.0, self._under_way[0][0] - time.monotonic()) if self._under_way else None
            for key, events in self._selector.select(timeout):
                if key.data is None:
                    self._selector.close()
                    os.close(self._wake)
                    return
                if events & selectors.EVENT_WRITE:
                    self._send(key.data)
                if events & selectors.EVENT_READ:
                    self._receive(key.data)
            self._deliver()

    def _receive(self, name: str) -> None:
        port = self._ports[name]
        frames = []
        with contextlib.suppress(BlockingIOError):
            for _ in range(BATCH):
                frames.append(port.recv(FRAME))
        now = time.monotonic()
        with self._lock:
            for frame in frames:
                for due, target in self._switch.forward(name, frame, now):
                    heapq.heappush(self._under_way, (due, next(self._numbers), target, frame))

    def _deliver(self) -> None:
        now = time.monotonic()
        targets = set()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, target, frame = heapq.heappop(self._under_way)
            if len(self._waiting[target]) < QUEUE:
                self._waiting[target].append(frame)
                targets.add(target)
        for target in targets:
            self._send(target)

    def _send(self, name: str) -> None:
        waiting = self._waiting[name]
        events = selectors.EVENT_READ
        try:
            while waiting:
                self._ports[name].send(waiting[0])
                waiting.popleft()
        except BlockingIOError:
            events |= selectors.EVENT_WRITE
        self._selector.modify(self._ports[name], events, name)


def _pair() -> tuple[socket.socket, socket.socket]:
    inner, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in (inner, outer):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    return inner, outer
