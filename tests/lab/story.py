"""The demonstration's story: a replicated LUN from its first byte to its failover, chapter by chapter.

tests/lab/demo.py tells it to a person, tests/lab/test_demo.py to the tests.
Each chapter is a title and a function that does it and says what was seen, or
raises.
"""

from __future__ import annotations

import contextlib
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Literal

from tcmu_replication.units import MiB, format_size
from tests.lab import pair, target, trees
from tests.lab.channel import Command
from tests.lab.host import GUEST, Host
from tests.lab.initiator import Session
from tests.lab.lab import Lab
from tests.lab.trees import Tree

Ending = Literal["latest", "checkpoint"]

TARGET = "iqn.2026-01.org.example:disk0"
SERVICE = "10.77.0.100"
"""The address at which initiators find the LUN, whichever host serves it."""
MOUNT = "/mnt/lun"
IN_FLIGHT = 20
"""Files that the client has synced when the primary dies; it is writing the next one then."""


class WrongBytesError(AssertionError):
    """Files are not what they should be."""


class Story:
    """A story on `lab`'s hosts, described by `pair.describe` and off; it ends with a failover to `ending`."""

    def __init__(self, lab: Lab, ending: Ending):
        self.lab = lab
        self.ending = ending
        self.alpha, self.beta, self.client = (lab.hosts[name] for name in ("alpha", "beta", "client"))
        self.pair = pair.Pair(lab)
        self.current: Tree = {}
        """What the client has written and synced."""
        self.at_checkpoint: Tree = {}
        self.betas_own: Tree = {}
        """What beta wrote to its LUN since the last checkpoint."""
        self.session: Session
        self.writer: Command
        """Writes on the client when the primary dies."""
        self.killed_at: float

    def chapters(self) -> list[tuple[str, Callable[[], str]]]:
        """The titles and what does them, to be called in this order."""
        sequel = {
            "latest": ("client's own session finds the LUN again: its writes go on", self.client_goes_on),
            "checkpoint": ("client goes back with it: it is started anew", self.client_goes_back),
        }
        return [
            ("Three hosts boot, each with a kernel of its own", self.boot),
            ("One resource file, one daemon on each host", self.configure),
            ("LIO backstores on both; alpha exports the LUN over iSCSI", self.export),
            ("client logs in, makes an ext4", self.log_in),
            ("client copies a file tree and syncs", self.copy_tree),
            ("alpha: checkpoint", self.checkpoint),
            ("client adds, changes and deletes files", self.change_tree),
            ("beta's LUN shows the checkpoint, while alpha's writes arrive", self.look_at_secondary),
            ("beta writes to its own LUN", self.write_on_secondary),
            ("alpha: checkpoint; beta's LUN is the present, its own writes are gone", self.checkpoint_again),
            ("beta writes to its own LUN again", self.write_on_secondary),
            ("alpha loses power while client writes", self.kill_primary),
            (f"beta: failover --to {self.ending}", self.failover),
            ("beta takes over the address, the target's name and the serial number", self.take_over),
            sequel[self.ending],
            ("client logs in anew and checks every byte", self.verify),
        ]

    # The pair

    def boot(self) -> str:
        self.lab.boot()
        return f"Linux {self.alpha.run('uname -r').stdout.strip()}"

    def configure(self) -> str:
        self.pair.configure()
        self.pair.start_daemons()
        return f"/etc/tcmu-replication/{pair.NAME}.toml, {format_size(pair.SIZE)}"

    def export(self) -> str:
        self.pair.create_backstores()
        self.pair.start()
        self._serve(self.alpha)
        states = [self.pair.status(host) for host in (self.alpha, self.beta)]
        return f"{TARGET}; " + ", ".join(
            f"{state['host']} {state['mode']} {state['stage']}" for state in states
        )

    def _serve(self, host: Host) -> None:
        host.python(GUEST / "take_address.py", f"{SERVICE}/24")
        target.Export(self.pair.backstores[host.name], TARGET, SERVICE)

    # The client

    def log_in(self) -> str:
        session = Session(self.client, TARGET, SERVICE)
        self.client.run(
            f"mkfs.ext4 -q {session.device} && mkdir -p {MOUNT} && mount {session.device} {MOUNT}"
        )
        self.session = session
        return f"{session.device}, serial number {pair.SERIAL}"

    def copy_tree(self) -> str:
        with self._made() as folder:
            self.current = trees.real_files(folder)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            seconds = self._copy(folder)
        speed = size / MiB / seconds
        return f"{len(self.current):,} files, {format_size(size)}, {speed:.1f} MiB/s"

    def change_tree(self) -> str:
        names = sorted(self.current)
        deleted, changed = names[::9], names[4::7]
        added = [f"added/{number:03}" for number in range(150)]
        with self._made() as folder:
            (folder / "deleted").write_text("".join(f"{name}\0" for name in deleted))
            self.client.run(f"cd {MOUNT} && xargs -0 rm < /lab/{folder.name}/deleted")
            (folder / "deleted").unlink()
            for name in deleted:
                del self.current[name]
            self.current |= trees.made_files(folder, [*changed, *added], seed=1)
            self._copy(folder)
        return f"{len(added)} added, {len(changed)} changed, {len(deleted)} deleted"

    @contextlib.contextmanager
    def _made(self) -> Iterator[pathlib.Path]:
        """A folder to make files in, which the client sees as /lab/ and its name."""
        with tempfile.TemporaryDirectory(dir=self.client.folder) as folder:
            yield pathlib.Path(folder)

    def _copy(self, folder: pathlib.Path) -> float:
        """Copies a folder's files onto the client's LUN and syncs; the seconds that took."""
        began = time.monotonic()
        self.client.run(f"cp -r /lab/{folder.name}/. {MOUNT} && sync -f {MOUNT}")
        return time.monotonic() - began

    def _start_writer(self, prefix: str) -> Command:
        return self.client.spawn([sys.executable, "-S", "-E", str(GUEST / "writer.py"), MOUNT, prefix])

    def _end_writer(self, writer: Command) -> Tree:
        """Stops the writer after its file; all that it wrote."""
        writer.signal(signal.SIGTERM)
        written = trees.written(writer.wait().stdout)
        self.current |= written
        return written

    # Checkpoints

    def checkpoint(self) -> str:
        done = self.pair.command(self.alpha, "checkpoint")
        self.at_checkpoint = dict(self.current)
        self.betas_own = {}
        return f"epoch {done['epoch']}, writes were held {done['pause-ms']:.1f} ms"

    def look_at_secondary(self) -> str:
        writer = self._start_writer("arriving")
        with self._secondary_lun():
            self._check(self.beta, self.at_checkpoint)
            writer.wait_for("arriving-0003")
        arrived = self._end_writer(writer)
        return f"{len(self.at_checkpoint):,} files as they were; {len(arrived)} new ones arrived meanwhile"

    def write_on_secondary(self) -> str:
        name = f"beta-{len(self.at_checkpoint)}"
        with self._secondary_lun():
            said = self.beta.run(f"cd {MOUNT} && head -c 1M /dev/urandom > {name} && sha256sum {name}").stdout
            self.betas_own[name] = said.split()[0]
        with self._secondary_lun():
            self._check(self.beta, self.at_checkpoint | self.betas_own)
        return f"{name}, 1 MiB, is there beside the {len(self.at_checkpoint):,} files"

    def checkpoint_again(self) -> str:
        seen = self.checkpoint()
        with self._secondary_lun():
            self._check(self.beta, self.current)
        return f"{seen}; {len(self.current):,} files"

    @contextlib.contextmanager
    def _secondary_lun(self) -> Iterator[None]:
        """beta's own LUN as a disk of beta's, mounted."""
        with target.Loop(self.pair.backstores[self.beta.name]) as loop:
            self.beta.run(f"mkdir -p {MOUNT} && mount {loop.device} {MOUNT}")
            try:
                yield
            finally:
                self.beta.run(f"umount {MOUNT}")

    # The end of alpha

    def kill_primary(self) -> str:
        self.writer = self._start_writer("last")
        self.writer.wait_for(f"last-{IN_FLIGHT:04}")
        self.alpha.kill()
        self.killed_at = time.monotonic()
        return (
            f"SIGKILL to its kernel; {len(trees.written(self.writer.stdout))} files of the writer were synced"
        )

    def failover(self) -> str:
        began = time.monotonic()
        self.pair.command(self.beta, "failover", "--to", self.ending, "--fenced")
        return f"done in {time.monotonic() - began:.1f} s; stage {self.pair.status(self.beta)['stage']}"

    def take_over(self) -> str:
        self._serve(self.beta)
        return f"{SERVICE}, {TARGET}; {time.monotonic() - self.killed_at:.1f} s after the power loss"

    def client_goes_on(self) -> str:
        synced = len(trees.written(self.writer.stdout))
        self.writer.wait_for(f"last-{synced + IN_FLIGHT:04}")
        stalled = time.monotonic() - self.killed_at
        written = self._end_writer(self.writer)
        self.client.run(f"umount {MOUNT}")
        self.session.logout()
        return (
            f"{len(written)} files by one writer, no error; going again {stalled:.1f} s after the power loss"
        )

    def client_goes_back(self) -> str:
        self.client.restart()
        self.current = self.at_checkpoint | self.betas_own
        return f"{len(self.current):,} files are to be there, {len(self.betas_own)} of them beta's own"

    def verify(self) -> str:
        session = Session(self.client, TARGET, SERVICE)
        serial = self.client.run(f"tail -c +5 /sys/block/{session.device[5:]}/device/vpd_pg80").stdout
        if serial.rstrip("\0") != pair.SERIAL:
            raise WrongBytesError(f"the LUN's serial number is {serial!r}, expected {pair.SERIAL}")
        self.client.run(f"mkdir -p {MOUNT} && mount {session.device} {MOUNT}")
        self._check(self.client, self.current)
        self.client.run(f"umount {MOUNT} && fsck.ext4 -f -n {session.device}")
        session.logout()
        return f"{len(self.current):,} files, every SHA-256 is right; fsck is clean"

    def _check(self, host: Host, expected: Tree) -> None:
        wrong = trees.differences(expected, trees.read(host, MOUNT))
        if wrong:
            raise WrongBytesError(f"{host.name}'s LUN is wrong: {wrong}")
