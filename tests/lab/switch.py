"""An Ethernet switch as values: frames and faults in, what goes where and when out.

No sockets, no clock, no threads: tests/lab/network.py has those.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

ADDRESS = 6
"""Bytes of an address; a frame begins with its destination's, then its source's (IEEE 802.3, 3.1.1)."""


@dataclasses.dataclass
class Faults:
    """What befalls frames on their way; all together, in this order."""

    cut: set[frozenset[str]] = dataclasses.field(default_factory=set)
    """Pairs of ports between which nothing passes, in either direction."""
    drop: float = 0.0
    """The part of all frames that is lost, 0 to 1."""
    delay_s: float = 0.0
    """How long each frame takes."""


class Switch:
    """Learns which address lives at which port, as a switch does; unknown ones are sent to all."""

    def __init__(self, ports: list[str]):
        self.ports = ports
        self.faults = Faults()
        self.dropped = 0
        """Frames lost so far by cuts and drops."""
        self._port_of: dict[bytes, str] = {}
        self._random = random.Random(0)

    def seed(self, seed: int) -> None:
        """The same seed and the same frames lose the same frames."""
        self._random = random.Random(seed)

    def forward(self, port: str, frame: bytes, now: float) -> Iterator[tuple[float, str]]:
        """When and to which ports `frame`, come in at `port` at time `now`, goes out."""
        if len(frame) < 2 * ADDRESS:
            return
        destination, source = frame[:ADDRESS], frame[ADDRESS : 2 * ADDRESS]
        self._port_of[source] = port
        known = self._port_of.get(destination)
        for target in self.ports if known is None else [known]:
            if target == port:
                continue
            if self._is_lost(port, target):
                self.dropped += 1
            else:
                yield now + self.faults.delay_s, target

    def _is_lost(self, source: str, target: str) -> bool:
        faults = self.faults
        return frozenset((source, target)) in faults.cut or (
            faults.drop > 0 and self._random.random() < faults.drop
        )
