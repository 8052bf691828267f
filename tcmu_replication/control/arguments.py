"""Checks arguments against a document's type, in the order and in the words of QEMU's input visitor.

Source: QEMU's qapi/qobject-input-visitor.c and qapi/qapi-visit-core.c (7.2): the
members in the schema's order, then what is unexpected. Two of its habits are
kept: an error of an enumeration or a short integer names the member without its
path, and a list's element has no name there ("null").
"""

from __future__ import annotations

import functools
from typing import Any

from msgspec import inspect

from tcmu_replication.errors import Error, Kind

_TYPES: dict[type[inspect.Type], tuple[Any, str]] = {
    inspect.BoolType: (bool, "boolean"),
    inspect.IntType: (int, "integer"),
    inspect.FloatType: ((int, float), "number"),
    inspect.StrType: (str, "string"),
    inspect.LiteralType: (str, "string"),
    inspect.ListType: (list, "array"),
    inspect.StructType: (dict, "object"),
}
"""What Python's JSON reader makes of a type, and what QEMU calls it."""

_NARROW = {(1 << 16) - 1: "uint16_t", (1 << 32) - 1: "uint32_t"}
"""QEMU's integers of less than 64 bits, by the largest; their errors name the member without its path."""


def check(arguments: Any, document: type) -> None:
    """Raises BAD_REQUEST at the first member that is missing, unexpected or of a wrong type or value."""
    _check(arguments, type_of(document), "")


@functools.cache
def type_of(document: Any) -> inspect.Type:
    """msgspec's description of a type."""
    return inspect.type_info(document)


def is_tagged_union(type: inspect.Type) -> bool:
    """Whether it is a union of documents that a member of theirs tells apart."""
    return isinstance(type, inspect.UnionType) and all(
        isinstance(branch, inspect.StructType) and branch.tag_field for branch in type.types
    )


def _check(value: Any, type: inspect.Type, path: str) -> None:
    if isinstance(type, inspect.UnionType):
        if is_tagged_union(type):
            type = _branch(value, type, path)
        elif any(isinstance(branch, inspect.NoneType) for branch in type.types):
            if value is None:
                return
            type = next(branch for branch in type.types if not isinstance(branch, inspect.NoneType))
        elif isinstance(value, str):
            return  # the only other unions of arguments are of a node's name and its options
        elif isinstance(value, dict):
            type = _branch(value, type, path)
        else:
            raise _error(f"Invalid parameter type for '{path}', expected: BlockdevRef")
    kind, name = _TYPES[type.__class__]
    # JSON's true is Python's 1
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _error(f"Invalid parameter type for '{path}', expected: {name}")
    if isinstance(type, inspect.StructType):
        _check_members(value, type, path)
    elif isinstance(type, inspect.ListType):
        for index, item in enumerate(value):
            _check(item, type.item_type, f"{path}[{index}]")
    elif isinstance(type, inspect.LiteralType) and value not in type.values:
        last = "null" if path.endswith("]") else path.rpartition(".")[2]
        raise _error(f"Parameter '{last}' does not accept value '{value}'")
    elif isinstance(type, inspect.IntType) and _outside(value, type):
        narrow = _NARROW.get(type.le or 0)
        last = path.rpartition(".")[2]
        raise _error(f"Parameter '{last if narrow else path}' expects {narrow or 'uint64_t'}")


def _branch(value: Any, union: inspect.UnionType, path: str) -> inspect.StructType:
    """The document of a tagged union that `value` says it is."""
    branches = {branch.tag: branch for branch in union.types if isinstance(branch, inspect.StructType)}
    tag = next(iter(branches.values())).tag_field
    assert tag is not None
    if not isinstance(value, dict):
        raise _error(f"Invalid parameter type for '{path}', expected: object")
    if tag not in value:
        raise _error(f"Parameter '{_join(path, tag)}' is missing")
    if not isinstance(value[tag], str):
        raise _error(f"Invalid parameter type for '{_join(path, tag)}', expected: string")
    if value[tag] not in branches:
        raise _error(f"Parameter '{tag}' does not accept value '{value[tag]}'")
    return branches[value[tag]]


def _check_members(value: dict[str, Any], type: inspect.StructType, path: str) -> None:
    for field in type.fields:
        if field.encode_name in value:
            _check(value[field.encode_name], field.type, _join(path, field.encode_name))
        elif field.required:
            raise _error(f"Parameter '{_join(path, field.encode_name)}' is missing")
    known = {type.tag_field, *(field.encode_name for field in type.fields)}
    for name in value:
        if name not in known:
            raise _error(f"Parameter '{_join(path, name)}' is unexpected")


def _outside(value: int, type: inspect.IntType) -> bool:
    return (type.ge is not None and value < type.ge) or (type.le is not None and value > type.le)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _error(text: str) -> Error:
    return Error(Kind.BAD_REQUEST, text)
