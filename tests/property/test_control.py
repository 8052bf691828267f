"""Whatever a client sends, a session answers it, calls a command that it may, or ends; nothing else."""

from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from tcmu_replication.control import framing
from tcmu_replication.control.command import Privilege
from tcmu_replication.control.session import Call, Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu.tables import COMMANDS

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*sorted(COMMANDS), "qmp_capabilities", "query-commands", "query-version"])
requests = st.fixed_dictionaries(
    {"execute": names | st.text()},
    optional={
        "arguments": st.dictionaries(
            st.sampled_from(
                ["to", "device", "epoch", "resource", "protocol", "addr", "parent", "enable", "x"]
            ),
            json_values
            | st.fixed_dictionaries({"type": st.sampled_from(["inet", "x"]), "data": json_values}),
        ),
        "id": json_values,
        "exec-oob": names,
        "extra": json_values,
    },
)
messages = st.binary() | (json_values | requests).map(lambda value: json.dumps(value).encode())


@given(st.lists(messages, max_size=8), st.sampled_from(Privilege), st.booleans())
def test_any_messages_are_answered_called_or_end_the_session(
    sent: list[bytes], privilege: Privilege, negotiate: bool
) -> None:
    session = Session(COMMANDS, COMMANDS, privilege, "test")
    if negotiate:
        session.receive(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
    for message in sent:
        try:
            answer = session.receive(message)
        except Error as error:
            if error.kind is not Kind.BAD_REQUEST:
                raise
            return
        if isinstance(answer, Call):
            assert session.negotiated
            assert privilege is Privilege.OPERATOR or answer.command.privilege is Privilege.PEER
            answer = session.fail(answer, Error(Kind.IO))
        reply = json.loads(answer)
        assert ("return" in reply) != ("error" in reply)
        assert answer.endswith(b"\r\n")
        assert answer.count(b"\n") == 1


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=3)), st.integers(1, 9), st.booleans())
def test_objects_come_out_as_they_were_put_in_however_they_are_cut(
    sent: list[dict[str, object]], step: int, ascii_only: bool
) -> None:
    """Strings full of brackets, quotes and backslashes are what could mislead the count."""
    data = b"".join(
        json.dumps(message, ensure_ascii=ascii_only).encode("utf-8", "replace") for message in sent
    )
    objects = framing.Objects()
    found = [message for at in range(0, len(data), step) for message in objects.feed(data[at : at + step])]
    assert b"".join(found) == data
    assert len(found) == len(sent)


@given(st.dictionaries(st.text(), st.text()), st.booleans())
def test_single_quotes_mean_what_double_quotes_mean(sent: dict[str, str], ascii_only: bool) -> None:
    """Also where a string has quotes of either kind itself."""
    text = json.dumps(sent, ensure_ascii=ascii_only).replace("'", r"\'")
    quoted = "".join({'\\"': '"', '"': "'"}.get(piece, piece) for piece in re.split(r'(\\.|")', text))
    data = quoted.encode("utf-8", "replace")
    assert framing.Objects().feed(data) == [data]
    plain = json.dumps(sent, ensure_ascii=ascii_only).encode("utf-8", "replace")
    assert framing.decode(data) == framing.decode(plain)


@given(st.text(alphabet='{}[]"\\ \nx' + "'"), st.integers(1, 9))
def test_any_bytes_end_the_stream_or_cut_the_same_way_in_any_pieces(text: str, step: int) -> None:
    data = text.encode()

    def feed(pieces: list[bytes]) -> tuple[list[bytes], bool]:
        objects, found = framing.Objects(), []
        try:
            for piece in pieces:
                for message in objects.feed(piece):
                    found.append(message)
        except Error:
            return found, True
        return found, False

    one_by_one = feed([data[at : at + 1] for at in range(len(data))])
    found, failed = feed([data[at : at + step] for at in range(0, len(data), step)])
    assert failed == one_by_one[1]
    assert found == one_by_one[0][: len(found)]
