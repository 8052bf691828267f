"""What a secondary refuses to be promoted for: a primary that lives, and data that is known to be old."""

from __future__ import annotations

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication.pulse import Heard
from tcmu_replication.replication.record import Record


def refuse_while_primary_lives(name: str, peer: str, heard: Heard) -> None:
    """Raise `Error(CONFLICT)` if the primary `peer` was heard within the last seconds."""
    ago = heard.ago_s
    if ago is None or not heard.alive:
        return
    raise Error(
        Kind.CONFLICT,
        f"the primary of {name}, {peer}, lives: it was heard {ago:.1f} s ago, and counts as gone "
        f"{max(0.0, heard.dead_after_s - ago):.1f} s from now if it is not heard again. If {peer} "
        "is surely powered off: --fenced. To take over from a primary that lives, stop its initiators first; then "
        f"--force: {peer} stops serving when it hears of it, and what it had not acknowledged is lost. "
        "(A `switch` of the roles that loses nothing is not there yet.)",
    )


def refuse_what_is_old(record: Record, peer: str, *, latest: bool, told: bool) -> None:
    """Raise `Error(INVALID_STATE)` if this host knows that it has not what a failover promises.

    `told`: the primary has said since this process began what there is to know.
    """
    name, manifest = record.name, record.manifest
    last = f" The last forwarded write came at {manifest.last_forwarded}." if manifest.last_forwarded else ""
    if not latest:
        if manifest.paired and not manifest.verified:
            raise Error(
                Kind.INVALID_STATE,
                f"the disks of {name} were not found to be equal yet (start compares them): the checkpoint "
                f"may be an image that {peer} never had. If {peer} can be brought back, do "
                "that. --force uses it as it is",
            )
        if manifest.suspect is not None:
            raise Error(
                Kind.INVALID_STATE,
                f"the checkpoint of {name} may be damaged: {manifest.suspect}. If {peer} can "
                "serve, let it. --to latest does not need the checkpoint. --force uses it as it is: what it "
                "shows may be a mix of old and new data",
            )
        return
    to_checkpoint = (
        f" --to checkpoint gives the state of {manifest.checkpoint_at}, whole."
        if manifest.suspect is None and manifest.verified
        else ""
    )
    if manifest.outdated_at or record.error is not None:
        since = manifest.outdated_at or manifest.error_at
        raise Error(
            Kind.INVALID_STATE,
            f"this host's disk of {name} is outdated since {since}: {record.error}.{last} If "
            f"{peer} can be brought back, do that: it has what is missing here.{to_checkpoint} "
            f"--force serves what is here, and gives up what was acknowledged since {since}",
        )
    if manifest.paired and not manifest.verified:
        raise Error(
            Kind.INVALID_STATE,
            f"the disks of {name} were not found to be equal yet (start compares them): this one may have "
            f"old data anywhere. If {peer} can be brought back, do that. --force serves what is here",
        )
    if manifest.paired and not told:
        raise Error(
            Kind.INVALID_STATE,
            f"{peer} was not heard since the worker of {name} was started here: it may have gone "
            f"on without this host, and what it then acknowledged is not here.{last} If {peer} can be "
            f"brought back, do that: status says then whether anything is missing.{to_checkpoint} --force serves "
            "what is here",
        )
