"""The handler's half of the command ring, in place and in batches.

    fetch() ... complete(), complete() ... publish() -> wake the kernel

`fetch` copies what it needs out of every new entry, because completions are
out of order: an answer always goes into the slot at the tail, whichever
command was queued there. The buffers of a command are views of the data area,
valid until its completion is published (or, completed with `keep`, until the
kernel is told to free them).

The ring opens nothing and wakes nobody; it needs only the shared memory. It
relies on x86-64's order of stores (entry before tail) and loads (head before
entry). One thread uses it.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from tcmu_replication.errors import Error, Kind
from tcmu_replication.tcmu import layout
from tcmu_replication.tcmu.layout import Capability, Opcode

REQUIRED = Capability.OUT_OF_ORDER | Capability.READ_LEN
"""Without READ_LEN a short Data-In would hand out what was in the pages before."""

_USUAL_SIZE = layout.USUAL.size
_USUAL_COMMAND = _USUAL_SIZE | Opcode.COMMAND
_CDB, _CDB_LENGTHS, _VARIABLE = layout.COMMAND_SIZE, layout.CDB_LENGTHS, layout.VARIABLE_LENGTH
_HEAD, _TAIL = layout.HEAD_WORD, layout.TAIL_WORD
_RESPONSE, _RESPONSE_OFFSET = layout.RESPONSE, layout.RESPONSE_OFFSET


class Command:
    """A command taken from the ring.

    `buffers` are its `length` bytes of Data-Out or Data-In: the entry does not
    say which, the CDB does. `fault` is None, or says what is wrong with the
    entry: such a command has no buffers and must be failed. `deadline_s` and
    `abandoned` are for whoever runs it.
    """

    __slots__ = ("abandoned", "buffers", "cdb", "cmd_id", "deadline_s", "fault", "length")

    def __init__(
        self, cmd_id: int, cdb: bytes, buffers: list[memoryview], length: int, fault: str | None = None
    ) -> None:
        self.cmd_id = cmd_id
        self.cdb = cdb
        self.buffers = buffers
        self.length = length
        self.fault = fault
        self.deadline_s = 0.0
        self.abandoned = False


class Abort(NamedTuple):
    """A task-management entry: the kernel aborted these commands and waits until each is completed."""

    kind: int
    cmd_ids: tuple[int, ...]


class Ring:
    """Mailbox, ring and data area over `memory`, the whole mapping (writable, format "B").

    Raises `Error`: UNSUPPORTED for a mailbox version or kernel that cannot be
    used, PEER_LIED for a ring that is not inside the memory. It begins at
    cmd_tail: what an earlier handler left there is fetched again, unless the
    ring was reset before.
    """

    def __init__(self, memory: memoryview) -> None:
        if len(memory) < layout.MAILBOX_SIZE:
            raise Error(Kind.PEER_LIED, f"a mapping of {len(memory)} bytes has no room for a mailbox")
        version, flags, offset, size, head, tail = layout.MAILBOX.unpack_from(memory)
        if version != layout.MAILBOX_VERSION:
            expected = f"this handler speaks {layout.MAILBOX_VERSION} (Linux 4.1 and newer)"
            raise Error(Kind.UNSUPPORTED, f"the mailbox has version {version}; {expected}")
        self.capabilities = Capability(flags)
        missing = REQUIRED & ~self.capabilities
        if missing:
            raise Error(Kind.UNSUPPORTED, f"TCMU of this kernel lacks {missing!r}; use 4.18 or newer")
        if offset < layout.MAILBOX_SIZE or offset % 8 or size % 8 or not 0 < size <= len(memory) - offset:
            found = f"a ring of {size} bytes at {offset}"
            raise Error(Kind.PEER_LIED, f"{found} is not inside a mapping of {len(memory)} bytes")
        self._memory = memory
        self._words = memory[: layout.MAILBOX_SIZE].cast("I")
        self._start, self._size = offset, size
        self._data, self._end = offset + size, len(memory)
        self._check_index(head)
        self._check_index(tail)
        self._index = self._tail = tail
        # Lengths of the entries from tail to index; negative where nobody waits for an answer.
        self._slots: deque[int] = deque()
        self.outstanding: dict[int, Command] = {}
        """Fetched and not completed, by cmd_id, in the order of arrival."""
        self.aborts: list[Abort] = []
        """Task-management entries that fetch() met; whoever acts on them empties it."""

    def fetch(self) -> list[Command]:
        """Every new command, in the order of the ring.

        Raises `Error` (PEER_LIED) at an entry after which the ring cannot be
        followed; those before it were returned. Only a reset helps then.
        """
        commands: list[Command] = []
        head, index = self._words[_HEAD], self._index
        if head == index:
            return commands
        self._check_index(head)
        start, size, memory, slots = self._start, self._size, self._memory, self._slots
        data, end, unpack, outstanding = self._data, self._end, layout.USUAL.unpack_from, self.outstanding
        try:
            while index != head:
                at = start + index
                limit = head if index < head else size
                command: Command | None
                # The one unpack must not look past the ring: the page there may not exist yet (SIGBUS).
                len_op = 0
                if index + _USUAL_SIZE <= limit:
                    len_op, cmd_id, vectors, bidi, cdb_at, base, span, cdb = unpack(memory, at)
                if (
                    len_op == _USUAL_COMMAND
                    and vectors == 1
                    and not bidi
                    and cdb_at == at + _CDB
                    and data <= base
                    and base + span <= end
                    and cdb[0] != _VARIABLE
                ):
                    length = _USUAL_SIZE
                    command = Command(cmd_id, cdb[: _CDB_LENGTHS[cdb[0]]], [memory[base : base + span]], span)
                else:
                    length, command = self._entry(at, start + limit)
                if command is None:
                    slots.append(-length)
                elif command.cmd_id in outstanding:
                    raise self._broken(at, f"cmd_id {command.cmd_id} is in use already")
                else:
                    slots.append(length)
                    outstanding[command.cmd_id] = command
                    commands.append(command)
                index += length
                if index == size:
                    index = 0
                self._index = index
        except Error:
            if not commands:
                raise
        return commands

    def complete(
        self, cmd_id: int, status: int, sense: bytes = b"", read_len: int = 0, keep: bool = False
    ) -> None:
        """Answer an outstanding command; the kernel sees it after publish().

        `status` is SAM's, `sense` goes with CHECK CONDITION (at most 96
        bytes). `read_len` > 0: only so many bytes of Data-In count. `keep`:
        its buffers stay ours until the kernel is told (KEEP_BUFFERS only).
        KeyError: it is not outstanding; a second answer would break the ring.
        """
        del self.outstanding[cmd_id]
        self._skip()
        tail = self._tail
        at = self._start + tail
        uflags = (layout.USE_READ_LEN if read_len else 0) | (layout.KEEP_BUFFERS if keep else 0)
        _RESPONSE.pack_into(self._memory, at + _RESPONSE_OFFSET, cmd_id, 0, uflags, status, read_len)
        if status:  # the request lies there: the kernel must not take it for sense data
            sense_at = at + layout.SENSE
            sense = sense[: layout.SENSE_LENGTH].ljust(layout.SENSE_LENGTH, b"\0")
            self._memory[sense_at : sense_at + layout.SENSE_LENGTH] = sense
        self._advance(self._slots.popleft())

    def publish(self) -> bool:
        """Show the kernel what was completed; True if it must be woken to see it."""
        self._skip()
        if self._tail == self._words[_TAIL]:
            return False
        self._words[_TAIL] = self._tail
        return True

    def release(self) -> None:
        """Let go of the memory; buffers handed out are not affected."""
        self._words.release()
        self._memory = memoryview(b"")

    def _skip(self) -> None:
        """Step over the slots at the tail that nobody answers: padding, task management, unknown."""
        slots = self._slots
        while slots and slots[0] < 0:
            self._advance(-slots.popleft())

    def _advance(self, length: int) -> None:
        tail = self._tail + length
        self._tail = tail if tail < self._size else 0

    def _check_index(self, index: int) -> None:
        if index >= self._size or index % layout.ALIGNMENT:
            raise Error(Kind.PEER_LIED, f"no entry of a ring of {self._size} bytes can start at {index}")

    def _broken(self, at: int, what: str) -> Error:
        return Error(Kind.PEER_LIED, f"ring offset {at - self._start}: {what}")

    def _entry(self, at: int, limit: int) -> tuple[int, Command | None]:
        """Length of the entry at `at`, which may not reach beyond `limit`, and its command if it is one."""
        len_op, cmd_id, _, uflags = layout.HEADER.unpack_from(self._memory, at)
        opcode, length = len_op & layout.OPCODE_MASK, len_op & ~layout.OPCODE_MASK
        if not layout.HEADER.size <= length <= limit - at:
            raise self._broken(at, f"an entry of {length} bytes, where there are {limit - at}")
        if opcode == Opcode.COMMAND:
            if length < layout.COMMAND_SIZE:
                raise self._broken(at, f"a command of {length} bytes has no room for its answer")
            return length, self._command(cmd_id, at, length)
        if opcode == Opcode.TASK_MANAGEMENT:
            self._abort(at, length)
        elif opcode != Opcode.PAD:
            self._memory[at + layout.HEADER.size - 1] = uflags | layout.UNKNOWN_OPCODE
        return length, None

    def _abort(self, at: int, length: int) -> None:
        room = (length - layout.COMMAND_IDS) // 2
        if room < 0:
            return
        _, _, kind, count = layout.TASK_MANAGEMENT.unpack_from(self._memory, at)
        first = at + layout.COMMAND_IDS
        cmd_ids = self._memory[first : first + 2 * min(count, room)].cast("H").tolist()
        self.aborts.append(Abort(kind, tuple(cmd_ids)))

    def _command(self, cmd_id: int, at: int, length: int) -> Command:
        """Any command entry, every field checked: one outside its area fails the command, not the ring."""
        _, _, vectors, bidi, cdb_at = layout.REQUEST.unpack_from(self._memory, at)
        if bidi:
            return Command(cmd_id, b"", [], 0, "bidirectional commands are not supported")
        if layout.IOVECS + layout.IOVEC.size * vectors > length:
            return Command(cmd_id, b"", [], 0, f"{vectors} iovecs do not fit an entry of {length} bytes")
        room = at + length - cdb_at
        if not at + layout.HEADER.size <= cdb_at < at + length:
            return Command(cmd_id, b"", [], 0, f"the CDB at {cdb_at} is outside its entry")
        opcode = self._memory[cdb_at]
        size = _CDB_LENGTHS[opcode]
        if opcode == _VARIABLE and room >= 8:
            size = 8 + self._memory[cdb_at + 7]
        if size > room:
            return Command(cmd_id, b"", [], 0, f"a CDB of {size} bytes at {cdb_at} runs out of its entry")
        buffers: list[memoryview] = []
        total = 0
        for base, span in layout.IOVEC.iter_unpack(
            self._memory[at + layout.IOVECS : at + layout.IOVECS + layout.IOVEC.size * vectors]
        ):
            if base < self._data or base + span > self._end:
                return Command(cmd_id, b"", [], 0, f"{span} bytes at {base} are outside the data area")
            if span:
                buffers.append(self._memory[base : base + span])
                total += span
        return Command(cmd_id, bytes(self._memory[cdb_at : cdb_at + size]), buffers, total)
