"""contrib's units under a real systemd: a pair in their sandboxes, a user of its own, the daemon's watchdog (S4)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest

from tests.lab import load, pair, target
from tests.lab.host import Host
from tests.lab.lab import Lab
from tests.lab.pair import Pair
from tests.lab.systemd import INSIDE, Systemd
from tests.support.tools import requires

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800), requires("systemd-analyze")]

DAEMON = "tcmu-replication.service"
WORKER = f"tcmu-replication-worker@{pair.NAME}.service"
USER = "tcmu-replication"
NBD = f"/run/tcmu-replication/{pair.NAME}.nbd"
LUN = f"nbd+unix:///{pair.NAME}?socket={NBD}"
IN_TMP = any(path.startswith(("/tmp/", "/var/tmp/")) for path in (sys.prefix, sys.executable, __file__))
INTERPRETER = "ProtectHome=read-only" + ("\nPrivateTmp=no" if IN_TMP else "")
"""The interpreter of the tests, and this checkout, may lie in somebody's home or in /tmp."""
LOAD_S = 600


class ServicePair(Pair):
    """alpha's LUN is served by the daemon's unit, beta's by the worker's unit, which may not do anything else."""

    def resource_file(self, **extra: str) -> str:
        return f'{super().resource_file(**extra)}\n[nbd]\nlisten = "unix:{NBD}"\n'

    def configure(self, **extra: str) -> None:
        """As docs/systemd.md has it."""
        super().configure(**extra)
        beta = self.secondary
        beta.run(f"rmdir {pair.STATE}/{pair.NAME}")  # the unit makes it
        beta.run("chmod 750 /etc/tcmu-replication && chmod 640 /etc/tcmu-replication/*")
        beta.run(f"chgrp -R {USER} /etc/tcmu-replication")
        beta.run(f"chown {USER} {beta.device('data')}")


def test_pair_of_services_in_their_sandboxes(hosts: Lab) -> None:
    alpha, beta = hosts.hosts["alpha"], hosts.hosts["beta"]
    first = Systemd(alpha, {DAEMON: f"{INTERPRETER}\nWatchdogSec=3"})
    second = Systemd(beta, {"tcmu-replication-worker@.service": INTERPRETER})
    for systemd in (first, second):
        systemd.await_boot()
    services = ServicePair(hosts)
    services.configure()
    second.start(WORKER)
    first.start(DAEMON)
    alpha.wait_until(f"{INSIDE}journalctl -u {DAEMON} | grep -q '{pair.NAME}: serves'")
    services.start()
    with services.backstore(alpha) as backstore, target.Loop(backstore) as lun:
        for systemd in (first, second):
            with loaded(lun):
                worker_is_killed(systemd, services)
        daemon_is_watched(first, services)
    assert "is not made to answer BUSY" not in first.log(DAEMON)
    services.command(alpha, "checkpoint")
    assert services.status(alpha)["error"] is None
    written = checksum(alpha, alpha.device("data"))
    assert checksum(beta, beta.device("data")) == written
    assert beta.run(f"nbdcopy '{LUN}' - | sha256sum").stdout.split()[0] == written
    assert second.run(f"stat -c %U /proc/{second.shows(WORKER, 'MainPID')}").stdout.strip() == USER
    assert set(beta.run(f"stat -c %U {pair.STATE}/{pair.NAME}/*").stdout.split()) == {USER}
    beta.run(f"qemu-io -f raw -c 'write -P 7 1M 1M' '{LUN}'")
    services.command(beta, "failover", "--to", "checkpoint", "--fenced", "--wait")
    own = beta.run(f"qemu-io -r -U -f raw -c 'read -P 7 1M 1M' {beta.device('data')}").stdout
    assert "read 1048576/1048576" in own
    assert "failed" not in own
    # Where the daemon serves all resources a worker's unit is refused.
    assert first.run(f"systemctl start {WORKER}", check=False).returncode != 0


@contextlib.contextmanager
def loaded(lun: target.Loop) -> Iterator[None]:
    """While a load is in full swing; it ends without an error."""
    running = load.start(lun.host, lun.device)
    load.wait_for_writes(lun.host, lun.device)
    yield
    running.wait(LOAD_S)


def worker_is_killed(systemd: Systemd, services: Pair) -> None:
    """By its number where systemd is."""
    systemd.run(f"kill -9 {services.status(systemd.host)['pid']}")


def daemon_is_watched(systemd: Systemd, services: Pair) -> None:
    """A daemon that hangs is started again by systemd, and its workers outlive it."""
    worker = services.status(systemd.host)["pid"]
    daemon = systemd.shows(DAEMON, "MainPID")
    systemd.run(f"kill -STOP {daemon}")
    systemd.host.wait_until(f'[ "$({INSIDE}systemctl show --value -p NRestarts {DAEMON})" = 1 ]')
    systemd.start(DAEMON)
    assert systemd.shows(DAEMON, "MainPID") != daemon
    assert services.status(systemd.host)["pid"] == worker


def checksum(host: Host, device: str) -> str:
    """Of the whole device."""
    return host.run(f"sha256sum {device}").stdout.split()[0]
