"""Which version of the peer protocol two hosts speak to each other: the greeting, and what follows from it. No I/O.

Each end speaks the protocols of a range. Both ends know both ranges after the
greeting and take the highest protocol that is in both, each by itself: `agree`
has the same outcome on either. A host from before there was a greeting speaks
protocol 2. docs/peer-protocol.md is the protocol, and the rule for changing it.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from msgspec import Meta

from tcmu_replication.control.command import Document
from tcmu_replication.errors import Error, Kind


class Range(NamedTuple):
    """The protocols that a host speaks, both ends included."""

    lowest: int
    highest: int

    def __str__(self) -> str:
        if self.lowest == self.highest:
            return f"protocol {self.lowest}"
        return f"protocols {self.lowest} to {self.highest}"


SPOKEN = Range(2, 3)
"""What this version speaks. A protocol is added and given up as docs/peer-protocol.md says."""
WITHOUT_GREETING = Range(2, 2)
"""What a host speaks that does not know the greeting."""

Number = Annotated[int, Meta(ge=0, le=(1 << 16) - 1)]
"""A protocol's number."""
Software = Annotated[str, Meta(max_length=40, pattern=r"^[!-~]+\Z")]
"""The version of a host's software, as in 0.1.0."""


class Greeting(Document, frozen=True, kw_only=True):
    """Arguments and result of peer-greet: who gives it speaks the protocols `lowest` to `highest`.

    `version` is that of its software. The greeting is the one document that never changes.
    """

    lowest: Number
    highest: Number
    version: Software


class Host(NamedTuple):
    """One end: its name in the resource file, what it speaks, and its software's version, None if it does not say."""

    name: str
    spoken: Range
    version: str | None

    def __str__(self) -> str:
        version = "of a version before the greeting" if self.version is None else f"version {self.version}"
        return f"{self.name} ({version}) speaks {self.spoken}"


class Terms(NamedTuple):
    """What came of a greeting: the `protocol` of both, or None and the `refusal`. `version` is the peer's software."""

    protocol: int | None
    version: str | None
    refusal: str = ""

    def require(self) -> int:
        """The protocol. Raises `Error(UNSUPPORTED)` if there is none."""
        if self.protocol is None:
            raise Error(Kind.UNSUPPORTED, self.refusal)
        return self.protocol


def agree(mine: Host, theirs: Host) -> Terms:
    """What `mine` and `theirs` speak to each other; the peer's numbers may be anything."""
    if theirs.spoken.lowest > theirs.spoken.highest:
        return Terms(None, theirs.version, f"{theirs}, which is no range; it is not believed")
    highest = min(mine.spoken.highest, theirs.spoken.highest)
    if highest >= max(mine.spoken.lowest, theirs.spoken.lowest):
        return Terms(highest, theirs.version)
    older, newer = sorted((mine, theirs), key=lambda host: host.spoken)
    return Terms(
        None,
        theirs.version,
        f"the hosts have no protocol in common: {older}, {newer}; upgrade tcmu-replication on {older.name}",
    )
