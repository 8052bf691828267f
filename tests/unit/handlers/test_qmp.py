"""QEMU's views of a resource: jobs, nodes, exports and their events, on both ends in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import stages
from tcmu_replication.replication.stages import Stage
from tcmu_replication.units import BLOCK
from tests.support.nbd import Nbd, NbdError
from tests.unit.handlers.ends import End


def test_commit_is_a_visible_job_with_its_events(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        await alpha.write(0, 1)
        assert await beta.ask("query-block-jobs") == await beta.ask("query-jobs") == []
        await beta.ask("failover", to="checkpoint", force=True)
        [job] = await beta.ask("query-block-jobs")
        assert (job["type"], job["device"], job["status"], job["busy"]) == (
            "commit",
            "commit-disk0",
            "running",
            True,
        )
        assert [job["id"] for job in await beta.ask("query-jobs")] == ["commit-disk0"]
        await beta.until(Stage.DONE)
        assert await beta.ask("query-block-jobs") == await beta.ask("query-jobs") == []
        steps = [event["status"] for event in beta.told("JOB_STATUS_CHANGE")]
        assert steps == ["created", "running", "waiting", "pending", "concluded", "null"]
        [ended] = beta.told("BLOCK_JOB_COMPLETED")
        assert (ended["device"], ended["len"], ended["offset"]) == ("commit-disk0", BLOCK, BLOCK)
        assert "error" not in ended
        assert [event["stage"] for event in beta.told("REPLICATION_STAGE")] == ["running", "failover", "done"]

    play(story)


def test_commit_that_fails_tells_what_it_could_not_do(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(alpha: End, beta: End) -> None:
        await beta.write(0, 1)

        def broken(*args: object, **options: object) -> None:
            raise Error(Kind.IO, "the medium is broken")

        monkeypatch.setattr(beta.backstore.disk, "write", broken)
        await beta.ask("failover", to="checkpoint", force=True)
        await beta.until(Stage.FAILOVER_FAILED)
        assert beta.told("BLOCK_JOB_ERROR") == [
            {"device": "commit-disk0", "operation": "write", "action": "report"}
        ]
        [ended] = beta.told("BLOCK_JOB_COMPLETED")
        assert "the medium is broken" in ended["error"]
        assert beta.told("REPLICATION_STAGE")[-1]["stage"] == "failover-failed"
        assert await beta.ask("query-block-jobs") == []

    play(story)


def test_commit_that_is_cancelled(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        await alpha.write(0, 1)
        await beta.ask("failover", to="checkpoint", force=True)
        await beta.ask("block-job-cancel", device="commit-disk0")
        assert beta.backstore.engine.stage is Stage.FAILOVER_FAILED
        assert [event["device"] for event in beta.told("BLOCK_JOB_CANCELLED")] == ["commit-disk0"]
        assert beta.told("BLOCK_JOB_COMPLETED") == []
        with pytest.raises(Error, match="Block job 'commit-disk0' not found"):
            await beta.ask("block-job-cancel", device="commit-disk0")

    play(story)


def test_backup_that_is_cancelled_is_its_unexpected_end(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        await alpha.write(0, 1)
        await beta.ask("job-cancel", id="backup-disk0")
        assert [event["type"] for event in beta.told("BLOCK_JOB_CANCELLED")] == ["backup"]
        assert (await beta.ask("query-errors"))["error"]
        with pytest.raises(Error, match=stages.BACKUP_GONE):
            await beta.backstore.engine.checkpoint()
        with pytest.raises(Error, match="Job not found"):
            await beta.ask("job-cancel", id="backup-disk0")
        with pytest.raises(Error, match="Block job 'backup-disk0' not found"):
            await alpha.ask("block-job-cancel", device="backup-disk0")

    play(story)


def test_nodes_and_devices_of_both_ends(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        assert await named(alpha) == {
            "top": "quorum",
            "disk": "raw",
            "replication": "replication",
            "remote": "nbd",
        }
        await alpha.ask("x-blockdev-change", parent="top", child="children.1")
        assert set(await named(alpha)) == {"top", "disk", "replication", "remote"}
        assert await named(beta) == {
            "replication": "replication",
            "active": "overlay",
            "hidden": "overlay",
            "disk": "raw",
            "copy-before-write": "copy-before-write",
        }
        nodes = {node["node-name"]: node for node in await beta.ask("query-named-block-nodes")}
        assert nodes["active"]["backing_file_depth"] == 2
        assert nodes["active"]["backing_file"] == nodes["hidden"]["file"]
        image = nodes["active"]["image"]
        assert image["backing-image"]["backing-image"]["filename"] == str(beta.directory / "disk.img")
        flat = await beta.ask("query-named-block-nodes", flat=True)
        assert not any("backing-image" in node["image"] for node in flat)
        shown = {
            device["device"]: device["inserted"]["node-name"] for device in await beta.ask("query-block")
        }
        assert shown == {"disk0": "replication", "disk0-disk": "copy-before-write"}

    play(story)


async def named(end: End) -> dict[str, str]:
    nodes = await end.ask("query-named-block-nodes", flat=True)
    return {node["node-name"]: node["drv"] for node in nodes}


def test_link_is_told_from_its_first_moment(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        assert [event["state"] for event in alpha.told("REPLICATION_LINK")][-1] == "connected"
        alpha.events.clear()
        await alpha.ask("stop-replication")
        assert [event["state"] for event in alpha.told("REPLICATION_LINK")] == ["none"]

    play(story)


def test_local_disk_is_no_child_that_may_go(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        with pytest.raises(Error, match="is what counts and cannot be removed"):
            await alpha.ask("x-blockdev-change", parent="disk0", child="children.0")
        await alpha.ask("x-blockdev-change", parent="disk0", child="children.1")
        await alpha.write(0, 1)
        assert beta.disk[0] == 0
        with pytest.raises(Error, match="misses writes"):
            await alpha.ask("x-blockdev-change", parent="disk0", node="replication")

    play(story)


def test_broken_disk_of_the_primary_is_told_in_sectors(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(alpha: End, beta: End) -> None:
        def broken(*args: object, **options: object) -> None:
            raise Error(Kind.IO, "the medium is broken")

        monkeypatch.setattr(alpha.backstore.disk, "write", broken)
        with pytest.raises(Error, match="the medium is broken"):
            await alpha.write(BLOCK, 1)
        assert alpha.told("QUORUM_REPORT_BAD") == [
            {
                "type": "write",
                "error": "the medium is broken",
                "node-name": "disk",
                "sector-num": 8,
                "sectors-count": 8,
            }
        ]
        assert alpha.told("QUORUM_FAILURE") == [{"reference": "disk0", "sector-num": 8, "sectors-count": 8}]

    play(story)


def test_device_exported_before_the_start_saves_pre_images_after_it(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        socket = str(beta.directory / "qmp.nbd")
        await beta.ask("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
        await beta.ask("nbd-server-add", device="disk0-disk", writable=True)
        client = await asyncio.to_thread(Nbd, socket, "disk0-disk")
        await asyncio.to_thread(client.write, 0, b"\1" * BLOCK)
        assert (await beta.ask("query-block-exports"))[0]["node-name"] == "disk"
        await beta.ask("start")
        assert (await beta.ask("query-block-exports"))[0]["node-name"] == "copy-before-write"
        await asyncio.to_thread(client.write, 0, b"\2" * BLOCK)
        assert bytes(beta.backstore.top.fetch(0, 1)) == b"\1"
        with pytest.raises(Error, match="export 'disk0-disk' still in use"):
            await beta.ask("nbd-server-remove", name="disk0-disk")
        await beta.ask("failover", to="checkpoint", force=True)
        assert beta.told("BLOCK_EXPORT_DELETED") == [{"id": "disk0-disk"}]
        with pytest.raises(ConnectionError):
            await asyncio.to_thread(client.write, 0, b"\3" * BLOCK)
        client.close()
        await beta.until(Stage.DONE)
        assert beta.disk[:BLOCK] == b"\1" * BLOCK
        with pytest.raises(Error, match="Permission conflict on node 'disk'"):
            await beta.ask("nbd-server-add", device="disk0-disk", writable=True)
        await beta.ask("nbd-server-stop")

    play(story, started=False)


def test_what_is_part_of_the_chain_is_not_exported(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        socket = str(beta.directory / "qmp.nbd")
        await beta.ask("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
        for name in ("hidden", "active", "copy-before-write"):
            with pytest.raises(Error, match="is part of the chain and cannot be exported"):
                await beta.ask("nbd-server-add", device=name)
        await beta.ask("block-export-add", type="nbd", id="r", node_name="disk")
        client = await asyncio.to_thread(Nbd, socket, "disk")
        await alpha.write(0, 7)
        assert await asyncio.to_thread(client.read, 0, 1) == b"\7"
        with pytest.raises(NbdError):
            await asyncio.to_thread(client.write, 0, b"\3" * 512)
        await beta.ask("block-export-del", id="r", mode="hard")
        client.close()
        with pytest.raises(Error, match="the port must be a number"):
            await alpha.ask("nbd-server-start", addr={"type": "inet", "data": {"host": "", "port": "http"}})

    play(story)
