"""The pause of a checkpoint, as a client sees it: the longest time without an answer around the command."""

from __future__ import annotations

import gc
import socket
import threading
import time
from itertools import pairwise
from typing import NamedTuple

from benchmarks import client
from tests.support.nbd import WRITE, Address, Nbd

BLOCK = 4096
DEPTH = 8
WARM_UP = 2000
"""Writes before the checkpoint, and after it."""
AFTER_S = 0.02
"""How long after the command's answer a gap may begin and still count."""
_BLOCKS = 1 << 16


class Pause(NamedTuple):
    """The longest gap between two answers around a checkpoint, and in a window of the same length later on."""

    pause_ms: float
    idle_ms: float


class Writer(threading.Thread):
    """Writes 4 KiB blocks at random, DEPTH at a time, and notes when answers came.

    `hold` lets what is in flight end and waits: what QEMU's user must do before a checkpoint.
    It does little per write, and the thread that sends the commands does nothing
    meanwhile but wait for a socket, so that the two do not wait for each other.
    """

    def __init__(self, address: tuple[Address, str], span: int) -> None:
        super().__init__(daemon=True)
        self._client = Nbd(*address)
        self._requests = client.requests(WRITE, BLOCK, min(_BLOCKS, span // BLOCK), span, seed=1)
        self._over, self._go, self._held = threading.Event(), threading.Event(), threading.Event()
        self._go.set()
        self.ended = 0
        self.answers: list[float] = []

    def run(self) -> None:
        sock, requests = self._client._sock, self._requests
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * DEPTH * BLOCK)
        count, data = len(requests), bytes([1]) * BLOCK
        sent = 0
        received = b""
        while not self._over.is_set() or self.ended < sent:
            if self._go.is_set() and not self._over.is_set():
                until = self.ended + DEPTH
                sock.sendall(b"".join(requests[number % count] + data for number in range(sent, until)))
                sent = until
            elif self.ended == sent:
                self._held.set()
                self._go.wait()
                continue
            replies = sock.recv(DEPTH * client.REPLY)
            at = time.monotonic()
            if not replies:
                raise ConnectionError("the server hung up")
            received += replies
            whole = len(received) // client.REPLY
            if whole:
                client.check(received, whole)
                received = received[whole * client.REPLY :]
                self.ended += whole
                self.answers.append(at)
        self._client.close()

    def hold(self) -> None:
        """Return when nothing is in flight."""
        self._held.clear()
        self._go.clear()
        self._held.wait()

    def resume(self) -> None:
        self._go.set()

    def wait_for(self, more: int) -> None:
        """Wait until so many more writes have been answered."""
        wanted = self.ended + more
        while self.ended < wanted:
            if not self.is_alive():
                raise RuntimeError("the load has ended")
            time.sleep(0.001)

    def end(self) -> None:
        self._over.set()
        self._go.set()
        self.join()


def measure(host, span: int) -> Pause:
    """Milliseconds without an answer around a checkpoint of `host`, while its forwarded writes go on."""
    writer = Writer(host.forwarded_address, span)
    gc.collect()
    gc.disable()
    writer.start()
    try:
        writer.wait_for(WARM_UP)
        began = time.monotonic()
        if host.quiesce:
            writer.hold()
        host.checkpoint()
        writer.resume()
        window = time.monotonic() + AFTER_S - began
        time.sleep(AFTER_S)
        writer.wait_for(WARM_UP)
        time.sleep(window)
    finally:
        writer.end()
        gc.enable()
    answers = writer.answers
    return Pause(_gap_ms(answers, began, began + window), _gap_ms(answers, answers[-1] - window, answers[-1]))


def _gap_ms(answers: list[float], began: float, ended: float) -> float:
    """The longest gap that reaches into the window, in milliseconds."""
    return 1000 * max(b - a for a, b in pairwise(answers) if b >= began and a <= ended)
