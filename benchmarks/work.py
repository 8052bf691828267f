"""The measurements, by group: each runs one side once and yields its samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import images, loads, machine, pauses, sides
from benchmarks.loads import Load
from benchmarks.rows import Sample
from benchmarks.scale import Scale
from tcmu_replication.units import GiB, KiB, MiB, TiB
from tests.support.nbd import Nbd

SMALL, LARGE = 4 * KiB, MiB
DEPTH_SMALL, DEPTH_LARGE = 32, 8


def forwarded(side: str, directory: Path, scale: Scale, turn: int) -> Iterator[Sample]:
    """Forwarded writes over TCP: what the copy-before-write costs. The same seed writes the same blocks."""
    random = Load("randwrite", SMALL, DEPTH_SMALL, scale.disk, scale.random, seed=turn + 1)
    with sides.SECONDARY[side](directory, scale.disk, tcp=True) as host:
        for row in ("forwarded-4k-first", "forwarded-4k-saved"):
            found = loads.lean(host.forwarded, random, host.pids)
            yield Sample(row, side, found.iops, found.cpu_us)
        host.checkpoint()
        found = loads.fio(
            host.forwarded, Load("write", LARGE, DEPTH_LARGE, scale.disk, scale.sequential), host.pids
        )
        yield Sample("forwarded-1m-first", side, found.mib_s, found.cpu_us)


def lun(side: str, directory: Path, scale: Scale, turn: int) -> Iterator[Sample]:
    """The secondary's own LUN over a unix socket, after forwarded writes: blocks are in every layer."""
    random = Load("randwrite", SMALL, DEPTH_SMALL, scale.disk, scale.random, seed=turn + 1)
    large = Load("write", LARGE, DEPTH_LARGE, scale.disk, scale.sequential)
    with sides.SECONDARY[side](directory, scale.disk, tcp=False) as host:
        loads.fio(host.forwarded, random._replace(seed=1000 + turn), host.pids)
        found = loads.lean(host.lun, random, host.pids)
        yield Sample("lun-4k-write", side, found.iops, found.cpu_us)
        found = loads.lean(host.lun, random._replace(rw="randread", seed=2000 + turn), host.pids)
        yield Sample("lun-4k-read", side, found.iops, found.cpu_us)
        host.checkpoint()
        found = loads.fio(host.lun, large, host.pids)
        yield Sample("lun-1m-write", side, found.mib_s, found.cpu_us)
        found = loads.fio(host.lun, large._replace(rw="read"), host.pids)
        yield Sample("lun-1m-read", side, found.mib_s, found.cpu_us)


def pause(side: str, directory: Path, scale: Scale, turn: int) -> Iterator[Sample]:
    """A checkpoint after many forwarded changes, with forwarded writes going on."""
    with sides.SECONDARY[side](directory, scale.disk, tcp=True) as host:
        _change(host, scale.changes, scale.disk)
        yield Sample("pause", side, pauses.measure(host, scale.disk))


def failover(side: str, directory: Path, scale: Scale, turn: int) -> Iterator[Sample]:
    """From the command to the first accepted write, and the commit behind it. Half of it lies in each overlay."""
    with sides.SECONDARY[side](directory, scale.disk, tcp=False) as host:
        _change(host, scale.half, scale.disk)
        loads.fio(host.lun, Load("write", LARGE, DEPTH_LARGE, scale.disk, scale.half), host.pids, scale.half)
        with Nbd(*host.lun_address) as client:
            before = machine.cpu_of(host.pids)
            began = time.monotonic()
            host.failover()
            client.write(scale.disk - SMALL, bytes(SMALL))
            yield Sample("failover", side, 1000 * (time.monotonic() - began))
            host.wait_committed()
            took = time.monotonic() - began
            used = machine.cpu_of(host.pids) - before
        copied = 2 * scale.half / MiB
        yield Sample("commit", side, copied / took, 1e6 * used / copied)


def primary(side: str, directory: Path, scale: Scale, turn: int) -> Iterator[Sample]:
    """The primary's LUN, with a secondary on the same machine. CPU is that of both."""
    random = Load("randwrite", SMALL, DEPTH_SMALL, scale.disk, scale.random, seed=turn + 1)
    with sides.PRIMARY[side](directory, scale.disk) as host:
        found = loads.lean(host.lun, random, host.pids)
        yield Sample("primary-4k", side, found.iops, found.cpu_us)


def pause_by_changes(side: str, directory: Path, scale: Scale, turn: int) -> Iterator[Sample]:
    """The pause after few and after many changes."""
    with sides.our_secondary(directory, scale.large, tcp=True) as host:
        for row, changes in (("pause-small", scale.small), ("pause-large", scale.large)):
            host.checkpoint()
            _change(host, changes, scale.large)
            yield Sample(row, side, pauses.measure(host, scale.large))


def start(side: str, directory: Path, scale: Scale, turn: int) -> Iterator[Sample]:
    """A worker that takes up a running secondary: until it answers commands."""
    for name, length in (("small", GiB), ("large", 16 * TiB)):
        place = directory / name
        place.mkdir()
        images.sparse(place / "beta.img", length)
        pair = sides.OurPair(place, length, True)
        first = sides.Ours(pair, "beta")
        try:
            first.start()
            _change(first, 16 * MiB, GiB)
        finally:
            first.close()
        again = sides.Ours(pair, "beta")
        try:
            yield Sample(f"start-{name}", side, 1000 * again.started_s)
            yield Sample(f"memory-{name}", side, machine.peak_memory_mib(again.pids[0]))
        finally:
            again.close()


def _change(host, length: int, span: int) -> None:
    """Forward `length` bytes of writes from the disk's beginning on."""
    loads.fio(host.forwarded, Load("write", LARGE, DEPTH_LARGE, span, length), host.pids)


Group = Callable[[str, Path, Scale, int], Iterator[Sample]]

COMPARED: dict[str, Group] = {
    "forwarded": forwarded, "lun": lun, "pause": pause, "failover": failover, "primary": primary,
}  # fmt: skip
"""Groups that both sides run, alternating."""

OURS: dict[str, tuple[Group, Callable[[Scale], int]]] = {
    "pause-by-changes": (pause_by_changes, lambda scale: min(scale.rounds, 3)),
    "start": (start, lambda scale: scale.starts),
}
"""Groups that only ours runs, and how often."""
