"""Documents that the tests of control and command line share."""

from __future__ import annotations

from typing import Any

from tcmu_replication.control import schema

PROTECTED = schema.Protection(
    protected=True, level="protected", words="every write is here", since="2026-01-02T03:00:00+00:00"
)


def status(**changes: Any) -> schema.Status:
    """A running secondary with something in every place."""
    return schema.Status(
        **{
            "resource": "disk0",
            "protection": PROTECTED,
            "host": "beta",
            "mode": "secondary",
            "stage": "running",
            "epoch": 7,
            "generation": "3f2a",
            "size": 256 << 20,
            "disk": "/dev/vdb",
            "top": "disk0",
            "link": schema.Link(state="connected", peer="192.0.2.1", in_flight=2, in_flight_bytes=8192),
            "overlays": schema.Overlays(active_bytes=4096, hidden_bytes=1 << 20),
            "last_checkpoint": schema.Checkpoint(epoch=7, at="2026-01-02T03:04:05Z", pause_ms=1.5),
            "frontends": [schema.Frontend(type="tcmu", device="uio0", commands=10)],
            "pid": 42,
            "version": "0.1.0",
        }
        | changes
    )
