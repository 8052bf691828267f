"""QEMU's names for what our commands do, for controllers that were written for QEMU (Xen's libxl, COLO managers).

Source: qapi/migration.json. They mean what QEMU's mean: a failover is one to
the checkpoint. Two differences, both defects of QEMU's: an error of a failover
is answered, and stopping a secondary without a failover succeeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import UNSET

from tcmu_replication.control.command import Nothing
from tcmu_replication.control.schema import Failover, Start, Stop
from tcmu_replication.control.server import Emit, Handler
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu.schema import ColoExit, ColoStatus, ErrorStatus, SetReplication


class ControllersStart(Start, frozen=True, kw_only=True):
    """Start, as QEMU means it: who controls both ends vouches for the disks, and what is done stays done."""


class ControllersCheckpoint(Nothing, frozen=True, kw_only=True):
    """Checkpoint, as QEMU means it: of this end alone."""


FAILOVER = Failover(to="checkpoint", force=True)
"""QEMU's failover: it is not asked whether the primary lives, since the controller decides."""
_NUMBER = {"primary": 0, "secondary": 1}
_COLO: dict[str, tuple[bool, Literal["none", "request", "error", "processing"]]] = {
    "none": (False, "none"),
    "running": (True, "none"),
    "failover": (True, "processing"),
    "failover-failed": (False, "error"),
    "done": (False, "request"),
}
"""For each stage whether this end has a COLO mode, and the reason why it lost it."""


def names(handlers: Mapping[str, Handler], emit: Emit) -> Mapping[str, Handler]:
    """QEMU's commands in terms of a resource's `handlers`; `emit` sends an event."""

    async def set_replication(arguments: SetReplication, session: Session) -> None:
        status = await handlers["query-status"](Nothing(), session)
        if not arguments.enable:
            # A controller that speaks QEMU's language knows which end it talks to: on a primary it is a stop.
            if arguments.failover is True and status.mode == "secondary":
                await handlers["failover"](FAILOVER, session)
            else:
                await handlers["stop-replication"](Stop(force=True), session)
            return
        if arguments.failover is not UNSET:
            raise Error(Kind.BAD_REQUEST, "Parameter 'failover' is only for stopping replication")
        mode = "primary" if arguments.primary else "secondary"
        if status.stage == "none" and status.mode != mode:
            raise Error(
                Kind.INVALID_STATE,
                "The parameter mode's value is invalid, "
                f"needs {_NUMBER[status.mode]}, but got {_NUMBER[mode]}",
            )
        await handlers["start"](ControllersStart(), session)

    async def query_replication_status(arguments: Nothing, session: Session) -> ErrorStatus:
        """QEMU's text ends where our reason begins."""
        result: ErrorStatus = await handlers["query-errors"](arguments, session)
        if result.desc is UNSET:
            return result
        return ErrorStatus(error=result.error, desc=result.desc.partition(": ")[0])

    async def do_checkpoint(arguments: Nothing, session: Session) -> None:
        await handlers["checkpoint"](ControllersCheckpoint(), session)

    async def query_colo_status(arguments: Nothing, session: Session) -> ColoStatus:
        """As QEMU's: the last mode is set as soon as there is one."""
        status = await handlers["query-status"](arguments, session)
        active, reason = _COLO[status.stage]
        mode: Literal["primary", "secondary"] = status.mode
        return ColoStatus(
            mode=mode if active else "none",
            last_mode="none" if status.stage == "none" else mode,
            reason=reason,
        )

    async def lost_heartbeat(arguments: Nothing, session: Session) -> None:
        status = await handlers["query-status"](arguments, session)
        if status.stage == "failover":
            raise Error(Kind.INVALID_STATE, "COLO failover is already activated")
        if status.stage != "running":
            raise Error(Kind.INVALID_STATE, "The feature 'colo' is not enabled")
        if status.mode == "primary":
            await handlers["stop-replication"](Stop(force=True), session)
        else:
            await handlers["failover"](FAILOVER, session)
        emit("COLO_EXIT", ColoExit(mode=status.mode, reason="request"))

    return {
        "query-colo-status": query_colo_status,
        "x-colo-lost-heartbeat": lost_heartbeat,
        "xen-set-replication": set_replication,
        "query-xen-replication-status": query_replication_status,
        "xen-colo-do-checkpoint": do_checkpoint,
    }
