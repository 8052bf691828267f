"""The measurements, by group: each runs one side once and yields its samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from benchmarks import images, limits, loads, machine, pauses, resync, sides
from benchmarks.loads import Figures, Load
from benchmarks.rows import Sample
from benchmarks.scale import Scale
from benchmarks.turn import Turn
from tcmu_replication.units import GiB, KiB, MiB, TiB
from tests.support.nbd import Nbd

SMALL, LARGE = 4 * KiB, MiB
DEPTH_SMALL, DEPTH_LARGE = 32, 8
EPOCHS_BEFORE = 2
"""How many epochs of the same work go before the measured one, so that it finds what replication that goes on finds."""
PAUSES = 7
"""How often the pause is measured after few and after many changes, in turns."""


def forwarded(turn: Turn) -> Iterator[Sample]:
    """Forwarded writes over TCP: what the copy-before-write costs. The same seed writes the same blocks."""
    scale = turn.scale
    random, large = _random(turn), Load("write", LARGE, DEPTH_LARGE, scale.disk, scale.sequential)
    with sides.SECONDARY[turn.side](turn.directory, scale.disk, tcp=True) as host:

        def touch(load: Load, client: loads.Client) -> Figures:
            with turn.warm(load):
                return client(host.forwarded, load, host.pids)

        _epochs_before(host, lambda: touch(random, loads.lean))
        for row in ("forwarded-4k-first", "forwarded-4k-saved"):
            found = touch(random, loads.lean)
            yield Sample(row, turn.side, found.iops, found.cpu_us)
        host.checkpoint()
        _epochs_before(host, lambda: touch(large, loads.fio))
        found = touch(large, loads.fio)
        yield Sample("forwarded-1m-first", turn.side, found.mib_s, found.cpu_us)


def lun(turn: Turn) -> Iterator[Sample]:
    """The secondary's own LUN over a unix socket, after forwarded writes: blocks are in every layer."""
    scale = turn.scale
    random, large = _random(turn), Load("write", LARGE, DEPTH_LARGE, scale.disk, scale.sequential)
    with sides.SECONDARY[turn.side](turn.directory, scale.disk, tcp=False) as host:

        def small() -> Figures:
            with turn.warm(random):
                loads.fio(host.forwarded, random._replace(seed=1000 + turn.number), host.pids)
            with turn.warm(random):
                return loads.lean(host.lun, random, host.pids)

        def long() -> Figures:
            with turn.warm(large):
                return loads.fio(host.lun, large, host.pids)

        _epochs_before(host, small)
        found = small()
        yield Sample("lun-4k-write", turn.side, found.iops, found.cpu_us)
        found = loads.lean(host.lun, random._replace(rw="randread", seed=2000 + turn.number), host.pids)
        yield Sample("lun-4k-read", turn.side, found.iops, found.cpu_us)
        host.checkpoint()
        _epochs_before(host, long)
        found = long()
        yield Sample("lun-1m-write", turn.side, found.mib_s, found.cpu_us)
        found = loads.fio(host.lun, large._replace(rw="read"), host.pids)
        yield Sample("lun-1m-read", turn.side, found.mib_s, found.cpu_us)


def pause(turn: Turn) -> Iterator[Sample]:
    """A checkpoint after many forwarded changes, with forwarded writes going on."""
    scale = turn.scale
    with sides.SECONDARY[turn.side](turn.directory, scale.disk, tcp=True) as host:
        _change(turn, host, scale.changes, scale.disk)
        yield from _pause("pause", host, scale.disk)


def failover(turn: Turn) -> Iterator[Sample]:
    """From the command to the first accepted write, and the commit behind it. Half of it lies in each overlay."""
    scale = turn.scale
    with sides.SECONDARY[turn.side](turn.directory, scale.disk, tcp=False) as host:
        _change(turn, host, scale.half, scale.disk)
        behind = Load("write", LARGE, DEPTH_LARGE, scale.disk, scale.half)
        with turn.warm(behind):
            loads.fio(host.lun, behind, host.pids, scale.half)
        with Nbd(*host.lun_address) as client:
            before = machine.cpu_of(host.pids)
            began = time.monotonic()
            host.failover()
            client.write(scale.disk - SMALL, b"x" * SMALL)
            yield Sample("failover", turn.side, 1000 * (time.monotonic() - began))
            host.wait_committed()
            took = time.monotonic() - began
            used = machine.cpu_of(host.pids) - before
        copied = 2 * scale.half / MiB
        yield Sample("commit", turn.side, copied / took, 1e6 * used / copied)


