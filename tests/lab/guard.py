"""Ends a lab whose process has died: kills its kernels, removes its folder.

Runs beside the lab as `python guard.py FOLDER` and reads its standard input,
a pipe from the lab. A line "+PID" names a session to kill, "-PID" says that it
is gone. At the end of input, however the lab came to it, what is still named
is killed and FOLDER removed. Standard library only, to start at once.
"""

import contextlib
import os
import shutil
import signal
import sys


def main() -> None:
    """Waits for the end of input, then clears up."""
    sessions: set[int] = set()
    for line in sys.stdin:
        sign, pid = line[0], int(line[1:])
        (sessions.add if sign == "+" else sessions.discard)(pid)
    for pid in sessions:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
