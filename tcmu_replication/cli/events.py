"""`tcmu-replication events`: what happens to resources, a line each, for as long as somebody reads."""

from __future__ import annotations

import datetime
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from tcmu_replication.cli.ask import STATUS_S
from tcmu_replication.control.client import Client
from tcmu_replication.daemon.places import socket_path
from tcmu_replication.errors import Error, Kind

RETRY_S = 1.0
"""The pause before a worker that does not answer is tried again."""
QUEUED = 1024
"""So many lines wait for a reader; then the followers wait too."""
_NATIVE = "REPLICATION_"


class Happened(NamedTuple):
    """`what`: exists, at the beginning and when a worker is back; down; or an event's name in lower case."""

    at: str
    resource: str
    what: str
    data: dict[str, Any]


def run(run_directory: Path, names: Sequence[str], *, now: bool, as_json: bool) -> None:
    """Print what is there of `names`, and then, unless `now`, what happens. Ends by Ctrl-C, or with its reader.

    Raises PERMISSION if this user may not ask.
    """
    found = (state(run_directory, name) for name in names) if now else follow(run_directory, names)
    try:
        for happened in found:
            click.echo(json.dumps(happened._asdict()) if as_json else line(happened))
    except KeyboardInterrupt:
        return


def line(happened: Happened) -> str:
    """As `drbdsetup events2` has it: time, what, whose, and name:value of what is known."""
    values = [
        f"{name}:{json.dumps(value) if isinstance(value, str) and ' ' in value else value}"
        for name, value in happened.data.items()
        if value is not None
    ]
    return " ".join([happened.at, happened.what, happened.resource, *values])


def state(run_directory: Path, name: str) -> Happened:
    """What a worker says of itself now. Raises PERMISSION."""
    try:
        with Client.unix(socket_path(run_directory, name)) as client:
            return _exists(name, client)
    except Error as error:
        return _down(name, error)


def follow(run_directory: Path, names: Sequence[str]) -> Iterator[Happened]:
    """All of them at once, until the iterator is closed. Raises PERMISSION."""
    happened: queue.Queue[Happened | Error] = queue.Queue(QUEUED)
    over = threading.Event()
    for name in names:
        threading.Thread(target=_follow, args=(run_directory, name, happened, over), daemon=True).start()
    try:
        while True:
            found = happened.get()
            if isinstance(found, Error):
                raise found
            yield found
    finally:
        over.set()


def _follow(
    run_directory: Path, name: str, happened: queue.Queue[Happened | Error], over: threading.Event
) -> None:
    """One worker: connect, and again when it has gone. That it is down is said once."""
    down = False
    while not over.is_set():
        try:
            with Client.unix(socket_path(run_directory, name)) as client:
                happened.put(_exists(name, client))
                down = False
                while True:
                    event = client.next_event()
                    happened.put(Happened(_time(event), name, _name(event), event.get("data", {})))
        except Error as error:
            try:
                found = _down(name, error)
            except Error as refused:
                happened.put(refused)
                return
            if not down:
                happened.put(found)
            down = True
        over.wait(RETRY_S)


def _exists(name: str, client: Client) -> Happened:
    status = client.execute("query-status", timeout=STATUS_S)
    protection, link = status["protection"], status["link"]
    data = {
        "role": status["mode"],
        "stage": status["stage"],
        "protection": protection["level"],
        "link": link["state"],
        "peer": link.get("peer"),
        "epoch": status["epoch"],
        "out-of-sync-bytes": status["out-of-sync-bytes"],
        "error": status.get("error"),
    }
    return Happened(_now(), name, "exists", data)


def _down(name: str, error: Error) -> Happened:
    if error.kind is Kind.PERMISSION:
        raise Error(Kind.PERMISSION, f"permission denied: only root may ask ({error})")
    return Happened(_now(), name, "down", {"reason": str(error)})


def _name(event: dict[str, Any]) -> str:
    return str(event["event"]).removeprefix(_NATIVE).lower().replace("_", "-")


def _time(event: dict[str, Any]) -> str:
    stamp = event["timestamp"]
    return _written(stamp["seconds"] + stamp["microseconds"] / 1e6)


def _now() -> str:
    return _written(time.time())


def _written(seconds: float) -> str:
    then = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return then.isoformat(timespec="milliseconds").replace("+00:00", "Z")
