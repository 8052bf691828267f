"""What a resource's worker says and understands: our commands and events, and QEMU's beside them."""

from __future__ import annotations

from tcmu_replication.control import schema as ours
from tcmu_replication.qemu import block_schema, blockdev_schema, schema

COMMANDS = ours.COMMANDS | schema.COMMANDS | block_schema.COMMANDS | blockdev_schema.COMMANDS
EVENTS = ours.EVENTS | schema.EVENTS | block_schema.EVENTS
