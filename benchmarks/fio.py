"""fio as the client of both sides: one job over NBD, its figures."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import machine
from tcmu_replication.units import MiB


class Load(NamedTuple):
    """A job: `rw` is fio's, `span` and `total` are bytes: where it works, and how much."""

    rw: str
    block: int
    depth: int
    span: int
    total: int
    seed: int = 1


class Figures(NamedTuple):
    """What came of it."""

    iops: float
    mib_s: float
    cpu_us: float


def run(uri: str, load: Load, pids: Sequence[int], start: int = 0) -> Figures:
    """Run the job against `uri`, from byte `start` on; `pids` are the servers whose CPU time counts."""
    before = machine.cpu_of(pids)
    said = subprocess.run(
        [
            "fio", "--name=bench", "--output-format=json", "--ioengine=nbd", f"--uri={uri}", "--thread",
            f"--rw={load.rw}", f"--bs={load.block}", f"--iodepth={load.depth}", f"--size={load.span - start}",
            f"--offset={start}",            f"--io_size={load.total}", f"--randseed={load.seed}", "--allrandrepeat=1",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    used = machine.cpu_of(pids) - before
    if said.returncode:
        raise RuntimeError(f"fio failed on {uri}: {said.stdout[-500:]} {said.stderr[-500:]}")
    job = json.loads(said.stdout[said.stdout.index("{") :])["jobs"][0]
    ended = job["read" if "read" in load.rw else "write"]
    return Figures(
        ended["iops"], ended["bw_bytes"] / MiB, 1e6 * used / max(ended["total_ios"], 1)
    )
