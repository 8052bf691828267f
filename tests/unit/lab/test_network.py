"""The relay's thread and sockets, with this test at the hosts' ends."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.lab.channel import PATIENCE_S
from tests.lab.network import QUEUE, Network
from tests.unit.lab.test_switch import ALL, A, B, frame


@pytest.fixture
def net() -> Iterator[Network]:
    network = Network({"alpha": "10.0.0.1/24", "beta": "10.0.0.2/24", "witness": "10.0.0.3/24"})
    yield network
    network.close()


def receive(port: socket.socket) -> bytes:
    waiting = select.poll()
    waiting.register(port, select.POLLIN)
    assert waiting.poll(PATIENCE_S * 1000), "no frame comes"
    return port.recv(1 << 16)


def test_frame_arrives_unchanged(net: Network) -> None:
    net.port("alpha").send(frame(B, A))
    assert receive(net.port("beta")) == frame(B, A)


def test_cut_frames_never_arrive_and_later_ones_do(net: Network) -> None:
    net.cut("alpha", "beta")
    net.port("alpha").send(frame(ALL, A) + b"cut")
    assert receive(net.port("witness")) == frame(ALL, A) + b"cut"
    net.heal()
    net.port("alpha").send(frame(B, A) + b"healed")
    assert receive(net.port("beta")) == frame(B, A) + b"healed"


def test_isolated_host_hears_nothing(net: Network) -> None:
    net.isolate("alpha")
    net.port("beta").send(frame(ALL, B))
    assert receive(net.port("witness")) == frame(ALL, B)
    assert not select.select([net.port("alpha")], [], [], 0)[0]


def test_delayed_frames_take_that_long_and_keep_their_order(net: Network) -> None:
    net.delay(50)
    began = time.monotonic()
    for number in range(10):
        net.port("alpha").send(frame(B, A) + bytes([number]))
    assert [receive(net.port("beta"))[-1] for _ in range(10)] == list(range(10))
    assert time.monotonic() - began >= 0.05


def test_host_that_does_not_listen_stops_nobody_else() -> None:
    net = Network({"alpha": "10.0.0.1/24", "beta": "10.0.0.2/24", "deaf": "10.0.0.3/24"})
    alpha, beta = net.port("alpha"), net.port("beta")
    count = 6000  # more than the deaf one's socket and queue hold
    ahead = threading.Semaphore(QUEUE // 2)  # and fewer than beta's queue holds

    def send() -> None:
        alpha.setblocking(True)
        for number in range(count):
            ahead.acquire()
            alpha.send(ALL + A + number.to_bytes(4, "big") + bytes(1400))

    sender = threading.Thread(target=send)
    sender.start()
    numbers = []
    for _ in range(count):
        numbers.append(int.from_bytes(receive(beta)[12:16], "big"))
        ahead.release()
    sender.join()
    net.close()
    assert numbers == list(range(count))


def test_wrong_host_or_fraction_is_refused(net: Network) -> None:
    with pytest.raises(ValueError, match="no host 'gamma' on this network; it has alpha, beta"):
        net.cut("alpha", "gamma")
    with pytest.raises(ValueError, match="expected 0 to 1"):
        net.drop(1.5, seed=1)
