"""The server's half of the fixed newstyle handshake: bytes in, bytes out, no I/O.

Source: doc/proto.md of the NBD project, "Handshake phase". The client's half
is in handshake_client.py.

    S: greeting    C: flags    C: option, S: replies ...    C: GO or EXPORT_NAME -> transmission
                                                            C: ABORT             -> the end

An option is one row of `_OPTIONS`. A listener with TLS answers nothing but
STARTTLS and ABORT: the ACK of STARTTLS ends this handshake, and behind the TLS
handshake the one that `secured` returns goes on with nothing of what was said
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import protocol
from tcmu_replication.nbd.protocol import HandshakeFlag, Info, Option, OptionReply

CONTEXT_ID = 1
"""The number that we give to base:allocation."""

_KNOWN_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


class Offer(NamedTuple):
    """What a server says about an export: bytes of length and block sizes, a TransmissionFlag mask."""

    name: str
    length: int
    flags: int
    description: str = ""
    minimum: int = protocol.MIN_BLOCK
    preferred: int = protocol.PREFERRED_BLOCK
    maximum: int = protocol.MAX_REQUEST


class Agreed(NamedTuple):
    """How a server's handshake ended: the export, and what may be used on the connection."""

    offer: Offer
    structured: bool
    allocation: bool


def text_of(data: bytes, what: str) -> str:
    """A string of the protocol. Raises Error PEER_LIED unless it is UTF-8 of at most MAX_STRING bytes."""
    if len(data) > protocol.MAX_STRING:
        raise Error(Kind.PEER_LIED, f"{what} has {len(data)} bytes, more than {protocol.MAX_STRING}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Error(Kind.PEER_LIED, f"{what} is not UTF-8: {data[:64]!r}") from error


class _RefusedError(Exception):
    """An option that is answered with an error reply, after which the handshake goes on."""

    def __init__(self, reply: OptionReply, text: str):
        super().__init__(text)
        self.reply = reply


class ServerHandshake:
    """One client's handshake. Send `greeting()`, then what `receive` returns, until `over`.

    Afterwards `agreed` is the outcome and `rest` the bytes behind the handshake,
    which belong to the transmission phase; or `wants_tls` is set and `secured()`
    is the handshake to have inside of TLS; or the client said ABORT.
    `offers` is looked up anew for each option, since exports come and go. `tls`
    says that they are for clients with TLS only.
    """

    def __init__(self, offers: Callable[[], Mapping[str, Offer]], *, tls: bool = False) -> None:
        self._offers = offers
        self._tls = tls
        self._secured = False
        self.wants_tls = False
        self._received = bytearray()
        self._client_flags: HandshakeFlag | None = None
        self._structured = False
        self._allocation_of: str | None = None
        self.over = False
        self.agreed: Agreed | None = None

    @property
    def rest(self) -> bytes:
        """What came in and was not part of the handshake."""
        return bytes(self._received)

    def greeting(self) -> bytes:
        """What a server says first."""
        return protocol.GREETING.pack(protocol.NBD_MAGIC, protocol.OPTION_MAGIC, _KNOWN_FLAGS)

    def secured(self) -> ServerHandshake:
        """What goes on when TLS is in place. Only the client's flags are kept: they are not said again."""
        assert self.wants_tls
        handshake = ServerHandshake(self._offers)
        handshake._client_flags = self._client_flags
        handshake._secured = True
        return handshake

    def receive(self, data: bytes) -> bytes:
        """Take bytes of the client and return what to send.

        Raises Error PEER_LIED, NOT_FOUND or PERMISSION: hang up.
        """
        assert not self.over
        self._received += data
        answer = bytearray()
        if self._client_flags is None and not self._take_client_flags():
            return b""
        while not self.over and (option := self._take_option()) is not None:
            answer += self._answer(*option)
        return bytes(answer)

    def _take_client_flags(self) -> bool:
        if len(self._received) < protocol.CLIENT_FLAGS.size:
            return False
        (flags,) = protocol.CLIENT_FLAGS.unpack_from(self._received)
        if flags & ~_KNOWN_FLAGS:
            raise Error(Kind.PEER_LIED, f"the client sent unknown handshake flags {flags:#x}")
        self._client_flags = HandshakeFlag(flags)
        del self._received[: protocol.CLIENT_FLAGS.size]
        return True

    def _take_option(self) -> tuple[int, bytes] | None:
        head = protocol.OPTION.size
        if len(self._received) < head:
            return None
        magic, option, length = protocol.OPTION.unpack_from(self._received)
        if magic != protocol.OPTION_MAGIC:
            raise Error(Kind.PEER_LIED, f"an option began with {magic:#x}, not {protocol.OPTION_MAGIC:#x}")
        if length > protocol.MAX_OPTION:
            limit = protocol.MAX_OPTION
            raise Error(Kind.PEER_LIED, f"option {option} has {length} bytes, more than {limit}")
        assert self._client_flags is not None
        if not self._client_flags & HandshakeFlag.FIXED_NEWSTYLE and option != Option.EXPORT_NAME:
            raise Error(Kind.PEER_LIED, f"option {option} from a client without the fixed newstyle")
        if len(self._received) < head + length:
            return None
        data = bytes(self._received[head : head + length])
        del self._received[: head + length]
        return option, data

    def _answer(self, option: int, data: bytes) -> bytes:
        handler = _OPTIONS.get(option)
        try:
            if self._tls and option not in (Option.STARTTLS, Option.ABORT):
                if option == Option.EXPORT_NAME:  # which has no error reply
                    raise Error(Kind.PERMISSION, "asked for an export without TLS")
                raise _RefusedError(OptionReply.ERR_TLS_REQD, "nothing is told here without TLS")
            if handler is None:
                raise _RefusedError(OptionReply.ERR_UNSUP, f"option {option} is not supported")
            return handler(self, option, data)
        except _RefusedError as refusal:
            return _reply(option, refusal.reply, str(refusal).encode()[: protocol.MAX_STRING])

    def _find(self, name: str) -> Offer:
        """The export of that name; an empty name is the only export, if there is one."""
        offers = self._offers()
        offer = offers.get(name)
        if offer is None and not name and len(offers) == 1:
            (offer,) = offers.values()
        if offer is None:
            raise _RefusedError(OptionReply.ERR_UNKNOWN, f"no export is named {name[:256]!r}")
        return offer

    def _agree(self, offer: Offer) -> None:
        self.over = True
        allocation = self._allocation_of is not None and self._allocation_of == offer.name
        self.agreed = Agreed(offer, self._structured, allocation)

    def _export_name(self, option: int, data: bytes) -> bytes:
        name = text_of(data, "an export's name")
        try:
            offer = self._find(name)
        except _RefusedError as refusal:
            # This option has no error reply: the specification says to hang up.
            raise Error(Kind.NOT_FOUND, str(refusal)) from None
        self._agree(offer)
        assert self._client_flags is not None
        zeroes = 0 if self._client_flags & HandshakeFlag.NO_ZEROES else protocol.EXPORT_NAME_ZEROES
        return protocol.EXPORT_NAME_REPLY.pack(offer.length, offer.flags) + bytes(zeroes)

    def _abort(self, option: int, data: bytes) -> bytes:
        self.over = True
        return _reply(option, OptionReply.ACK)

    def _list(self, option: int, data: bytes) -> bytes:
        _expect_no_data(option, data)
        answer = b""
        for offer in self._offers().values():
            name = offer.name.encode()
            entry = protocol.U32.pack(len(name)) + name + offer.description.encode()
            answer += _reply(option, OptionReply.SERVER, entry)
        return answer + _reply(option, OptionReply.ACK)

    def _starttls(self, option: int, data: bytes) -> bytes:
        _expect_no_data(option, data)
        if self._secured:
            raise _RefusedError(OptionReply.ERR_INVALID, "TLS is in place already")
        if not self._tls:
            raise _RefusedError(OptionReply.ERR_POLICY, "this listener has no TLS")
        if self._received:
            raise Error(Kind.PEER_LIED, f"{len(self._received)} bytes behind STARTTLS, in front of TLS")
        self.over = self.wants_tls = True
        return _reply(option, OptionReply.ACK)

    def _info_or_go(self, option: int, data: bytes) -> bytes:
        fields = _Fields(data)
        name = text_of(fields.string(), "an export's name")
        wanted = {fields.u16() for _ in range(fields.u16())}
        fields.end()
        offer = self._find(name)
        parts = [protocol.INFO_EXPORT.pack(Info.EXPORT, offer.length, offer.flags)]
        parts.append(
            protocol.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, offer.minimum, offer.preferred, offer.maximum)
        )
        if Info.NAME in wanted:
            parts.append(protocol.U16.pack(Info.NAME) + offer.name.encode())
        if Info.DESCRIPTION in wanted and offer.description:
            parts.append(protocol.U16.pack(Info.DESCRIPTION) + offer.description.encode())
        if option == Option.GO:
            self._agree(offer)
        return b"".join(_reply(option, OptionReply.INFO, p) for p in parts) + _reply(option, OptionReply.ACK)

    def _structured_reply(self, option: int, data: bytes) -> bytes:
        _expect_no_data(option, data)
        self._structured = True
        return _reply(option, OptionReply.ACK)

    def _meta_context(self, option: int, data: bytes) -> bytes:
        if option == Option.SET_META_CONTEXT:
            self._allocation_of = None
        if not self._structured:
            raise _RefusedError(OptionReply.ERR_INVALID, "meta contexts need structured replies first")
        fields = _Fields(data)
        name = text_of(fields.string(), "an export's name")
        count = fields.u32()
        if count > len(data) // 4:
            raise _RefusedError(OptionReply.ERR_INVALID, f"{count} queries do not fit into {len(data)} bytes")
        queries = [text_of(fields.string(), "a query") for _ in range(count)]
        fields.end()
        offer = self._find(name)
        listing = option == Option.LIST_META_CONTEXT
        known = {protocol.BASE_ALLOCATION} | ({"base:"} if listing else set())
        if not known.intersection(queries) and not (listing and not queries):
            return _reply(option, OptionReply.ACK)
        if not listing:
            self._allocation_of = offer.name
        context = protocol.U32.pack(0 if listing else CONTEXT_ID) + protocol.BASE_ALLOCATION.encode()
        return _reply(option, OptionReply.META_CONTEXT, context) + _reply(option, OptionReply.ACK)


