"""The private network as its hosts see it."""

from __future__ import annotations

import pathlib
import sys

import pytest

from tests.lab.channel import PATIENCE_S
from tests.lab.host import Host
from tests.lab.network import Network

pytestmark = pytest.mark.lab

ECHO = pathlib.Path(__file__).parent / "guest" / "echo.py"
PORT = 4711


@pytest.fixture
def beta(beta: Host) -> Host:
    """beta, where an echo server listens."""
    if "echo" not in beta.run("ps -eo args", check=True).stdout:
        beta.spawn([sys.executable, "-S", "-E", str(ECHO), "serve", str(PORT)]).wait_for("listening")
    return beta


def ask(host: Host, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
    """Exit status and output of asking beta's server once: "12.3 ms" or the error's name."""
    done = host.spawn([sys.executable, "-S", "-E", str(ECHO), "ask", "beta", str(PORT), str(timeout_s)])
    done.wait(timeout_s + PATIENCE_S, check=False)
    return done.returncode or 0, done.stdout.strip()


def test_hosts_reach_each_other_by_name(client: Host, beta: Host) -> None:
    assert ask(client)[0] == 0


def test_cut_separates_one_pair_until_healed(alpha: Host, client: Host, beta: Host, net: Network) -> None:
    net.cut("client", "beta")
    assert ask(client, timeout_s=1) in [(1, "TimeoutError"), (1, "OSError")]  # the latter when ARP fails
    assert ask(alpha)[0] == 0
    net.heal()
    assert ask(client)[0] == 0


def test_delay_lasts_both_ways(client: Host, beta: Host, net: Network) -> None:
    net.delay(100)
    status, said = ask(client)
    assert status == 0
    assert float(said.split()[0]) >= 200


def test_drops_are_made_good_by_tcp(client: Host, beta: Host, net: Network) -> None:
    net.drop(0.1, seed=1)
    before = net.dropped
    while net.dropped == before:
        assert ask(client)[0] == 0
