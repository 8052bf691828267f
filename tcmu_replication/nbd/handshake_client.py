"""The client's half of the newstyle handshake: bytes in, bytes out, no I/O.

Source: doc/proto.md of the NBD project, "Handshake phase".

    greeting [-> STARTTLS -> TLS]
             -> STRUCTURED_REPLY -> SET_META_CONTEXT -> GO -> transmission
                                                        | ERR_UNSUP  -> EXPORT_NAME -> transmission
                                                        | ERR_UNKNOWN -> LIST -> Error that names the exports

What a server does not know is left out: only the export is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import protocol
from tcmu_replication.nbd.handshake import text_of
from tcmu_replication.nbd.protocol import HandshakeFlag, Info, Option, OptionReply, TransmissionFlag

_MAX_LISTED = 10
"""So many exports are named when the wanted one does not exist."""


class Agreement(NamedTuple):
    """The export as the server described it: bytes, and the context's number if block status may be asked."""

    length: int
    flags: TransmissionFlag
    structured: bool
    allocation_id: int | None
    minimum: int = protocol.MIN_BLOCK
    maximum: int = protocol.MAX_REQUEST


class ClientHandshake:
    """Ask a server for `export`. Feed `receive` and send what it returns until `agreed` is set.

    `rest` has the bytes behind the handshake (a server sends none unasked). With
    `tls` nothing is asked before TLS: `wants_tls` is set when it may begin, and
    `secured()` is what to send inside of it.
    """

    def __init__(self, export: str, *, tls: bool = False) -> None:
        self._tls = tls
        self.wants_tls = False
        self._export = export.encode()
        self._received = bytearray()
        self._await: Callable[[], bytes | None] = self._greeting
        self._zeroes = 0
        self._structured = False
        self._allocation_id: int | None = None
        self._length: int | None = None
        self._flags = 0
        self._minimum = protocol.MIN_BLOCK
        self._maximum = protocol.MAX_REQUEST
        self._listed: list[str] = []
        self.agreed: Agreement | None = None

    @property
    def rest(self) -> bytes:
        """What came in and was not part of the handshake."""
        return bytes(self._received)

    def receive(self, data: bytes) -> bytes:
        """Take bytes of the server and return what to send.

        Raises Error: PEER_LIED (not the protocol, or not a newstyle server), NOT_FOUND
        (no such export), PERMISSION (refused by policy, TLS wanted), UNSUPPORTED.
        """
        self._received += data
        send = b""
        while self.agreed is None and not self.wants_tls and (answer := self._await()) is not None:
            send += answer
        return send

    def secured(self) -> bytes:
        """TLS is in place: go on."""
        assert self.wants_tls
        self.wants_tls = False
        self._await = self._structured_reply
        return _option(Option.STRUCTURED_REPLY)

    def _take(self, length: int) -> bytes | None:
        if len(self._received) < length:
            return None
        data = bytes(self._received[:length])
        del self._received[:length]
        return data

    def _greeting(self) -> bytes | None:
        expected = protocol.NBD_MAGIC.to_bytes(8)
        if not expected.startswith(self._received[:8]):
            raise Error(Kind.PEER_LIED, f"no NBD server: it greeted with {bytes(self._received[:16])!r}")
        greeting = self._take(protocol.GREETING.size)
        if greeting is None:
            return None
        _, magic, flags = protocol.GREETING.unpack(greeting)
        if magic == protocol.OLDSTYLE_MAGIC:
            raise Error(Kind.UNSUPPORTED, "the server speaks the old NBD handshake without export names")
        if magic != protocol.OPTION_MAGIC:
            raise Error(Kind.PEER_LIED, f"the server's greeting goes on with {magic:#x}")
        mine = HandshakeFlag(flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
        self._zeroes = 0 if mine & HandshakeFlag.NO_ZEROES else protocol.EXPORT_NAME_ZEROES
        hello = protocol.CLIENT_FLAGS.pack(mine)
        if self._tls:
            if not mine & HandshakeFlag.FIXED_NEWSTYLE:
                raise Error(Kind.UNSUPPORTED, "the server is too old for TLS, which is wanted here")
            self._await = self._starttls
            return hello + _option(Option.STARTTLS)
        if not mine & HandshakeFlag.FIXED_NEWSTYLE:
            return hello + self._ask_export_name()
        self._await = self._structured_reply
        return hello + _option(Option.STRUCTURED_REPLY)

    def _reply(self, option: Option) -> tuple[int, bytes] | None:
        """The next reply, which must be to `option`: its type and data. None: more bytes are needed."""
        head = protocol.OPTION_REPLY.size
        if len(self._received) < head:
            return None
        magic, answered, reply, length = protocol.OPTION_REPLY.unpack_from(self._received)
        if magic != protocol.OPTION_REPLY_MAGIC:
            raise Error(Kind.PEER_LIED, f"an option's reply began with {magic:#x}")
        if answered != option:
            raise Error(Kind.PEER_LIED, f"the server answered option {answered}, asked was {option.name}")
        if length > protocol.MAX_OPTION:
            raise Error(Kind.PEER_LIED, f"the reply to {option.name} has {length} bytes, too many to be true")
        if len(self._received) < head + length:
            return None
        data = bytes(self._received[head : head + length])
        del self._received[: head + length]
        if reply in (OptionReply.ERR_TLS_REQD, OptionReply.ERR_POLICY, OptionReply.ERR_SHUTDOWN):
            name = OptionReply(reply).name
            hint = "; it wants TLS, which is not set up here" if reply == OptionReply.ERR_TLS_REQD else ""
            raise Error(Kind.PERMISSION, f"the server refuses {option.name}: {_said(name, data)}{hint}")
        return reply, data

    def _starttls(self) -> bytes | None:
        answer = self._reply(Option.STARTTLS)
        if answer is None:
            return None
        reply, _ = answer
        if reply != OptionReply.ACK:
            _expect_error(Option.STARTTLS, reply)
            raise Error(Kind.PERMISSION, "the server has no TLS, which is wanted here")
        if self._received:
            raise Error(Kind.PEER_LIED, f"{len(self._received)} bytes of the server in front of TLS")
        self.wants_tls = True
        return b""

    def _structured_reply(self) -> bytes | None:
        answer = self._reply(Option.STRUCTURED_REPLY)
        if answer is None:
            return None
        reply, _ = answer
        if reply == OptionReply.ACK:
            self._structured = True
            self._await = self._meta_context
            name = protocol.BASE_ALLOCATION.encode()
            query = protocol.U32.pack(1) + protocol.U32.pack(len(name)) + name
            return _option(
                Option.SET_META_CONTEXT, protocol.U32.pack(len(self._export)) + self._export + query
            )
        _expect_error(Option.STRUCTURED_REPLY, reply)
        return self._ask_go()

    def _meta_context(self) -> bytes | None:
        answer = self._reply(Option.SET_META_CONTEXT)
        if answer is None:
            return None
        reply, data = answer
        if reply == OptionReply.META_CONTEXT:
            if self._allocation_id is not None or data[4:] != protocol.BASE_ALLOCATION.encode():
                raise Error(Kind.PEER_LIED, f"the server offers a context nobody asked for: {data[4:68]!r}")
            self._allocation_id = int.from_bytes(data[:4])
            return b""
        if reply != OptionReply.ACK:
            _expect_error(Option.SET_META_CONTEXT, reply)
            self._allocation_id = None
        return self._ask_go()

    def _ask_go(self) -> bytes:
        self._await = self._go
        wish = protocol.U16.pack(1) + protocol.U16.pack(Info.BLOCK_SIZE)
        return _option(Option.GO, protocol.U32.pack(len(self._export)) + self._export + wish)

    def _go(self) -> bytes | None:
        answer = self._reply(Option.GO)
        if answer is None:
            return None
        reply, data = answer
        if reply == OptionReply.INFO:
            self._info(data)
            return b""
        if reply == OptionReply.ACK:
            if self._length is None:
                raise Error(Kind.PEER_LIED, "the server agreed without saying how long the export is")
            self._agree(self._length, self._flags)
            return b""
        _expect_error(Option.GO, reply)
        if reply == OptionReply.ERR_UNSUP:
            return self._ask_export_name()
        if reply == OptionReply.ERR_UNKNOWN:
            self._await = self._list
            return _option(Option.LIST)
        raise Error(Kind.UNSUPPORTED, f"the server refuses the export: {_said(f'reply {reply:#x}', data)}")

    def _info(self, data: bytes) -> None:
        kind = int.from_bytes(data[:2]) if len(data) >= 2 else None
        if kind == Info.EXPORT and len(data) == protocol.INFO_EXPORT.size:
            _, self._length, self._flags = protocol.INFO_EXPORT.unpack(data)
        elif kind == Info.BLOCK_SIZE and len(data) == protocol.INFO_BLOCK_SIZE.size:
            _, minimum, _, maximum = protocol.INFO_BLOCK_SIZE.unpack(data)
            if minimum == 0 or minimum & (minimum - 1) or maximum < minimum:
                raise Error(Kind.PEER_LIED, f"the server's block sizes make no sense: {minimum} to {maximum}")
            self._minimum = minimum
            self._maximum = min(maximum, protocol.MAX_REQUEST)
            self._maximum -= self._maximum % minimum
            if not self._maximum:
                raise Error(Kind.UNSUPPORTED, f"the server wants blocks of {minimum} bytes")
        elif kind is None or kind in (Info.EXPORT, Info.BLOCK_SIZE):
            raise Error(Kind.PEER_LIED, f"the server describes the export with {data[:32]!r}")

    def _ask_export_name(self) -> bytes:
        self._await = self._export_name
        return _option(Option.EXPORT_NAME, self._export)

    def _export_name(self) -> bytes | None:
        data = self._take(protocol.EXPORT_NAME_REPLY.size + self._zeroes)
        if data is None:
            return None
        self._agree(*protocol.EXPORT_NAME_REPLY.unpack_from(data))
        return b""

    def _agree(self, length: int, flags: int) -> None:
        if length >= 1 << 63:
            raise Error(Kind.PEER_LIED, f"the server says that the export has {length} bytes")
        known = TransmissionFlag(flags & sum(TransmissionFlag))
        self.agreed = Agreement(
            length, known, self._structured, self._allocation_id, self._minimum, self._maximum
        )

    def _list(self) -> bytes | None:
        answer = self._reply(Option.LIST)
        if answer is None:
            return None
        reply, data = answer
        if reply == OptionReply.SERVER:
            end = 4 + int.from_bytes(data[:4])
            if len(self._listed) < _MAX_LISTED:
                self._listed.append(repr(text_of(data[4:end], "an export's name")))
            return b""
        wanted = f"the server has no export {self._export.decode()!r}"
        raise Error(
            Kind.NOT_FOUND, f"{wanted}; it offers {', '.join(self._listed)}" if self._listed else wanted
        )


def _option(option: Option, data: bytes = b"") -> bytes:
    return protocol.OPTION.pack(protocol.OPTION_MAGIC, option, len(data)) + data


def _said(name: str, data: bytes) -> str:
    text = protocol.sentence(data)
    return f"{name}, {text}" if text else name


def _expect_error(option: Option, reply: int) -> None:
    if not reply & protocol.OPTION_ERROR_BIT:
        raise Error(Kind.PEER_LIED, f"the server answered {option.name} with a reply of type {reply}")
