"""A load that notices any wrong byte: fio, which writes blocks with checksums and reads them back."""

from __future__ import annotations

import shlex

from tests.lab.channel import Command
from tests.lab.host import Host

DEPTH = 32


def start(host: Host, device: str, *, size: str = "24M", seconds: int | None = None) -> Command:
    """Starts random 4 KiB writes at queue depth 32 over `size` of `device`, past the page cache.

    Each is read back soon after it was written, and all at the end; a wrong or
    failed block ends it with another status than 0. With `seconds` it goes on
    over and over for so long.
    """
    lasting = ["--time_based", f"--runtime={seconds}"] if seconds else []
    return host.spawn(
        shlex.join(
            [
                "fio",
                "--name=load",
                f"--filename={device}",
                "--ioengine=libaio",
                "--direct=1",
                "--rw=randwrite",
                "--bs=4k",
                f"--iodepth={DEPTH}",
                f"--size={size}",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_backlog=1024",
                "--randseed=1",
                "--output-format=terse",
                *lasting,
            ]
        )
    )


def wait_for_writes(host: Host, device: str, count: int = 500) -> None:
    """Returns when `count` more writes of a disk are done: the load is in full swing."""
    statistics = f"/sys/block/{device.removeprefix('/dev/')}/stat"
    done = int(host.read(statistics).split()[4])  # "write I/Os", Documentation/block/stat.rst
    host.wait_until(f"{{ read -r a b c d writes rest < {statistics}; [ $writes -ge {done + count} ]; }}")
