"""Imports go one way: the table of docs/architecture.md, held against the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "tcmu_replication"

PURE = [
    "errors",
    "units",
    "secret",
    "scsi.*",
    "nbd.protocol",
    "nbd.handshake",
    "nbd.handshake_client",
    "nbd.transmission",
    "nbd.uri",
    "tcmu.layout",
    "replication.protection",
    "replication.facts",
    "replication.identity",
    "replication.stages",
    "replication.state",
    "replication.verdict",
    "control.framing",
    "control.protocol",
    "control.session",
]
NO_IO = {"socket", "asyncio", "os", "mmap", "threading", "time", "select", "subprocess", "logging"}

SHARED = ["errors", "units", "ownership", "tls", "secret", "prove", "listener", "dial", "background"]
# What each folder may import of the project, besides itself and SHARED.
MAY = {
    "scsi": [],
    "nbd": [],
    "tcmu": [],
    "block": ["nbd"],
    "jobs": ["block"],
    "control": [],
    "host": ["tcmu"],
    "replication": ["block", "jobs", "control"],
    "frontend": ["block", "scsi", "tcmu", "nbd"],
    "daemon": ["block", "control", "frontend", "host", "replication", "scsi", "tcmu", "jobs", "nbd"],
    "qemu": ["block", "control", "daemon", "frontend", "jobs", "nbd", "replication"],
    "handlers": [
        "block",
        "control",
        "daemon",
        "frontend",
        "jobs",
        "nbd",
        "qemu",
        "replication",
        "tcmu",
        "scsi",
        "host",
    ],
    "cli": ["control", "daemon"],
}


def modules():
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts), path
    for path in sorted((ROOT / "handlers").glob("*.py")):
        yield f"handlers.{path.stem}", path


def imports(path):
    """Every module that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder(module):
    return module.split(".")[0]


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_imports_go_down(module, path):
    mine = folder(module)
    if mine not in MAY:
        return
    allowed = {mine, *SHARED, "__version__", *MAY[mine]}
    for name in imports(path):
        if name.startswith(PACKAGE + "."):
            theirs = folder(name.removeprefix(PACKAGE + "."))
            assert theirs in allowed, f"{module} imports {name}; {mine} may import {sorted(allowed)}"


KNOW_QEMU = {"qemu", "handlers"}
"""Who speaks as QEMU's controller, and who puts it together with the rest. Nothing else knows that it is there."""
QEMU_SEES = {"replication.stages", "replication.peer_state"}
"""Of a replica: the names of its stages, and what a peer is. All else it sees through `qemu.view`."""


@pytest.mark.parametrize(
    ("module", "path"), [pytest.param(m, p, id=m) for m, p in modules() if folder(m) not in KNOW_QEMU]
)
def test_nothing_native_knows_qemu(module, path):
    known = [name for name in imports(path) if name.startswith(f"{PACKAGE}.qemu")]
    assert not known, f"{module} imports {known}: what QEMU's side needs of it belongs in {PACKAGE}.qemu"


@pytest.mark.parametrize(
    ("module", "path"), [pytest.param(m, p, id=m) for m, p in modules() if folder(m) == "qemu"]
)
def test_qemu_sees_a_replica_through_its_view(module, path):
    start = f"{PACKAGE}.replication."
    seen = {".".join(name.split(".")[1:3]) for name in imports(path) if name.startswith(start)}
    assert seen <= QEMU_SEES, f"{module} imports {sorted(seen - QEMU_SEES)} instead of {PACKAGE}.qemu.view"


def pure_modules():
    for module, path in modules():
        for pattern in PURE:
            if module == pattern or (pattern.endswith(".*") and module.startswith(pattern[:-1])):
                yield pytest.param(module, path, id=module)


@pytest.mark.parametrize(("module", "path"), list(pure_modules()))
def test_pure_modules_do_no_io(module, path):
    used = {name.split(".")[0] for name in imports(path)} & NO_IO
    assert not used, f"{module} understands bytes and must not import {sorted(used)}"


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("ownership", {"errors"}),
        ("tls", {"errors", "ownership"}),
        ("secret", {"errors"}),
        ("prove", {"secret"}),
        ("listener", {"errors"}),
        ("dial", set()),
        ("background", set()),
    ],
)
def test_what_everything_may_import_imports_little(name, may):
    ours = [module for module in imports(ROOT / PACKAGE / f"{name}.py") if module.startswith(PACKAGE)]
    assert {module.split(".")[1] for module in ours if "." in module} <= may


@pytest.mark.parametrize("name", ["errors", "units"])
def test_the_bottom_imports_nothing_of_ours(name):
    assert not [i for i in imports(ROOT / PACKAGE / f"{name}.py") if i.startswith(PACKAGE)]
