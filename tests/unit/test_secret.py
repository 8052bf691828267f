"""The proof of a link's shared secret (S1), both halves in memory: who knows it gets in, and nobody else."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace

import pytest

from tcmu_replication import secret
from tcmu_replication.errors import Error, Kind
from tcmu_replication.secret import HELLO, MAC, MAGIC, Proof, Secret

KEY = b"0123456789abcdef"
OURS = Secret(lambda: KEY, "disk0", "nbd")
NONCES = {"client": b"c" * 32, "server": b"s" * 32}


def half(role: secret.Role, of: Secret = OURS, nonce: bytes | None = None) -> Proof:
    return of.proof(role, nonce or NONCES[role])


def feed(proof: Proof, data: bytes, step: int = 1 << 10) -> bytes:
    """Give it `data` as it wants it, in pieces of `step` bytes at most; what it answered."""
    answers = b""
    while data and proof.wanted:
        piece = data[: min(step, proof.wanted)]
        data = data[len(piece) :]
        answers += proof.receive(piece)
    return answers


def converse(client: Proof, server: Proof, step: int = 1 << 10) -> None:
    mac = feed(client, server.hello, step)
    feed(server, client.hello, step)
    feed(client, feed(server, mac, step), step)


@pytest.mark.parametrize("step", [1, 7, 8, 39, 40, 1024])
def test_ends_with_one_secret_believe_each_other_in_any_pieces(step: int) -> None:
    client, server = half("client"), half("server")
    converse(client, server, step)
    assert (client.wanted, server.wanted) == (0, 0)
    assert (client.failed, server.failed) == (None, None)


def test_macs_are_those_of_the_description() -> None:
    client, server = half("client"), half("server")
    mac = feed(client, server.hello)
    covered = b"TCMUKEY\1" + b"client\0" + b"nbd\0disk0\0" + b"c" * 32 + b"s" * 32
    assert mac == hmac.new(KEY, covered, hashlib.sha256).digest()
    feed(server, client.hello)
    answer = feed(server, mac)
    assert answer == b"\1" + hmac.new(KEY, covered.replace(b"client", b"server"), hashlib.sha256).digest()


DIFFERENT = {
    "another secret": replace(OURS, read=lambda: b"another one of 16"),
    "the other port": replace(OURS, port="control"),
    "another resource": replace(OURS, resource="disk1"),
}


@pytest.mark.parametrize("row", DIFFERENT)
def test_both_ends_say_that_the_secrets_differ(row: str) -> None:
    client, server = half("client"), half("server", DIFFERENT[row])
    converse(client, server)
    for end in (client, server):
        assert end.failed is not None
        assert end.failed.kind is Kind.PERMISSION
        assert str(end.failed) == secret.DIFFERENT
        assert end.wanted == 0


def test_every_bit_of_a_clients_proof_counts_and_a_wrong_one_gets_no_mac() -> None:
    for bit in range(MAC * 8):
        client, server = half("client"), half("server")
        mac = bytearray(feed(client, server.hello))
        mac[bit // 8] ^= 1 << bit % 8
        feed(server, client.hello)
        assert feed(server, bytes(mac)) == b"\0"
        assert server.failed is not None


def test_every_bit_of_a_servers_proof_counts() -> None:
    for bit in range(8 * (1 + MAC)):
        client, server = half("client"), half("server")
        feed(server, client.hello)
        answer = bytearray(feed(server, feed(client, server.hello)))
        answer[bit // 8] ^= 1 << bit % 8
        feed(client, bytes(answer))
        assert client.failed is not None
        assert str(client.failed) == secret.DIFFERENT


def test_proof_sent_back_to_its_maker_is_refused() -> None:
    """A stranger who answers each end with its own bytes."""
    client = half("client")
    mac = feed(client, client.hello)  # with the client's own nonce
    feed(client, b"\1" + mac)
    assert client.failed is not None


def test_proof_of_one_server_is_no_clients() -> None:
    """A stranger lets one server's client prove what another server asks."""
    client, server = half("client"), half("server")
    feed(server, client.hello)
    answer = feed(server, feed(client, server.hello))
    other = half("server")
    feed(other, client.hello)
    assert feed(other, answer[1:]) == b"\0"


def test_proof_of_an_earlier_connection_is_refused() -> None:
    client, server = half("client"), half("server")
    mac = feed(client, server.hello)
    again = half("server", nonce=b"n" * 32)
    feed(again, client.hello)
    assert feed(again, mac) == b"\0"


def test_nonces_are_new_for_each_connection() -> None:
    assert len({OURS.proof("server").hello for _ in range(100)}) == 100


OTHERS = {
    "an NBD server": (b"NBDMAGICIHAVEOPT\0\3", secret.MISSING_THERE),
    "a QMP server": (b'{"QMP": {"version"', secret.MISSING_THERE),
    "a QMP client": (b'{"execute": "qmp_c', secret.MISSING_THERE),
    "TLS's alert": (b"\x15\3\1\0\2\2\x46", secret.MISSING_THERE),
    "TLS's handshake": (b"\x16\3\1\2\0\1\0", secret.MISSING_THERE),
    "another version": (b"TCMUKEY\2" + bytes(32), "began with b'TCMUKEY\\x02'"),
    "anything": (b"GET / HTTP/1.1\r\n", "which is no proof"),
    "zeroes": (bytes(40), "which is no proof"),
}


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("step", [1, 1024])
@pytest.mark.parametrize("row", OTHERS)
def test_other_language_is_refused_at_its_first_bytes(row: str, role: secret.Role, step: int) -> None:
    said, why = OTHERS[row]
    proof = half(role)
    feed(proof, said[:8], step)
    assert proof.failed is not None
    assert proof.failed.kind is Kind.PERMISSION
    assert why in str(proof.failed)


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("heard", [0, 7, 8, HELLO - 1, HELLO, HELLO + 1])
def test_end_that_hangs_up_is_lost(role: secret.Role, heard: int) -> None:
    client, server = half("client"), half("server")
    said = {
        "client": server.hello + b"\1" + bytes(MAC),
        "server": client.hello + bytes(MAC),
    }[role]
    proof = client if role == "client" else server
    feed(proof, said[:heard])
    assert proof.receive(b"") == b""
    assert proof.failed is not None
    assert proof.failed.kind is Kind.PEER_LOST
    hint = "`secret` may be missing there"
    assert (hint in str(proof.failed)) == (heard == 0)


def test_end_without_a_secret_knows_that_it_is_asked() -> None:
    with pytest.raises(Error, match="this end has none") as caught:
        secret.refuse_if_asked(MAGIC + bytes(32))
    assert caught.value.kind is Kind.PERMISSION
    secret.refuse_if_asked(b"NBDMAGIC")


def test_secret_that_cannot_be_read_is_told_at_the_proof() -> None:
    def read() -> bytes:
        raise Error(Kind.BAD_CONFIG, "gone")

    with pytest.raises(Error, match="gone"):
        replace(OURS, read=read).proof("server")
