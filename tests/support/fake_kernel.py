"""The kernel's half of a TCMU device, over ordinary shared memory: no root, no module, no device.

It queues commands as target_core_user does (entries, padding at the wrap, one
iovec per run of adjacent blocks, blocks that are recycled and not zeroed,
commands that wait while ring or data area are full), and takes completions in
the order of the slots, by cmd_id. What would mark the kernel's ring as broken
raises `BrokenRingError` here. `open()` gives the handler's side, a real uio.Device.

    kernel = FakeKernel()
    token = kernel.queue(cdb, in_length=4096); kernel.kick()
    ... the handler works ...
    kernel.pump(); kernel.results[token]

It has the methods of configfs.Backstore that a frontend uses, so it serves as
that too. On an event loop, `attach(loop)` does the pumping.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from tcmu_replication.tcmu import layout, uio
from tcmu_replication.tcmu.layout import Capability, Opcode

BLOCK = 4096
ALL = Capability.OUT_OF_ORDER | Capability.READ_LEN | Capability.TASK_MANAGEMENT | Capability.KEEP_BUFFERS
CHECK_CONDITION, BUSY = 0x02, 0x08
TIMED_OUT = bytes((0x70, 0, 0x02, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x08, 0, 0, 0, 0, 0))

Spoil = Callable[[bytearray], None]


class BrokenRingError(AssertionError):
    """The handler broke the protocol: the real kernel would fail every command from now on."""


class Result(NamedTuple):
    """What the initiator gets: status, sense (CHECK CONDITION only), Data-In without the residual.

    Data-In is what target_core_user copies to the initiator's buffer, whatever the status is: loopback's initiator
    has that buffer. iSCSI sends nothing of it with a status that is not GOOD.
    """

    status: int
    sense: bytes
    data: bytes


class _Request(NamedTuple):
    token: int
    cdb: bytes
    data_out: bytes
    in_length: int
    bidi: bool
    spoil: Spoil | None


class _Queued:
    __slots__ = ("blocks", "expired", "in_length", "kept", "token", "vectors")

    def __init__(self, token: int, blocks: list[int], vectors: list[tuple[int, int]], in_length: int) -> None:
        self.token, self.blocks, self.vectors, self.in_length = token, blocks, vectors, in_length
        self.expired = self.kept = False


class FakeKernel:
    """One device. `ring_size` is a multiple of 8, `data_size` of 4 KiB; `scatter` mixes the free blocks."""

    def __init__(
        self,
        ring_size: int = 64 * 1024 - layout.MAILBOX_SIZE,
        data_size: int = 4 << 20,
        *,
        capabilities: Capability = ALL,
        scatter: random.Random | None = None,
        time_out_s: int = 30,
    ) -> None:
        self.ring_size = ring_size
        self.data_offset = layout.MAILBOX_SIZE + ring_size
        self.size = self.data_offset + data_size
        self._memfd = os.memfd_create("fake-tcmu", os.MFD_CLOEXEC)
        os.truncate(self._memfd, self.size)
        self._map = mmap.mmap(self._memfd, self.size)
        self.memory = memoryview(self._map)
        layout.MAILBOX.pack_into(
            self.memory, 0, layout.MAILBOX_VERSION, capabilities, layout.MAILBOX_SIZE, ring_size, 0, 0
        )
        self._words = self.memory[: layout.MAILBOX_SIZE].cast("I")
        self._ours, self._theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        self._head = self._cleaned = 0
        self._free = list(range(data_size // BLOCK - 1, -1, -1))
        self._scatter = scatter
        self._free_ids = list(range(0xFFFF, 0, -1))
        self._commands: dict[int, _Queued] = {}
        self._waiting: deque[_Request] = deque()
        self._tokens = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.results: dict[int, Result] = {}
        self.on_result: Callable[[int], None] | None = None
        self.unknown_answers: list[bool] = []
        self.blocked = False
        self.resets = 0
        self.time_out_s = time_out_s
        self.actions: list[str] = []

    # What the initiator does

    def queue(
        self,
        cdb: bytes,
        data_out: bytes = b"",
        in_length: int = 0,
        *,
        bidi: bool = False,
        spoil: Spoil | None = None,
    ) -> int:
        """Put a command into the ring, or in line if there is no room; its result appears under the token.

        `spoil` may change the entry before the handler sees it.
        """
        self._tokens += 1
        request = _Request(self._tokens, cdb, data_out, in_length, bidi, spoil)
        if self.blocked:
            self._end(request.token, Result(BUSY, b"", b""))
        elif self._waiting or not self._put(request):
            self._waiting.append(request)
        return request.token

    def kick(self) -> None:
        """Signal the handler's event."""
        self._ours.send(b"\1\0\0\0")

    def abort(self, tokens: list[int], kind: int = layout.TaskManagement.ABORT_TASK) -> None:
        """A task-management entry that names those of `tokens` that are in the ring."""
        ids = [cmd_id for cmd_id, queued in self._commands.items() if queued.token in tokens]
        entry = bytearray(layout.round_entry(layout.COMMAND_IDS + 2 * len(ids)))
        layout.TASK_MANAGEMENT.pack_into(entry, 0, len(entry) | Opcode.TASK_MANAGEMENT, 0, kind, len(ids))
        struct.pack_into(f"={len(ids)}H", entry, layout.COMMAND_IDS, *ids)
        self._insert(entry)

    def unknown(self, opcode: int = 5, length: int = 64) -> None:
        """An entry that only a newer kernel knows; the handler's answer goes to `unknown_answers`."""
        entry = bytearray(length)
        layout.HEADER.pack_into(entry, 0, length | opcode, 0, 0, 0)
        self._insert(entry)

    def expire(self, token: int) -> None:
        """The kernel's own time-out: the initiator gets an error, the handler must still answer, once."""
        queued = next(c for c in self._commands.values() if c.token == token)
        queued.expired = True
        self._end(token, Result(CHECK_CONDITION, TIMED_OUT, b""))

    # What the kernel does with the handler

    def open(self, name: str = "uio0") -> uio.Device:
        """The handler's side: an own mapping and descriptor. Can be had again after it was closed."""
        return uio.Device(name, os.dup(self._theirs.fileno()), mmap.mmap(self._memfd, self.size))

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take completions whenever the handler wakes the kernel."""
        self._loop = loop
        loop.add_reader(self._ours.fileno(), self.pump)

    def pump(self) -> bool:
        """Take completions if the handler woke the kernel since the last call; whether it did."""
        woken = False
        with contextlib.suppress(BlockingIOError):
            while self._ours.recv(4):
                woken = True
        if woken:
            self.reap()
        return woken

    def reap(self) -> None:
        """Take everything up to cmd_tail, then let waiting commands in."""
        tail = self._words[layout.TAIL_WORD]
        if tail >= self.ring_size or tail % layout.ALIGNMENT:
            raise BrokenRingError(f"cmd_tail is {tail}")
        while self._cleaned != tail:
            if self._cleaned == self._head:
                raise BrokenRingError(f"cmd_tail {tail} is beyond cmd_head {self._head}")
            at = layout.MAILBOX_SIZE + self._cleaned
            len_op, cmd_id, _, uflags = layout.HEADER.unpack_from(self.memory, at)
            opcode = len_op & layout.OPCODE_MASK
            if opcode == Opcode.COMMAND:
                self._take(at, cmd_id, uflags)
            elif opcode not in (Opcode.PAD, Opcode.TASK_MANAGEMENT):
                self.unknown_answers.append(bool(uflags & layout.UNKNOWN_OPCODE))
            self._cleaned = (self._cleaned + (len_op & ~layout.OPCODE_MASK)) % self.ring_size
        let_in = False
        while self._waiting and self._put(self._waiting[0]):
            self._waiting.popleft()
            let_in = True
        if let_in:
            self.kick()

    def remove(self) -> None:
        """The device goes away: the handler's descriptor polls readable and ends."""
        self._detach()
        self._ours.close()

    def close(self) -> None:
        """Let go of everything but the handler's side and of buffers that are still in use."""
        self._detach()
        self._ours.close()
        self._theirs.close()
        self._words.release()
        self.memory.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self._memfd)

    @property
    def in_ring(self) -> int:
        """Commands that the handler has not answered yet."""
        return sum(not queued.kept for queued in self._commands.values())

    @property
    def waiting(self) -> int:
        """Commands for which there is no room yet."""
        return len(self._waiting)

    @property
    def kept(self) -> int:
        """Commands answered whose buffers the handler still keeps."""
        return sum(queued.kept for queued in self._commands.values())

    @property
    def free_blocks(self) -> int:
        """Blocks of the data area in no one's use."""
        return len(self._free)

    # configfs.Backstore

    def ready(self) -> bool:
        """Always enabled."""
        return True

    def block(self) -> None:
        """As action/block_dev: new commands and those in line end BUSY."""
        self.actions.append("block")
        self.blocked = True
        while self._waiting:
            self._end(self._waiting.popleft().token, Result(BUSY, b"", b""))

    def unblock(self) -> None:
        """As action/block_dev."""
        self.actions.append("unblock")
        self.blocked = False

    def reset_ring(self) -> None:
        """As action/reset_ring 1: what is in flight ends BUSY, the ring is empty."""
        self.actions.append("reset_ring")
        for cmd_id, queued in self._commands.items():
            if not queued.expired and not queued.kept:
                self._end(queued.token, Result(BUSY, b"", b""))
            self._recycle(cmd_id, queued)
        self._commands.clear()
        self._head = self._cleaned = 0
        self._words[layout.HEAD_WORD] = self._words[layout.TAIL_WORD] = 0

    def free_kept(self, cmd_id: int) -> None:
        """As action/free_kept_buf."""
        queued = self._commands.get(cmd_id)
        if queued is None or not queued.kept:
            raise BrokenRingError(f"cmd_id {cmd_id} is not kept")
        self._recycle(cmd_id, self._commands.pop(cmd_id))

    def notify_task_management(self) -> None:
        """As attrib/tmr_notification 1; abort() is called by hand here."""
        self.actions.append("notify_task_management")

    # Inside

    def _detach(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._ours.fileno())
            self._loop = None

    def _end(self, token: int, result: Result) -> None:
        if token in self.results:
            raise BrokenRingError(f"command {token} ended twice")
        self.results[token] = result
        if self.on_result is not None:
            self.on_result(token)

    def _recycle(self, cmd_id: int, queued: _Queued) -> None:
        self._free_ids.append(cmd_id)
        self._free.extend(reversed(queued.blocks))
        if self._scatter is not None:
            self._scatter.shuffle(self._free)

    def _room(self, length: int) -> bool:
        """Whether an entry fits, with the padding that it needs, one byte never being used."""
        to_end = self.ring_size - self._head
        needed = length if to_end >= length else length + to_end
        used = (self._head - self._cleaned) % self.ring_size
        return self.ring_size - used - 1 >= needed

    def _insert(self, entry: bytearray) -> None:
        assert self._room(len(entry)), "no room in the ring"
        to_end = self.ring_size - self._head
        if to_end < len(entry):
            layout.HEADER.pack_into(
                self.memory, layout.MAILBOX_SIZE + self._head, to_end | Opcode.PAD, 0, 0, 0
            )
            self._head = 0
        at = layout.MAILBOX_SIZE + self._head
        self.memory[at : at + len(entry)] = entry
        self._head = (self._head + len(entry)) % self.ring_size
        self._words[layout.HEAD_WORD] = self._head

    def _vectors(self, length: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Blocks for `length` bytes and the (base, length) of each run of adjacent ones."""
        blocks = []
        vectors: list[tuple[int, int]] = []
        while length > 0:
            block = self._free.pop()
            blocks.append(block)
            base = self.data_offset + block * BLOCK
            span = min(length, BLOCK)
            if vectors and sum(vectors[-1]) == base:
                vectors[-1] = (vectors[-1][0], vectors[-1][1] + span)
            else:
                vectors.append((base, span))
            length -= span
        return blocks, vectors

    def _put(self, request: _Request) -> bool:
        """Queue the command if ring and data area have room."""
        token, cdb, data_out, in_length, bidi, spoil = request
        lengths = (len(data_out), in_length) if bidi else (max(len(data_out), in_length), 0)
        needed = -(-lengths[0] // BLOCK) + -(-lengths[1] // BLOCK)
        if needed > len(self._free) or not self._free_ids:
            return False
        blocks, vectors = self._vectors(lengths[0])
        more_blocks, more_vectors = self._vectors(lengths[1])
        every = vectors + more_vectors
        base = max(layout.COMMAND_SIZE, layout.IOVECS + layout.IOVEC.size * len(every))
        length = base + layout.round_entry(len(cdb))
        assert length <= self.ring_size // 2, "the kernel refuses an entry as large as this"
        if not self._room(length):
            self._free.extend(reversed(blocks + more_blocks))
            return False
        cmd_id = self._free_ids.pop()
        to_end = self.ring_size - self._head
        at = 0 if to_end < length else self._head
        entry = bytearray(length)
        layout.REQUEST.pack_into(
            entry,
            0,
            length | Opcode.COMMAND,
            cmd_id,
            len(vectors),
            len(more_vectors),
            layout.MAILBOX_SIZE + at + base,
        )
        where = layout.IOVECS
        for vector in every:
            layout.IOVEC.pack_into(entry, where, *vector)
            where += layout.IOVEC.size
        entry[base : base + len(cdb)] = cdb
        if spoil is not None:
            spoil(entry)
        done = 0
        for start, span in vectors if data_out else ():
            self.memory[start : start + span] = data_out[done : done + span]
            done += span
        self._commands[cmd_id] = _Queued(
            token, blocks + more_blocks, more_vectors if bidi else vectors, in_length
        )
        self._insert(entry)
        return True

    def _take(self, at: int, cmd_id: int, uflags: int) -> None:
        """A completed slot: find the command by the cmd_id in it, hand its result on."""
        queued = self._commands.get(cmd_id)
        if queued is None:
            raise BrokenRingError(f"cmd_id {cmd_id} is not outstanding")
        if queued.kept:
            raise BrokenRingError(f"cmd_id {cmd_id} was completed before")
        if not queued.expired:
            self._end(queued.token, self._result(at, queued, uflags))
        if uflags & layout.KEEP_BUFFERS:
            queued.kept, queued.expired = True, False
        else:
            self._recycle(cmd_id, self._commands.pop(cmd_id))

    def _result(self, at: int, queued: _Queued, uflags: int) -> Result:
        _, _, _, status, read_len = layout.RESPONSE.unpack_from(self.memory, at + layout.RESPONSE_OFFSET)
        shortened = uflags & layout.USE_READ_LEN and read_len > 0 and queued.in_length > 0
        if status == CHECK_CONDITION:
            sense = bytes(self.memory[at + layout.SENSE : at + layout.SENSE + layout.SENSE_LENGTH])
            if not shortened:
                return Result(status, sense, b"")
        else:
            sense = b""
        length = min(queued.in_length, read_len) if shortened else queued.in_length
        data = b"".join(self.memory[start : start + span] for start, span in queued.vectors)
        return Result(status, sense, data[:length] if queued.in_length else b"")
