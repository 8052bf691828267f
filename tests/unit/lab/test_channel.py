"""Our end of a host's line, with this test as the agent."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.lab.channel import Channel, CommandError, HostDiedError


class Agent:
    """The other end, told what to say."""

    def __init__(self, line: socket.socket):
        self.line = line
        self.file = line.makefile("rb")

    def hear(self) -> dict:
        return json.loads(self.file.readline())

    def say(self, *messages: dict) -> None:
        self.line.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def ends(log: list[str]) -> Iterator[tuple[Channel, Agent]]:
    ours, theirs = socket.socketpair()
    channel = Channel("host", ours, log.append)
    with theirs:
        yield channel, Agent(theirs)
        channel.close()


def test_commands_answers_may_interleave(ends: tuple[Channel, Agent], log: list[str]) -> None:
    channel, agent = ends
    one, two = (channel.start(name, {"run": [name]}) for name in ("one", "two"))
    assert [agent.hear()["run"], agent.hear()["run"]] == [["one"], ["two"]]
    agent.say({"id": 1, "out": "1"}, {"id": 2, "err": "2"}, {"id": 2, "exit": 0}, {"id": 1, "exit": 0})
    assert (one.wait().stdout, two.wait().stderr) == ("1", "2")
    assert log[:2] == ["[1] $ one", "[2] $ two"]
    assert "[2] err: 2" in log


def test_output_cut_inside_a_character_is_whole_again(ends: tuple[Channel, Agent]) -> None:
    channel, agent = ends
    command = channel.start("x", {"run": ["x"]})
    for piece in (b"h\xc3", b"\xb6he\xff"):
        agent.say({"id": 1, "out": piece.decode("utf-8", "surrogateescape")})
    agent.say({"id": 1, "exit": 0})
    assert command.wait().stdout == "höhe\\xff"


def test_failure_raises_with_status_and_words(ends: tuple[Channel, Agent]) -> None:
    channel, agent = ends
    command = channel.start("x", {"run": ["x"]})
    agent.say({"id": 1, "err": "why"}, {"id": 1, "exit": 2})
    with pytest.raises(CommandError, match=r"host: x ended with status 2\nwhy"):
        command.wait()


def test_overdue_command_is_told_to_die(ends: tuple[Channel, Agent]) -> None:
    channel, agent = ends
    command = channel.start("x", {"run": ["x"]})
    agent.hear()
    with pytest.raises(CommandError, match=r"did not say 'done' within 0.01 s"):
        command.wait_for("done", 0.01)
    assert agent.hear() == {"id": 1, "signal": 9}


def test_command_that_ends_without_the_word_raises(ends: tuple[Channel, Agent]) -> None:
    channel, agent = ends
    command = channel.start("x", {"run": ["x"]})
    agent.say({"id": 1, "out": "ready"}, {"id": 1, "exit": 0})
    assert command.wait_for("ready") is command
    with pytest.raises(CommandError, match="without saying 'steady'"):
        command.wait_for("steady")


def test_dead_host_fails_who_waits_and_who_comes_later(ends: tuple[Channel, Agent]) -> None:
    channel, agent = ends
    command = channel.start("x", {"run": ["x"]})
    agent.line.shutdown(socket.SHUT_RDWR)
    with pytest.raises(HostDiedError, match="died before the command ended"):
        command.wait()
    with pytest.raises(HostDiedError):
        channel.start("y", {"run": ["y"]}).wait()


def test_line_that_is_not_json_is_logged_and_passed_over(ends: tuple[Channel, Agent], log: list[str]) -> None:
    channel, agent = ends
    command = channel.start("x", {"run": ["x"]})
    agent.line.sendall(b"Kernel panic\n")
    agent.say({"id": 1, "exit": 0})
    command.wait()
    assert "not the agent's: b'Kernel panic'" in log
