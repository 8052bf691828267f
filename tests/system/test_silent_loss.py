"""Nothing is lost in silence: what two real hosts remember, tell and refuse. Each test names its finding."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tcmu_replication.units import MiB
from tests.support.processes import Pair
from tests.support.relay import Relay
from tests.support.tools import PATIENCE_S, requires, until

pytestmark = requires("qemu-io")

SIZE = 64 * MiB
LINK = {"reconnect-delay": 0.5, "timeout": 3.0, "dead-after": 2.0}


@pytest.fixture
def pair(tmp_path):
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        yield pair


def test_d2_gap_is_known_after_a_clean_stop_and_after_a_death(pair):
    pair.replicate()
    pair.beta.pause()
    pair.alpha.io("write -P 0x22 0 64k", "flush")
    pair.alpha.stop()
    pair.alpha.start()
    assert "not forwarded" in pair.alpha.status()["error"]
    pair.alpha.kill()
    pair.alpha.start()
    status = pair.alpha.status()
    assert "not forwarded" in status["error"]
    assert status["out-of-sync-bytes"] == 64 * 1024
    pair.beta.resume()
    assert pair.alpha.cli("checkpoint", "disk0", check=False).returncode == 3


def test_d3_writes_under_way_at_the_death_of_the_primary_are_sent_again(tmp_path):
    with Pair(tmp_path, size=SIZE, link={"reconnect-delay": 14.0, "timeout": 10.0}) as pair:
        pair.replicate()
        pair.beta.pause()
        writer = pair.alpha.io_later("write -P 0x33 8M 16M")
        until(lambda: pair.alpha.disk.read_bytes()[8 * MiB] == 0x33, "the local disk has it")
        pair.alpha.kill()
        writer.wait(PATIENCE_S)
        pair.beta.resume()
        pair.alpha.start()
        until(lambda: pair.alpha.status()["protection"]["protected"], "in sync again")
        assert pair.equal
        pair.alpha.cli("checkpoint", "disk0")


def test_d5_primary_without_its_directory_is_not_ready_where_the_peer_knows_a_pair(pair):
    pair.replicate()
    pair.alpha.io("write -P 0x11 0 64k")
    pair.alpha.stop()
    pair.alpha.overlays.rename(pair.alpha.overlays.with_name("unmounted"))
    pair.alpha.overlays.mkdir()
    pair.alpha.start()
    until(lambda: "knows disk0 as a pair" in (pair.alpha.status()["not-ready"] or ""), "beta has answered")
    assert "write failed" in pair.alpha.io("write -P 0x22 0 64k", check=False).stdout
    assert pair.alpha.disk.read_bytes()[0] == 0x11
    refused = pair.alpha.cli("start", "disk0", check=False)
    assert refused.returncode == 3
    assert "Mount it" in refused.stderr


def test_d6_writes_between_the_copy_and_start_are_found(pair):
    until(lambda: pair.alpha.status()["not-ready"] is None, "beta has said that it knows of no pair")
    pair.alpha.io("write -P 0x11 32M 4k")
    pair.beta.cli("start", "disk0")
    found = pair.alpha.cli("start", "disk0", "--wait", check=False)
    status = pair.alpha.status()
    assert found.returncode == 1
    assert "differ" in found.stderr
    assert not status["protection"]["protected"]
    assert pair.alpha.cli("checkpoint", "disk0", check=False).returncode == 3


def test_d7_secondary_knows_that_it_is_outdated_and_refuses_the_latest(pair):
    pair.replicate()
    pair.alpha.io("write -P 0x11 0 1M")
    pair.alpha.cli("checkpoint", "disk0")
    pair.beta.pause()
    pair.alpha.io("write -P 0x22 0 1M", "flush")
    pair.beta.resume()
    until(lambda: pair.beta.status()["outdated-since"], "beta was told")
    status = pair.beta.status()
    assert not status["protection"]["protected"]
    assert status["link"]["state"] != "connected"
    assert pair.beta.cli("errors", "disk0", check=False).returncode == 1
    pair.alpha.kill()
    refused = pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced", check=False)
    assert refused.returncode == 3
    assert "outdated since" in refused.stderr
    assert "--to checkpoint" in refused.stderr
    pair.beta.stop()
    pair.beta.start()
    assert pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced", check=False).returncode == 3
    pair.beta.cli("failover", "disk0", "--to", "checkpoint", "--fenced", "--wait")
    pair.beta.io("read -P 0x11 0 1M")


def test_d8_failover_waits_for_a_silent_primary_and_a_promoted_peer_ends_the_old_one(pair):
    pair.replicate()
    pair.alpha.io("write -P 0x11 0 1M")
    refused = pair.beta.cli("failover", "disk0", "--to", "latest", check=False)
    assert refused.returncode == 3
    for word in ("lives", "from now", "--fenced", "--force", "switch"):
        assert word in refused.stderr
    pair.alpha.pause()
    until(
        lambda: pair.beta.cli("failover", "disk0", "--to", "latest", check=False).returncode == 0,
        "a primary that is silent counts as gone",
    )
    pair.beta.io("write -P 0x22 0 1M")
    pair.alpha.resume()
    until(lambda: "was promoted" in (pair.alpha.status()["not-ready"] or ""), "alpha has heard of it")
    assert "write failed" in pair.alpha.io("write -P 0x33 0 1M", check=False).stdout
    pair.alpha.stop()
    pair.alpha.start()
    assert "was promoted" in pair.alpha.status()["not-ready"]
    assert "read failed" in pair.alpha.io("read 0 512", check=False).stdout


def test_d9_promoted_host_gives_up_no_writes_unasked(pair):
    pair.replicate()
    pair.alpha.kill()
    pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced")
    pair.beta.io("write -P 0x22 0 1M", "flush")
    for words in ([], ["--assume-clean"]):
        refused = pair.beta.cli("start", "disk0", *words, check=False)
        assert refused.returncode == 3
        assert "was written on this host" in refused.stderr
    pair.beta.io("read -P 0x22 0 1M")
    pair.beta.cli("start", "disk0", "--discard-my-data")
    assert pair.beta.status()["stage"] == "running"


def test_d11_checkpoint_of_the_pair_is_the_primarys(pair):
    pair.replicate()
    refused = pair.beta.cli("checkpoint", "disk0", check=False)
    assert refused.returncode == 3
    assert "on the primary (alpha)" in refused.stderr
    assert pair.beta.status()["epoch"] == 1


def test_d11_checkpoint_that_was_given_up_is_never_made_of_later_writes(tmp_path):
    """The network keeps the command for longer than the primary waits, and brings it all the same."""
    with (
        Pair(tmp_path, size=SIZE, link=LINK) as pair,
        Relay("127.0.0.2", ("127.0.0.2", pair.control_port), "127.0.0.1") as relay,
    ):
        pair.alpha.stop()
        pair.alpha.set("control-port", relay.port)
        pair.alpha.start()
        pair.replicate()
        pair.alpha.io("write -P 0x11 0 1M")
        pair.alpha.cli("checkpoint", "disk0")
        relay.hold(b'"peer-checkpoint"')
        with ThreadPoolExecutor() as operator:
            given_up = operator.submit(pair.alpha.cli, "checkpoint", "disk0", check=False)
            assert relay.held.wait(PATIENCE_S)
            assert pair.alpha.status()["checkpoint-under-way-since"] is not None
            assert "no answer" in given_up.result().stderr
        assert pair.alpha.status()["checkpoint-under-way-since"] is None
        pair.alpha.io("write -P 0x22 0 1M", "flush")
        relay.release()
        until(lambda: "was given up" in pair.beta.log.read_text(), "beta has got the command")
        assert pair.beta.status()["epoch"] == 2
        assert pair.alpha.status()["protection"]["protected"]
        pair.alpha.kill()
        pair.beta.cli("failover", "disk0", "--to", "checkpoint", "--fenced", "--wait")
        pair.beta.io("read -P 0x11 0 1M")


def test_assume_clean_is_refused_where_the_record_says_otherwise(pair):
    """D9: as the help says."""
    pair.replicate()
    pair.beta.pause()
    pair.alpha.io("write -P 0x22 0 64k")
    pair.beta.resume()
    until(lambda: pair.beta.status()["outdated-since"], "beta was told")
    pair.alpha.cli("stop", "disk0")
    pair.beta.cli("stop", "disk0")
    pair.beta.cli("start", "disk0")
    refused = pair.alpha.cli("start", "disk0", "--assume-clean", check=False)
    assert "not known to be equal" in refused.stderr
    assert pair.alpha.status()["stage"] == "done"


def test_a_gap_is_mended_as_the_texts_say(pair):
    pair.replicate()
    pair.beta.pause()
    pair.alpha.io("write -P 0x22 0 1M")
    pair.beta.resume()
    until(lambda: pair.beta.status()["outdated-since"], "beta was told")
    pair.alpha.cli("stop", "disk0")
    pair.beta.cli("stop", "disk0")
    pair.beta.disk.write_bytes(pair.alpha.disk.read_bytes())
    pair.replicate()
    until(lambda: pair.alpha.status()["protection"]["protected"], "protected again")
    pair.alpha.io("write -P 0x44 1M 1M")
    assert pair.equal


def promoted(pair):
    """The primary died, the secondary was promoted and written; then the old primary came back and heard of it."""
    pair.replicate()
    pair.alpha.io("write -P 0x11 0 1M")
    pair.alpha.kill()
    pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced", "--wait")
    pair.beta.io("write -P 0x22 1M 1M", "flush")
    pair.alpha.start()
    until(lambda: "was promoted" in (pair.alpha.status()["not-ready"] or ""), "alpha has heard of it")


def test_pair_after_a_failover_is_made_anew_as_the_texts_say(pair):
    """docs/status.md, After a failover, with the roles of before."""
    promoted(pair)
    pair.alpha.cli("stop", "disk0", check=False)
    pair.alpha.stop()
    pair.alpha.disk.write_bytes(pair.beta.disk.read_bytes())
    pair.alpha.start()
    refused = pair.beta.cli("start", "disk0", check=False)
    assert "--discard-my-data" in refused.stderr
    pair.beta.cli("start", "disk0", "--discard-my-data")
    refused = pair.alpha.cli("start", "disk0", check=False)
    assert "--force" in refused.stderr
    pair.alpha.cli("start", "disk0", "--force", "--wait")
    assert pair.alpha.status()["protection"]["protected"]
    pair.alpha.io("read -P 0x11 0 1M", "read -P 0x22 1M 1M", "write -P 0x33 2M 1M")
    assert pair.equal


def test_pair_after_a_failover_goes_on_in_exchanged_roles_as_the_texts_say(pair):
    promoted(pair)
    pair.alpha.stop()
    pair.beta.stop()
    pair.alpha.disk.write_bytes(pair.beta.disk.read_bytes())
    for worker in (pair.alpha, pair.beta):
        worker.exchange_roles()
        worker.start()
    pair.beta.io("read -P 0x22 1M 1M")
    pair.alpha.cli("start", "disk0")
    refused = pair.beta.cli("start", "disk0", "--assume-clean", check=False)
    assert "was written while nothing was replicated" in refused.stderr
    pair.beta.cli("start", "disk0", "--wait")
    assert pair.beta.status()["protection"]["protected"]
    pair.beta.io("write -P 0x33 2M 1M")
    assert pair.equal
    for worker in (pair.alpha, pair.beta):
        worker.kill()
        worker.start()
    until(lambda: pair.beta.status()["protection"]["protected"], "in sync again")
