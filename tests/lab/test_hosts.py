"""The lab itself: hosts run commands, keep their disks, die, and see this machine only as it is."""

from __future__ import annotations

import contextlib
import os
import pathlib
import select
import signal
import subprocess
import sys

import pytest

from tests.lab.channel import PATIENCE_S, CommandError, HostDiedError
from tests.lab.host import REPOSITORY, Host
from tests.lab.lab import Lab

pytestmark = pytest.mark.lab


def test_command_gives_output_errors_and_status(alpha: Host) -> None:
    done = alpha.run("echo out; echo err >&2; exit 3", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)


def test_failed_command_raises_with_what_it_said(alpha: Host) -> None:
    with pytest.raises(CommandError, match=r"(?s)alpha: echo no >&2; false ended with status 1.*no"):
        alpha.run("echo no >&2; false")


def test_missing_program_has_the_shells_status(alpha: Host) -> None:
    assert alpha.run(["/no/such/program"], check=False).returncode == 127


def test_commands_run_side_by_side(alpha: Host) -> None:
    alpha.run("mkfifo /run/meeting")
    reader = alpha.spawn("cat /run/meeting")
    alpha.run("echo met > /run/meeting")
    assert reader.wait().stdout == "met\n"


def test_overdue_command_is_killed(alpha: Host) -> None:
    with pytest.raises(CommandError, match="did not end within"):
        alpha.run("exec sleep 1000", timeout=0.2)
    alpha.run("until ! pgrep -x sleep; do :; done")


def test_signal_reaches_a_running_command(alpha: Host) -> None:
    waiting = alpha.spawn("trap 'echo told; exit 5' TERM; echo ready; while :; do sleep 0.1; done")
    waiting.wait_for("ready")
    waiting.signal(signal.SIGTERM)
    assert waiting.wait(check=False).returncode == 5
    assert waiting.stdout == "ready\ntold\n"


def test_output_of_a_megabyte_arrives_whole(alpha: Host) -> None:
    said = alpha.run(f"{sys.executable} -c \"print('höhe ' * 200000)\"").stdout
    assert said == "höhe " * 200000 + "\n"


def test_files_pass_in_both_directions(alpha: Host, tmp_path: pathlib.Path) -> None:
    data = os.urandom(1 << 20)
    (tmp_path / "in").write_bytes(data)
    alpha.put(tmp_path / "in", "/srv/deep/file")
    alpha.get("/srv/deep/file", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    alpha.write("/etc/deep/text", "grüß\n")
    assert alpha.read("/etc/deep/text") == "grüß\n"


def test_python_script_runs_in_the_projects_environment(alpha: Host, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, tcmu_replication\nprint(tcmu_replication.__file__, sys.argv[1:])\nsys.exit(4)\n"
    )
    with pytest.raises(CommandError) as failed:
        alpha.python(script, "a b")
    assert failed.value.command.returncode == 4
    assert failed.value.command.stdout == f"{REPOSITORY}/tcmu_replication/__init__.py ['a b']\n"


def test_host_writes_nothing_on_this_machine(alpha: Host) -> None:
    alpha.run(f"touch /etc/lab-wrote-this {REPOSITORY}/lab-wrote-this; rm {__file__}")
    assert not pathlib.Path("/etc/lab-wrote-this").exists()
    assert not (REPOSITORY / "lab-wrote-this").exists()
    assert pathlib.Path(__file__).exists()


def test_power_loss_keeps_what_was_synced(beta: Host) -> None:
    data = beta.device("data")
    beta.run(f"printf kept | dd of={data} conv=fsync bs=4k seek=7 status=none")
    beta.write("/srv/kept", "system disk")
    beta.run("printf overlay > /var/lib/tcmu-replication/kept && sync /var/lib/tcmu-replication/kept")
    writer = beta.spawn(f"dd if=/dev/zero of={data} bs=4k seek=100 status=none; sleep 1000")
    beta.kill()
    with pytest.raises(HostDiedError):
        writer.wait()
    with pytest.raises(HostDiedError, match="not running"):
        beta.run("true")
    beta.boot()
    assert beta.run(f"dd if={data} bs=4k skip=7 count=1 status=none | head -c 4").stdout == "kept"
    assert beta.read("/srv/kept") == "system disk"
    assert beta.read("/var/lib/tcmu-replication/kept") == "overlay"


def test_kill_ends_every_process_of_the_host(beta: Host) -> None:
    beta.spawn("echo here; while :; do :; done").wait_for("here")
    processes = _processes(beta.pid)
    assert len(processes) > 2  # the kernel, the agent, the loop
    beta.kill()
    assert _have_ended(processes)


def test_dead_test_process_leaves_no_host(tmp_path: pathlib.Path) -> None:
    script = (
        "import os, pathlib, sys\n"
        "from tests.lab.lab import Lab\n"
        "lab = Lab(pathlib.Path(sys.argv[1])).__enter__()\n"
        "host = lab.host('orphan')\n"
        "lab.boot()\n"
        "host.spawn('while :; do :; done')\n"
        "print(host.pid, lab.guard.pid, host.folder, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as test:
        assert test.stdout is not None
        group, guard, folder = test.stdout.readline().split()
        processes = [*_processes(int(group)), os.pidfd_open(int(guard))]
        assert len(processes) > 3
        test.kill()
    assert _have_ended(processes)
    assert not pathlib.Path(folder).exists()


def test_fresh_lab_has_empty_disks(fresh_lab: Lab) -> None:
    alpha = fresh_lab.hosts["alpha"]
    alpha.run(f"printf old > {alpha.device('data')}; touch /srv/old; sync")
    fresh_lab.renew()
    assert alpha.run(f"head -c 3 {alpha.device('data')} | tr '\\0' 0; ls /srv").stdout == "000"


def _processes(group: int) -> list[int]:
    """Descriptors of a process group's members, readable when they have ended."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid="], capture_output=True, text=True, check=True)
    descriptors = []
    for line in listed.stdout.splitlines():
        pid, pgid = line.split()
        if int(pgid) == group:
            with contextlib.suppress(ProcessLookupError):  # one that has ended since it was listed
                descriptors.append(os.pidfd_open(int(pid)))
    return descriptors


def _have_ended(processes: list[int]) -> bool:
    """Whether they all end, in a while; the descriptors are closed."""
    ended = []
    for process in processes:
        waiting = select.poll()
        waiting.register(process, select.POLLIN)
        ended.append(bool(waiting.poll(PATIENCE_S * 1000)))
        os.close(process)
    return all(ended)
