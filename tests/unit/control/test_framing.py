"""QMP as bytes: objects, requests, replies, errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tcmu_replication.control import framing
from tcmu_replication.control.framing import Request
from tcmu_replication.errors import Error, Kind


@pytest.mark.parametrize("step", [1, 3, 1000], ids=["byte-by-byte", "three", "whole"])
def test_objects_come_out_whole_however_they_arrive(step: int) -> None:
    quoted = rb"""{"b":"}{\"]"}"""
    data = b'{"a":1} ' + quoted + b'{"c":[{}]}\r\n{"d"'
    objects = framing.Objects()
    found = [message for i in range(0, len(data), step) for message in objects.feed(data[i : i + step])]
    assert found == [b'{"a":1}', quoted, b'{"c":[{}]}']
    assert objects.feed(b":4}") == [b'{"d":4}']


def test_longest_message_passes_and_one_byte_more_does_not() -> None:
    longest = b'{"a":"' + b"x" * (framing.MAX_LENGTH - 8) + b'"}'
    assert framing.Objects().feed(longest) == [longest]
    for endless in (longest[:-1] + b"y}", longest[:-1] + b"yy"):
        with pytest.raises(Error, match="a message of more than"):
            framing.Objects().feed(endless)


@pytest.mark.parametrize("data", [b"x", b"[]", b"7", b"null", b'"a"', b"\xff", b"}", b'{"a":' + b"[" * 64])
def test_bytes_that_begin_no_object_or_nest_too_deep_are_refused_at_once(data: bytes) -> None:
    with pytest.raises(Error) as caught:
        framing.Objects().feed(data)
    assert caught.value.kind is Kind.BAD_REQUEST


@pytest.mark.parametrize(
    "data",
    [
        *(b"x", b"[]", b"7", b"null", b'"a"', b"{", b"\xff", b"[" * 100_000, b"9" * 9999),
        *(
            b'{"id":"\\ud800"}',
            b'{"id":"\\udcff\\ud800"}',
            b'{"id":NaN}',
            b'{"id":-Infinity}',
            b'{"id":1e999}',
            '{"id":1}'.encode("utf-16-le"),
        ),
    ],
)
def test_text_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(Error) as caught:
        framing.decode(data)
    assert caught.value.kind is Kind.BAD_REQUEST


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({}, "QMP input lacks member 'execute'"),
        ({"execute": 1}, "QMP input member 'execute' must be a string"),
        ({"execute": "x", "arguments": []}, "QMP input member 'arguments' must be an object"),
        ({"execute": "x", "extra": 1}, "QMP input member 'extra' is unexpected"),
        ({"exec-oob": "x"}, "QMP input member 'exec-oob' is unexpected"),
    ],
)
def test_request_with_wrong_members_is_refused_in_qemus_words(message: dict[str, Any], said: str) -> None:
    with pytest.raises(Error, match=said):
        framing.parse_request(message)


@pytest.mark.parametrize("id", [None, 0, "x", [1, {"a": None}]])
def test_id_comes_back_as_it_was(id: Any) -> None:
    request = framing.parse_request({"execute": "x", "id": id})
    assert json.loads(framing.success({}, request)) == {"return": {}, "id": id}
    assert json.loads(framing.failure(Error(Kind.IO), request))["id"] == id


def test_no_id_none_returned() -> None:
    assert json.loads(framing.success(7, Request("x", {}))) == {"return": 7}
    assert "id" not in json.loads(framing.failure(Error(Kind.IO), None))


def test_every_kind_has_a_class_and_survives_the_way() -> None:
    assert set(framing.CLASS_OF_KIND) == set(Kind)
    for kind in Kind:
        reply = json.loads(framing.failure(Error(kind, "a sentence", offset=4096, length=512), None))
        back = framing.error_of(reply["error"])
        assert (back.kind, back.detail, back.offset, back.length) == (kind, "a sentence", 4096, 512)


def test_error_of_a_qemu_has_no_kind_of_ours() -> None:
    error = framing.error_of({"class": "GenericError", "desc": "I/O error occurred"})
    assert (error.kind, error.detail) == (Kind.IO, "I/O error occurred")


@pytest.mark.parametrize("body", [None, [], {}, {"desc": 1}])
def test_error_reply_that_is_none(body: Any) -> None:
    assert framing.error_of(body).kind is Kind.PEER_LIED


def test_event_carries_its_time() -> None:
    message = json.loads(framing.event("X", {"a": 1}, 12.5))
    assert message == {"event": "X", "data": {"a": 1}, "timestamp": {"seconds": 12, "microseconds": 500_000}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"""{'execute':'quit'}""", {"execute": "quit"}),
        (r"""{'a':"it's",'b':'say "x" \' \" \\'}""", {"a": "it's", "b": 'say "x" \' " \\'}),
        (r"""{"a":"\'","b":"\\'"}""", {"a": "'", "b": "\\'"}),
        (r"""{'a':'{[','b':"'"}""", {"a": "{[", "b": "'"}),
    ],
)
def test_strings_in_single_quotes(text: str, value: dict[str, str]) -> None:
    """As QEMU's documents write requests, whatever arrives together."""
    objects, found = framing.Objects(), []
    for byte in text.encode():
        found += objects.feed(bytes([byte]))
    assert [framing.decode(message) for message in found] == [value]


@pytest.mark.parametrize("text", ["{'a\":1}", "{'a':1", "{a':1}", "{'a':'\n'}", "{''':1}"])
def test_quotes_that_do_not_match(text: str) -> None:
    with pytest.raises(Error, match="not JSON"):
        framing.decode(text.encode())
