"""UIO devices as they come and go: uevents from the kernel, through pyudev.

The kernel's own events are used and not udevd's, so that this works in
containers and in an initramfs. An event is a hint: `add` comes before the
kernel has finished the backstore, and `remove` when the name is gone already.
Devices that are there at the start are found by `tcmu.uio.devices`.
"""

from __future__ import annotations

from typing import NamedTuple

import pyudev


class Event(NamedTuple):
    """`action` is "add", "remove" or another of udev's, `device` is "uio3"."""

    action: str
    device: str


class Monitor:
    """A listening monitor: from its making on no event is missed (list the devices afterwards)."""

    def __init__(self) -> None:
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), "kernel")
        self._monitor.filter_by("uio")
        self._monitor.start()

    def fileno(self) -> int:
        """Readable when events wait."""
        return int(self._monitor.fileno())

    def events(self) -> list[Event]:
        """The events that wait, without blocking."""
        found = []
        while (device := self._monitor.poll(timeout=0)) is not None:
            found.append(Event(device.action or "", device.sys_name))
        return found
