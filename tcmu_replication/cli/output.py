"""How answers are shown: tables for people (rich on a terminal, plain text elsewhere), JSON for machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tcmu_replication.units import format_size

if TYPE_CHECKING:
    from rich.table import Table

HEADERS = ("resource", "mode", "stage", "epoch", "link", "in flight", "dirty", "job", "error")
WRAPPED = ("in flight", "link", "job", "error")
GOOD, BAD, BUSY = "green", "red", "yellow"
STAGE_COLOUR = {"running": GOOD, "done": GOOD, "failover": BUSY, "failover-failed": BAD, "down": BAD}
LINK_COLOUR = {"connected": GOOD, "connecting": BUSY, "waiting": BUSY, "lost": BAD}
BAR = 20

Row = tuple[str, ...]


def rows(documents: Sequence[dict[str, Any]]) -> list[Row]:
    """A line of HEADERS per status document."""
    return [_row(document) for document in documents]


def plain(lines: Sequence[Row], headers: Row = HEADERS) -> str:
    """A table in plain text, aligned, without a trailing blank."""
    whole = [tuple(header.upper() for header in headers), *lines]
    widths = [max(len(row[column]) for row in whole) for column in range(len(headers))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in whole
    )


def rich_table(lines: Sequence[Row], headers: Row = HEADERS) -> Table:
    """The same table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for header in headers:
        width = max(LINK_COLOUR, key=len) if header == "link" else header.split(" ")[-1]
        table.add_column(header, no_wrap=header not in WRAPPED, min_width=len(width), overflow="fold")
    colours = STAGE_COLOUR | LINK_COLOUR
    for row in lines:
        cells = [Text(cell, colours.get(cell.split(" ")[0], "")) for cell in row]
        if row[-1] != "-":
            cells[-1].stylize(BAD)
        table.add_row(*cells)
    return table


def table(documents: Sequence[dict[str, Any]]) -> str:
    """Several resources, for where standard output goes: drawn on a terminal, else plain."""
    if not sys.stdout.isatty():
        return plain(rows(documents))
    from rich.console import Console

    console = Console()
    with console.capture() as captured:
        console.print(rich_table(rows(documents)))
    return captured.get().rstrip("\n")


def detail(document: dict[str, Any]) -> str:
    """Everything about one resource, a line each."""
    if document.get("stage") == "down":
        return f"{document['resource']}: down\n  error        {document['error']}"
    if "subtype" in document:
        facts = {"handler": document["subtype"], "config": document["config"]}
        facts |= {"size": format_size(document["size"]), "worker": _worker(document)}
        return _lines(document["device"], document, facts)
    link, overlays, checkpoint = document["link"], document["overlays"], document.get("last-checkpoint")
    facts = {
        "mode": f"{document['mode']} on {document['host']}",
        "stage": document["stage"],
        "epoch": f"{document['epoch']} of generation {document['generation'] or '(none)'}",
        "disk": f"{document['disk']}, {format_size(document['size'])}; the LUN serves {document['top']}",
        "link": _link(document),
        "overlays": f"active {format_size(overlays['active-bytes'])}, "
        f"hidden {format_size(overlays['hidden-bytes'])}",
        "out of sync": format_size(document["out-of-sync-bytes"]),
        "checkpoint": f"epoch {checkpoint['epoch']} at {checkpoint['at']}, "
        f"writes were held {checkpoint['pause-ms']:.1f} ms"
        if checkpoint
        else "none yet",
        "error": _error(document) or "none",
        "worker": _worker(document),
    }
    if link["in-flight"]:
        facts["link"] += f", {link['in-flight']} in flight ({format_size(link['in-flight-bytes'])})"
    title = f"{document['resource']}: {document['stage']}"
    jobs = [f"  {'job':<12} {job_line(job)}" for job in document["jobs"]]
    return "\n".join([_lines(title, document, facts), *jobs])


def job_line(job: dict[str, Any]) -> str:
    """A job with a bar: "commit [#####---------------]  25 %  64 MiB of 256 MiB, 12 MiB/s, running"."""
    done, whole = job["offset"], job["length"]
    part = done / whole if whole else 1.0
    bar = ("#" * int(part * BAR)).ljust(BAR, "-")
    speed = f", {format_size(job['speed'])}/s" if job["speed"] else ""
    error = f": {job['error']}" if job.get("error") else ""
    sizes = f"{format_size(done)} of {format_size(whole)}"
    return f"{job['type']} [{bar}] {int(part * 100):3d} %  {sizes}{speed}, {job['status']}{error}"


def _error(document: dict[str, Any]) -> str:
    """What is wrong now comes before what is recorded."""
    return "; ".join(document[member] for member in ("hangs", "error") if document.get(member))


def _worker(document: dict[str, Any]) -> str:
    return f"process {document['pid']}, version {document['version']}"


def _lines(title: str, document: dict[str, Any], facts: dict[str, str]) -> str:
    lines = [title, *(f"  {label:<12} {value}" for label, value in facts.items())]
    lines += [
        f"  {row['type']:<12} {row['device']}: {row['commands']} commands, {row['in-flight']} in flight, "
        f"{row['errors']} failed"
        for row in document["frontends"]
    ]
    return "\n".join(lines)


def _row(document: dict[str, Any]) -> Row:
    if "subtype" in document:
        return (f"{document['device']} {document['config']}", document["subtype"], *("-",) * 7)
    if document["stage"] == "down":
        return (document["resource"], "-", "down", "-", "-", "-", "-", "-", document["error"] or "-")
    dirty = document["overlays"]["active-bytes"] + document["overlays"]["hidden-bytes"]
    dirty = dirty if document["mode"] == "secondary" else document["out-of-sync-bytes"]
    jobs = ", ".join(f"{job['type']} {_percent(job)} %" for job in document["jobs"])
    return (
        document["resource"],
        document["mode"],
        document["stage"],
        str(document["epoch"]),
        _link(document),
        str(document["link"]["in-flight"]),
        format_size(dirty),
        jobs or "-",
        _error(document) or "-",
    )


def _link(document: dict[str, Any]) -> str:
    link = document["link"]
    words = [link["state"], link["peer"], f"({link['reason']})" if link.get("reason") else ""]
    return " ".join(word for word in words if word)


def _percent(job: dict[str, Any]) -> int:
    return 100 * job["offset"] // job["length"] if job["length"] else 100
