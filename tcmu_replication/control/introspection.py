"""What query-qmp-schema answers, generated from the tables.

Source: qapi/introspect.json. Types are named by what they describe here; QEMU
numbers them, and a client may not depend on either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import inspect

from tcmu_replication.control.arguments import is_tagged_union, type_of
from tcmu_replication.control.command import Command, Document, Nothing

_BUILTINS: dict[type[inspect.Type], tuple[str, str]] = {
    inspect.BoolType: ("bool", "boolean"),
    inspect.IntType: ("int", "int"),
    inspect.FloatType: ("number", "number"),
    inspect.StrType: ("str", "string"),
    inspect.NoneType: ("null", "null"),
    inspect.AnyType: ("any", "value"),
    inspect.DictType: ("any", "value"),
}
"""QAPI's name of a type and of its JSON type; an object of any members is "any" there too."""


def schema(commands: Iterable[Command], events: Mapping[str, type[Document]]) -> list[dict[str, Any]]:
    """SchemaInfo of every command and event, and after them of every type that they use."""
    types = _Types()
    rows: list[dict[str, Any]] = []
    for command in commands:
        row: dict[str, Any] = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": types.name(type_of(command.arguments)),
            "ret-type": types.result(type_of(Nothing if command.result is None else command.result)),
        }
        if command.oob:
            row["allow-oob"] = True
        rows.append(row)
    for name, document in events.items():
        rows.append({"name": name, "meta-type": "event", "arg-type": types.name(type_of(document))})
    return [*rows, *types.found.values()]


class _Types:
    """The types met so far, by name."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def name(self, type: inspect.Type, wanted: str = "") -> str:
        """The name under which `type` is described; `wanted` if it has none of its own."""
        match type:
            case inspect.StructType():
                return self._object(type)
            case inspect.ListType():
                element = self.name(type.item_type, wanted)
                return self._add(f"[{element}]", {"meta-type": "array", "element-type": element})
            case inspect.LiteralType():
                values = [str(value) for value in type.values]
                members = [{"name": value} for value in values]
                return self._add(
                    "|".join(values), {"meta-type": "enum", "members": members, "values": values}
                )
            case inspect.UnionType() if is_tagged_union(type):
                return self._union(type)
            case inspect.UnionType():
                return self._alternate(type, wanted)
            case _:
                name, json_type = _BUILTINS[type.__class__]
                return self._add(name, {"meta-type": "builtin", "json-type": json_type})

    def result(self, type: inspect.Type) -> str:
        """As `name`; no result where there might be one is an empty object, so every member is optional."""
        if not isinstance(type, inspect.UnionType):
            return self.name(type)
        document = next(branch for branch in type.types if isinstance(branch, inspect.StructType))
        members = self.found[self.name(document)]["members"]
        optional = [member | {"default": None} for member in members]
        return self._add(f"{document.cls.__name__}|{{}}", {"meta-type": "object", "members": optional})

    def _add(self, name: str, description: dict[str, Any]) -> str:
        self.found.setdefault(name, {"name": name, **description})
        return name

    def _object(self, type: inspect.StructType) -> str:
        name = type.cls.__name__
        if name not in self.found:
            self._add(name, {"meta-type": "object", "members": []})  # first, should it contain itself
            self.found[name]["members"] = [self._member(field, name) for field in type.fields]
        return name

    def _member(self, field: inspect.Field, owner: str) -> dict[str, Any]:
        name = field.encode_name
        member = {"name": name, "type": self.name(field.type, f"{owner}.{name}")}
        return member if field.required else member | {"default": None}

    def _union(self, type: inspect.UnionType) -> str:
        """Documents told apart by a tag: QAPI's union, whose branches have the members without the tag."""
        branches = [branch for branch in type.types if isinstance(branch, inspect.StructType)]
        tag = str(branches[0].tag_field)
        values = [str(branch.tag) for branch in branches]
        kinds = self._add(
            "|".join(values),
            {"meta-type": "enum", "members": [{"name": v} for v in values], "values": values},
        )
        variants = [{"case": str(b.tag), "type": self._object(b)} for b in branches]
        return self._add(
            f"{tag}: " + "|".join(branch.cls.__name__ for branch in branches),
            {
                "meta-type": "object",
                "members": [{"name": tag, "type": kinds}],
                "tag": tag,
                "variants": variants,
            },
        )

    def _alternate(self, type: inspect.UnionType, wanted: str) -> str:
        branches = [
            inspect.UnionType((branch,))
            if isinstance(branch, inspect.StructType) and branch.tag_field
            else branch
            for branch in type.types
        ]
        members = [{"type": self.name(branch, wanted)} for branch in branches]
        name = "|".join(member["type"] for member in members)
        return self._add(name, {"meta-type": "alternate", "members": members})
