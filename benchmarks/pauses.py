"""The pause of a checkpoint, as a client sees it: the longest time without an answer around the command."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from itertools import pairwise

from tests.support.nbd import WRITE, Address, Nbd

BLOCK = 4096
DEPTH = 8
WARM_UP = 2000
"""Writes before the checkpoint, and after it."""


class Writer(threading.Thread):
    """Writes 4 KiB blocks at random, DEPTH at a time, and notes when each was answered.

    `hold` lets what is in flight end and waits: what QEMU's user must do before a checkpoint.
    """

    def __init__(self, address: tuple[Address, str], span: int) -> None:
        super().__init__(daemon=True)
        self._client = Nbd(*address)
        self._span = span // BLOCK
        self._over, self._go, self._held = threading.Event(), threading.Event(), threading.Event()
        self._go.set()
        self.answers: list[float] = []

    def run(self) -> None:
        client, choose = self._client, random.Random(1).randrange
        data = bytes([1]) * BLOCK
        flying = deque()
        while not self._over.is_set():
            if not self._go.is_set():
                self._finish(flying)
                self._held.set()
                self._go.wait()
            flying.append(client.start(WRITE, choose(self._span) * BLOCK, BLOCK, data))
            if len(flying) == DEPTH:
                self._finish_one(flying)
        self._finish(flying)
        client.close()

    def _finish(self, flying: deque) -> None:
        while flying:
            self._finish_one(flying)

    def _finish_one(self, flying: deque) -> None:
        request = flying.popleft()
        self._client.finish([request])
        if request.error:
            raise OSError(request.error, "a write of the load failed")
        self.answers.append(time.monotonic())

    def hold(self) -> None:
        """Return when nothing is in flight."""
        self._held.clear()
        self._go.clear()
        self._held.wait()

    def resume(self) -> None:
        self._go.set()

    def wait_for(self, more: int) -> None:
        """Wait until so many more writes have been answered."""
        wanted = len(self.answers) + more
        while len(self.answers) < wanted:
            if not self.is_alive():
                raise RuntimeError("the load has ended")
            time.sleep(0.001)

    def end(self) -> None:
        self._over.set()
        self.join()


def measure(host, span: int) -> float:
    """Milliseconds without an answer around a checkpoint of `host`, while its forwarded writes go on."""
    writer = Writer(host.forwarded_address, span)
    writer.start()
    try:
        writer.wait_for(WARM_UP)
        began = time.monotonic()
        if host.quiesce:
            writer.hold()
        host.checkpoint()
        writer.resume()
        ended = time.monotonic()
        writer.wait_for(WARM_UP)
    finally:
        writer.end()
    return 1000 * max(b - a for a, b in pairwise(writer.answers) if b >= began and a <= ended)
