"""The other host of a pair, as it has introduced itself: one record for all connections between the two.

Whoever connects greets first; `meet` is for what came of it. On the side that is
called, `commands` lets nobody past who has no protocol in common with us.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import tcmu_replication
from tcmu_replication.control.protocol import SPOKEN, WITHOUT_GREETING, Greeting, Host, Range, Terms, agree
from tcmu_replication.control.schema import PeerHello, PeerSoftware
from tcmu_replication.control.server import Handler
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind

log = logging.getLogger(__name__)


class Counterpart:
    """The host `peer` of `resource`, as seen from the host `me`, which speaks `spoken`.

    `terms` is what came of the last greeting, None before the first: a peer may be another version at
    each connection.
    """

    def __init__(self, resource: str, me: str, peer: str, spoken: Range = SPOKEN) -> None:
        self.terms: Terms | None = None
        self._resource = resource
        self._me = Host(me, spoken, tcmu_replication.__version__)
        self._peer = peer

    @property
    def greeting(self) -> Greeting:
        """What this host says of itself."""
        spoken = self._me.spoken
        return Greeting(lowest=spoken.lowest, highest=spoken.highest, version=tcmu_replication.__version__)

    @property
    def software(self) -> PeerSoftware | None:
        """For `status`."""
        if self.terms is None:
            return None
        protocol, version, refusal = self.terms
        return PeerSoftware(protocol=protocol, version=version, refusal=refusal or None)

    def meet(self, greeting: Greeting | None) -> Terms:
        """What we speak with who gives this greeting, or knows none; the log says what is new."""
        if greeting is None:
            return self._met(Host(self._peer, WITHOUT_GREETING, None))
        return self._met(Host(self._peer, Range(greeting.lowest, greeting.highest), greeting.version))

    def _met(self, peer: Host) -> Terms:
        terms = agree(self._me, peer)
        if terms != self.terms and terms.protocol is None:
            log.error("%s: %s", self._resource, terms.refusal)
        elif terms != self.terms:
            log.info("%s: %s; protocol %d is used", self._resource, peer, terms.protocol)
        self.terms = terms
        return terms

    # --- where we are called

    def commands(self, handlers: Mapping[str, Handler]) -> dict[str, Handler]:
        """peer-greet, and `handlers` for those alone with whom we have a protocol in common."""
        return {"peer-greet": self._greet} | {
            name: self._after_greeting(handler) for name, handler in handlers.items()
        }

    async def _greet(self, arguments: Greeting, session: Session) -> Greeting:
        """Answered whatever came of it: each end sees both ranges, and refuses by itself."""
        if session.terms is not None:
            raise Error(Kind.INVALID_STATE, "peer-greet comes first on a connection, and once")
        session.terms = self.meet(arguments)
        return self.greeting

    def _after_greeting(self, handler: Handler) -> Handler:
        async def checked(arguments: Any, session: Session) -> Any:
            if session.terms is None:
                session.terms = self._met(_without_greeting(self._peer, arguments))
            protocol = session.terms.require()
            if isinstance(arguments, PeerHello) and arguments.protocol != protocol:
                raise Error(
                    Kind.UNSUPPORTED,
                    f"protocol {arguments.protocol} was not agreed on for this connection, but {protocol}",
                )
            return await handler(arguments, session)

        return checked


def _without_greeting(name: str, arguments: Any) -> Host:
    """Who begins with another command: it says in its hello what it speaks, and that only."""
    if isinstance(arguments, PeerHello):
        return Host(name, Range(arguments.protocol, arguments.protocol), None)
    return Host(name, WITHOUT_GREETING, None)
