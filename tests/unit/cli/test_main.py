"""The command line against a control server with canned bodies, as its own process and within."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from tcmu_replication.cli import exits, main, waiting
from tcmu_replication.control import schema
from tcmu_replication.control.server import Server
from tcmu_replication.errors import Error, Kind
from tests.support.certificates import Authority
from tests.support.processes import free_port
from tests.support.tools import PATIENCE_S
from tests.unit.control.documents import status
from tests.unit.daemon.test_config import GOOD

COMMANDS = [
    "daemon",
    "serve",
    "status",
    "devices",
    "start",
    "checkpoint",
    "failover",
    "stop",
    "errors",
    "events",
    "resync",
    "check",
]


class Workers:
    """Control servers in a thread of their own; `calls` is what was asked of them."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.calls: list[tuple[str, Any]] = []
        self.loop = asyncio.new_event_loop()
        self.servers: list[Server] = []
        self.named: dict[str, Server] = {}
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def serve(self, name: str, table: dict[str, schema.Command] = schema.COMMANDS, **bodies: Any) -> None:
        """Answer as `name`; a body is a result, an Error to raise, or a list of these to give one by one."""

        def handler(command: str, body: Any) -> Callable[..., Any]:
            async def answer(arguments: Any, session: object) -> Any:
                self.calls.append((command, arguments))
                one_by_one = isinstance(body, list) and command not in schema.MANAGER_COMMANDS
                result = body.pop(0) if one_by_one else body
                if isinstance(result, Error):
                    raise result
                return result

            return answer

        names = {key.replace("_", "-"): body for key, body in bodies.items()}
        server = Server({key: handler(key, body) for key, body in names.items()}, table)
        self._call(server.listen_unix(self.run / f"{name}.sock"))
        self.servers.append(server)
        self.named[name] = server

    def end(self, name: str) -> None:
        """The worker of `name` ends."""
        server = self.named.pop(name)
        self.servers.remove(server)
        self._call(server.close())

    def close(self) -> None:
        for server in self.servers:
            self._call(server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_S)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host "beta" with the resources disk0 and disk1, and gamma's that is not its own."""
    directory, run = tmp_path / "etc", tmp_path / "run"
    directory.mkdir()
    run.mkdir()
    for name in ("disk0", "disk1"):
        (directory / f"{name}.toml").write_text(GOOD.replace("disk0", name))
    (directory / "other.toml").write_text(GOOD.replace("disk0", "other").replace("host.beta", "host.gamma"))
    monkeypatch.setenv("TCMU_REPLICATION_CONFIG", str(directory))
    monkeypatch.setenv("TCMU_REPLICATION_RUN", str(run))
    monkeypatch.setenv("TCMU_REPLICATION_HOST", "beta")
    return tmp_path


@pytest.fixture
def workers(place: Path) -> Iterator[Workers]:
    workers = Workers(place / "run")
    yield workers
    workers.close()


def command(*arguments: str) -> Result:
    """Run the command line as `main` does, in this process."""
    runner = CliRunner()
    result = runner.invoke(main.cli, list(arguments))
    if isinstance(result.exception, Error):
        result.exit_code = exits.STATUS_OF_KIND[result.exception.kind]
        result.stderr_bytes = (result.stderr_bytes or b"") + str(result.exception).encode()
    elif result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_help_names_every_command_and_exit_status() -> None:
    text = command("--help").stdout
    assert all(f"  {name} " in text for name in COMMANDS)
    assert all(f"  {status}  {meaning}" in text for status, meaning in exits.MEANINGS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str) -> None:
    result = command(name, "--help")
    assert result.exit_code == 0
    assert main.cli.commands[name].get_short_help_str().rstrip(".") in result.stdout


def test_help_of_failover_explains_both_meanings() -> None:
    text = command("failover", "--help").stdout
    assert "everything that the primary had acknowledged" in text
    assert "the last checkpoint plus this host's own writes" in text


