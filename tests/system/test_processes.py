"""A pair of real processes: the story of one resource, from the command line, without LIO."""

import json
import time

import pytest

from tcmu_replication.units import MiB
from tests.support.load import Load
from tests.support.processes import Pair
from tests.support.tools import PATIENCE_S, requires

pytestmark = requires("qemu-io", "fio")

SIZE = 64 * MiB
LINK = {"reconnect-delay": 14.0, "timeout": 10.0}
"""As long as may be: what comes back in this time is to be waited for, also on a slow machine."""
CHECKPOINTS = 6


@pytest.fixture
def pair(tmp_path):
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        yield pair


def same(pair):
    return pair.alpha.disk.read_bytes() == pair.beta.disk.read_bytes()


def load(worker, **options):
    """fio on the worker's LUN."""
    return Load(worker.directory, worker.uri, "--size=48M", **options)


def test_replicate_checkpoint_and_fail_over_to_the_checkpoint(pair):
    pair.replicate()
    pair.alpha.io("write -P 0x22 0 8M")
    pair.alpha.cli("checkpoint", "disk0")
    pair.alpha.io("write -P 0x33 4M 8M")
    pair.beta.io("read -P 0x22 0 8M", "read -P 0 8M 8M", "write -P 0x44 1M 1M", "read -P 0x44 1M 1M")
    assert same(pair)
    pair.beta.cli("failover", "disk0", "--to", "checkpoint", "--force", "--wait")
    assert pair.beta.status()["stage"] == "done"
    pair.beta.io("read -P 0x22 0 1M", "read -P 0x44 1M 1M", "read -P 0x22 2M 6M", "read -P 0 8M 8M")
    assert pair.beta.disk.read_bytes()[: 10 * MiB] == (
        b"\x22" * MiB + b"\x44" * MiB + b"\x22" * 6 * MiB + bytes(2 * MiB)
    )


def test_fail_over_to_the_latest(pair):
    pair.replicate()
    pair.alpha.io("write -P 0x22 0 8M")
    pair.beta.io("write -P 0x44 1M 1M")
    pair.beta.cli("failover", "disk0", "--to", "latest", "--force")
    pair.beta.io("read -P 0x22 0 8M", "write -P 0x55 0 1M", "read -P 0x55 0 1M")


def test_failover_without_a_meaning_explains_both(pair):
    pair.replicate()
    refused = pair.beta.cli("failover", "disk0", check=False)
    assert refused.returncode == 2
    assert "latest" in refused.stderr
    assert "checkpoint" in refused.stderr
    assert pair.beta.status()["stage"] == "running"


def test_commands_in_the_wrong_order_say_what_to_do(pair):
    refused = pair.alpha.cli("start", "disk0", check=False)
    assert refused.returncode == 3
    assert "start it first" in refused.stderr
    assert pair.beta.io("read 0 512", check=False).stdout.count("read failed") == 1
    pair.replicate()
    again = pair.beta.cli("start", "disk0", check=False)
    assert "Block replication is running or done" in again.stderr
    refused = pair.alpha.cli("failover", "disk0", "--to", "latest", check=False)
    assert "fail over on the secondary" in refused.stderr


@pytest.mark.parametrize("victim", ["alpha", "beta"])
def test_worker_killed_under_load_loses_nothing(pair, victim):
    """The primary's client is a fio that would report any error or wrong byte (beta), or the next one (alpha)."""
    pair.replicate()
    worker = getattr(pair, victim)
    if victim == "beta":
        running = load(pair.alpha)
        for _ in range(2):
            wait_for_writes(pair.beta)
            worker.kill()
            worker.start()
        running.end()
    else:
        pair.alpha.io("write -P 0x66 50M 1M")
        worker.kill()
        worker.start()
        pair.alpha.io("read -P 0x66 50M 1M")
        running = load(pair.alpha)
        wait_for_writes(pair.beta)
        running.end()
    status = pair.alpha.status()
    assert status["error"] is None
    assert status["out-of-sync-bytes"] == 0
    assert same(pair)
    pair.alpha.cli("checkpoint", "disk0")
    assert pair.beta.cli("errors", "disk0").stdout == "disk0: no error\n"


