"""A process that writes to the secondary's chain until it is killed. It says what it begins and what has ended.

Run as `python -m tests.property.killed_writer FOLDER SEED DURABLE`. Lines on
standard output, unbuffered: "begin NUMBER SIDE OFFSET LENGTH STAMP" before a
write, "end NUMBER" once it was acknowledged. A stamp of 0 is a zeroing.
"""

from __future__ import annotations

import os
import random
import sys
from functools import partial
from pathlib import Path

from tcmu_replication.block.copy_before_write import CopyBeforeWrite
from tcmu_replication.block.file import File
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import Pending

LENGTH = 40 * 4096 + 700


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def ended(number: int, pending: Pending) -> None:
    say(f"end {number}" if pending.error is None else f"failed {number} {pending.error}")


def main(folder: Path, seed: int, durable: bool) -> None:
    dice = random.Random(seed)
    disk = File(str(folder / "disk"))
    make = Overlay if (folder / "hidden.map").exists() else Overlay.create
    hidden = make("hidden", folder / "hidden", disk)
    make = Overlay if (folder / "active.map").exists() else Overlay.create
    active = make("active", folder / "active", hidden)
    nodes = {"top": active, "sec": CopyBeforeWrite(disk, hidden, durable)}
    number = 0
    while True:
        for _ in range(dice.randrange(1, 8)):
            side = dice.choice(["top", "sec", "sec"])
            offset = dice.choice([dice.randrange(LENGTH), dice.randrange(LENGTH // 4096) * 4096])
            length = min(LENGTH - offset, dice.choice([1, 512, 4096, 3 * 4096, 40000]))
            stamp = dice.choice([0, *[dice.randrange(1, 256)] * 5])
            number += 1
            say(f"begin {number} {side} {offset} {length} {stamp}")
            if stamp:
                pending = nodes[side].write(offset, [memoryview(bytes([stamp]) * length)])
            else:
                pending = nodes[side].zero(offset, length)
            if pending is None:
                say(f"end {number}")
            else:
                pending.then(partial(ended, number))
        nodes["sec"].unplug()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True")
