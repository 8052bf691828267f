"""Random requests on a pair whose workers die and freeze, and whose network fails, against a model of the bytes.

Of a request whose answer never came nobody knows whether it was carried out: each of its sectors may be old or new.
All else is as the model says, on the primary always, and on both disks whenever the primary says that it is protected.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tcmu_replication.units import KiB, MiB
from tests.support.nbd import FLUSH, TRIM, WRITE, ZEROES, Nbd, Request
from tests.support.network import Network
from tests.support.processes import Pair
from tests.support.tools import PATIENCE_S

SIZE = 8 * MiB
CELLS = 64
SECTOR = 512
PATIENT = {"reconnect-delay": 14.0, "timeout": 10.0, "dead-after": 2.0}
"""Long enough , as long as may be, that what comes back in a story has missed nothing."""
HASTY = {"reconnect-delay": 0.3, "timeout": 1.5, "dead-after": 2.0}
"""So short that the primary often goes on alone."""
SEEDS = range(
    first := int(os.environ.get("TCMU_REPLICATION_SEED", "0")),
    first + int(os.environ.get("TCMU_REPLICATION_SOAK", "1")),
)
ROUNDS = int(os.environ.get("TCMU_REPLICATION_ROUNDS", "3"))


class Change:
    """A request that changes a range: what was there, and what will be."""

    def __init__(self, request: Request, before: bytes, after: bytes) -> None:
        self.request = request
        self.before = before
        self.after = after

    @property
    def answered(self) -> bool:
        return self.request.done and not self.request.error


class Story:
    """`model` is what the LUN must show, `image` the last checkpoint; `changes` are under way."""

    def __init__(self, rng: random.Random, pair: Pair, network: Network) -> None:
        self.rng, self.pair, self.network = rng, pair, network
        self.model = bytearray(SIZE)
        self.image = bytes(SIZE)
        self.changes: list[Change] = []
        self.told: list[str] = []

    # --- what happens

    def request(self, lun: Nbd, count: int) -> list[Request]:
        """Begin requests of every kind whose ranges do not overlap, and some flushes."""
        begun = []
        for cell in self.rng.sample(range(CELLS), count):
            offset = cell * SIZE // CELLS + self.rng.randrange(8) * SECTOR
            length = self.rng.choice((SECTOR, 4 * KiB, 12 * KiB, 100 * KiB))
            command = self.rng.choice((WRITE, WRITE, WRITE, ZEROES, TRIM, FLUSH))
            if command == FLUSH:
                begun.append(lun.start(FLUSH, 0, 0))
                continue
            data = self.rng.randbytes(length) if command == WRITE else b""
            begun.append(lun.start(command, offset, length, data))
            before = bytes(self.model[offset : offset + length])
            self.changes.append(Change(begun[-1], before, data or bytes(length)))
        return begun

    def round(self, misfortunes: tuple[Callable[[Story], None], ...]) -> None:
        """Requests, and something that happens while they are under way."""
        misfortune = self.rng.choice(misfortunes)
        self.told.append(misfortune.__name__)
        with Nbd(str(self.pair.alpha.socket), "disk0") as lun:
            begun = self.request(lun, self.rng.randrange(1, 20))
            time.sleep(self.rng.choice((0.0, 0.0, 0.002, 0.02)))  # so that other requests are half done
            process = self.pair.alpha.process
            misfortune(self)
            try:
                lun.finish([*begun, lun.start(FLUSH, 0, 0)] if self.pair.alpha.process is process else begun)
            except OSError:
                assert self.pair.alpha.process is not process, "a primary that lives answers"
        assert not any(request.error for request in begun if request.done), self.told

    def settled(self) -> bytes:
        """The primary's disk, when it is as the model says; which knows from then on what became of each change."""
        found = self.pair.alpha.disk.read_bytes()
        self.compare(found)
        self.model[:] = found
        self.changes.clear()
        return found

    def compare(self, found: bytes) -> None:
        """Raise AssertionError unless `found` is the model with its changes."""
        expected = bytearray(self.model)
        for change in self.changes:
            at, length = change.request.offset, change.request.length
            for sector in range(0, length, SECTOR):
                piece = slice(at + sector, at + sector + SECTOR)
                one = slice(sector, sector + SECTOR)
                if change.answered or found[piece] == change.after[one]:
                    expected[piece] = change.after[one]
        assert first_difference(found, expected) is None, self.told

    def checkpoint(self) -> None:
        self.told.append("checkpoint")
        self.pair.alpha.cli("checkpoint", "disk0")
        self.image = bytes(self.model)

    def protected(self) -> bool:
        """Once it is decided: protected, or an error that stays."""
        end = time.monotonic() + PATIENCE_S
        while True:
            status = self.pair.alpha.status()
            if status["protection"]["protected"]:
                return True
            if status["error"] is not None:
                return False
            assert time.monotonic() < end, (self.told, status)

    def fail_over(self, to: str) -> None:
        """The primary dies or freezes with requests under way, and the secondary has what it promises."""
        alpha, beta = self.pair.alpha, self.pair.beta
        self.told.append(f"failover to {to}")
        with Nbd(str(alpha.socket), "disk0") as lun:
            self.request(lun, 10)
            frozen = self.rng.random() < 0.5
            if frozen:
                alpha.pause()
            else:
                alpha.kill()
            beta.cli("failover", "disk0", "--to", to, "--fenced", "--wait")
            if to == "latest":
                self.compare(beta.disk.read_bytes())
            else:
                assert first_difference(beta.disk.read_bytes(), self.image) is None, self.told
            if frozen:
                alpha.resume()
                wait_until(lambda: "was promoted" in (alpha.status()["not-ready"] or ""), self.told)