def primary(turn: Turn) -> Iterator[Sample]:
    """The primary's LUN, with a secondary on the same machine. CPU is that of both."""
    load = _random(turn)
    with sides.PRIMARY[turn.side](turn.directory, turn.scale.disk) as host, turn.warm(load):
        found = loads.lean(host.lun, load, host.pids)
    yield Sample("primary-4k", turn.side, found.iops, found.cpu_us)


def pause_by_changes(turn: Turn) -> Iterator[Sample]:
    """The pause after few and after many changes, in turns; the first of each is not counted."""
    scale = turn.scale
    with sides.our_secondary(turn.directory, scale.large, tcp=True) as host:
        for number in range(1 + PAUSES):
            for row, changes in (("pause-small", scale.small), ("pause-large", scale.large)):
                host.checkpoint()
                _change(turn, host, changes, scale.large)
                samples = list(_pause(row, host, scale.large))
                if number:
                    yield from samples


def durable(turn: Turn) -> Iterator[Sample]:
    """Forwarded first touches on a real file system, with durable = true and with false."""
    scale = turn.scale
    load = _random(turn)._replace(span=scale.durable_disk, total=scale.durable)
    for name, safe in (("on", True), ("off", False)):
        place = turn.directory / name
        place.mkdir()
        with (
            images.directory(turn.disks) as disks,
            sides.our_secondary(place, scale.durable_disk, tcp=True, durable=safe, disks=disks) as host,
        ):
            _epochs_before(host, lambda: loads.lean(host.forwarded, load, host.pids))
            found = loads.lean(host.forwarded, load, host.pids)
        yield Sample(f"durable-{name}", turn.side, found.iops, found.cpu_us)
    with images.directory(turn.disks) as disks:
        for name, per_s in limits.synced(disks, scale.durable_disk, scale.durable, DEPTH_SMALL).items():
            yield Sample(f"durable-{name}", limits.SIDE, per_s)


def start(turn: Turn) -> Iterator[Sample]:
    """A worker that takes up a running secondary: until it answers commands."""
    for name, length in (("small", GiB), ("large", 16 * TiB)):
        place = turn.directory / name
        place.mkdir()
        images.sparse(place / "beta.img", length)
        pair = sides.OurPair(place, length, True)
        first = sides.Ours(pair, "beta")
        try:
            first.start()
            _change(turn, first, 16 * MiB, GiB)
        finally:
            first.close()
        again = sides.Ours(pair, "beta")
        try:
            yield Sample(f"start-{name}", turn.side, 1000 * again.started_s)
            yield Sample(f"memory-{name}", turn.side, machine.peak_memory_mib(again.pids[0]))
        finally:
            again.close()


def _random(turn: Turn) -> Load:
    scale = turn.scale
    return Load("randwrite", SMALL, DEPTH_SMALL, scale.disk, scale.random, seed=turn.number + 1)


def _epochs_before(host, work: Callable[[], Figures]) -> None:
    """Do the work in earlier epochs: replication that makes checkpoints is always in the state that this leaves."""
    for _ in range(EPOCHS_BEFORE):
        work()
        host.checkpoint()


def _pause(row: str, host, span: int) -> Iterator[Sample]:
    found = pauses.measure(host, span)
    yield Sample(row, host.side, found.pause_ms)
    yield Sample(row, f"{host.side}, no checkpoint", found.idle_ms)


def _change(turn: Turn, host, length: int, span: int) -> None:
    """Forward `length` bytes of writes from the disk's beginning on."""
    load = Load("write", LARGE, DEPTH_LARGE, span, length)
    with turn.warm(load):
        loads.fio(host.forwarded, load, host.pids)


Group = Callable[[Turn], Iterator[Sample]]

COMPARED: dict[str, Group] = {
    "forwarded": forwarded, "lun": lun, "pause": pause, "failover": failover, "primary": primary,
    "resync": resync.measure,
}  # fmt: skip
"""Groups that both sides run, alternating."""

OURS: dict[str, tuple[Group, Callable[[Scale], int]]] = {
    "pause-by-changes": (pause_by_changes, lambda scale: 1),
    "durable": (durable, lambda scale: min(scale.rounds, 3)),
    "start": (start, lambda scale: scale.starts),
}
"""Groups that only ours runs, and how often."""
