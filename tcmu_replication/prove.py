"""Proving a link's shared secret on a connected socket, before either end says anything else."""

from __future__ import annotations

import asyncio
import socket

from tcmu_replication.secret import Proof


async def prove(sock: socket.socket, proof: Proof) -> None:
    """Carry out this end's half on a non-blocking socket, and read nothing that comes behind it.

    Raises Error PERMISSION (the other end does not know the secret, or of none) or PEER_LOST, and OSError.
    """
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, proof.hello)
    while proof.wanted:
        answer = proof.receive(await loop.sock_recv(sock, proof.wanted))
        if answer:
            await loop.sock_sendall(sock, answer)
    if proof.failed is not None:
        raise proof.failed
