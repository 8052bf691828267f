"""Every target over its corpus and over inputs made from it, without a fuzzer."""

from __future__ import annotations

import contextlib
import gc
import importlib
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz import CORPUS, TARGETS

MADE = 2000
ROOM = 512 << 20
"""Bytes of address space that a target may need on top of what is there: several of the longest requests."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Whoever asks for much more memory gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def check_of(target: str) -> Callable[[bytes], None]:
    """The entry of a target."""
    check: Callable[[bytes], None] = importlib.import_module(f"tests.fuzz.{target}").check
    return check


def corpus(target: str) -> list[Path]:
    """The files of a target, in an order that is always the same."""
    return sorted((CORPUS / target).iterdir())


FILES = [(target, path) for target in TARGETS for path in corpus(target)]


@pytest.mark.parametrize(("target", "path"), FILES, ids=[f"{target}-{path.name}" for target, path in FILES])
def test_input_of_the_corpus(target: str, path: Path) -> None:
    with bounded():
        check_of(target)(path.read_bytes())


@pytest.mark.parametrize("target", ["allocation_map", "bitmap", "hot_extents"])
def test_maps_of_the_corpus_are_opened_and_not_only_refused(target: str) -> None:
    """One target gave a path that no map is opened at, and so looked at nothing."""
    opens = importlib.import_module(f"tests.fuzz.{target}").opens
    found = {path.name for path in corpus(target) if opens(path.read_bytes())}
    assert {"fresh", "marks"} <= found < {path.name for path in corpus(target)}


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_made_from_the_corpus(target: str) -> None:
    check = check_of(target)
    words = importlib.import_module(f"tests.fuzz.{target}").WORDS
    seeds = [path.read_bytes() for path in corpus(target)]
    for number in range(MADE):
        if number % 100 == 0:
            gc.collect()  # connections that have ended still hold their buffers
        data = made(random.Random(number), seeds, words)
        try:
            with bounded():
                check(data)
        except BaseException as error:
            error.add_note(f"input {number}: {data!r}")
            raise


def made(chance: random.Random, seeds: list[bytes], words: tuple[bytes, ...]) -> bytes:
    """One or two inputs with bytes changed, words inserted, and pieces cut out or repeated."""
    data = bytearray(chance.choice(seeds))
    if chance.random() < 0.3:
        data += chance.choice(seeds)[chance.randrange(4) :]
    for _ in range(chance.randrange(6)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 2, 4, 8, 28)))
        match chance.randrange(6):
            case 0:
                data[at:end] = chance.randbytes(end - at)
            case 1:
                data[at:end] = chance.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * (end - at)
            case 2:
                data[at:at] = chance.choice(words)
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = data[at:end] * chance.randrange(1, 5)
            case 5:
                del data[at:]
    return bytes(data)
