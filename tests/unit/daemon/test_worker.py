"""What the worker asks of the kernel's backstore before it serves it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.daemon.handler import Backstore
from tcmu_replication.daemon.places import Context
from tcmu_replication.daemon.worker import Worker, check_store
from tcmu_replication.errors import Error, Kind
from tcmu_replication.tcmu import configfs, uio
from tcmu_replication.units import MiB
from tests.support.fake_kernel import FakeKernel
from tests.support.files_kernel import FilesKernel


def store(core: Path, size: int, block: int) -> configfs.Backstore:
    """The kernel's side, as far as it is looked at."""
    attributes = core / "user_0" / "disk0" / "attrib"
    attributes.mkdir(parents=True)
    (attributes / "dev_size").write_text(f"{size}\n")
    (attributes / "hw_block_size").write_text(f"{block}\n")
    return configfs.Backstore("0", "disk0", core)


@pytest.mark.parametrize(("block", "expected"), [(512, 512), (4096, 4096), (4096, None)])
def test_backstore_as_the_lun_is_served(tmp_path: Path, block: int, expected: int | None) -> None:
    check_store(store(tmp_path, MiB, block), Backstore(Gate(Memory(MiB)), expected), "uio0", "disk0")


@pytest.mark.parametrize(
    ("size", "block", "found", "remedy"),
    [(2 * MiB, 512, "2097152 bytes", "size=1048576"), (MiB, 4096, "4096 bytes", "hw_block_size=512")],
)
def test_backstore_unlike_the_lun_is_refused(
    tmp_path: Path, size: int, block: int, found: str, remedy: str
) -> None:
    """A8: two devices of one resource are alike."""
    with pytest.raises(Error) as caught:
        check_store(store(tmp_path, size, block), Backstore(Gate(Memory(MiB)), 512), "uio1: disk0", "disk0")
    assert caught.value.kind is Kind.BAD_CONFIG
    for words in ("uio1: disk0 was created with", found, remedy, "delete it and create it"):
        assert words in str(caught.value)


def test_who_asks_for_a_device_that_is_being_taken_up_is_answered_as_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lio-findings 7: the worker had begun by itself, and told the daemon that it serves what then failed."""
    kernel = FakeKernel()
    kernel.memory[:2] = (3).to_bytes(2, "little")  # the version of a kernel to come
    files = FilesKernel(tmp_path / "kernel")
    files.create("uio0", "replication/disk0", MiB)
    core = configfs.Backstore
    monkeypatch.setattr(configfs, "Backstore", lambda hba, name: core(hba, name, files.place / "core"))
    monkeypatch.setattr(
        uio, "identify", lambda device: uio.parse(device, "tcm-user/0/store-uio0/replication/disk0")
    )
    monkeypatch.setattr(uio.Device, "open", kernel.open)

    async def both() -> list[BaseException | None]:
        worker = Worker("disk0", "replication", "disk0", Context(tmp_path, tmp_path, "alpha"))
        worker.backstore = Backstore(Gate(Memory(MiB)), 512)
        return await asyncio.gather(worker.attach("uio0"), worker.attach("uio0"), return_exceptions=True)

    answers = asyncio.run(both())
    kernel.close()
    files.close()
    assert [str(answer)[:30] for answer in answers] == ["the mailbox has version 3; thi"] * 2
