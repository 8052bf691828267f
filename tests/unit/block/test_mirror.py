"""The mirror: both children, the local disk's word, order of overlapping writes, and detach."""

import pytest

from tcmu_replication.block.memory import Memory
from tcmu_replication.block.mirror import Mirror
from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import KiB, MiB

LENGTH = 4 * MiB


class Later(Node):
    """A node whose writes end when the test says so; `log` is the order in which they arrived."""

    def __init__(self, child):
        super().__init__("replica", child.length, child)
        self.waiting = []
        self.log = []

    def write(self, offset, buffers, fua=False):
        data = b"".join(buffers)
        self.log.append((offset, data))
        pending = Pending()

        def end(error=None):
            if error is None:
                self.child.write(offset, [memoryview(data)])
            pending.complete(error)

        self.waiting.append(end)
        return pending

    def end(self, error=None):
        self.waiting.pop(0)(error)


class Broken(Node):
    """A disk that fails the named operations."""

    def __init__(self, child, *operations):
        super().__init__(child.name, child.length, child)
        self.operations = set(operations)

    def _check(self, operation):
        if operation in self.operations:
            raise Error(Kind.IO, f"{operation} failed")

    def read(self, offset, buffers):
        self._check("read")
        return self.child.read(offset, buffers)

    def write(self, offset, buffers, fua=False):
        self._check("write")
        return self.child.write(offset, buffers, fua)

    def flush(self):
        self._check("flush")
        return self.child.flush()


def view(byte, length=4 * KiB):
    return [memoryview(bytes([byte]) * length)]


def content(node, offset, length=4 * KiB):
    return bytes(node.fetch(offset, length))


@pytest.fixture
def disk():
    return Memory(LENGTH)


@pytest.fixture
def failures():
    return []


def mirror_of(disk, failures, **options):
    return Mirror("mirror", disk, report=failures.append, **options)


def attach(mirror, replica):
    mirror.attach(replica, replica)


def test_without_replica_writes_go_to_the_disk_alone(disk, failures):
    mirror = mirror_of(disk, failures)
    assert mirror.write(0, view(1)) is None
    assert content(disk, 0) == b"\1" * 4096
    assert failures == []


def test_write_ends_when_both_have_ended(disk, failures):
    mirror = mirror_of(disk, failures)
    replica = Later(Memory(LENGTH))
    attach(mirror, replica)
    pending = mirror.write(8192, view(2))
    assert content(disk, 8192) == b"\2" * 4096
    assert not pending.done
    replica.end()
    assert pending.done
    assert pending.error is None
    assert content(replica.child, 8192) == b"\2" * 4096


def test_local_failure_never_hides_behind_the_replica(disk, failures):
    mirror = mirror_of(Broken(disk, "write"), failures)
    replica = Later(Memory(LENGTH))
    attach(mirror, replica)
    with pytest.raises(Error) as failed:
        mirror.write(0, view(3))
    assert failed.value.kind is Kind.IO
    assert replica.log == [], "the peer has what this disk has not"
    assert [(f.child, f.operation, f.offset, f.length, f.final) for f in failures] == [
        (disk.name, "write", 0, 4096, True)
    ]
    assert mirror.errors == {disk.name: 1}


def test_late_local_failure_does_not_hide_behind_the_replica(failures):
    disk = Later(Memory(LENGTH))
    mirror = mirror_of(disk, failures)
    replica = Later(Memory(LENGTH))
    attach(mirror, replica)
    pending = mirror.write(0, view(3))
    replica.end()
    assert not pending.done
    disk.end(Error(Kind.IO, "write failed"))
    assert pending.error.kind is Kind.IO
    assert [(f.child, f.final) for f in failures] == [(disk.name, True)]


def test_replica_failure_is_counted_and_not_the_callers(disk, failures):
    mirror = mirror_of(disk, failures)
    replica = Later(Memory(LENGTH))
    attach(mirror, replica)
    pending = mirror.write(0, view(4))
    replica.end(Error(Kind.PEER_LOST, "gone"))
    assert pending.error is None
    assert mirror.errors == {"replica": 1}
    assert not failures[0].final


def test_read_error_is_reported_when_detach_is_not_the_policy(disk, failures):
    mirror = mirror_of(Broken(disk, "read"), failures)
    attach(mirror, Memory(LENGTH))
    with pytest.raises(Error):
        mirror.read(0, [memoryview(bytearray(4096))])
    assert failures[0].operation == "read"
    assert not mirror.detached


def test_detach_serves_from_the_peer_after_a_read_error(disk, failures):
    peer = Memory(LENGTH)
    peer.write(0, view(7))
    mirror = mirror_of(Broken(disk, "read"), failures, may_detach=lambda: True)
    attach(mirror, peer)
    buffer = memoryview(bytearray(4096))
    assert mirror.read(0, [buffer]) is None
    assert bytes(buffer) == b"\7" * 4096
    assert mirror.detached
    assert [(f.operation, f.final) for f in failures] == [("read", False)]


def test_detach_after_a_write_error_keeps_the_write_on_the_peer(disk, failures):
    peer = Memory(LENGTH)
    mirror = mirror_of(Broken(disk, "write"), failures, may_detach=lambda: True)
    attach(mirror, peer)
    assert mirror.write(0, view(5)) is None
    assert mirror.detached
    assert content(mirror, 0) == content(peer, 0) == b"\5" * 4096


def test_detach_refused_when_the_peer_misses_writes(disk, failures):
    peer = Memory(LENGTH)
    mirror = mirror_of(Broken(disk, "write"), failures, may_detach=lambda: False)
    attach(mirror, peer)
    with pytest.raises(Error):
        mirror.write(0, view(5))
    assert not mirror.detached


def test_flush_fails_with_the_local_disk(disk, failures):
    mirror = mirror_of(Broken(disk, "flush"), failures)
    attach(mirror, Memory(LENGTH))
    with pytest.raises(Error, match="flush failed"):
        mirror.flush()


class Disk(Memory):
    """A disk of one of three kinds: its discards zero or do nothing, or (QEMU's are of this kind) either."""

    def __init__(self, unmaps, discards):
        super().__init__(LENGTH)
        self.data[:] = b"x" * LENGTH
        self._unmaps = unmaps
        self._discards = discards

    @property
    def unmaps(self):
        return self._unmaps

    def discard(self, offset, length):
        return self.zero(offset, length) if self._discards else None


@pytest.mark.parametrize("peer", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("local", [(True, True), (False, False), (True, False), (False, True)])
def test_discard_leaves_the_same_on_both_disks_whatever_each_can(failures, local, peer):
    """Issue section 6: a trim where one disk punches holes and the other cannot."""
    disk, replica = Disk(*local), Disk(*peer)
    mirror = mirror_of(disk, failures)
    attach(mirror, replica)
    assert mirror.discard(4096, 8192) is None
    assert disk.data == replica.data
    assert disk.data.count(0) == (8192 if local[0] else 0)


def test_discard_without_replica_is_the_disks_own(failures):
    disk = Disk(False, True)
    mirror_of(disk, failures).discard(0, 4096)
    assert disk.data.count(0) == 4096
