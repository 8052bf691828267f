"""The iSCSI initiator of a lab host in plain words: open-iscsi's own programs."""

from __future__ import annotations

from tests.lab.host import Host
from tests.lab.target import block_device

SETTINGS = {
    "node.startup": "manual",
    "node.session.timeo.replacement_timeout": "600",
    "node.conn[0].timeo.noop_out_interval": "2",
    "node.conn[0].timeo.noop_out_timeout": "2",
    "node.conn[0].timeo.login_timeout": "10",
    "node.conn[0].timeo.logout_timeout": "30",
    "node.session.initial_login_retry_max": "8",
    "node.session.err_timeo.host_reset_timeout": "60",
}
"""iscsid.conf: a target that is gone is noticed within seconds, and waited for as long as a slow machine needs."""


class Session:
    """A login at the target called `name` at `address`; `device` is its LUN 0's path on `host`."""

    def __init__(self, host: Host, name: str, address: str):
        self.host = host
        self.name = name
        self.address = address
        _start_daemon(host)
        host.run(f"iscsiadm -m discovery -t sendtargets -p {address}")
        host.run(f"iscsiadm -m node -T {name} -p {address} --login")
        # The directories of sessions do not bear the target's name: find it first.
        session = host.run(f"grep -lx {name} /sys/class/iscsi_session/session*/targetname").stdout.split("/")[
            -2
        ]
        self.device = block_device(host, f"/sys/class/iscsi_session/{session}/device/target*/*:0")

    def logout(self) -> None:
        """Ends the session; its device goes away."""
        self.host.run(f"iscsiadm -m node -T {self.name} -p {self.address} --logout")
        self.host.run(f"iscsiadm -m node -T {self.name} -p {self.address} -o delete")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.host.running:
            self.logout()


def _start_daemon(host: Host) -> None:
    if host.run("pgrep -x iscsid", check=False).returncode == 0:
        return
    settings = "\n".join(f"{key} = {value}" for key, value in SETTINGS.items())
    host.write("/etc/iscsi/iscsid.conf", settings + "\n")
    host.run("iscsid")  # returns when the daemon listens
