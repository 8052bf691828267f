"""Fuzzing of every parser of outside bytes: a target a module, with its corpus.

A target has `check(data)`, which raises for what must not be, the `WORDS` of
its language, and the `MAX_LENGTH` of an input. `make fuzz` runs them under
atheris, test_corpus.py (in `make test`) without it.
"""

from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
TARGETS = (
    "nbd_server_handshake",
    "nbd_client_handshake",
    "nbd_requests",
    "nbd_replies",
    "control_requests",
    "control_replies",
    "scsi_commands",
    "tcmu_ring",
    "secret_proof",
    "manifest",
    "allocation_map",
    "bitmap",
    "hot_extents",
    "resource_file",
)
