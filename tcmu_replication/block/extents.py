"""What ranges are made of, put together from several answers."""

from __future__ import annotations

from collections.abc import Iterable

from tcmu_replication.block.node import Extent


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """The same range with alike neighbours as one."""
    found: list[Extent] = []
    for extent in extents:
        if found and found[-1][1:] == extent[1:]:
            found[-1] = extent._replace(length=found[-1].length + extent.length)
        else:
            found.append(extent)
    return found
