"""A LUN that the kernel has for a handler in user space, as the manager sees it: who serves it, or why nobody does.

What is not ours. A backstore of a subtype without a handler here is another
program's, or a slip of the pen: `replicatoin/disk0`. Which of the two cannot be
seen without opening the device, and only one process may have it open. So it is
told where LUNs are asked for (`devices`), with the name that may have been
meant, and never held against this host: an alarm that is always on is read by
nobody.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

from tcmu_replication.control.schema import DeviceInfo
from tcmu_replication.daemon.child import Child
from tcmu_replication.errors import Error, one_line
from tcmu_replication.tcmu import uio

log = logging.getLogger(__name__)

State = Literal["served", "starting", "unserved", "foreign"]

REPLICATION = "replication"
GRACE_S = 10.0
"""A new LUN is being taken up for so long before it counts as one that nobody serves."""


class Why(NamedTuple):
    """Why a LUN is not served, what was found and expected, and what to do."""

    reason: str
    advice: str


class Lun:
    """A TCMU device. `error` is why its worker did not take it up when it was last told to."""

    def __init__(self, identity: uio.Identity, *, foreign: bool = False) -> None:
        self.identity = identity
        self.foreign = foreign
        self.served = False
        self.error: Error | None = None
        self._since = _now()
        self._began_s = time.monotonic()

    @property
    def worker(self) -> str | None:
        """The worker whose it is: that of its resource, or one of its own; None if it is another program's."""
        if self.foreign:
            return None
        return self.identity.config if self.identity.subtype == REPLICATION else self.identity.uio

    def begins(self) -> None:
        """Its worker serves, and is told to take it up."""
        self.error = None
        self._began_s = time.monotonic()

    def taken(self) -> None:
        """Its worker serves it."""
        self.error = None
        if not self.served:
            log.info("%s: %s is served", self.worker, self.identity.uio)
            self.served, self._since = True, _now()

    def refused(self, error: Error) -> None:
        """Its worker could not take it up; the log has each reason once."""
        if str(error) != str(self.error):
            log.error("%s: %s is not served: %s", self.worker, self.identity.uio, error)
        self.error = error

    def lost(self) -> None:
        """Its worker serves it no more."""
        self.error = None
        if self.served:
            self.served, self._since = False, _now()

    def why(self, every_s: float) -> Why | None:
        """Why its worker, which is told every `every_s` seconds, does not serve it; None if it did not say."""
        if self.error is None:
            return None
        advice = "mend what that names, or delete the backstore; the worker tries"
        return Why(str(self.error), f"{advice} again every {every_s:g} s, and serves it when it can")

    def info(self, child: Child | None, why: Why | None) -> DeviceInfo:
        """The row of query-devices. `child` is its worker, `why` what keeps it from being served if that is known."""
        return DeviceInfo(
            device=self.identity.uio,
            backstore=one_line(self.identity.name),
            config=one_line(self.identity.dev_config),
            state=self._state(why),
            since=self._since,
            worker=None if child is None else child.name,
            pid=None if child is None else child.pid,
            reason=None if self.served else (why or self._slow()).reason,
            advice=None if self.served else (why or self._slow()).advice,
        )

    def _state(self, why: Why | None) -> State:
        if self.served:
            return "served"
        if self.foreign:
            return "foreign"
        young = time.monotonic() - self._began_s < GRACE_S
        return "starting" if why is None and young else "unserved"

    def _slow(self) -> Why:
        return Why(
            f"its worker {self.worker} is to take it up, and has not said that it serves it",
            f"wait. If it stays so, see the log: `journalctl -u tcmu-replication --grep {self.worker}`",
        )


def of_another(identity: uio.Identity, subtypes: Collection[str]) -> Why:
    """Why a LUN of none of the `subtypes` that have a handler here is not served by us."""
    known = ", ".join(sorted(subtypes))
    near = get_close_matches(identity.subtype, subtypes, n=1)
    meant = one_line(f"{near[0]}/{identity.config}") if near else f"one of {known}"
    return Why(
        f"no handler of this host serves {one_line(identity.dev_config)}; it has handlers for {known}",
        f"nothing, if another program serves it. If {meant} was meant: delete the backstore and create it anew",
    )


def without_resource(error: Error, resources: Collection[str], within_s: float) -> Why:
    """Why a LUN is not served whose resource is none of this host's `resources`: `error` says what it is instead."""
    here = f"this host has {', '.join(sorted(resources))}" if resources else "this host has no resource"
    return Why(
        f"it is of no resource of this host: {error}",
        f"if another resource was meant ({here}), delete the backstore and create it anew. Else write or mend "
        f"that file: the LUN is served within {within_s:g} s, or at once after `systemctl reload tcmu-replication`",
    )


def with_unread_file(path: Path, within_s: float) -> Why:
    """Why a LUN is not served whose resource file `path` has only just become good."""
    return Why(
        f"{path} is good, and was not so when the daemon read it",
        f"wait up to {within_s:g} s, or `systemctl reload tcmu-replication`",
    )


def without_service(child: Child) -> Why | None:
    """Why a LUN is not served whose worker is `child`; None if that serves, or has only just been started."""
    if child.error is not None:
        return Why(
            f"its worker {child.name} does not serve: {child.error}",
            "mend what that names; the worker is tried again and again, at least every 30 s",
        )
    if child.state in ("stopping", "stopped"):
        return Why(
            f"its worker {child.name} was told to end", "`systemctl reload tcmu-replication` starts it again"
        )
    return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
