"""QEMU's names for what our commands do, for controllers that were written for QEMU (Xen's libxl, COLO managers).

Source: qapi/migration.json. They mean what QEMU's mean: a failover is one to
the checkpoint. Two differences, both defects of QEMU's: an error of a failover
is answered, and stopping a secondary without a failover succeeds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec import UNSET

from tcmu_replication.control.command import Nothing
from tcmu_replication.control.qemu_schema import ErrorStatus, SetReplication
from tcmu_replication.control.schema import Failover, Start
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind

Handler = Callable[[Any, Session], Awaitable[Any]]

NEEDED = {"query-status", "start", "checkpoint", "failover", "stop", "query-errors"}
_NUMBER = {"primary": 0, "secondary": 1}


def names(handlers: Mapping[str, Handler]) -> dict[str, Handler]:
    """QEMU's commands in terms of a worker's `handlers`; none if these are not a resource's."""
    if not set(handlers) >= NEEDED:
        return {}

    async def set_replication(arguments: SetReplication, session: Session) -> None:
        if not arguments.enable:
            if arguments.failover is True:
                await handlers["failover"](Failover(to="checkpoint"), session)
            else:
                await handlers["stop"](Nothing(), session)
            return
        if arguments.failover is not UNSET:
            raise Error(Kind.BAD_REQUEST, "Parameter 'failover' is only for stopping replication")
        status = await handlers["query-status"](Nothing(), session)
        mode = "primary" if arguments.primary else "secondary"
        if status.stage == "none" and status.mode != mode:
            raise Error(
                Kind.INVALID_STATE,
                "The parameter mode's value is invalid, "
                f"needs {_NUMBER[status.mode]}, but got {_NUMBER[mode]}",
            )
        await handlers["start"](Start(), session)

    async def query_replication_status(arguments: Nothing, session: Session) -> ErrorStatus:
        """QEMU's text ends where our reason begins."""
        result: ErrorStatus = await handlers["query-errors"](arguments, session)
        if result.desc is UNSET:
            return result
        return ErrorStatus(error=result.error, desc=result.desc.partition(": ")[0])

    async def do_checkpoint(arguments: Nothing, session: Session) -> None:
        await handlers["checkpoint"](arguments, session)

    return {
        "xen-set-replication": set_replication,
        "query-xen-replication-status": query_replication_status,
        "xen-colo-do-checkpoint": do_checkpoint,
    }
