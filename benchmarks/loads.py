"""The clients, the same for both sides: fio over NBD, and our own where fio would be what is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import machine
from tcmu_replication.units import MiB

ROOT = Path(__file__).parents[1]


class Load(NamedTuple):
    """A job: `rw` is fio's, `span` and `total` are bytes: where it works, and how much."""

    rw: str
    block: int
    depth: int
    span: int
    total: int
    seed: int = 1


class Figures(NamedTuple):
    """What came of it; `cpu_us` is the servers' CPU time per request."""

    iops: float
    mib_s: float
    cpu_us: float


def fio(uri: str, load: Load, pids: Sequence[int], start: int = 0) -> Figures:
    """fio, from byte `start` on; `pids` are the servers whose CPU time counts."""
    before = machine.cpu_of(pids)
    said = _run(
        "fio", "--name=bench", "--output-format=json", "--ioengine=nbd", f"--uri={uri}", "--thread",
        f"--rw={load.rw}", f"--bs={load.block}", f"--iodepth={load.depth}", f"--size={load.span - start}",
        f"--offset={start}", f"--io_size={load.total}", f"--randseed={load.seed}", "--allrandrepeat=1",
    )  # fmt: skip
    used = machine.cpu_of(pids) - before
    job = json.loads(said[said.index("{") :])["jobs"][0]
    ended = job["read" if "read" in load.rw else "write"]
    return Figures(ended["iops"], ended["bw_bytes"] / MiB, 1e6 * used / max(ended["total_ios"], 1))


def lean(uri: str, load: Load, pids: Sequence[int]) -> Figures:
    """`benchmarks.client`, for random reads and writes of small blocks."""
    count = load.total // load.block
    before = machine.cpu_of(pids)
    said = _run(
        sys.executable, "-m", "benchmarks.client", uri, load.rw.removeprefix("rand"),
        *map(str, (load.block, load.depth, count, load.span, load.seed)),
    )  # fmt: skip
    used = machine.cpu_of(pids) - before
    iops = count / float(said)
    return Figures(iops, iops * load.block / MiB, 1e6 * used / count)


Client = Callable[[str, Load, Sequence[int]], Figures]


def _run(*command: str) -> str:
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if said.returncode:
        raise RuntimeError(f"{command} failed: {said.stdout[-500:]} {said.stderr[-500:]}")
    return said.stdout
