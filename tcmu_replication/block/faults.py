"""A filter that fails, tears or delays chosen calls on cue. For tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tcmu_replication.block.buffers import part, size
from tcmu_replication.block.node import Buffers, Node
from tcmu_replication.block.pending import Pending, attempt
from tcmu_replication.errors import Error, Kind


@dataclass
class Rule:
    """Which calls a fault meets: `operation` on a range that overlaps [`offset`, `end`), `count` times.

    `skip` calls that match are let through first. `met` counts those that the
    fault met.
    """

    operation: str
    offset: int
    end: int
    count: int
    skip: int
    kind: Kind | None
    torn_after: int
    met: int = 0
    held: list[Held] = field(default_factory=list)

    def release(self) -> None:
        """Answer every delayed call, in order."""
        held, self.held = self.held, []
        for call in held:
            call.release()

    def cancel(self) -> None:
        """Meet no more calls. What is delayed stays so until `release`."""
        self.count = 0


@dataclass
class Held:
    """A delayed call."""

    call: Callable[[], Pending | None]
    promised: Pending

    def release(self) -> None:
        """Make the call now and answer with its outcome."""
        error, pending = attempt(self.call)
        if pending is None:
            self.promised.complete(error)
        else:
            pending.then(lambda ended: self.promised.complete(ended.error, ended.value))


class Faults(Node):
    """Passes everything, but for the calls that a rule meets. The first rule that fits a call counts."""

    def __init__(self, child: Node, *, name: str = "faults") -> None:
        super().__init__(name, child.length, child, read_only=child.read_only)
        self._rules: list[Rule] = []

    def fail(
        self,
        operation: str,
        kind: Kind = Kind.IO,
        *,
        offset: int = 0,
        length: int | None = None,
        count: int = 1 << 62,
        skip: int = 0,
        torn_after: int = 0,
    ) -> Rule:
        """Let calls of `operation` ("read", "fetch", "write", "zero", "discard", "flush") fail.

        A write takes effect in its first `torn_after` bytes before it fails.
        """
        return self._add(operation, kind, offset, length, count, skip, torn_after)

    def delay(
        self,
        operation: str,
        *,
        offset: int = 0,
        length: int | None = None,
        count: int = 1 << 62,
        skip: int = 0,
        torn_after: int = 0,
    ) -> Rule:
        """Let calls return a `Pending` that ends at the rule's `release()`.

        The call is made only then; but the first `torn_after` bytes of a read
        or write at once, as a thread or a disk might do. "fetch" cannot wait.
        """
        assert operation != "fetch", "a fetch is answered at once"
        return self._add(operation, None, offset, length, count, skip, torn_after)

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`."""
        return self._pass("read", offset, size(buffers), self.child.read, buffers)

    def fetch(self, offset: int, length: int) -> memoryview:
        """See `Node.fetch`."""
        rule = self._rule("fetch", offset, length)
        if rule is not None:
            raise self._error(rule, offset, length)
        return self.child.fetch(offset, length)

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`."""
        return self._pass("write", offset, size(buffers), self.child.write, buffers, fua)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`."""
        return self._pass("zero", offset, length, self.child.zero, length, fua, unmap)

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`."""
        return self._pass("discard", offset, length, self.child.discard, length)

    def flush(self) -> Pending | None:
        """See `Node.flush`."""
        return self._pass("flush", 0, self.length, lambda _: self.child.flush())

    def _add(
        self,
        operation: str,
        kind: Kind | None,
        offset: int,
        length: int | None,
        count: int,
        skip: int,
        torn: int,
    ) -> Rule:
        end = self.length if length is None else offset + length
        self._rules.append(Rule(operation, offset, end, count, skip, kind, torn))
        return self._rules[-1]

    def _rule(self, operation: str, offset: int, length: int) -> Rule | None:
        for rule in self._rules:
            if (
                rule.operation == operation
                and rule.count
                and offset < rule.end
                and rule.offset < offset + length
            ):
                if rule.skip:
                    rule.skip -= 1
                    return None
                rule.count -= 1
                rule.met += 1
                return rule
        return None

    def _pass(
        self, operation: str, offset: int, length: int, call: Callable[..., Pending | None], *args: Any
    ) -> Pending | None:
        rule = self._rule(operation, offset, length)
        if rule is None:
            return call(offset, *args)
        if rule.torn_after and operation in ("read", "write"):
            call(offset, part(args[0], 0, rule.torn_after))
            if rule.kind is None:
                args = (part(args[0], rule.torn_after, length), *args[1:])
                offset += min(rule.torn_after, length)
        if rule.kind is not None:
            raise self._error(rule, offset, length)
        rule.held.append(Held(partial(call, offset, *args), Pending()))
        return rule.held[-1].promised

    def _error(self, rule: Rule, offset: int, length: int) -> Error:
        assert rule.kind is not None
        return Error(rule.kind, f"{self.name}: {rule.operation} fails on cue", offset=offset, length=length)