_OPTIONS: dict[int, Callable[[ServerHandshake, int, bytes], bytes]] = {
    Option.EXPORT_NAME: ServerHandshake._export_name,
    Option.ABORT: ServerHandshake._abort,
    Option.LIST: ServerHandshake._list,
    Option.STARTTLS: ServerHandshake._starttls,
    Option.INFO: ServerHandshake._info_or_go,
    Option.GO: ServerHandshake._info_or_go,
    Option.STRUCTURED_REPLY: ServerHandshake._structured_reply,
    Option.LIST_META_CONTEXT: ServerHandshake._meta_context,
    Option.SET_META_CONTEXT: ServerHandshake._meta_context,
}


class _Fields:
    """Walks the data of an option; data that is too short or too long is the client's invalid option."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, length: int) -> bytes:
        piece = self._data[self._at : self._at + length]
        if len(piece) != length:
            raise _RefusedError(OptionReply.ERR_INVALID, f"the option ends after {len(self._data)} bytes")
        self._at += length
        return piece

    def u16(self) -> int:
        return int.from_bytes(self._take(2))

    def u32(self) -> int:
        return int.from_bytes(self._take(4))

    def string(self) -> bytes:
        return self._take(self.u32())

    def end(self) -> None:
        if self._at != len(self._data):
            surplus = len(self._data) - self._at
            raise _RefusedError(OptionReply.ERR_INVALID, f"the option has {surplus} bytes too many")


def _reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    return protocol.OPTION_REPLY.pack(protocol.OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def _expect_no_data(option: int, data: bytes) -> None:
    if data:
        raise _RefusedError(OptionReply.ERR_INVALID, f"option {option} takes no data, {len(data)} bytes came")
