"""What the host that may be promoted must know: writes that were acknowledged without it (D7)."""

import pytest

from tcmu_replication.units import MiB
from tests.support.processes import Pair
from tests.support.tools import requires

pytestmark = requires("qemu-io")

SIZE = 16 * MiB
LINK = {"reconnect-delay": 0.3, "timeout": 2.0, "dead-after": 2.0}


@pytest.fixture
def pair(tmp_path):
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        pair.replicate()
        yield pair


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_secondary_that_was_away_when_the_primary_went_on_and_died_refuses_the_latest(pair, end):
    """D7: nobody can tell it any more."""
    pair.alpha.io("write -P 0x11 0 1M")
    pair.alpha.cli("checkpoint", "disk0")
    getattr(pair.beta, end)()
    pair.alpha.io("write -P 0x22 0 1M", "flush")
    pair.alpha.kill()
    pair.beta.start()
    refused = pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced", check=False)
    assert refused.returncode == 3
    assert "was not heard since" in refused.stderr
    pair.beta.cli("failover", "disk0", "--to", "checkpoint", "--fenced", "--wait")
    pair.beta.io("read -P 0x11 0 1M")


def test_secondary_whose_primary_stopped_replication_refuses_the_latest(pair):
    """D7: the LUN goes on after `stop`."""
    pair.alpha.cli("stop", "disk0")
    pair.alpha.io("write -P 0x22 0 1M", "flush")
    pair.alpha.kill()
    refused = pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced", check=False)
    assert refused.returncode == 3
    assert "outdated since" in refused.stderr
