"""The table of stages, cell by cell, against an independent reading of QEMU's behaviour."""

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import stages
from tcmu_replication.replication.stages import Action, Machine, Mode, Operation, Stage

RUNNING_OR_DONE = "Block replication is running or done"
NOT_RUNNING = "Block replication is not running"
SERVES_ALREADY = (
    "this host is the primary and serves already; fail over on the secondary, or stop replication here"
)
BACKUP_GONE = "Backup job was cancelled unexpectedly"

# What each operation does in each stage: "next stage", "ignored", "= action" or "! error text".
PRIMARY = """
                    none                running                 done
open                ignored             = RESUME                ignored
start               running             ! running or done       ignored
start-again         running             ! running or done       running
checkpoint          ignored             = MOVE_EPOCH            ignored
get-error           ! not running       = ANSWER_ERROR          = ANSWER_ERROR
stop                ! not running       done                    ignored
failover            ! serves already    ! serves already        ! serves already
failover-to-latest  ! serves already    ! serves already        ! serves already
superseded          impossible          done                    impossible
read                = EIO               = EIO                   = EIO
write               = EIO               = TO_PEER               = EIO
close               ignored             = SUSPEND               ignored
"""
SECONDARY = """
                    none             running           failover         failover-failed    done
open                ignored          = RESUME          = RESUME         failover           ignored
start               running          ! running or done ignored          ! running or done  ignored
start-again         running          ! running or done ignored          ! running or done  running
checkpoint          ! backup gone    = MOVE_EPOCH      ignored          ! backup gone      ignored
get-error           ! not running    = ANSWER_ERROR    = ANSWER_ERROR   = ANSWER_ERROR     = ANSWER_ERROR
stop                ! not running    done              ignored          ! not running      ignored
failover            ! not running    failover          ignored          ! not running      ignored
failover-to-latest  ! not running    done              ignored          ! not running      ignored
backup-ended        = RECORD_ERROR   = RECORD_ERROR    ignored          = RECORD_ERROR     = RECORD_ERROR
commit-done         impossible       impossible        done             impossible         impossible
commit-failed       impossible       impossible        failover-failed  impossible         impossible
read                = EIO            = CHAIN           = CHAIN          = CHAIN            = DISK
write               = EIO            = TO_ACTIVE       = SPLIT          = SPLIT            = DISK
close               ignored          = SUSPEND         = SUSPEND        = SUSPEND          ignored
"""
TEXTS = {
    "running or done": RUNNING_OR_DONE,
    "not running": NOT_RUNNING,
    "backup gone": BACKUP_GONE,
    "serves already": SERVES_ALREADY,
}


def cells(mode, text):
    """(mode, stage, operation, expected) of a drawing above; cells are divided by two or more spaces."""
    head, *rows = [line for line in text.splitlines() if line.strip()]
    names = head.split()
    starts = [head.index(f" {name}") + 1 for name in names]
    for row in rows:
        operation = Operation(row.split()[0])
        ends = [*starts[1:], len(row) + 1]
        for name, start, end in zip(names, starts, ends, strict=True):
            yield pytest.param(
                mode,
                Stage(name),
                operation,
                row[start:end].strip(),
                id=f"{mode.value}-{name}-{operation.value}",
            )


CELLS = [*cells(Mode.PRIMARY, PRIMARY), *cells(Mode.SECONDARY, SECONDARY)]


def test_every_cell_of_the_table_is_expected():
    drawn = {(c.values[0], c.values[1], c.values[2]) for c in CELLS if c.values[3] != "impossible"}
    assert drawn == set(stages.TABLE)


@pytest.mark.parametrize(("mode", "stage", "operation", "expected"), CELLS)
def test_cell(mode, stage, operation, expected):
    machine = Machine(mode, stage)
    if expected == "impossible":
        with pytest.raises(Error, match="cannot happen"):
            machine.ask(operation)
        return
    if expected.startswith("! "):
        with pytest.raises(Error) as refused:
            machine.ask(operation)
        assert refused.value.kind is Kind.INVALID_STATE
        assert str(refused.value) == TEXTS[expected[2:]]
        assert machine.stage is stage
        return
    action = machine.ask(operation)
    machine.move(operation)
    if expected == "ignored":
        assert action is Action.IGNORE
        assert machine.stage is stage
    elif expected.startswith("= "):
        assert action is Action[expected[2:]]
        assert machine.stage is stage
    else:
        assert machine.stage is Stage(expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "Missing the option mode"),
        ({"top-id": "t"}, "Missing the option mode"),
        ({"mode": "secondary"}, "Missing the option top-id"),
        ({"mode": "primary", "top-id": "t"}, "The primary side does not support option top-id"),
        ({"mode": "both"}, "The option mode's value should be primary or secondary"),
    ],
)
def test_options_wrong(options, text):
    with pytest.raises(Error) as refused:
        stages.parse_options(options)
    assert str(refused.value) == text


def test_options_right():
    assert stages.parse_options({"mode": "primary"}) == (Mode.PRIMARY, None)
    assert stages.parse_options({"mode": "secondary", "top-id": "t"}) == (Mode.SECONDARY, "t")


def test_start_with_the_other_mode():
    with pytest.raises(Error) as refused:
        Machine(Mode.SECONDARY).check_mode(Mode.PRIMARY)
    assert str(refused.value) == "The parameter mode's value is invalid, needs 1, but got 0"


def test_error_is_sticky_and_the_first_reason_is_kept():
    machine = Machine(Mode.PRIMARY, Stage.RUNNING)
    machine.get_error()
    machine.record("first")
    machine.record("second")
    assert machine.error == "first"
    with pytest.raises(Error, match=r"^I/O error occurred$"):
        machine.get_error()
    machine.forget_error()
    machine.get_error()
