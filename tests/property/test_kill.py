"""A process killed with SIGKILL in the middle of writes loses nothing that it acknowledged, and tears nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tcmu_replication.block.file import File
from tcmu_replication.block.overlay import Overlay
from tests.property.killed_writer import LENGTH

PROJECT = Path(__file__).parents[2]


def killed_run(folder: Path, seed: int, durable: bool) -> list[list[str]]:
    """What a writer said before it was killed, at some moment after some number of lines."""
    dice = random.Random(seed)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.property.killed_writer", str(folder), str(seed), str(durable)],
        stdout=subprocess.PIPE,
        cwd=PROJECT,
    ) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(dice.randrange(1, 60))]
        for _ in range(dice.randrange(20000)):
            pass  # a moment that is no boundary of anything
        writer.kill()
        lines += writer.stdout.readlines()
    assert lines[0].startswith(b"begin"), "the writer did not start"
    return [line.decode().split() for line in lines if line.endswith(b"\n")]


class Model:
    """The bytes that must be there, and for writes under way those that may be there instead."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)

    def check(self, actual: bytes, said: list[list[str]], side: str) -> None:
        acknowledged = {words[1] for words in said if words[0] == "end"}
        maybe: dict[int, set[int]] = {}
        for words in said:
            if words[0] != "begin" or words[2] != side:
                continue
            offset, length, stamp = map(int, words[3:])
            if words[1] in acknowledged:
                self.content[offset : offset + length] = bytes([stamp]) * length
                for at in range(offset, offset + length):
                    maybe.pop(at, None)
            else:
                for at in range(offset, offset + length):
                    maybe.setdefault(at, set()).add(stamp)
        for at, values in maybe.items():
            if actual[at] in values:
                self.content[at] = actual[at]
        assert actual == self.content


@pytest.mark.parametrize("durable", [False, True])
def test_chain_survives_kills_in_the_middle_of_writes(tmp_path: Path, durable: bool) -> None:
    old = bytes(n * 31 % 251 + 1 for n in range(LENGTH))
    (tmp_path / "disk").write_bytes(old)
    sec, top = Model(old), Model(old)
    for seed in random.Random(0).sample(range(1 << 30), 10):
        said = killed_run(tmp_path, seed, durable)
        assert not [words for words in said if words[0] == "failed"]
        disk = File(str(tmp_path / "disk"))
        hidden = Overlay("hidden", tmp_path / "hidden", disk)
        active = Overlay("active", tmp_path / "active", hidden)
        sec.check(bytes(disk.fetch(0, LENGTH)), said, "sec")
        top.check(bytes(active.fetch(0, LENGTH)), said, "top")
        active.close()