def wait_for_writes(secondary, more=MiB):
    """Until this much was forwarded and saved."""
    before = secondary.status()["overlays"]["hidden-bytes"]
    end = time.monotonic() + PATIENCE_S
    while secondary.status()["overlays"]["hidden-bytes"] < min(before + more, 40 * MiB):
        assert time.monotonic() < end


def test_checkpoints_under_load_from_both_sides(pair):
    pair.replicate()
    # The secondary's own writes are dropped by each checkpoint: nothing to verify.
    loads = [load(pair.alpha), load(pair.beta, verify=False)]
    for _ in range(CHECKPOINTS):
        wait_for_writes(pair.beta)
        pair.alpha.cli("checkpoint", "disk0")
    for running in loads:
        running.end()
    assert pair.alpha.status()["epoch"] == CHECKPOINTS + 1
    assert same(pair)


def test_frozen_secondary_lets_the_primary_go_on_and_is_remembered(tmp_path):
    with Pair(tmp_path, size=SIZE, link={"reconnect-delay": 0.5, "timeout": 8.0}) as pair:
        pair.replicate()
        pair.alpha.io("write -P 0x11 0 1M")
        pair.beta.pause()
        pair.alpha.io("write -P 0x22 0 64k")  # held for timeout + reconnect-delay, then alone
        pair.beta.resume()
        status = pair.alpha.status()
        assert status["out-of-sync-bytes"] == 64 * 1024
        assert "not forwarded" in status["error"]
        errors = pair.alpha.cli("errors", "disk0", check=False)
        assert errors.returncode == 1
        assert "I/O error occurred" in errors.stdout
        refused = pair.alpha.cli("checkpoint", "disk0", check=False)
        assert refused.returncode == 3
        assert "misses writes" in refused.stderr
        pair.alpha.io("write -P 0x33 2M 64k")
        assert pair.beta.disk.read_bytes()[2 * MiB] == 0


def test_overlay_limit_fails_the_forwarded_write_and_keeps_the_checkpoint(tmp_path):
    with Pair(tmp_path, size=SIZE, overlay_limit=4 * MiB) as pair:
        pair.replicate()
        pair.alpha.io("write -P 0x11 0 4M")
        pair.alpha.cli("checkpoint", "disk0")
        pair.alpha.io("write -P 0x11 4M 4M")
        pair.alpha.cli("checkpoint", "disk0")
        pair.alpha.io("write -P 0x22 0 8M")
        assert "limit" in pair.alpha.status()["error"]
        pair.beta.io("read -P 0x11 0 8M")


def test_all_resources_at_once_prints_a_line_each(pair):
    done = pair.beta.cli("start", "--all")
    assert done.stdout == "disk0: started\n"
    pair.alpha.cli("start", "--all", "--wait")
    answers = json.loads(pair.alpha.cli("checkpoint", "--all", "--json").stdout)
    assert [a["resource"] for a in answers] == ["disk0"]
    assert answers[0]["result"]["epoch"] == 2


def test_second_worker_on_the_same_resource_is_refused(pair):
    second = pair.beta.cli("serve", "disk0", check=False)
    assert second.returncode == 3
    assert "already served by process" in second.stderr


def test_stop_on_both_ends_leaves_equal_disks_and_start_compares_them(pair):
    """D6: start means start."""
    pair.replicate()
    pair.alpha.io("write -P 0x22 0 1M")
    pair.alpha.cli("stop", "disk0")
    pair.beta.cli("stop", "disk0")
    assert same(pair)
    pair.replicate()
    pair.alpha.io("write -P 0x33 0 1M")
    pair.beta.io("read -P 0x22 0 1M")
    assert pair.alpha.cli("checkpoint", "disk0").stdout.startswith("disk0: checkpoint")