def test_no_heavy_import_for_a_plain_command(workers: Workers) -> None:
    """What an operator types at three in the morning on a slow host must not load half of Python."""
    workers.serve("disk0", stop_replication=None)
    program = (
        "import sys\nfrom tcmu_replication.cli.main import cli\n"
        "cli.main(['stop', 'disk0'], standalone_mode=False)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    answer, modules = done.stdout.splitlines()
    assert answer == "disk0: stopped"
    heavy = {"asyncio", "rich", "msgspec", "pyudev", "tomllib", "concurrent", "rtslib_fb"}
    assert not heavy & set(modules.split())


@pytest.mark.parametrize(
    ("arguments", "asked", "body", "printed"),
    [
        (["start", "disk0"], schema.Start(), None, "disk0: started"),
        (["start", "disk0", "--assume-clean"], schema.Start(assume_clean=True), None, "disk0: started"),
        (
            ["checkpoint", "disk0"],
            schema.Nothing(),
            schema.Checkpoint(epoch=8, at="2026-01-02T03:04:05Z", pause_ms=1.25),
            "disk0: checkpoint: epoch 8, writes were held 1.2 ms",
        ),
        (["checkpoint", "disk0"], schema.Nothing(), None, "disk0: nothing to do"),
        (
            ["failover", "disk0", "--to", "latest"],
            schema.Failover(to="latest"),
            schema.FailoverStarted(to="latest", stage="done"),
            "disk0: failover to latest: the LUN is writable, stage done",
        ),
        (["stop", "disk0"], schema.Stop(), None, "disk0: stopped"),
        (["resync", "disk0"], schema.Resync(), None, "disk0: the resync has begun"),
        (["resync", "disk0", "--pause"], schema.Resync(paused=True), None, "disk0: so it is from now on"),
        (["resync", "disk0", "--resume"], schema.Resync(paused=False), None, "disk0: so it is"),
        (["resync", "disk0", "--limit", "50M"], schema.Resync(limit=50 << 20), None, "disk0: so it is"),
        (["resync", "disk0", "--limit", "0"], schema.Resync(limit=0), None, "disk0: so it is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_reaches_its_worker_and_says_what_became_of_it(
    workers: Workers, arguments: list[str], asked: Any, body: Any, printed: str
) -> None:
    name = {"stop": "stop-replication"}.get(arguments[0], arguments[0])  # QMP's stop stops a machine
    workers.serve("disk0", **{name: body})
    result = command(*arguments)
    assert (result.exit_code, workers.calls) == (0, [(name, asked)])
    assert printed in result.stdout


@pytest.mark.parametrize("limit", ["", "fast", "-1", "1.5M", "50 X"])
def test_limit_that_is_no_size_is_refused(workers: Workers, limit: str) -> None:
    workers.serve("disk0", resync=None)
    assert command("resync", "disk0", "--limit", limit).exit_code == exits.WRONG
    assert workers.calls == []


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_error_of_a_worker_is_told_and_decides_the_exit_status(workers: Workers, kind: Kind) -> None:
    workers.serve("disk0", start=Error(kind, "a sentence"))
    result = command("start", "disk0")
    assert "disk0: a sentence" in result.stderr
    assert result.exit_code == exits.STATUS_OF_KIND[kind]


@pytest.mark.parametrize("name", ["start", "checkpoint", "failover", "stop"])
@pytest.mark.parametrize("arguments", [[], ["disk0", "--all"]], ids=["neither", "both"])
def test_name_or_all_must_be_said(place: Path, name: str, arguments: list[str]) -> None:
    result = command(name, *arguments)
    assert result.exit_code == exits.WRONG
    assert "say which: NAME or --all" in result.stderr


def test_all_asks_this_hosts_resources_at_the_same_time(workers: Workers) -> None:
    """Each waits for the other, so that one after the other would never end."""
    both = threading.Barrier(2, timeout=PATIENCE_S)
    checkpoint = schema.Checkpoint(epoch=1, at="2026-01-02T03:04:05Z", pause_ms=1)

    async def meet(arguments: Any, session: object) -> schema.Checkpoint:
        await asyncio.get_running_loop().run_in_executor(None, both.wait)
        return checkpoint

    for name in ("disk0", "disk1"):
        server = Server({"checkpoint": meet})
        workers._call(server.listen_unix(workers.run / f"{name}.sock"))
        workers.servers.append(server)
    result = command("checkpoint", "--all")
    assert result.exit_code == 0
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["disk0", "disk1"]


def test_all_goes_on_after_a_failure_and_ends_with_its_status(workers: Workers) -> None:
    workers.serve("disk0", stop_replication=Error(Kind.INVALID_STATE, "Block replication is not running"))
    workers.serve("disk1", stop_replication=None)
    result = command("stop", "--all")
    assert result.exit_code == exits.STATE
    assert result.stderr == "disk0: Block replication is not running\n"
    assert result.stdout == "disk1: stopped\n"


def test_json_of_actions(workers: Workers) -> None:
    workers.serve("disk0", stop_replication=Error(Kind.INVALID_STATE, "no"))
    workers.serve("disk1", stop_replication=None)
    result = command("stop", "--all", "--json")
    assert json.loads(result.stdout) == [
        {"resource": "disk0", "error": {"kind": "invalid-state", "desc": "disk0: no"}},
        {"resource": "disk1", "result": {}},
    ]


def test_failover_without_a_meaning_explains_both_and_asks_nobody(workers: Workers) -> None:
    workers.serve("disk0", failover=None)
    result = command("failover", "disk0")
    assert result.exit_code == exits.WRONG
    assert "--to latest or --to checkpoint" in result.stderr
    assert "acknowledged" in result.stderr
    assert "own writes" in result.stderr
    assert workers.calls == []


def test_failover_means_what_the_resource_file_says(workers: Workers, place: Path) -> None:
    path = place / "etc" / "disk0.toml"
    path.write_text(GOOD.replace("[link]", 'failover = "checkpoint"\n[link]'))
    workers.serve("disk0", failover=None)
    assert command("failover", "disk0").exit_code == 0
    assert workers.calls == [("failover", schema.Failover(to="checkpoint"))]


def commit(offset: int) -> schema.Job:
    return schema.Job(id="commit", type="commit", offset=offset, length=100, status="running")


def test_failover_waits_for_its_commit(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PERIOD_S", 0)
    steps = [status(stage="failover", jobs=[commit(offset)]) for offset in (10, 60, 100)]
    started = schema.FailoverStarted(to="checkpoint", stage="failover")
    workers.serve("disk0", failover=started, query_status=[*steps, status(stage="done")])
    result = command("failover", "disk0", "--to", "checkpoint", "--wait")
    assert result.exit_code == 0
    assert result.stdout.endswith("disk0: stage done\n")


def test_failover_that_fails_behind_is_told_by_wait(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PERIOD_S", 0)
    started = schema.FailoverStarted(to="checkpoint", stage="failover")
    steps = [status(stage="failover", jobs=[commit(10)]), status(stage="failover-failed", error="no space")]
    workers.serve("disk0", failover=started, query_status=steps)
    result = command("failover", "disk0", "--to", "checkpoint", "--wait")
    assert result.exit_code == exits.FAILED
    assert "the commit failed: no space" in result.stderr


def test_worker_that_is_not_there(place: Path) -> None:
    result = command("checkpoint", "disk0")
    assert result.exit_code == exits.ABSENT
    assert "disk0: nobody serves at" in result.stderr
    assert "Is the daemon running?" in result.stderr


def test_worker_that_is_not_there_and_why(workers: Workers) -> None:
    why = schema.WorkerInfo(name="disk0", state="failed", error="disk0.toml: host.beta.disk: found nothing")
    workers.serve("_manager", schema.MANAGER_COMMANDS, query_workers=[why])
    result = command("checkpoint", "disk0")
    assert "The daemon says: failed, disk0.toml: host.beta.disk: found nothing" in result.stderr
    assert "has no such resource" in command("checkpoint", "disk9").stderr


def test_worker_that_is_not_there_and_since_when(workers: Workers) -> None:
    since = "2026-01-02T03:04:05+00:00"
    row = schema.WorkerInfo(name="disk0", state="waiting", error="was killed by SIGKILL", down_since=since)
    workers.serve("_manager", schema.MANAGER_COMMANDS, query_workers=[row])
    assert f"The daemon says: waiting since {since}, was killed by SIGKILL" in command("status").stdout


def test_worker_that_hangs_and_since_when(workers: Workers) -> None:
    since = "2026-01-02T03:04:05+00:00"
    late = Error(Kind.TIMED_OUT, "no answer to 'query-status' in 5 s")
    row = schema.WorkerInfo(name="disk0", state="running")
    rows = [row]
    workers.serve("_manager", schema.MANAGER_COMMANDS, query_workers=rows)
    workers.serve("disk0", query_status=late)
    assert "The worker hangs" in command("status").stdout
    rows[:] = [replace(row, state="hung", error="SIGKILL does not end it", down_since=since)]
    assert f"The daemon says: hung since {since}, SIGKILL does not end it" in command("status").stdout


def test_status_of_all_shows_who_is_down(workers: Workers) -> None:
    workers.serve("disk0", query_status=status(jobs=[commit(45)]))
    result = command("status")
    assert result.exit_code == exits.ABSENT
    header, first, second = result.stdout.splitlines()[:3]
    assert header.split()[:3] == ["RESOURCE", "ROLE", "PROTECTED"]
    assert first.split()[:3] == ["disk0", "secondary", "yes"]
    assert "connected" in first
    assert second.split()[:5] == ["disk1", "-", "NO", "-", "down"]
    assert "disk1: DOWN: nobody serves at" in result.stdout
    assert "other" not in result.stdout


UNSAFE = schema.Protection(
    protected=False,
    level="unprotected",
    words="the link to alpha is down",
    since="2026-01-02T03:04:05Z",
    advice="see to it",
)


@pytest.mark.parametrize(
    ("levels", "status_of_all"),
    [
        (["protected", "resyncing"], exits.RESYNCING),
        (["resyncing", "unprotected"], exits.UNPROTECTED),
        (["failed", "protected"], exits.UNPROTECTED),
        (["unprotected", "outdated"], exits.OUTDATED),
    ],
)
def test_status_tells_the_worst_of_all(workers: Workers, levels: list[str], status_of_all: int) -> None:
    for number, level in enumerate(levels):
        protection = schema.Protection(protected=level == "protected", level=level, words="as it is")
        workers.serve(f"disk{number}", query_status=status(resource=f"disk{number}", protection=protection))
    assert command("status").exit_code == status_of_all


@pytest.mark.parametrize("arguments", [["disk0"], ["disk0", "--json"], [], ["--json"]])
def test_status_is_0_only_when_all_that_is_shown_is_protected(workers: Workers, arguments: list[str]) -> None:
    """An unprotected pair was `running`, green, exit status 0."""
    workers.serve("disk1", query_status=status(resource="disk1"))
    workers.serve("disk0", query_status=status(protection=UNSAFE))
    assert command("status", *arguments).exit_code == exits.UNPROTECTED
    assert command("status", "disk1").exit_code == 0


def test_status_of_a_user_without_rights_is_an_error_and_no_stage(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user without rights read that the resource was down."""

    def refuse(path: Path) -> None:
        raise Error(Kind.PERMISSION, f"{path}: only root may control a resource")

    monkeypatch.setattr("tcmu_replication.control.client.Client.unix", refuse)
    for arguments in (["status"], ["status", "disk0", "--json"], ["errors"]):
        result = command(*arguments)
        assert result.exit_code == exits.DENIED
        assert "only root may" in result.stderr
        assert "down" not in result.stdout


def test_watch_prints_a_json_document_a_line(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of many lines, with nothing between them, are no stream."""
    from tcmu_replication.cli import status as view

    rounds = iter([None, None])

    def next_round(seconds: float) -> None:
        if next(rounds, "end") == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr(view.time, "sleep", next_round)
    workers.serve("disk0", query_status=[status(epoch=7), status(epoch=7), status(epoch=8)])
    result = command("status", "disk0", "--watch", "--json")
    assert [json.loads(line)["epoch"] for line in result.stdout.splitlines()] == [7, 8]


@pytest.mark.parametrize(
    ("link", "said"),
    [
        (
            schema.Link(state="lost", peer="beta", since="2026-01-02T03:04:05Z"),
            "disk0: the link to beta is down since 2026-01-02T03:04:05Z (no answer to 'peer-hello'",
        ),
        (
            schema.Link(state="connected", peer="beta"),
            "disk0: beta does not answer (no answer to 'peer-hello'",
        ),
    ],
)
@pytest.mark.parametrize("kind", [Kind.TIMED_OUT, Kind.PEER_LOST])
def test_worker_whose_peer_is_silent_does_not_hang(
    workers: Workers, link: schema.Link, said: str, kind: Kind
) -> None:
    """A checkpoint while the link was cut said that the worker hangs."""
    late = Error(kind, "no answer to 'peer-hello' in 10 s")
    workers.serve("disk0", checkpoint=late, query_status=status(link=link))
    result = command("checkpoint", "disk0")
    assert result.exit_code == exits.STATUS_OF_KIND[kind]
    assert said in result.stderr
    assert "see `tcmu-replication status disk0`, there" in result.stderr
    assert "hangs" not in result.stderr


def test_status_of_one_in_words(workers: Workers) -> None:
    workers.serve("disk0", query_status=status(jobs=[commit(45)], error="I/O error occurred"))
    result = command("status", "disk0")
    assert result.exit_code == 0
    for words in (
        "disk0: protected since",
        "stage        running",
        "secondary on beta",
        "active 4 KiB, hidden 1 MiB",
        "2 in flight (8 KiB)",
        "writes were held 1.5 ms",
        "I/O error occurred",
        "uio0: 10 commands",
        "commit [#########-----------]  45 %",
    ):
        assert words in result.stdout


def test_status_json_is_the_document_that_travels(workers: Workers) -> None:
    workers.serve("disk0", query_status=status())
    document = json.loads(command("status", "disk0", "--json").stdout)
    assert document == schema.COMMANDS["query-status"].encode(status())
    everything = json.loads(command("status", "--json").stdout)
    assert everything[0] == document
    assert (everything[1]["resource"], everything[1]["stage"]) == ("disk1", "down")


def test_status_shows_luns_of_other_handlers(workers: Workers) -> None:
    lun = schema.DeviceStatus(
        device="uio3", subtype="file", config="/srv/image", size=1 << 20, pid=1, version="0.1.0"
    )
    workers.serve("uio3", schema.DEVICE_COMMANDS, query_status=lun)
    assert command("status").stdout.splitlines()[3].split()[:3] == ["uio3", "/srv/image", "file"]
    assert "handler      file" in command("status", "uio3").stdout


def lun(device: str, config: str, state: str = "unserved", **changes: Any) -> schema.DeviceInfo:
    """A LUN as the daemon sees it."""
    row = {"device": device, "backstore": f"store-{device}", "config": config, "state": state}
    row |= {"since": "2026-01-02T03:04:05+00:00"}
    if state != "served":
        row |= {"reason": f"found {config}; expected a good one", "advice": "mend it"}
    return schema.DeviceInfo(**row | changes)  # type: ignore[arg-type]


SERVED = lun("uio0", "replication/disk0", "served", worker="disk0", pid=42)
WRONG_SIZE = lun("uio1", "replication/disk0", worker="disk0", pid=42)
NOBODY = lun("uio2", "replication/nope")
FOREIGN = lun("uio3", "qcow//srv/vm", "foreign")
COMING = lun("uio4", "file//srv/image", "starting", worker="uio4", pid=43)


def devices(workers: Workers, *rows: schema.DeviceInfo | Error) -> None:
    """What the daemon answers."""
    body = rows[0] if rows and isinstance(rows[0], Error) else list(rows)
    workers.serve("_manager", schema.MANAGER_COMMANDS, query_devices=body, query_workers=[])


def both_protected(workers: Workers) -> None:
    for name in ("disk0", "disk1"):
        workers.serve(name, query_status=status(resource=name))


def test_status_shows_first_the_luns_that_nobody_serves_and_is_4(workers: Workers) -> None:
    """lio-findings 7: `status` never showed such a device."""
    both_protected(workers)
    devices(workers, SERVED, WRONG_SIZE, NOBODY, FOREIGN, COMING)
    result = command("status")
    assert result.exit_code == exits.ABSENT
    table, *paragraphs = result.stdout.rstrip("\n").split("\n\n")
    lines = table.splitlines()
    assert lines[1].split()[:4] == ["uio1", "store-uio1", "LUN", "NO"]
    assert "not served" in lines[1]
    assert lines[2].startswith("uio2 store-uio2")
    assert [line.split()[0] for line in lines[3:]] == ["disk0", "disk1"]
    since = "NOT SERVED since 2026-01-02 03:04:05 UTC"
    assert paragraphs == [
        f"{row.device} ({row.backstore}, {row.config}): {since}: {row.reason}\n  what to do: mend it"
        for row in (WRONG_SIZE, NOBODY)
    ]


def test_status_in_json_begins_with_the_luns_that_nobody_serves(workers: Workers) -> None:
    both_protected(workers)
    devices(workers, SERVED, NOBODY)
    result = command("status", "--json")
    assert result.exit_code == exits.ABSENT
    first, *others = json.loads(result.stdout)
    assert (first["device"], first["state"], first["advice"]) == ("uio2", "unserved", "mend it")
    assert [document["resource"] for document in others] == ["disk0", "disk1"]


def test_status_of_one_has_its_own_luns_alone(workers: Workers) -> None:
    both_protected(workers)
    devices(workers, WRONG_SIZE, NOBODY)
    result = command("status", "disk0")
    assert result.exit_code == exits.ABSENT
    assert result.stdout.startswith("uio1 (store-uio1, replication/disk0): NOT SERVED since")
    assert "\n\ndisk0: protected since" in result.stdout
    assert "uio2" not in result.stdout
    document = json.loads(command("status", "disk0", "--json").stdout)
    assert document["resource"] == "disk0"
    assert [row["device"] for row in document["unserved"]] == ["uio1"]
    assert command("status", "disk1").exit_code == 0
    assert "unserved" not in json.loads(command("status", "disk1", "--json").stdout)
    told = command("status", "uio2")
    assert told.exit_code == exits.ABSENT
    assert told.stdout.startswith("uio2 (store-uio2, replication/nope): NOT SERVED since")
    assert "nobody serves at" not in told.stdout


@pytest.mark.parametrize("row", [SERVED, FOREIGN, COMING], ids=lambda row: row.state)
def test_lun_that_is_served_or_coming_or_not_ours_leaves_status_as_it_is(
    workers: Workers, row: schema.DeviceInfo
) -> None:
    both_protected(workers)
    devices(workers, row)
    result = command("status")
    assert (result.exit_code, result.stderr) == (0, "")
    assert row.device not in result.stdout


def test_lun_of_a_resource_that_is_down_is_not_told_twice(workers: Workers) -> None:
    workers.serve("disk1", query_status=status(resource="disk1"))
    devices(workers, lun("uio1", "replication/disk0", worker="disk0"), lun("uio5", "file//x", worker="uio5"))
    (workers.run / "uio5.sock").touch()  # left behind by its worker
    result = command("status")
    assert result.exit_code == exits.ABSENT
    assert "disk0: DOWN: nobody serves" in result.stdout
    assert "uio1" not in result.stdout
    assert "uio5 (store-uio5, file//x): NOT SERVED" in result.stdout
    assert "uio5: DOWN" not in result.stdout


def test_daemon_that_does_not_say_which_luns_nobody_serves_is_told_of(workers: Workers) -> None:
    both_protected(workers)
    devices(workers, Error(Kind.TIMED_OUT, "no answer"))
    result = command("status")
    assert result.exit_code == 0
    assert "warning: the daemon does not say which LUNs nobody serves: no answer" in result.stderr


def test_devices_shows_every_lun_and_why_one_is_not_served(workers: Workers) -> None:
    devices(workers, SERVED, WRONG_SIZE, FOREIGN, COMING)
    result = command("devices")
    assert result.exit_code == exits.ABSENT
    header, *lines = result.stdout.split("\n\n")[0].splitlines()
    assert header.split() == ["DEVICE", "BACKSTORE", "CONFIG", "SERVED", "SINCE", "WORKER"]
    cells = [line.split() for line in lines]
    assert [(row[0], row[3], row[6:]) for row in cells] == [
        ("uio0", "yes", ["disk0", "(42)"]),
        ("uio1", "NO", ["disk0", "(42)"]),
        ("uio3", "-", ["-"]),
        ("uio4", "starting", ["uio4", "(43)"]),
    ]
    assert (
        "uio1 (store-uio1, replication/disk0): NOT SERVED since 2026-01-02 03:04:05 UTC: found"
        in result.stdout
    )
    assert "uio3 (store-uio3, qcow//srv/vm): not served: found qcow//srv/vm" in result.stdout
    assert json.loads(command("devices", "--json").stdout)[0]["pid"] == 42


@pytest.mark.parametrize("row", [SERVED, FOREIGN, COMING], ids=lambda row: row.state)
def test_devices_is_0_when_none_of_ours_is_unserved(workers: Workers, row: schema.DeviceInfo) -> None:
    devices(workers, row)
    assert command("devices").exit_code == 0


def test_devices_without_a_lun_or_without_a_daemon(workers: Workers) -> None:
    absent = command("devices")
    assert absent.exit_code == exits.ABSENT
    assert "nobody serves at" in absent.stderr
    assert "Is the daemon running?" in absent.stderr
    devices(workers)
    assert command("devices").stdout == "no LUN in the kernel is for a handler in user space\n"
    assert json.loads(command("devices", "--json").stdout) == []


def test_errors_of_all(workers: Workers) -> None:
    error = schema.ErrorStatus(error=True, desc="I/O error occurred")
    since = "2026-01-02T03:04:05Z"
    workers.serve("disk0", query_errors=error, query_status=status(error_since=since, protection=UNSAFE))
    workers.serve("disk1", query_errors=schema.ErrorStatus(error=False), query_status=status())
    result = command("errors")
    assert result.stdout.splitlines() == [
        f"disk0: I/O error occurred, since {since}",
        "disk0: NOT PROTECTED since 2026-01-02 03:04:05 UTC: the link to alpha is down",
        "  what to do: see to it",
        "disk1: no error",
    ]
    assert result.exit_code == exits.FAILED
    assert command("errors", "disk1").exit_code == 0
    answers = json.loads(command("errors", "--json").stdout)
    assert [answer["result"]["protection"]["protected"] for answer in answers] == [False, True]


def test_errors_says_that_nothing_is_protected_though_no_error_is_recorded(workers: Workers) -> None:
    """The secondary had lost its power, and the primary said `no error`."""
    workers.serve(
        "disk0", query_errors=schema.ErrorStatus(error=False), query_status=status(protection=UNSAFE)
    )
    result = command("errors", "disk0")
    assert result.exit_code == exits.UNPROTECTED
    assert "disk0: NOT PROTECTED since 2026-01-02 03:04:05 UTC: the link to alpha is down" in result.stdout


def test_check_says_what_is_wrong_with_which_file(place: Path) -> None:
    result = command("check")
    assert result.exit_code == exits.WRONG
    assert "disk0.toml: host.beta.disk: found /dev/vdb (No such file" in result.stderr
    assert "other.toml: good, and beta has no part in it" in " ".join(result.stdout.split())


@pytest.fixture
def good(place: Path) -> Path:
    """The file of disk0, alone, with a disk, an overlay directory, an address and ports that are there."""
    disk, overlays = place / "disk", place / "overlays"
    with disk.open("wb") as file:
        file.truncate(256 << 20)
    overlays.mkdir()
    path = place / "etc" / "disk0.toml"
    text = GOOD.replace("/dev/vdb", str(disk)).replace("/var/lib/overlays", str(overlays))
    text = text.replace("192.0.2", "127.0.0")
    text = text.replace(
        "port = 10809", f'trust = "address"\nport = {free_port()}\ncontrol-port = {free_port()}'
    )
    path.write_text(text)
    (place / "etc" / "disk1.toml").unlink()
    (place / "etc" / "other.toml").unlink()
    return path


def test_check_of_a_good_file(good: Path) -> None:
    result = command("check", str(good))
    assert result.exit_code == 0
    first, *rest = result.stdout.splitlines()
    assert first == f"{good}: good, secondary on beta"
    assert rest[0].startswith("  link: ")
    assert all(line.startswith("  ") for line in rest)
    assert "warning" not in result.stdout


def test_check_on_a_terminal_fits_80_columns_where_a_path_lets_it(good: Path) -> None:
    (good.parent.parent / "overlays").chmod(0o777)
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "tcmu_replication", "check"]
    with subprocess.Popen(words, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while data := os.read(ours, 4096):
                said += data
    os.close(ours)
    assert process.returncode == exits.WRONG
    lines = said.decode().splitlines()
    assert len(lines) > 2
    assert all(len(line) <= 80 or str(good.parent.parent) in line for line in lines)
    assert "so that others may write it" in " ".join(" ".join(lines).split())


def test_check_says_each_thing_that_is_wrong_and_what_is_worth_a_word(good: Path) -> None:
    text = good.read_text()
    port = next(line for line in text.splitlines() if line.startswith("port")).split(" = ")[1]
    good.write_text(text + f'[nbd]\nlisten = "unix:{good.parent}/lun.sock"\n')
    (good.parent.parent / "overlays").chmod(0o777)
    with socket.create_server(("127.0.0.2", int(port))):
        result = command("check", "--json")
    assert result.exit_code == exits.WRONG
    [report] = json.loads(result.stdout)
    assert (report["file"], report["verdict"], report["mode"]) == (str(good), "wrong", "secondary")
    overlays, taken = report["errors"]
    assert "host.beta.overlays: found" in overlays
    assert f"link.port: found 127.0.0.2 port {port}, where another process listens" in taken
    assert command("check").exit_code == exits.WRONG


def test_check_of_files_in_which_this_host_has_no_part_is_wrong(good: Path) -> None:
    """A wrong host name said `good, and vm has no part in it`."""
    for words in (["check"], ["check", str(good)]):
        result = command("--host", "vm", *words)
        assert result.exit_code == exits.WRONG
        assert "host: found this host's name vm; expected alpha or beta: call this host so" in result.stderr
        assert "--host NAME" in result.stderr
    (good.parent / "disk1.toml").write_text(good.read_text().replace("disk0", "disk1").replace("beta", "vm"))
    result = command("--host", "vm", "check")
    assert "has no part in it" in " ".join(result.stdout.split())
    assert "call this host so" not in result.stderr


def test_check_of_no_files_says_so(good: Path) -> None:
    good.unlink()
    result = command("check")
    assert (result.exit_code, result.stdout) == (0, f"no resource files in {good.parent}\n")
    assert json.loads(command("check", "--json").stdout) == []


@pytest.mark.parametrize(("days", "status"), [(3, 0), (60, 0), (-1, exits.WRONG)])
def test_check_warns_of_a_certificate_that_will_expire_soon(good: Path, days: int, status: int) -> None:
    end = time.gmtime(time.time() + days * 24 * 3600 + 3600)
    tls = good.parent / "tls"
    Authority(good.parent).issue(tls, "beta", valid=("20010101000000Z", time.strftime("%Y%m%d%H%M%SZ", end)))
    good.write_text(good.read_text().replace('trust = "address"\n', "") + f'[tls]\ncertificates = "{tls}"\n')
    result = command("check")
    assert result.exit_code == status
    said = " ".join(result.stdout.split())
    for name in ("server-cert.pem", "client-cert.pem"):
        warning = f"warning: {tls}/{name} expires at {time.strftime('%Y-%m-%d', end)}"
        assert (warning in said) == (days == 3)
    assert ("in 3 days: put a new one in its place" in said) == (days == 3)
    assert ("its certificate has expired" in result.stderr) == (days < 0)


def test_main_turns_an_error_into_a_line_and_a_status(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tcmu_replication", "failover", "nonsense"], capture_output=True, text=True
    )
    assert done.returncode == exits.WRONG
    assert "nonsense.toml: file: found No such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_complete_from_the_resource_files(place: Path) -> None:
    context = main.cli.make_context("tcmu-replication", ["status", "x"])
    assert main.complete_name(context, main.cli.params[0], "disk") == ["disk0", "disk1"]
