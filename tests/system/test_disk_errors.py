"""Disks, overlays and records that fail: what both hosts know of it, and what they refuse (D1, D2, D4, D5, D12).

Two real workers whose system calls fail on cue.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tcmu_replication.cli import exits
from tcmu_replication.units import MiB
from tests.support.faulty import break_medium, install
from tests.support.processes import Pair, Worker
from tests.support.tools import requires, until

pytestmark = requires("qemu-io")

SIZE = 64 * MiB
LINK: dict[str, object] = {"reconnect-delay": 0.5, "timeout": 3.0, "dead-after": 2.0}
ENDS: list[Callable[[Worker], None]] = [Worker.stop, Worker.kill]


def breakable(folder: Path, **resource: object) -> Pair:
    """A pair, not running yet, each of whose media can be broken."""
    pair = Pair(folder, size=SIZE, link=LINK, **resource)
    install(pair.alpha)
    install(pair.beta)
    return pair


def replicate(pair: Pair) -> None:
    """From here on both disks are known to be equal, on both hosts."""
    pair.replicate()
    for worker in (pair.alpha, pair.beta):
        until(lambda worker=worker: protected(worker), f"{worker.host} is protected")


def protected(worker: Worker) -> bool:
    return worker.status()["protection"]["protected"]


def level(worker: Worker) -> str:
    return worker.status()["protection"]["level"]


def first(worker: Worker) -> int:
    """The disk's first byte, past the worker."""
    with open(worker.disk, "rb") as disk:
        return disk.read(1)[0]


# --- D1: the primary's disk fails, and the secondary goes on in its stead


def detach(pair: Pair, how: str) -> None:
    """The primary's disk fails when its LUN is asked for something; it is back at once, without what came then."""
    pair.alpha.io("write -P 0x11 0 1M", "flush")
    break_medium(pair.alpha, f"{how} disk.img EIO")
    pair.alpha.io({"read": "read -P 0x11 0 64k", "write": "write -P 0x22 0 64k", "sync": "flush"}[how])
    pair.alpha.io("write -P 0x22 0 1M", "flush")
    break_medium(pair.alpha)
    assert first(pair.alpha) == 0x11
    assert first(pair.beta) == 0x22


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("how", ["read", "write", "sync"])
def test_d1_disk_that_failed_is_never_served_again_whatever_becomes_of_the_worker(
    tmp_path: Path, how: str, end: Callable[[Worker], None]
) -> None:
    with breakable(tmp_path, on_local_error="detach") as pair:
        replicate(pair)
        detach(pair, how)
        for byte in (0x33, 0x44):
            end(pair.alpha)
            pair.alpha.start()
            pair.alpha.io("read -P 0x22 0 1M", f"write -P {byte} 2M 64k", "flush", f"read -P {byte} 2M 64k")
            assert level(pair.alpha) == "failed"
            assert "the disk of alpha has failed" in pair.alpha.status()["protection"]["words"]
        pair.alpha.cli("checkpoint", "disk0")
        assert first(pair.alpha) == 0x11
        assert "the secondary serves" in pair.alpha.cli("stop", "disk0", check=False).stderr


def test_d1_link_that_was_down_serves_a_primary_without_a_disk_again(tmp_path: Path) -> None:
    """The secondary was called outdated by it, though it alone had everything."""
    with breakable(tmp_path, on_local_error="detach") as pair:
        replicate(pair)
        detach(pair, "write")
        pair.beta.pause()
        assert "write failed" in pair.alpha.io("write -P 0x33 0 1M", check=False).stdout
        pair.beta.resume()
        until(lambda: "failed" not in pair.alpha.io("read 0 64k", check=False).stdout, "the link is back")
        pair.alpha.io("write -P 0x44 0 1M", "flush", "read -P 0x44 0 1M")
        pair.alpha.kill()
        pair.alpha.start()
        pair.alpha.io("read -P 0x44 0 1M")
        assert pair.beta.status()["outdated-since"] is None
        pair.alpha.kill()
        pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced")
        pair.beta.io("read -P 0x44 0 1M")


