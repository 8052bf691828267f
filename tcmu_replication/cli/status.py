"""`tcmu-replication status`: once, or again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tcmu_replication.cli import devices, exits, output
from tcmu_replication.cli.ask import STATUS_S, all_at_once, ask
from tcmu_replication.errors import Error, Kind

PERIOD_S = 0.5
Document = dict[str, Any]


def run(run_directory: Path, names: Sequence[str], *, detailed: bool, as_json: bool, watch: bool) -> None:
    """Show the status of `names`; the exit status says the worst of them.

    That is 5 if one may not be asked, else 4 if one is down or a LUN is not served,
    else 10 if one is outdated, else 8 if one is not protected, else 9 if that ends by
    itself. LUNs that are no resources are never protected,
    and do not count.
    """
    if watch:
        _watch(run_directory, names, detailed=detailed, as_json=as_json)
        return
    documents = fetch(run_directory, names, detailed=detailed)
    click.echo(_json(documents, detailed) if as_json else _text(documents, detailed))
    if status := _exit_status(documents):
        sys.exit(status)


def _exit_status(documents: Sequence[Document]) -> int:
    if any("backstore" in document or document.get("stage") == "down" for document in documents):
        return exits.ABSENT
    resources = [document for document in documents if "subtype" not in document]
    found = {
        exits.STATUS_OF_LEVEL.get(document["protection"]["level"], exits.UNPROTECTED)
        for document in resources
    }
    return next((status for status in exits.WORST_FIRST if status in found), 0)


def device_workers(run_directory: Path) -> list[str]:
    """The LUNs that are no resources: workers of UIO devices have sockets of their own."""
    return sorted(path.stem for path in run_directory.glob("uio*.sock"))


def fetch(run_directory: Path, names: Sequence[str], *, detailed: bool) -> list[Document]:
    """LUNs that nobody serves (schema.DeviceInfo), then the status documents of `names`.

    All are asked at the same time; a worker that fails to answer is "down". With `detailed` there is
    one name, and only its LUNs. Raises PERMISSION if this user may not ask: that says nothing of the resource.
    """
    answers = all_at_once(names, lambda name: ask(run_directory, name, "query-status", timeout=STATUS_S))
    for answer in answers:
        if answer.error is not None and answer.error.kind is Kind.PERMISSION:
            raise Error(Kind.PERMISSION, f"permission denied: only root may ask ({answer.error})")
    documents = [
        answer.result
        if answer.error is None
        else {"resource": answer.resource, "stage": "down", "error": str(answer.error)}
        for answer in answers
    ]
    return _each_once(devices.unserved(run_directory, names[0] if detailed else None), documents)


def _each_once(luns: Sequence[Document], documents: Sequence[Document]) -> list[Document]:
    """What a resource that is down says of itself is not told of its LUNs again; a LUN says more than its worker."""
    down = {document["resource"] for document in documents if document.get("stage") == "down"}
    shown = [lun for lun in luns if lun["worker"] not in down - {lun["device"]}]
    instead = {lun["device"] for lun in shown}
    return [*shown, *(document for document in documents if document.get("resource") not in instead)]


def _text(documents: Sequence[Document], detailed: bool) -> str:
    if detailed:
        return "\n\n".join(output.detail(document) for document in documents)
    return output.table(documents) if documents else "no resources on this host"


def _json(documents: Sequence[Document], detailed: bool, indent: int | None = 2) -> str:
    import json

    return json.dumps(_one(documents) if detailed else documents, indent=indent)


def _one(documents: Sequence[Document]) -> Document:
    """The document of one resource; LUNs of it that nobody serves are its member `unserved`."""
    *luns, document = documents
    return {**document, "unserved": luns} if luns else document


def _watch(run_directory: Path, names: Sequence[str], *, detailed: bool, as_json: bool) -> None:
    """On a terminal redraw in place; elsewhere print what has changed: JSON as a document a line."""
    before = ""
    try:
        while True:
            documents = fetch(run_directory, names, detailed=detailed)
            text = _json(documents, detailed, None) if as_json else _text(documents, detailed)
            if text != before:
                if not as_json:
                    click.clear()
                click.echo(text)
                before = text
            time.sleep(PERIOD_S)
    except KeyboardInterrupt:
        return
