"""lio-findings 7, on a real kernel: LUNs that nobody can serve say why, and are served when that is mended."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator

import pytest

from tcmu_replication.cli import exits
from tests.lab import target
from tests.lab.host import Host
from tests.lab.lab import Lab
from tests.lab.pair import NAME, PROGRAM, SIZE, Pair

pytestmark = pytest.mark.lab

SERIAL = "d15c0000-7463-4d75-8000-0000000000e{}"
HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_RDWR); print('held', flush=True); time.sleep(3600)"


@pytest.fixture
def served(hosts: Lab) -> Iterator[Host]:
    """alpha with the resource and its daemon."""
    pair = Pair(hosts)
    pair.configure()
    pair.start_daemon(pair.primary)
    yield pair.primary
    daemon = pair.daemons[pair.primary.name]
    daemon.signal()
    daemon.wait()


def luns(host: Host) -> dict[str, dict]:
    """What `devices` says, by the name of the backstore."""
    done = host.run([PROGRAM, "devices", "--json"], check=False)
    return {row["backstore"]: row for row in json.loads(done.stdout)}


def wait_for(host: Host, name: str, state: str, *words: str) -> dict:
    """The row of a LUN once it is in this state, for a reason that has these words."""
    while True:
        row = luns(host).get(name, {"state": "unknown", "reason": ""})
        if row["state"] == state and all(word in (row["reason"] or "") for word in words):
            return row


def test_luns_that_nobody_can_serve_are_in_status_with_the_reason_until_it_is_mended(served: Host) -> None:
    host = served
    configs = {
        "good": (f"replication/{NAME}", SIZE, ""),
        "small": (f"replication/{NAME}", SIZE // 2, ""),
        "blocks": (f"replication/{NAME}", SIZE, "hw_block_size=4096"),
        "nope": ("replication/nope", SIZE, ""),
        "missing": ("file//srv/missing", SIZE, ""),
        "held": ("file//srv/held", SIZE, ""),
        "slip": (f"replicatoin/{NAME}", SIZE, ""),
    }
    with contextlib.ExitStack() as stack:
        stores = {
            name: target.user(host, name, SERIAL.format(number), *row)
            for number, (name, row) in enumerate(configs.items())
        }
        stack.callback(lambda: [store.delete() for store in stores.values()])
        good = wait_for(host, "good", "served")
        assert (good["worker"], good["config"]) == (NAME, f"replication/{NAME}")
        wrong = {
            "small": f"created with {SIZE // 2} bytes, {NAME} has {SIZE}; delete it and create it with size={SIZE}",
            "blocks": "created with blocks of 4096 bytes",
            "nope": "/etc/tcmu-replication/nope.toml: file: found No such file or directory",
            "missing": "file//srv/missing: found: No such file or directory",
            "held": "file//srv/held: found: No such file or directory",
        }
        rows = {name: wait_for(host, name, "unserved", words) for name, words in wrong.items()}
        assert luns(host)["slip"]["state"] == "foreign"
        told = host.run([PROGRAM, "status"], check=False)
        assert told.returncode == exits.ABSENT
        for name, words in wrong.items():
            assert f"{rows[name]['device']} ({name}, {configs[name][0]}): NOT SERVED since" in told.stdout
            assert words in told.stdout
        assert "slip" not in told.stdout

        # What is in the way goes away.
        holder = host.spawn([sys.executable, "-c", HOLD, f"/dev/{rows['held']['device']}"])
        holder.wait_for("held")
        host.run(f"truncate -s {SIZE} /srv/missing /srv/held")
        wait_for(host, "held", "unserved", "is open in another process; stop the handler")
        holder.signal()
        holder.wait(check=False)
        resource = pathlib.Path("/etc/tcmu-replication") / f"{NAME}.toml"
        host.run(f"cp -p {resource.with_suffix('.secret')} {resource.with_name('nope.secret')}")
        host.run("mkdir -m 700 /var/lib/tcmu-replication/nope")
        host.run(f"truncate -s {SIZE} /srv/nope")
        text = host.read(str(resource)).replace(NAME, "nope").replace(host.device("data"), "/srv/nope")
        host.write(
            str(resource.with_name("nope.toml")), text.replace("10810", "10812").replace("10809", "10811")
        )
        for name in ("small", "blocks"):
            stores[name].delete()
            stores[name] = target.user(host, name, stores[name].serial, f"replication/{NAME}", SIZE)
        for name in wrong:
            wait_for(host, name, "served")
        assert host.run([PROGRAM, "devices"]).returncode == 0
        assert "NOT SERVED" not in host.run([PROGRAM, "status"], check=False).stdout
        host.run(f"{PROGRAM} init {NAME} && {PROGRAM} init nope")  # a new primary is not ready without
        for name in ("missing", "nope", "small"):
            with target.Loop(stores[name]) as loop:
                host.run(f"printf {name} | dd of={loop.device} bs=512 conv=fsync,notrunc status=none")
                assert host.run(f"head -c {len(name)} {loop.device}").stdout == name
