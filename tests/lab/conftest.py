"""Two hosts and an initiator for all lab tests: booted once, new for each module, whole for each test."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import pytest

from tcmu_replication.units import MiB
from tests.lab.disk import Disk
from tests.lab.host import Host
from tests.lab.lab import Lab, missing_tools
from tests.lab.network import Network

LOGS = pathlib.Path(__file__).parents[2] / "lab-logs" / "tests"
STATE = "/var/lib/tcmu-replication"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [*missing_tools(), *([] if os.geteuid() == 0 else ["root"])]
    for item in items:
        if "lab" in item.keywords and missing:
            item.add_marker(pytest.mark.skip(reason=f"the lab needs {', '.join(missing)}"))


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """alpha and beta, each with a `data` disk of 256 MiB and an ext4 for overlays, and client; running."""
    with Lab(LOGS) as lab:
        for name in ("alpha", "beta"):
            lab.host(name, disks=[Disk("data", 256 * MiB), Disk("overlays", 512 * MiB, mount=STATE)])
        lab.host("client")
        lab.network(alpha="10.77.0.1/24", beta="10.77.0.2/24", client="10.77.0.3/24")
        lab.boot()
        yield lab


@pytest.fixture(scope="module")
def fresh_lab(lab: Lab) -> Lab:
    """The lab as new for each module; some seconds after a module that used it."""
    lab.renew()
    return lab


@pytest.fixture
def hosts(fresh_lab: Lab) -> Lab:
    """The lab; every host runs when the test begins, and the network is whole."""
    fresh_lab.networks[0].heal()
    fresh_lab.boot()
    return fresh_lab


@pytest.fixture
def alpha(hosts: Lab) -> Host:
    return hosts.hosts["alpha"]


@pytest.fixture
def beta(hosts: Lab) -> Host:
    return hosts.hosts["beta"]


@pytest.fixture
def client(hosts: Lab) -> Host:
    return hosts.hosts["client"]


@pytest.fixture
def net(hosts: Lab) -> Network:
    return hosts.networks[0]
