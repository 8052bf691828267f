"""Random requests on a pair while either worker dies or freezes, against a model of the bytes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tcmu_replication.units import KiB, MiB
from tests.support.nbd import FLUSH, TRIM, WRITE, ZEROES, Nbd, Request
from tests.support.processes import Pair, Worker
from tests.support.tools import requires

pytestmark = requires("qemu-io")

SIZE = 8 * MiB
LINK = {"reconnect-delay": 14.0, "timeout": 10.0}
SEEDS = range(int(os.environ.get("TCMU_REPLICATION_SOAK", "2")))
ROUNDS = 8


def some(rng: random.Random, lun: Nbd, model: bytearray, count: int) -> list[Request]:
    """Begin requests of every kind that do not overlap, and do them in the model."""
    begun = []
    for cell in rng.sample(range(64), count):
        offset = cell * SIZE // 64 + rng.randrange(8) * 512
        length = rng.choice((512, 4 * KiB, 12 * KiB, 100 * KiB))
        command = rng.choice((WRITE, WRITE, ZEROES, TRIM, FLUSH))
        data = rng.randbytes(length) if command == WRITE else b""
        if command == FLUSH:
            begun.append(lun.start(FLUSH, 0, 0))
            continue
        begun.append(lun.start(command, offset, length, data))
        model[offset : offset + length] = data or bytes(length)
    return begun


def fail_and_return(rng: random.Random, worker: Worker) -> None:
    """Dead for a moment, or frozen."""
    if rng.random() < 0.5:
        worker.kill()
        worker.start()
    else:
        worker.pause()
        worker.resume()


@pytest.mark.parametrize("seed", SEEDS)
def test_pair_is_equal_when_it_is_quiet_whoever_failed(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    model = bytearray(SIZE)
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        pair.replicate()
        for _ in range(ROUNDS):
            with Nbd(str(pair.alpha.socket), "disk0") as lun:
                begun = some(rng, lun, model, rng.randrange(1, 20))
                fail_and_return(rng, pair.beta)
                begun += [lun.start(FLUSH, 0, 0)]
                lun.finish(begun)
                assert not any(request.error for request in begun)
            if rng.random() < 0.4:
                fail_and_return(rng, pair.alpha)
            assert pair.alpha.status()["error"] is None
            assert pair.alpha.disk.read_bytes() == model
            assert pair.beta.disk.read_bytes() == model
        pair.alpha.cli("checkpoint", "disk0")
