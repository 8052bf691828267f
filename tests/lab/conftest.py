"""Two hosts and an initiator for all lab tests: booted once, new for each module, whole for each test."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import pytest

from tests.lab import pair
from tests.lab.host import Host
from tests.lab.lab import Lab, missing_tools
from tests.lab.network import Network

LOGS = pathlib.Path(__file__).parents[2] / "lab-logs" / "tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [*missing_tools(), *([] if os.geteuid() == 0 else ["root"])]
    for item in items:
        if "lab" in item.keywords and missing:
            item.add_marker(pytest.mark.skip(reason=f"the lab needs {', '.join(missing)}"))


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """alpha and beta, each with a disk `data` and an ext4 for overlays, and client; running."""
    with Lab(LOGS) as lab:
        pair.describe(lab)
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
