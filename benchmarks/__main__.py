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
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks import images, limits, machine, picture, report, ring, scale, work
from benchmarks.rows import Sample
from benchmarks.scale import Scale

SCALES = {"full": scale.FULL, "quick": scale.QUICK, "tiny": scale.TINY}
PRIORITY = -15


@click.command()
@click.option("--scale", "name", type=click.Choice(list(SCALES)), default="full", help="How much work.")
@click.option("--only", help="Groups to run, separated by commas; see work.py. Default: all.")
@click.option("--rounds", type=int, help="How often each side runs each group.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-results"), help="A directory.")
def main(name: str, only: str | None, rounds: int | None, out: Path) -> None:
    """Compare QEMU's replication with ours, and both with the machine's limits."""
    chosen = SCALES[name] if rounds is None else SCALES[name]._replace(rounds=rounds)
    facts = machine.facts() | {"scale": name} | chosen._asdict()
    samples = []
    for sample in run(chosen, None if only is None else set(only.split(","))):
        samples.append(sample)
        _progress(sample)
    found = report.lines(samples, chosen)
    out.mkdir(exist_ok=True)
    report.save(out / "results.json", facts, found, samples)
    (out / "results.md").write_text(report.markdown(found))
    picture.draw(out / "performance.svg", found, _subtitle(facts))
    report.show(found)
    click.echo(f"{out}/results.json, results.md, performance.svg")


def run(chosen: Scale, only: set[str] | None = None) -> Iterator[Sample]:
    """Every measurement, as it is made."""
    for turn in range(chosen.rounds):
        for group, measure in work.COMPARED.items():
            # Who goes first changes, so that neither always finds the machine warm.
            for side in ("QEMU", "ours") if turn % 2 == 0 else ("ours", "QEMU"):
                if only is None or group in only:
                    with images.directory() as directory:
                        yield from measure(side, directory, chosen, turn)
        for group, (measure, times) in work.OURS.items():
            if (only is None or group in only) and turn < times(chosen):
                with images.directory() as directory:
                    yield from measure("ours", directory, chosen, turn)
        for group, alone in (("ring", ring.measure), ("limits", limits.measure)):
            if only is None or group in only:
                with images.directory() as directory:
                    yield from alone(directory, chosen)


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
