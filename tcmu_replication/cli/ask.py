"""Ask workers: one, or all at once, over their control sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tcmu_replication.control.client import Client
from tcmu_replication.daemon.places import MANAGER, socket_path
from tcmu_replication.errors import Error, Kind

ANSWER_S = 60.0
"""A checkpoint waits for the writes in flight, and those for a lost peer (25 s at most)."""
STATUS_S = 5.0
"""Status is answered from memory."""
UNHEARD = (Kind.TIMED_OUT, Kind.PEER_LOST)
"""Somebody did not answer; who is to be found out."""


class Answer(NamedTuple):
    """What became of a command at one resource: a result or an error."""

    resource: str
    result: Any = None
    error: Error | None = None


def ask(
    run: Path, name: str, command: str, arguments: Mapping[str, Any] | None = None, timeout: float = ANSWER_S
) -> Any:
    """Give one worker a command and return its result; errors are named after the resource."""
    try:
        client = Client.unix(socket_path(run, name))
    except Error as error:
        raise Error(error.kind, f"{name}: {error}{_advice(run, name, error.kind)}") from error
    with client:
        try:
            return client.execute(command, arguments, timeout)
        except Error as error:
            said = _unheard(run, name, command, error) if error.kind in UNHEARD else str(error)
            raise Error(error.kind, f"{name}: {said}") from error


def attempt(name: str, call: Callable[[str], Any]) -> Answer:
    """One answer, whatever happens."""
    try:
        return Answer(name, call(name))
    except Error as error:
        return Answer(name, error=error)


def all_at_once(names: Sequence[str], call: Callable[[str], Any]) -> list[Answer]:
    """The answers of several resources, asked at the same time, in the order of `names`."""
    if len(names) < 2:
        return [attempt(name, call) for name in names]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(len(names), 32)) as pool:
        return list(pool.map(lambda name: attempt(name, call), names))


def workers(run: Path) -> dict[str, dict[str, Any]]:
    """What the manager knows of each worker (schema.WorkerInfo); empty if it does not answer."""
    try:
        with Client.unix(socket_path(run, MANAGER)) as client:
            return {row["name"]: row for row in client.execute("query-workers", timeout=STATUS_S)}
    except Error:
        return {}


def _unheard(run: Path, name: str, command: str, error: Error) -> str:
    """Who did not answer: the worker, or its peer, whom the worker has asked."""
    try:
        if command == "query-status":
            raise error
        with Client.unix(socket_path(run, name)) as client:
            link = client.execute("query-status", timeout=STATUS_S).get("link")
    except Error:
        return str(error) + _advice(run, name, error.kind)
    if not link:
        return str(error)
    there = f"see `tcmu-replication status {name}`, there"
    if link["state"] == "connected":
        return f"{link['peer']} does not answer ({error}); {there}"
    since = f" since {link['since']}" if link.get("since") else ""
    return (
        f"the link to {link['peer']} is down{since} ({error}). Expected {link['peer']} to be on and to serve {name}: "
        f"{there}; what to do here: `tcmu-replication status {name}`"
    )


def _advice(run: Path, name: str, kind: Kind) -> str:
    """What to do about a worker that does not answer."""
    if kind not in (Kind.TIMED_OUT, Kind.NOT_FOUND):
        return ""
    known = workers(run)
    row = known.get(name, {})
    if kind is Kind.TIMED_OUT and not row.get("down-since"):
        return f". The worker hangs; its log: `journalctl -u 'tcmu-replication*' --grep {name}`"
    if row:
        since = f" since {row['down-since']}" if row.get("down-since") else ""
        return f". The daemon says: {row['state']}{since}" + (f", {row['error']}" if row.get("error") else "")
    if known:
        return ". The daemon runs but has no such resource: see `tcmu-replication check`"
    return ". Is the daemon running? See `systemctl status 'tcmu-replication*'`"
