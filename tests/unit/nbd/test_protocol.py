"""The tables of NBD errors."""

from __future__ import annotations

from tcmu_replication.errors import Kind
from tcmu_replication.nbd import protocol
from tcmu_replication.nbd.protocol import NbdError


def test_every_kind_has_an_nbd_error() -> None:
    assert set(protocol.ERROR_OF_KIND) == set(Kind)


def test_every_nbd_error_has_a_kind() -> None:
    assert set(protocol.KIND_OF_ERROR) == set(NbdError)


def test_no_space_and_read_only_survive_the_way_to_a_client() -> None:
    for kind, expected in ((Kind.NO_SPACE, Kind.NO_SPACE), (Kind.UNSUPPORTED, Kind.UNSUPPORTED)):
        assert protocol.kind_of_error(protocol.ERROR_OF_KIND[kind]) is expected


def test_unknown_error_is_an_io_error_with_its_number() -> None:
    assert protocol.kind_of_error(999) is Kind.IO
    assert protocol.error_name(999) == "error 999"
    assert protocol.error_name(28) == "ENOSPC"


def test_sentence_of_a_peer_fits_a_line() -> None:
    assert protocol.sentence("voll: ä".encode()) == "voll: ä"
    assert protocol.sentence(b"one\nERROR two\x1b[31m\xff") == "one?ERROR two?[31m\ufffd"
    assert protocol.sentence(b"x" * 5000) == "x" * 397 + "..."
