"""A pair heals by itself: after an outage of the link, and after the end of either host, nobody copies a disk."""

import random

import pytest

from tcmu_replication.units import MiB
from tests.support.processes import Pair
from tests.support.tools import requires, until
from tests.system.test_silent_loss import promoted

pytestmark = requires("qemu-io")

SIZE = 64 * MiB
LINK = {"reconnect-delay": 0.5, "timeout": 3.0, "dead-after": 2.0}


@pytest.fixture
def pair(tmp_path):
    with Pair(tmp_path, size=SIZE, link=LINK, resync="automatic") as pair:
        yield pair


def protected(pair):
    until(lambda: pair.alpha.status()["protection"]["protected"], "the primary says protected")
    until(lambda: pair.beta.status()["protection"]["protected"], "the secondary says protected")


def test_writes_that_the_secondary_missed_are_sent_when_it_is_back(pair):
    pair.replicate()
    pair.alpha.io("write -P 0x11 0 4M")
    pair.alpha.cli("checkpoint", "disk0")
    epoch = pair.beta.status()["epoch"]
    pair.beta.pause()
    pair.alpha.io("write -P 0x22 1M 1M", "write -P 0x23 8M 4k", "write -P 0x24 63M 1M", "flush")
    assert not pair.alpha.status()["protection"]["protected"]
    pair.beta.resume()
    protected(pair)
    pair.alpha.io("write -P 0x33 2M 1M")
    assert pair.equal
    assert pair.alpha.status()["out-of-sync-bytes"] == 0
    assert pair.beta.status()["epoch"] == epoch + 2, "the state at the gap, and the one behind the resync"
    pair.alpha.kill()
    pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced", "--wait")
    pair.beta.io("read -P 0x22 1M 1M", "read -P 0x33 2M 1M", "read -P 0x24 63M 1M")


def test_secondary_is_refused_the_latest_and_given_the_checkpoint_while_it_is_made_whole(pair):
    pair.replicate()
    pair.alpha.io("write -P 0x11 0 1M")
    pair.beta.pause()
    pair.alpha.io("write -P 0x22 0 1M", "flush")
    pair.alpha.kill()
    pair.beta.resume()
    pair.alpha.set("resync", "manual")
    pair.alpha.start()
    until(lambda: pair.beta.status()["outdated-since"], "beta was told")
    pair.alpha.kill()
    assert pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced", check=False).returncode == 3
    pair.alpha.start()
    pair.alpha.cli("resync", "disk0")
    protected(pair)
    assert pair.equal


@pytest.mark.parametrize("victim", ["alpha", "beta"])
def test_resync_goes_on_after_the_death_of_either_worker(pair, victim):
    pair.replicate()
    pair.alpha.cli("resync", "disk0", "--limit", "8M")  # so that it is under way when somebody dies
    pair.beta.pause()
    pair.alpha.io("write -P 0x22 0 48M", "flush")
    pair.beta.resume()
    until(lambda: pair.beta.status()["protection"]["words"].startswith("alpha sends"), "the resync has begun")
    worker = getattr(pair, victim)
    worker.kill()
    worker.start()
    protected(pair)
    assert pair.equal


def test_writes_during_a_resync_are_on_both_hosts(pair):
    pair.replicate()
    pair.beta.pause()
    pair.alpha.io("write -P 0x22 0 32M", "flush")
    pair.beta.resume()
    for turn in range(8):
        pair.alpha.io(f"write -P {0x30 + turn:#x} {turn * 3}M 4M", f"write -P 0x44 {turn * 5}k 512")
    protected(pair)
    assert pair.equal


def test_new_secondary_is_made_equal_on_the_operators_word_alone(pair):
    until(lambda: pair.alpha.status()["not-ready"] is None, "beta has said that it knows of no pair")
    pair.alpha.io("write -P 0x11 32M 8M", "write -P 0x12 0 4k")
    pair.beta.disk.write_bytes(b"old data" + random.randbytes(SIZE - 8))
    pair.beta.cli("start", "disk0")
    refused = pair.alpha.cli("start", "disk0", check=False)
    assert "--sync-from" in refused.stderr
    assert pair.beta.disk.read_bytes()[:8] == b"old data"
    wrong = pair.alpha.cli("start", "disk0", "--sync-from", "beta", check=False)
    assert wrong.returncode == 2
    pair.alpha.cli("start", "disk0", "--sync-from", "alpha")
    protected(pair)
    assert pair.equal


def test_disks_that_start_found_to_differ_are_not_made_equal_unasked(pair):
    until(lambda: pair.alpha.status()["not-ready"] is None, "beta has said that it knows of no pair")
    pair.alpha.io("write -P 0x11 32M 4k")
    pair.beta.cli("start", "disk0")
    assert pair.alpha.cli("start", "disk0", "--wait", check=False).returncode == 1
    told = pair.alpha.status()["protection"]
    assert "resync disk0` here makes beta equal" in told["advice"]
    pair.alpha.cli("resync", "disk0")
    protected(pair)
    assert pair.equal


def test_promoted_host_goes_on_as_the_primary_as_the_texts_say(pair):
    """docs/status.md, After a failover."""
    promoted(pair)
    for worker in (pair.alpha, pair.beta):
        worker.stop()
        worker.exchange_roles()
    for worker in (pair.alpha, pair.beta):
        worker.start()
    pair.beta.io("write -P 0x33 2M 1M", "flush")
    pair.alpha.cli("start", "disk0")
    pair.beta.cli("start", "disk0", "--sync-from", "beta")
    protected(pair)
    pair.beta.io("read -P 0x11 0 1M", "read -P 0x22 1M 1M", "write -P 0x44 3M 1M")
    assert pair.equal


def test_resync_that_nothing_needs_is_refused(pair):
    pair.replicate()
    assert "misses nothing" in pair.alpha.cli("resync", "disk0", check=False).stderr
    assert pair.beta.cli("resync", "disk0", check=False).returncode == 3
