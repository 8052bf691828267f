"""One QMP connection as the server sees it: negotiation, then the commands of its privilege. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from tcmu_replication import __version__
from tcmu_replication.control import framing
from tcmu_replication.control.framing import NO_COMMAND, Request
from tcmu_replication.control.schema import Command, Privilege
from tcmu_replication.errors import Error, Kind


class Call(NamedTuple):
    """A command to carry out; its outcome goes back through `Session.succeed` or `Session.fail`."""

    command: Command
    arguments: Any
    request: Request


class Session:
    """`privilege` is what this connection may do, `peer` says for the log who it is.

    `commands` is the table, `served` the names that have a handler: the rest
    is not found, and neither is what the privilege does not cover.
    """

    def __init__(
        self, commands: Mapping[str, Command], served: Collection[str], privilege: Privilege, peer: str
    ) -> None:
        self.privilege = privilege
        self.peer = peer
        self.negotiated = False
        self._commands = {
            name: row
            for name, row in commands.items()
            if name in served and (privilege is Privilege.OPERATOR or row.privilege is privilege)
        }

    def receive(self, data: bytes) -> Call | bytes:
        """What a message asks for: a call, or the reply to send at once.

        Raises BAD_REQUEST if it is no JSON object: the connection ends.
        """
        message = framing.decode(data)
        try:
            request = framing.parse_request(message)
        except Error as error:
            has_id = "id" in message
            return framing.failure(error, Request("", {}, message.get("id"), has_id))
        try:
            return self._dispatch(request)
        except Error as error:
            return framing.failure(error, request, NO_COMMAND if error.kind is Kind.UNSUPPORTED else None)

    def succeed(self, call: Call, result: Any) -> bytes:
        """The reply with a result. Raises msgspec.ValidationError if it is not what the table says."""
        return framing.success(call.command.encode(result), call.request)

    def fail(self, call: Call, error: Error) -> bytes:
        """The reply with a handler's error."""
        return framing.failure(error, call.request)

    def _dispatch(self, request: Request) -> Call | bytes:
        if not self.negotiated:
            if request.command != "qmp_capabilities":
                raise Error(Kind.UNSUPPORTED, "Expecting capabilities negotiation with 'qmp_capabilities'")
            self._negotiate(request.arguments)
            return framing.success({}, request)
        match request.command:
            case "qmp_capabilities":
                raise Error(Kind.UNSUPPORTED, "Capabilities negotiation is already complete, command ignored")
            case "query-commands":
                names = ["qmp_capabilities", "query-commands", "query-version", *self._commands]
                return framing.success([{"name": name} for name in sorted(names)], request)
            case "query-version":
                return framing.success({"package": f"tcmu-replication {__version__}"}, request)
        command = self._commands.get(request.command)
        if command is None:
            raise Error(Kind.UNSUPPORTED, f"The command {request.command} has not been found")
        return Call(command, command.decode(request.arguments), request)

    def _negotiate(self, arguments: dict[str, Any]) -> None:
        wanted = arguments.get("enable", [])
        if wanted != [] or set(arguments) - {"enable"}:
            raise Error(Kind.BAD_REQUEST, f"Capability {wanted!r:.80} not available; this server has none")
        self.negotiated = True