def first_difference(one: bytes, other: bytes | bytearray) -> int | None:
    """The first sector that differs."""
    if one == other:
        return None
    return next(at for at in range(0, SIZE, SECTOR) if one[at : at + SECTOR] != other[at : at + SECTOR])


def wait_until(found: Callable[[], object], what: object) -> None:
    end = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < end, what
        time.sleep(0.05)


# --- misfortunes


def nothing(story: Story) -> None:
    pass


def secondary_dies(story: Story) -> None:
    story.pair.beta.kill()
    story.pair.beta.start()


def secondary_ends(story: Story) -> None:
    story.pair.beta.stop()
    story.pair.beta.start()


def secondary_freezes(story: Story) -> None:
    story.pair.beta.pause()
    time.sleep(story.rng.choice((0.0, 0.2, 2.5)))
    story.pair.beta.resume()


def primary_dies(story: Story) -> None:
    story.pair.alpha.kill()
    story.pair.alpha.start()


def primary_ends(story: Story) -> None:
    story.pair.alpha.stop()
    story.pair.alpha.start()


def primary_freezes(story: Story) -> None:
    story.pair.alpha.pause()
    time.sleep(story.rng.choice((0.0, 0.2, 2.5)))
    story.pair.alpha.resume()


def both_die_and_then_the_primary(story: Story) -> None:
    for worker in story.rng.sample((story.pair.alpha, story.pair.beta), 2):
        worker.kill()
    story.pair.alpha.start()
    if story.rng.random() < 0.5:
        story.pair.beta.start()
        story.pair.alpha.kill()
        story.pair.alpha.start()
    else:
        story.pair.alpha.kill()
        story.pair.beta.start()
        story.pair.alpha.start()


def link_is_cut(story: Story) -> None:
    story.network.cut()
    time.sleep(story.rng.choice((0.0, 0.2, 2.5)))
    story.network.mend()


def link_swallows(story: Story) -> None:
    story.network.hold()
    time.sleep(story.rng.choice((0.0, 0.2, 2.5)))
    story.network.mend()


def primary_dies_cut_off(story: Story) -> None:
    story.network.cut()
    story.pair.alpha.kill()
    story.pair.alpha.start()
    story.pair.alpha.kill()
    story.network.mend()
    story.pair.alpha.start()


