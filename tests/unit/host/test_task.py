"""What the kernel says of a thread of ours."""

from __future__ import annotations

import os
import threading

from tcmu_replication.host import task


def test_thread_that_waits_has_run_nothing_of_its_own_since() -> None:
    wait, go = os.pipe()
    numbers: list[int] = []

    def work() -> None:
        numbers.append(task.this())
        os.read(wait, 1)

    thread = threading.Thread(target=work)
    thread.start()
    while not numbers or (seen := task.look(numbers[0])) is None or seen.state != "S":
        pass
    while seen != (again := task.look(numbers[0])):  # it may have waited for the interpreter before
        seen = again
    assert seen == task.look(numbers[0])
    assert seen is not None
    assert not seen.runs
    os.write(go, b"x")
    thread.join()
    while task.look(numbers[0]) is not None:  # join returns a moment before the kernel's thread has gone
        pass
    os.close(wait)
    os.close(go)


def test_thread_that_computes_runs() -> None:
    seen = task.look(task.this())
    assert seen is not None
    assert seen.runs
