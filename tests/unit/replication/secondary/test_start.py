"""A secondary begins: what it checks first, and what a start that fails leaves."""

import asyncio
import os
import threading

import pytest

from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Node
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication import stages
from tcmu_replication.replication.epochs import Epochs, Pair
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.units import BLOCK
from tests.support.tools import PATIENCE_S
from tests.unit.replication.secondary.site import (
    FORWARDED,
    LENGTH,
    OLD,
    Disk,
    Site,
    run,
    started,
)


def test_before_start_requests_are_io_errors(site):
    async def story():
        await site.engine.open()
        with pytest.raises(Error) as refused:
            await site.top(0)
        assert refused.value.kind is Kind.IO
        with pytest.raises(Error):
            await site.own(0, BLOCK)
        with pytest.raises(Error, match=f"^{stages.NOT_RUNNING}$"):
            site.engine.get_error()
        with pytest.raises(Error, match=f"^{stages.BACKUP_GONE}$"):
            await site.engine.checkpoint()
        with pytest.raises(Error, match=f"^{stages.NOT_RUNNING}$"):
            await site.engine.failover(latest=False)

    run(story())


def test_start_anew_after_promotion_begins_a_new_pairing(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.engine.stop()
        first = site.engine.manifest.generation
        assert await site.engine.start(Mode.SECONDARY, again=True)
        assert site.engine.manifest.generation != first
        await site.forward(0, BLOCK, 0x44)
        assert await site.top(0) == {FORWARDED}

    run(story())


def test_start_anew_waits_until_the_overlays_of_before_are_gone(site, monkeypatch):
    """They are removed behind, by name, and the new pair has the same names."""
    removed, may_remove = Pair.destroy, threading.Event()

    def late(pair):
        assert may_remove.wait(PATIENCE_S)
        removed(pair)

    async def story():
        await started(site)
        monkeypatch.setattr(Pair, "destroy", late)
        await site.engine.stop()
        again = asyncio.create_task(site.engine.start(Mode.SECONDARY, again=True))
        for _ in range(100):
            await asyncio.sleep(0)
        may_remove.set()
        assert await again
        await site.forward(0, BLOCK)
        await site.reopen()
        assert await site.top(0) == {OLD}

    run(story())


def test_start_with_the_wrong_mode_leaves_nothing(site):
    async def story():
        await site.engine.open()
        with pytest.raises(Error, match="needs 1, but got 0"):
            await site.engine.start(Mode.PRIMARY)
        assert list(site.directory.iterdir()) == []
        assert await site.engine.start(Mode.SECONDARY)
        with pytest.raises(Error, match=f"^{stages.RUNNING_OR_DONE}$"):
            await site.engine.start(Mode.SECONDARY)

    run(story())


class Leaf(Node):
    """An overlay without a backing, or of another length, or that cannot be emptied."""

    def __init__(self, length, child=None):
        super().__init__("odd", length, child)

    def destroy(self):
        pass

    close = release = destroy


def odd_pairs(disk, real):
    """(the pair that start would get, the error) in QEMU's order of checks; each also fails the later checks."""
    other = Memory(LENGTH)
    yield Pair(Leaf(1), Leaf(2)), stages.NO_ACTIVE_BACKING
    yield Pair(Leaf(1), Leaf(2, real.hidden)), stages.NO_HIDDEN_BACKING
    yield Pair(Leaf(1, other), Leaf(2, real.hidden)), stages.NO_DISK_BACKEND
    yield Pair(Leaf(1, disk), Leaf(2, real.hidden)), stages.LENGTHS_DIFFER
    yield Pair(Leaf(LENGTH, disk), Leaf(LENGTH, real.hidden)), stages.NO_MAKE_EMPTY
    yield real, stages.BAD_TOP


def test_start_checks_the_chain_in_qemus_order(tmp_path):
    async def story():
        directory = tmp_path / "real"
        directory.mkdir()
        site = Site(tmp_path, top_id="nobody", roots={})
        real = Epochs(directory, site.disk).create(1)
        await site.engine.open()
        for pair, text in list(odd_pairs(site.disk, real)):
            site.epochs.create = lambda epoch, pair=pair: pair
            with pytest.raises(Error) as refused:
                await site.engine.start(Mode.SECONDARY)
            assert str(refused.value) == text
            assert site.engine.stage is Stage.NONE
            assert manifests.load(tmp_path) is None

    run(story())


@pytest.mark.parametrize("roots", ["elsewhere", "nothing"])
def test_start_with_a_top_that_is_no_root_above_the_filter(tmp_path, roots):
    async def story():
        site = Site(tmp_path, roots={} if roots == "nothing" else {"disk0": Memory(LENGTH)})
        await site.engine.open()
        for _ in range(2):
            with pytest.raises(Error, match=f"^{stages.BAD_TOP}$"):
                await site.engine.start(Mode.SECONDARY)
            assert list(tmp_path.iterdir()) == []

    run(story())


def test_open_in_another_resources_directory_is_refused(tmp_path):
    async def story():
        site = Site(tmp_path)
        await started(site)
        other = Site(tmp_path, Disk(LENGTH // 2))
        with pytest.raises(Error, match="an overlay directory of its own"):
            await other.engine.open()
        assert os.path.exists(tmp_path / "epoch-00000001.hidden.map")

    run(story())


def test_open_that_misses_an_overlay_removes_nothing(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.engine.prepare_checkpoint(1)
        site.engine.record.save(epoch=3)
        with pytest.raises(Error):
            await site.reopen()
        assert len(list(site.directory.glob("epoch-00000001.*"))) == 4
        assert len(list(site.directory.glob("epoch-00000002.*"))) == 4

    run(story())


def test_start_anew_that_fails_leaves_the_lun_serving_its_disk(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.engine.stop()
        make = site.epochs.create

        def full(epoch):
            raise Error(Kind.NO_SPACE, "no space left")

        site.epochs.create = full
        with pytest.raises(Error, match="no space left"):
            await site.engine.start(Mode.SECONDARY, again=True)
        assert site.engine.stage is Stage.DONE
        assert await site.top(0) == {FORWARDED}
        await site.own(BLOCK, BLOCK)
        site.epochs.create = make
        assert await site.engine.start(Mode.SECONDARY, again=True, discard=True)

    run(story())


def test_command_that_meets_a_defect_is_told_to_the_loop(tmp_path):
    """A3: it may have done half of what it does, so the worker has to end."""
    site = Site(tmp_path)
    seen = []

    async def publish(node):
        raise KeyError("nobody foresaw this")

    async def play():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["exception"]))
        await site.engine.open()
        site.publish = publish
        site.engine = site.make()
        await site.engine.open()
        with pytest.raises(KeyError):
            await site.engine.start(Mode.SECONDARY)

    run(play())
    assert [type(found) for found in seen] == [KeyError]