@pytest.mark.parametrize("restarted", [True, False], ids=["restarted", "not restarted"])
def test_d1_disk_serves_again_once_it_was_made_whole(tmp_path: Path, restarted: bool) -> None:
    with breakable(tmp_path, on_local_error="detach") as pair:
        replicate(pair)
        detach(pair, "write")
        pair.beta.cli("failover", "disk0", "--to", "latest", "--force")
        pair.beta.io("read -P 0x22 0 1M")
        until(lambda: "was promoted" in (pair.alpha.status()["not-ready"] or ""), "alpha has heard of it")
        if restarted:
            pair.alpha.kill()
            pair.alpha.start()
        pair.beta.cli("start", "disk0")
        refused = pair.alpha.cli("start", "disk0", "--force", "--assume-clean", check=False)
        assert refused.returncode == exits.FAILED
        assert "older than the secondary's" in refused.stderr
        pair.alpha.disk.write_bytes(pair.beta.disk.read_bytes())
        pair.alpha.cli("start", "disk0", "--force", "--wait")
        until(lambda: protected(pair.alpha), "protected again")
        pair.alpha.io("read -P 0x22 0 1M", "write -P 0x55 0 1M", "flush")
        assert first(pair.alpha) == 0x55
        assert pair.equal
        pair.alpha.kill()
        pair.alpha.start()
        pair.alpha.io("read -P 0x55 0 1M")


# --- D2: what cannot be written down


RECORD = "open overlays/manifest EROFS"
MAP = "write out-of-sync.map EIO"


@pytest.mark.parametrize("end", ENDS)
def test_d2_write_that_would_be_on_one_side_is_not_acknowledged_without_a_record(
    tmp_path: Path, end: Callable[[Worker], None]
) -> None:
    with breakable(tmp_path) as pair:
        replicate(pair)
        pair.beta.pause()
        break_medium(pair.alpha, RECORD, MAP)
        for _ in range(2):
            assert "write failed" in pair.alpha.io("write -P 0x22 0 64k", check=False).stdout
        break_medium(pair.alpha)
        end(pair.alpha)
        pair.alpha.start()
        status = pair.alpha.status()
        assert status["error"] is not None
        assert status["outdated-since"] is not None
        pair.beta.resume()
        until(lambda: pair.beta.status()["outdated-since"], "beta was told")
        assert pair.alpha.cli("checkpoint", "disk0", check=False).returncode == exits.STATE


def test_d2_record_that_can_be_written_again_lets_the_lun_go_on_alone(tmp_path: Path) -> None:
    with breakable(tmp_path) as pair:
        replicate(pair)
        pair.beta.pause()
        break_medium(pair.alpha, RECORD)
        assert "write failed" in pair.alpha.io("write -P 0x22 0 64k", check=False).stdout
        break_medium(pair.alpha)
        pair.alpha.io("write -P 0x33 0 64k", "flush", "read -P 0x33 0 64k")
        pair.alpha.stop()
        pair.alpha.start()
        assert "not forwarded" in pair.alpha.status()["error"]
        assert pair.alpha.status()["outdated-since"] is not None


@pytest.mark.parametrize("end", ENDS)
def test_d2_map_that_cannot_be_written_is_known_to_be_no_map(
    tmp_path: Path, end: Callable[[Worker], None]
) -> None:
    """The record says that the disks differ, and not where: the write is acknowledged."""
    with breakable(tmp_path) as pair:
        replicate(pair)
        pair.beta.pause()
        break_medium(pair.alpha, MAP)
        pair.alpha.io("write -P 0x22 0 64k", "flush")
        break_medium(pair.alpha)
        end(pair.alpha)
        pair.alpha.start()
        assert pair.alpha.status()["outdated-since"] is not None
        pair.beta.resume()
        until(lambda: pair.beta.status()["outdated-since"], "beta was told")
        told = pair.alpha.cli("checkpoint", "disk0", check=False)
        assert "at least" in told.stderr


# --- D12: the peer has what this disk refused


@pytest.mark.parametrize("end", ENDS)
def test_d12_write_that_the_local_disk_refused_counts_until_both_are_equal(
    tmp_path: Path, end: Callable[[Worker], None]
) -> None:
    with breakable(tmp_path) as pair:
        replicate(pair)
        pair.alpha.io("write -P 0x11 0 1M", "flush")
        break_medium(pair.alpha, "write disk.img EIO", "read disk.img EIO")
        assert "write failed" in pair.alpha.io("write -P 0x22 0 64k", check=False).stdout
        for _ in range(2):
            status = pair.alpha.status()
            assert status["out-of-sync-bytes"] == 64 * 1024
            assert not status["protection"]["protected"]
            refused = pair.alpha.cli("checkpoint", "disk0", check=False)
            assert "64 KiB are still being sent" in refused.stderr
            end(pair.alpha)
            pair.alpha.start()
        break_medium(pair.alpha)
        until(lambda: protected(pair.alpha), "the secondary has what this disk has")
        assert pair.equal
        assert first(pair.beta) == 0x11
        pair.alpha.cli("checkpoint", "disk0")


