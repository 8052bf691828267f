"""What the tables of commands and events are made of: documents, and rows with their types."""

from __future__ import annotations

import contextlib
import enum
from typing import Annotated, Any, ClassVar, NamedTuple

import msgspec
from msgspec import Meta, Struct

from tcmu_replication.control import arguments as checking
from tcmu_replication.errors import Error, Kind

Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Privilege(enum.Enum):
    """Who may give a command: root on this host, or also the configured peer over TCP."""

    OPERATOR = "operator"
    PEER = "peer"


OPERATOR, PEER = Privilege.OPERATOR, Privilege.PEER


class Document(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """Base of everything that travels: immutable, known members only.

    `limited_by` is of an event that comes at most once a second, for each value of that member by itself.
    """

    limited_by: ClassVar[str] = ""


class Nothing(Document, frozen=True, kw_only=True):
    """No arguments."""


class Command(NamedTuple):
    """A row of the command table. `arguments` is a document, or a union of some that a member tells apart;
    `result` is a type that msgspec converts to, None for no result.

    `oob`: it answers at once and so may be given out of band, while others of its connection wait.
    """

    name: str
    arguments: Any
    result: Any
    privilege: Privilege
    doc: str
    oob: bool = False

    def prepare(self) -> None:
        """Look at the types now, as the first call would: a failover should not wait for that."""
        checking.type_of(self.arguments)
        for document in (self.arguments, self.result or Nothing):
            with contextlib.suppress(msgspec.ValidationError):
                msgspec.convert({}, document)

    def decode(self, arguments: dict[str, Any]) -> Any:
        """The arguments as this command's struct. Raises BAD_REQUEST, in QEMU's words where QEMU has some."""
        checking.check(arguments, self.arguments)
        try:
            return msgspec.convert(arguments, self.arguments)
        except msgspec.ValidationError as error:
            raise Error(Kind.BAD_REQUEST, f"Invalid arguments of '{self.name}': {error}") from error

    def encode(self, result: Any) -> Any:
        """A handler's result as it travels ({} for none). Raises msgspec.ValidationError if it is none."""
        if result is None:
            return {}
        return msgspec.to_builtins(msgspec.convert(msgspec.to_builtins(result), self.result))


def table(*rows: Command) -> dict[str, Command]:
    """Rows by their names."""
    return {row.name: row for row in rows}
