"""A run: every step on both sides, and after it nothing differs but what `differences` names."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tcmu_replication.replication import stages
from tcmu_replication.replication.stages import Stage
from tcmu_replication.units import BLOCK
from tests.interop.differential.differences import Difference
from tests.interop.differential.process import ProcessSide
from tests.interop.differential.sides import EngineSide, Outcome, QemuSide, Side, pieces
from tests.interop.differential.steps import (
    BAD,
    SECTOR,
    Command,
    Request,
    Requests,
    Sequence,
    Step,
    Verb,
)


class DisagreementError(AssertionError):
    """Where QEMU and ours part."""


Ours = EngineSide | ProcessSide


def differ(sequence: Sequence, directory: Path, ours_as: type[Ours] = EngineSide) -> set[Difference]:
    """Run a sequence on QEMU and on ours; the differences that it met. Raises `DisagreementError`."""
    theirs = directory / "qemu"
    ours = directory / "ours"
    theirs.mkdir()
    ours.mkdir()

    async def whole() -> set[Difference]:
        qemu_side = QemuSide(theirs, sequence)
        try:
            our_side = ours_as(ours, sequence)
            await our_side.open()
            try:
                return await Run(sequence, qemu_side, our_side).run()
            finally:
                await our_side.close()
        finally:
            qemu_side.close()

    return asyncio.run(whole())


class Run:
    """One sequence on the two sides."""

    def __init__(self, sequence: Sequence, theirs: Side, ours: Side) -> None:
        self.sequence = sequence
        self.theirs = theirs
        self.ours = ours
        self.met: set[Difference] = set()
        self._done: list[Step] = []
        self._mixed = False
        self._forward_failed = False

    async def run(self) -> set[Difference]:
        """All steps, or up to a failed commit and what follows it."""
        await self._compare()
        for step in self.sequence.steps:
            await self._step(step)
            if self.theirs.stage is Stage.FAILOVER_FAILED:
                await self._after_failure()
                break
        return self.met

    async def _after_failure(self) -> None:
        """Everything is refused, and the LUN goes on."""
        for command in (Command.START, Command.CHECKPOINT, Command.STOP, Command.GET_ERROR, Command.FAILOVER):
            await self._step(command)
        for number, offset in enumerate((0, BAD.start - BLOCK, BAD.stop, 2 * BAD.stop - SECTOR)):
            write = Request(Verb.OWN, offset, BLOCK, 1 << 40 | number)
            await self._step(Requests((write, write._replace(verb=Verb.READ, offset=BAD.start))))

    async def _step(self, step: Step) -> None:
        self._done.append(step)
        if isinstance(step, Requests):
            await self._requests(step)
        else:
            await self._command(step)
        await self._compare()

    async def _command(self, command: Command) -> None:
        stage = self.theirs.stage
        self._mixed = command is Command.STOP and stage is Stage.RUNNING
        theirs = await self.theirs.command(command)
        ours = await self.ours.command(command)
        if command is Command.RESTART:
            self._forward_failed = False
        if theirs != ours and not self._allowed(command, stage, theirs, ours):
            raise self._disagreement(f"QEMU says {theirs!r}, ours says {ours!r}")

    def _allowed(self, command: Command, stage: Stage, theirs: str | None, ours: str | None) -> bool:
        """The rows of `Difference` that change an answer."""
        if command is Command.STOP and stage is Stage.RUNNING:
            return self._meet(Difference.STOP, (theirs, ours), (stages.BACKUP_GONE, None))
        if command is Command.FAILOVER and stage in (Stage.NONE, Stage.FAILOVER_FAILED):
            return self._meet(Difference.FAILOVER_ERRORS, (theirs, ours), (None, stages.NOT_RUNNING))
        if command is Command.GET_ERROR and stage is Stage.RUNNING and self._forward_failed:
            return self._meet(Difference.SECONDARY_STATUS, (theirs, ours), (None, stages.IO_ERROR))
        if command is Command.GET_ERROR and stage is Stage.FAILOVER:
            return self._meet(Difference.COMMIT_SHOWS_AN_ERROR, (theirs, ours), (stages.IO_ERROR, None))
        return False

    def _meet(self, difference: Difference, found: object, expected: object) -> bool:
        self.met.add(difference)
        return found == expected

    async def _requests(self, step: Requests) -> None:
        theirs = await self.theirs.requests(step.requests)
        ours = await self.ours.requests(step.requests)
        for request, one, other in zip(step.requests, theirs, ours, strict=True):
            if one != other:
                raise self._disagreement(f"{request}: QEMU answers {_show(one)}, ours {_show(other)}")
            writes = request.verb in (Verb.FORWARD, Verb.FORWARD_ZERO)
            self._forward_failed |= writes and one.errno > 0
        trims = tuple(request for request in step.requests if request.verb.trims)
        if trims:
            await self._make_equal(trims)

    async def _make_equal(self, trims: tuple[Request, ...]) -> None:
        """QEMU ignores a trim, ours may make zeroes: check that, then write the range on both."""
        for trim in trims:
            self.met.add(Difference.TRIM_FORWARDED if trim.verb.forwarded else Difference.TRIM_OWN)
            read = trim._replace(verb=Verb.FORWARD_READ if trim.verb.forwarded else Verb.READ)
            (kept,) = await self.theirs.requests([read])
            (left,) = await self.ours.requests([read])
            for at in range(0, trim.length, SECTOR):
                sector = left.data[at : at + SECTOR]
                if sector not in (bytes(SECTOR), kept.data[at : at + SECTOR]):
                    raise self._disagreement(f"{trim}: neither kept nor zero at {at:#x}")
            write = trim._replace(verb=Verb.FORWARD if trim.verb.forwarded else Verb.OWN)
            for side in (self.theirs, self.ours):
                assert await side.requests([write]) == [Outcome(0)]

    async def _compare(self) -> None:
        """The stage, every byte of the LUN and, where it counts, of the disk."""
        if self.theirs.stage is Stage.FAILOVER:
            # The commit runs, or has just ended: the LUN counts, the disk is on its way.
            return await self._compare_luns()
        if self.theirs.stage is not self.ours.stage:
            raise self._disagreement(f"QEMU is in {self.theirs.stage}, ours in {self.ours.stage}")
        if self._mixed:
            await self._compare_with_the_disk()
        else:
            await self._compare_luns()
        if self.theirs.stage is Stage.FAILOVER_FAILED:
            self.met.add(Difference.FAILED_COMMIT)
        elif (theirs := self.theirs.disk()) != (ours := self.ours.disk()):
            raise self._disagreement(f"the disk differs: {_where(theirs, ours)}")
        return None

    async def _compare_with_the_disk(self) -> None:
        """What our stop promises, where QEMU's LUN is a mix."""
        disk = self.ours.disk()
        for piece, (offset, length) in zip(await self.ours.top(), pieces(self.sequence.fault), strict=True):
            if piece is not None and piece != disk[offset : offset + length]:
                raise self._disagreement(f"after stop our LUN is not the disk at {offset:#x}")

    async def _compare_luns(self) -> None:
        theirs, ours = await self.theirs.top(), await self.ours.top()
        for number, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            if one != other:
                raise self._disagreement(f"the LUN differs, piece {number}: {_where(one, other)}")

    def _disagreement(self, text: str) -> DisagreementError:
        steps = "\n  ".join(map(repr, self._done[-25:]))
        return DisagreementError(
            f"seed {self.sequence.seed}, step {len(self._done)} (cluster {self.sequence.cluster}, "
            f"durable {self.sequence.durable}, fault {self.sequence.fault.value}): {text}\n  {steps}"
        )


def _show(outcome: Outcome) -> str:
    return (
        f"errno {outcome.errno}"
        if outcome.errno
        else f"{len(outcome.data)} bytes {outcome.data[:16].hex()}..."
    )


def _where(theirs: bytes | None, ours: bytes | None) -> str:
    """The first sector that differs."""
    if theirs is None or ours is None:
        return f"QEMU {'fails' if theirs is None else 'reads'}, ours {'fails' if ours is None else 'reads'}"
    for at in range(0, max(len(theirs), len(ours)), SECTOR):
        one, other = theirs[at : at + SECTOR], ours[at : at + SECTOR]
        if one != other:
            return f"at {at:#x}: QEMU {one[:16].hex()}, ours {other[:16].hex()}"
    raise AssertionError("they are the same")