SHORT = (
    nothing,
    secondary_dies,
    secondary_ends,
    secondary_freezes,
    primary_dies,
    primary_ends,
    primary_freezes,
    both_die_and_then_the_primary,
    link_is_cut,
    link_swallows,
    primary_dies_cut_off,
)


@pytest.mark.parametrize("seed", SEEDS)
def test_pair_is_equal_when_it_is_quiet_whoever_failed(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with Pair(tmp_path, size=SIZE, link=PATIENT, relayed=True) as pair, Network(pair.relayed) as network:
        pair.replicate()
        story = Story(rng, pair, network)
        for _ in range(ROUNDS):
            story.round(SHORT)
            assert story.protected(), (story.told, pair.alpha.status()["error"])
            assert first_difference(pair.beta.disk.read_bytes(), story.settled()) is None, story.told
            if rng.random() < 0.4:
                story.checkpoint()
        story.fail_over(rng.choice(("latest", "checkpoint")))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_secondary_missed_is_known_and_refused(tmp_path: Path, seed: int) -> None:
    rng = random.Random(f"gap {seed}")
    with Pair(tmp_path, size=SIZE, link=HASTY, relayed=True) as pair, Network(pair.relayed) as network:
        pair.replicate()
        story = Story(rng, pair, network)
        for _ in range(ROUNDS):
            story.round(SHORT)
            protected = story.protected()
            found = story.settled()
            if protected:
                assert first_difference(pair.beta.disk.read_bytes(), found) is None, story.told
                if rng.random() < 0.4:
                    try:
                        story.checkpoint()
                    except AssertionError:
                        if story.protected():
                            raise
                continue
            story.told.append("missed")
            wait_until(lambda: pair.beta.status()["error"], (story.told, "the secondary was told"))
            assert not pair.beta.status()["protection"]["protected"]
            assert pair.alpha.cli("checkpoint", "disk0", check=False).returncode != 0
            if rng.random() < 0.4:
                refused(story)
                return
            if rng.random() < 0.5:
                (primary_dies if rng.random() < 0.5 else secondary_dies)(story)
                assert not story.protected()
            copy(story)
        if story.protected():
            story.fail_over(rng.choice(("latest", "checkpoint")))


@pytest.mark.parametrize("seed", SEEDS)
def test_pair_heals_whoever_failed_and_how_often(tmp_path: Path, seed: int) -> None:
    rng = random.Random(f"heal {seed}")
    with (
        Pair(tmp_path, size=SIZE, link=HASTY, relayed=True, resync="automatic") as pair,
        Network(pair.relayed) as network,
    ):
        pair.replicate()
        story = Story(rng, pair, network)
        for _ in range(ROUNDS):
            for _ in range(rng.choice((1, 1, 2, 3))):  # the next one may find a resync under way
                story.round(SHORT)
            wait_until(
                lambda: all(worker.status()["protection"]["protected"] for worker in (pair.alpha, pair.beta)),
                (story.told, "healed"),
            )
            assert first_difference(pair.beta.disk.read_bytes(), story.settled()) is None, story.told
        story.fail_over("latest")


def refused(story: Story) -> None:
    """The latest is not there, and the secondary says so; the checkpoint is."""
    alpha, beta = story.pair.alpha, story.pair.beta
    alpha.kill()
    if story.rng.random() < 0.5:
        secondary_ends(story)
    assert beta.cli("failover", "disk0", "--to", "latest", "--fenced", check=False).returncode == 3
    beta.cli("failover", "disk0", "--to", "checkpoint", "--fenced", "--wait")
    assert first_difference(beta.disk.read_bytes(), story.image) is None, story.told


def copy(story: Story) -> None:
    """As the texts say."""
    story.told.append("copied")
    alpha, beta = story.pair.alpha, story.pair.beta
    alpha.cli("stop", "disk0")
    beta.cli("stop", "disk0")
    beta.disk.write_bytes(alpha.disk.read_bytes())
    beta.cli("start", "disk0")
    alpha.cli("start", "disk0", "--wait")
    story.image = bytes(story.model)
