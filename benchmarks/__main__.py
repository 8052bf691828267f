"""QEMU's replication and ours side by side, in one run: `python -m benchmarks` (as root; see docs/performance.md).

The sides alternate, round by round, on fresh images on tmpfs. Everything runs
at a raised priority, client and servers alike, so that what else the machine
does disturbs less.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import click

from benchmarks import activity, images, limits, machine, picture, report, ring, scale, work
from benchmarks.memory import Memory
from benchmarks.rows import Sample
from benchmarks.scale import Scale
from benchmarks.turn import Turn
from tcmu_replication.block import space

SCALES = {"full": scale.FULL, "quick": scale.QUICK, "tiny": scale.TINY}
PRIORITY = -15


def _every(scale: Scale) -> int:
    return scale.rounds


GROUPS: dict[str, tuple[Callable[[Turn], Iterable[Sample]], Callable[[Scale], int]]] = {
    **{name: (measure, _every) for name, measure in work.COMPARED.items()},
    **work.OURS,
    "activity": (activity.measure, _every),
    "ring": (ring.measure, _every),
    "limits": (limits.measure, _every),
}
"""What is measured, and in how many of the rounds."""
ON_DISK = {"durable", "activity"}
"""Groups that need a real file system."""


@click.command()
@click.option("--scale", "name", type=click.Choice(list(SCALES)), default="full", help="How much work.")
@click.option("--only", help=f"Groups to run, separated by commas: {', '.join(GROUPS)}. Default: all.")
@click.option("--rounds", type=int, help="How often each side runs each group.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-results"), help="A directory.")
@click.option(
    "--disk-directory",
    "disks",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path.cwd,
    help="Where images lie that must be on a disk. Default: here.",
)
def main(name: str, only: str | None, rounds: int | None, out: Path, disks: Path) -> None:
    """Compare QEMU's replication with ours, and both with the machine's limits."""
    chosen = SCALES[name] if rounds is None else SCALES[name]._replace(rounds=rounds)
    facts = machine.facts() | {"scale": name} | chosen._asdict()
    groups = set(GROUPS) if only is None else set(only.split(","))
    if groups & ON_DISK and space.in_memory(str(disks)):
        click.echo(
            f"no group {' or '.join(sorted(groups & ON_DISK))}: {disks} is in memory; name a directory with "
            "--disk-directory",
            err=True,
        )
        groups -= ON_DISK
    samples = []
    for sample in run(chosen, groups, disks):
        samples.append(sample)
        _progress(sample)
    found = report.lines(samples, chosen)
    out.mkdir(exist_ok=True)
    report.save(out / "results.json", facts, found, samples)
    (out / "results.md").write_text(report.markdown(found))
    picture.draw(out / "performance.svg", found, _subtitle(facts))
    report.show(found)
    click.echo(f"{out}/results.json, results.md, performance.svg")


def run(chosen: Scale, groups: Collection[str], disks: Path) -> Iterator[Sample]:
    """Every measurement, as it is made."""
    with images.directory() as root, Memory() as memory:
        (root / images.STOCK).mkdir()
        for number in range(chosen.rounds):
            for name, (measure, times) in GROUPS.items():
                if name in groups and number < times(chosen):
                    for side in _order(name, number):
                        with images.directory(root) as directory:
                            yield from measure(Turn(side, directory, disks, chosen, number, memory))


def _order(group: str, number: int) -> tuple[str, ...]:
    """Who runs a group. Who goes first changes, so that neither always finds the machine warm."""
    if group not in work.COMPARED:
        return ("ours",)
    return ("QEMU", "ours") if number % 2 == 0 else ("ours", "QEMU")


def _progress(sample: Sample) -> None:
    cpu = "" if sample.cpu_us is None else f"{sample.cpu_us:10.1f} us CPU"
    click.echo(
        f"{time.strftime('%T')} {sample.row:20} {sample.side:6} {sample.value:12,.1f}{cpu}", file=sys.stderr
    )


def _subtitle(facts: dict[str, object]) -> str:
    return (
        f"{facts['processor']}, {facts['processors']} processors, Linux {facts['kernel']}, "
        f"Python {facts['python']}, {str(facts['qemu']).partition(' (')[0]}"
    )


@contextlib.contextmanager
def first_served() -> Iterator[None]:
    """Give this process and its children precedence, as far as allowed.

    With autogroups (sched(7)) niceness counts within a session only, and a session has its own.
    """
    autogroup = Path("/proc/self/autogroup")
    with contextlib.suppress(OSError):
        os.nice(PRIORITY)
    with contextlib.suppress(OSError):
        autogroup.write_text(str(PRIORITY))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            autogroup.write_text("0")


if __name__ == "__main__":
    with first_served():
        main()
