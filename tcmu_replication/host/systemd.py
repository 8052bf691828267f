"""Tell the service manager (systemd, or our own manager) how we are: sd_notify(3), which is one datagram."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(**state: str | int) -> None:
    """Send assignments of sd_notify(3): READY=1, STATUS="...", STOPPING=1, WATCHDOG=1.

    Does nothing without NOTIFY_SOCKET, and nothing can go wrong here that would
    be worth failing for.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    text = "\n".join(f"{key}={str(value).replace(chr(10), ' ')}" for key, value in state.items())
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)
        channel.sendto(text.encode(), address)
