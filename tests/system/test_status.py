"""What a real pair says of itself while it is, and is not, protected."""

from __future__ import annotations

from pathlib import Path

from tcmu_replication.cli import exits
from tests.support.processes import Pair
from tests.support.qemu import until


def test_pair_whose_secondary_is_gone_is_not_protected_though_no_error_is_recorded(tmp_path: Path) -> None:
    """The secondary lost its power: `errors` said `no error`, `status` was green with exit status 0."""
    with Pair(tmp_path, size=16 << 20, link={"reconnect-delay": 0.5, "timeout": 2.0}) as pair:
        before = pair.alpha.cli("status", check=False)
        assert before.returncode == exits.UNPROTECTED
        assert "disk0: NOT PROTECTED" in before.stdout
        pair.replicate()
        until(lambda: pair.alpha.cli("status", check=False).returncode == 0, "protection")
        assert pair.alpha.cli("errors").stdout == "disk0: no error\n"
        assert pair.beta.cli("status", "disk0").stdout.startswith("disk0: protected")

        pair.beta.kill()
        pair.alpha.io("write -P 0x11 0 64k")  # held for the reconnect-delay, then alone
        for words in (["status"], ["status", "disk0"], ["status", "disk0", "--json"]):
            assert pair.alpha.cli(*words, check=False).returncode == exits.UNPROTECTED
        told = pair.alpha.cli("errors", "disk0", check=False)
        assert told.returncode == exits.FAILED
        assert "disk0: NOT PROTECTED" in told.stdout
        assert "bring back beta" in told.stdout
        down = pair.beta.cli("status", check=False)
        assert down.returncode == exits.ABSENT
        assert "disk0: DOWN: nobody serves" in down.stdout


def test_checkpoint_on_a_link_that_refuses_connections_says_who_is_missing_and_where_to_look(
    tmp_path: Path,
) -> None:
    """It was `[Errno 111] Connect call failed ('192.0.2.2', 10810)`."""
    with Pair(tmp_path, size=16 << 20) as pair:
        pair.replicate()
        pair.beta.kill()
        refused = pair.alpha.cli("checkpoint", "disk0", check=False)
        assert refused.returncode == exits.PEER
        assert refused.stderr.startswith("disk0: the link to beta is down since ")
        for words in (
            f"127.0.0.2:{pair.control_port}: Connection refused: nobody listens there",
            "Expected beta to be on and to serve disk0",
            "what to do here: `tcmu-replication status disk0`",
        ):
            assert words in refused.stderr
        told = pair.alpha.cli("status", "disk0", check=False).stdout
        for raw in ("Errno", "Connect call failed"):
            assert raw not in refused.stderr + told


def test_stopped_pair_is_not_protected_on_either_host(tmp_path: Path) -> None:
    """`none` and `done` were exit status 0 too. The secondary has heard that the primary goes on alone."""
    with Pair(tmp_path, size=16 << 20) as pair:
        pair.replicate()
        for worker, status in ((pair.alpha, exits.UNPROTECTED), (pair.beta, exits.FAILED)):
            worker.cli("stop", "disk0")
            told = worker.cli("errors", "disk0", check=False)
            assert told.returncode == status
            assert "replication is not running" in told.stdout


def test_link_that_is_down_keeps_its_time_until_it_is_up_again(tmp_path: Path) -> None:
    """Each attempt to connect began it anew."""
    with Pair(tmp_path, size=16 << 20, link={"reconnect-delay": 2.0, "timeout": 2.0}) as pair:
        pair.replicate()
        pair.beta.kill()
        until(lambda: pair.alpha.status()["link"]["state"] != "connected", "the end of the connection")
        since = pair.alpha.status()["link"]["since"]
        pair.alpha.io("write -P 0x11 0 64k")  # held for the reconnect-delay, then alone
        link = pair.alpha.status()["link"]
        assert (link["state"], link["since"]) == ("lost", since)


def test_secondary_that_was_stopped_after_a_gap_says_that_its_disk_is_old(tmp_path: Path) -> None:
    """D7: its LUN serves that disk, and it said no more than that nothing was replicated."""
    with Pair(tmp_path, size=16 << 20, link={"reconnect-delay": 0.5, "timeout": 1.0}) as pair:
        pair.replicate()
        pair.beta.pause()
        pair.alpha.io("write -P 0x11 0 64k", "write -P 0x22 1M 64k")
        pair.beta.resume()
        until(lambda: pair.beta.status().get("outdated-since"), "the secondary's notice")
        for worker in (pair.alpha, pair.beta):
            worker.cli("stop", "disk0")
        told = pair.beta.cli("errors", "disk0", check=False).stdout
        assert "the disk of this host is old or damaged: alpha goes on" in told
        assert "let no initiator use the LUN of this host" in told