def test_d12_write_that_was_refused_and_cannot_be_marked_is_a_gap(tmp_path: Path) -> None:
    with breakable(tmp_path) as pair:
        replicate(pair)
        break_medium(pair.alpha, "write disk.img EIO", MAP)
        assert "write failed" in pair.alpha.io("write -P 0x22 0 64k", check=False).stdout
        break_medium(pair.alpha)
        pair.alpha.kill()
        pair.alpha.start()
        assert pair.alpha.status()["outdated-since"] is not None
        assert pair.alpha.cli("checkpoint", "disk0", check=False).returncode == exits.STATE


# --- D4: a sync that failed


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("what", "where"), [("disk", "disk.img"), ("overlay", "hidden.data"), ("overlay", "hidden.map")]
)
def test_d4_sync_that_failed_on_the_secondary_is_known_to_both_for_good(
    tmp_path: Path, what: str, where: str, end: Callable[[Worker], None]
) -> None:
    with breakable(tmp_path) as pair:
        replicate(pair)
        pair.alpha.io("write -P 0x11 0 1M", "flush")
        pair.alpha.cli("checkpoint", "disk0")
        break_medium(pair.beta, f"sync {where} EIO")
        pair.alpha.io("write -P 0x22 0 1M", "flush")
        until(lambda: pair.alpha.status()["outdated-since"], "alpha has heard of it")
        break_medium(pair.beta)
        for worker in (pair.beta, pair.alpha):
            end(worker)
            worker.start()
        for worker in (pair.alpha, pair.beta):
            assert worker.status()["error"] is not None
            assert not protected(worker)
        pair.alpha.kill()
        refused = pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced", check=False)
        assert refused.returncode == exits.STATE
        assert "injected into sync" in refused.stderr
        if what == "overlay":
            refused = pair.beta.cli("failover", "disk0", "--to", "checkpoint", "--fenced", check=False)
            assert refused.returncode == exits.STATE
            assert "may be damaged: an overlay could not be made durable" in refused.stderr
        else:
            pair.beta.cli("failover", "disk0", "--to", "checkpoint", "--fenced", "--wait")
            pair.beta.io("read -P 0x11 0 1M")


@pytest.mark.parametrize("end", ENDS)
def test_d4_sync_that_failed_on_the_primary_is_known_to_both_and_the_secondary_may_be_promoted(
    tmp_path: Path, end: Callable[[Worker], None]
) -> None:
    with breakable(tmp_path) as pair:
        replicate(pair)
        break_medium(pair.alpha, "sync disk.img EIO")
        assert "failed" in pair.alpha.io("write -P 0x22 0 1M", "flush", check=False).stdout
        until(lambda: level(pair.beta) == "failed", "beta was told")
        break_medium(pair.alpha)
        for worker in (pair.alpha, pair.beta):
            end(worker)
            worker.start()
        for worker in (pair.alpha, pair.beta):
            assert level(worker) == "failed"
            assert "could not make writes durable" in worker.status()["protection"]["words"]
            assert "fail over" in worker.status()["protection"]["advice"]
        pair.alpha.kill()
        pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced")
        pair.beta.io("read -P 0x22 0 1M")


# --- D5: a directory is of one disk


@pytest.mark.parametrize("host", ["alpha", "beta"])
def test_d5_directory_beside_another_disk_is_refused(tmp_path: Path, host: str) -> None:
    with breakable(tmp_path) as pair:
        replicate(pair)
        worker = getattr(pair, host)
        worker.stop()
        mine, other = worker.disk, worker.disk.with_name("other.img")
        other.write_bytes(mine.read_bytes())
        mine.rename(mine.with_name("kept.img"))
        other.rename(mine)
        told = worker.refuse_to_start()
        for words in (
            f"inode {mine.stat().st_ino}",
            "was written for the disk",
            "move the directory's files away",
        ):
            assert words in " ".join(told.split())
        mine.with_name("kept.img").rename(mine)
        worker.start()
        until(lambda: protected(worker), "it is the pair's disk again")


def test_d5_directory_that_was_emptied_is_not_served_where_the_peer_knows_the_pair(tmp_path: Path) -> None:
    with breakable(tmp_path) as pair:
        replicate(pair)
        pair.alpha.io("write -P 0x11 0 64k", "flush")
        pair.alpha.kill()
        for path in pair.alpha.overlays.iterdir():
            path.unlink()
        pair.alpha.start()
        until(
            lambda: "knows disk0 as a pair" in (pair.alpha.status()["not-ready"] or ""), "beta has answered"
        )
        assert "failed" in pair.alpha.io("read 0 64k", check=False).stdout
        assert "failed" in pair.alpha.io("write -P 0x22 0 64k", check=False).stdout
        assert first(pair.alpha) == 0x11
        assert pair.alpha.cli("start", "disk0", "--assume-clean", check=False).returncode == exits.STATE
