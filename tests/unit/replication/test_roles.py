"""The table of stages drives: what it says, the role of that stage does."""

import pytest

from tcmu_replication.replication import roles, stages
from tcmu_replication.replication.role import Role
from tcmu_replication.replication.stages import Action, Operation

NO_METHOD = {
    Action.IGNORE,
    Action.REFUSE,
    Action.ANSWER_ERROR,
    Action.SUSPEND,
    Action.FINISH,
    Action.STEP_DOWN,
}
"""Nothing to do, or done by the replica, or the name of what a role has done by itself."""
BEGINS = {Action.ATTACH, Action.WATCH}
ROUTED = {Operation.READ, Operation.WRITE}
BY_ITSELF = {Operation.COMMIT_FAILED, Operation.BACKUP_ENDED}


@pytest.mark.parametrize("cell", stages.TABLE, ids=lambda cell: "-".join(part.value for part in cell))
def test_every_action_of_the_table_is_a_method_of_its_role(cell):
    mode, stage, operation = cell
    row = stages.TABLE[cell]
    if row.action in NO_METHOD or operation in ROUTED or operation in BY_ITSELF:
        return
    role = roles.TABLE[mode, row.next if row.action in BEGINS else stage]
    name = row.action.name.lower()
    assert getattr(role, name) is not getattr(Role, name), f"{role.__name__} does not {name}"


def test_every_stage_of_each_mode_has_a_role():
    assert set(roles.TABLE) == {(mode, stage) for mode, stage, _ in stages.TABLE}
