"""How answers are shown: tables for people (rich on a terminal, plain text elsewhere), JSON for machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from tcmu_replication.units import format_size

if TYPE_CHECKING:
    from rich.table import Table

HEADERS = ("resource", "role", "protected", "since", "link", "out of sync")
LUN_HEADERS = ("device", "backstore", "config", "served", "since", "worker")
WRAPPED = ("resource", "role", "backstore", "config", "worker")
PROTECTED, UNPROTECTED, UNKNOWN = "yes", "NO", "-"
GOOD, BAD, BUSY = "green", "red", "yellow"
COLOURS = {
    PROTECTED: GOOD,
    UNPROTECTED: BAD,
    "down": BAD,
    "connected": GOOD,
    "connecting": BUSY,
    "waiting": BUSY,
    "lost": BAD,
    "not served": BAD,
    "starting": BUSY,
}
WIDTH = 80
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

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for header in headers:
        table.add_column(header, no_wrap=header not in WRAPPED, min_width=len(header), overflow="fold")
    for row in lines:
        table.add_row(*(Text(cell, COLOURS.get(cell, "")) for cell in row))
    return table


def folded(text: str, indent: str, stream: TextIO | None = None) -> str:
    """For a terminal lines of at most `WIDTH`, where the words allow it: a path stays whole; elsewhere one line.

    `stream` is where it goes: standard output, or another.
    """
    if not (stream or sys.stdout).isatty():
        return indent + text
    import textwrap

    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(documents: Sequence[dict[str, Any]]) -> str:
    """Several resources, for where standard output goes: drawn on a terminal, else plain.

    Below the table is what is wrong with each that is not protected, and what to do.
    """
    return _with_trouble(_table(rows(documents), HEADERS), documents)


def luns(documents: Sequence[dict[str, Any]]) -> str:
    """LUNs (schema.DeviceInfo) in the same way; below the table is why those are not served that are not."""
    return _with_trouble(_table([_lun_row(lun) for lun in documents], LUN_HEADERS), documents)


def _with_trouble(whole: str, documents: Sequence[dict[str, Any]]) -> str:
    trouble = [words for document in documents if (words := _trouble(document))]
    return "\n\n".join([whole, *trouble])


def _table(lines: Sequence[Row], headers: Row) -> str:
    if not sys.stdout.isatty():
        return plain(lines, headers)
    from rich.console import Console

    console = Console()
    with console.capture() as captured:
        console.print(rich_table(lines, headers))
    return captured.get().strip("\n")


def _trouble(document: dict[str, Any]) -> str:
    if "backstore" in document:
        return _unserved(document)
    if "subtype" in document:
        return folded(f"{document['device']}: {document['hangs']}", "") if document.get("hangs") else ""
    if document["stage"] == "down":
        return _red(folded(f"{document['resource']}: DOWN: {_bare(document)}", ""))
    hangs = [folded(f"{document['resource']}: {document['hangs']}", "")] if document.get("hangs") else []
    protection = document["protection"]
    told = [] if protection["protected"] else [verdict(document["resource"], protection)]
    return "\n".join([*told, *hangs])


def _unserved(lun: dict[str, Any]) -> str:
    """Why a LUN is not served, since when, and what to do; nothing of one that is."""
    if lun["state"] == "served":
        return ""
    ours = lun["state"] == "unserved"
    state = f"NOT SERVED since {_short(lun['since'])}" if ours else "not served"
    first = folded(f"{lun['device']} ({lun['backstore']}, {lun['config']}): {state}: {lun['reason']}", "")
    return "\n".join([_red(first) if ours else first, folded(f"what to do: {lun['advice']}", "  ")])


def verdict(name: str, protection: dict[str, Any]) -> str:
    """Protected or not, since when and why, and what to do."""
    since = f" since {_short(protection['since'])}" if protection.get("since") else ""
    state = "protected" if protection["protected"] else "NOT PROTECTED"
    first = folded(f"{name}: {state}{since}: {protection['words']}", "")
    lines = [first if protection["protected"] else _red(first)]
    if protection.get("advice"):
        lines.append(folded(f"what to do: {protection['advice']}", "  "))
    return "\n".join(lines)


def _red(text: str) -> str:
    import os

    import click

    plain_text = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if plain_text else click.style(text, fg=BAD)


def _bare(document: dict[str, Any]) -> str:
    """Its error, which begins with the resource's name as every error does."""
    error: str = document.get("error") or "no answer"
    return error.removeprefix(f"{document['resource']}: ")


def _short(time: str | None) -> str:
    """A time for people: "2026-01-02 03:04:05 UTC" of an ISO 8601 one in UTC."""
    return "-" if not time else f"{time[:19].replace('T', ' ')} UTC"


