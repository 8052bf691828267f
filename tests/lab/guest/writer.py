"""Writes files until told to stop: `writer.py FOLDER PREFIX`, in a lab host.

Says "PREFIX-0001 SHA256" for each, and only after the file and its name are
synced: what it has said must survive anything. SIGTERM ends it after the file
that it is writing.
"""

import hashlib
import itertools
import os
import signal
import sys
import time

SIZES = (4096, 65536, 1000, 16384, 7)
"""Bytes of one file after another."""
LIMIT = 3000
"""Files after which it only waits, lest it fill the disk: 50 MiB."""


def main(folder: str, prefix: str) -> None:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for number, size in zip(range(1, LIMIT + 1), itertools.cycle(SIZES), strict=False):
        if stopped:
            return
        name = f"{prefix}-{number:04}"
        data = os.urandom(size)
        with open(os.path.join(folder, name), "xb", buffering=0) as file:
            written = 0
            while written < size:
                written += file.write(data[written:])
            os.fsync(file.fileno())
        os.fsync(directory)
        print(name, hashlib.sha256(data).hexdigest(), flush=True)
    while not stopped:
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