def detail(document: dict[str, Any]) -> str:
    """Everything about one resource: protected or not first, then the facts, a line each."""
    if document.get("stage") == "down" or "backstore" in document:
        return _trouble(document)
    if "subtype" in document:
        facts = {"handler": document["subtype"], "config": document["config"]}
        facts |= {"size": format_size(document["size"]), "error": _error(document) or "none"}
        facts |= {"worker": _worker(document)}
        return _lines(document["device"], document, facts)
    link, overlays, checkpoint = document["link"], document["overlays"], document.get("last-checkpoint")
    facts = {
        "role": f"{document['mode']} on {document['host']}",
        "stage": document["stage"],
        "epoch": f"{document['epoch']} of generation {document['generation'] or '(none)'}",
        "disk": f"{document['disk']}, {format_size(document['size'])}; the LUN serves {document['top']}",
        "link": _link(document),
        "peer": _peer(document),
        "heard": _times(
            {f"{link['peer']} at": link.get("heard"), "last write at": document.get("last-forwarded")}
        ),
        "overlays": f"active {format_size(overlays['active-bytes'])}, "
        f"hidden {format_size(overlays['hidden-bytes'])}",
        "out of sync": format_size(document["out-of-sync-bytes"]),
        "checkpoint": f"epoch {checkpoint['epoch']} at {checkpoint['at']}, "
        f"writes were held {checkpoint['pause-ms']:.1f} ms"
        if checkpoint
        else "none yet",
        "under way": _times({"a checkpoint, since": document.get("checkpoint-under-way-since")}),
        "error": _error(document) or "none",
        "worker": _worker(document),
    }
    if link["in-flight"]:
        facts["link"] += f", {link['in-flight']} in flight ({format_size(link['in-flight-bytes'])})"
    title = verdict(document["resource"], document["protection"])
    jobs = [folded(f"{'job':<12} {job_line(job)}", "  ") for job in document["jobs"]]
    return "\n".join([_lines(title, document, {k: v for k, v in facts.items() if v}), *jobs])


def _peer(document: dict[str, Any]) -> str:
    """The peer's software and the protocol in use; nothing before it was met."""
    software = document.get("peer-software")
    if not software:
        return ""
    if software.get("refusal"):
        return str(software["refusal"])
    version = software["version"] or "not told (from before hosts did)"
    return f"{document['link']['peer']}, version {version}, protocol {software['protocol']}"


def _times(times: dict[str, str | None]) -> str:
    return ", ".join(f"{what} {_short(at)}" for what, at in times.items() if at)


def job_line(job: dict[str, Any]) -> str:
    """A job with a bar: "commit [#####---------------]  25 %  64 MiB of 256 MiB, 12 MiB/s, running"."""
    done, whole = job["offset"], job["length"]
    part = done / whole if whole else 1.0
    bar = ("#" * int(part * BAR)).ljust(BAR, "-")
    speed = f", {format_size(job['speed'])}/s" if job["speed"] else ""
    speed += f", {job['seconds-left']:.0f} s left" if job.get("seconds-left") is not None else ""
    error = f": {job['error']}" if job.get("error") else ""
    sizes = f"{format_size(done)} of {format_size(whole)}"
    return f"{job['type']} [{bar}] {int(part * 100):3d} %  {sizes}{speed}, {job['status']}{error}"


def _error(document: dict[str, Any]) -> str:
    """What is wrong now comes before what is recorded."""
    return "; ".join(document[member] for member in ("hangs", "error") if document.get(member))


def _worker(document: dict[str, Any]) -> str:
    return f"process {document['pid']}, version {document['version']}"


def _lines(title: str, document: dict[str, Any], facts: dict[str, str]) -> str:
    lines = [title, *(folded(f"{label:<12} {value}", "  ") for label, value in facts.items())]
    lines += [
        folded(
            f"{row['type']:<12} {row['device']}: {row['commands']} commands, {row['in-flight']} in flight, "
            f"{row['errors']} failed",
            "  ",
        )
        for row in document["frontends"]
    ]
    return "\n".join(lines)


def _lun_row(lun: dict[str, Any]) -> Row:
    served = {"served": PROTECTED, "unserved": UNPROTECTED, "foreign": UNKNOWN}
    pid = f" ({lun['pid']})" if lun["pid"] is not None else ""
    return (
        lun["device"],
        lun["backstore"],
        lun["config"],
        served.get(lun["state"], lun["state"]),
        _short(lun["since"]).removesuffix(" UTC"),
        f"{lun['worker']}{pid}" if lun["worker"] is not None else "-",
    )


def _row(document: dict[str, Any]) -> Row:
    if "backstore" in document:
        since = _short(document["since"]).removesuffix(" UTC")
        return (f"{document['device']} {document['backstore']}", "LUN", UNPROTECTED, since, "not served", "-")
    if "subtype" in document:
        return (f"{document['device']} {document['config']}", document["subtype"], UNKNOWN, *("-",) * 3)
    if document["stage"] == "down":
        return (document["resource"], "-", UNPROTECTED, "-", "down", "-")
    protection, link = document["protection"], document["link"]
    return (
        document["resource"],
        document["mode"],
        PROTECTED if protection["protected"] else UNPROTECTED,
        _short(protection.get("since")).removesuffix(" UTC"),
        link["state"],
        format_size(document["out-of-sync-bytes"]),
    )


def _link(document: dict[str, Any]) -> str:
    link = document["link"]
    words = [link["state"], link["peer"], f"({link['reason']})" if link.get("reason") else ""]
    return " ".join(word for word in words if word)
