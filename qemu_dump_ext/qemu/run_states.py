"""QEMU's run states, and what they mean to a dump. Pure.

Source: QEMU qapi/run-state.json, qapi/migration.json; dump/dump.c qmp_dump_guest_memory(),
migration/migration.c migrate_add_blocker().
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from qemu_dump_ext.structures.dialect import QemuVersion

_INCOMING_WORDS_SINCE: QemuVersion = (11, 0, 0)  # 10.2 says `incoming`, 11.1 does not
PAUSED = "paused"
"""What `stop`, and a debugger that connects, make of a running guest."""
RESET = "prelaunch"
"""What `system_reset` makes of a paused guest; also that of one that has never run."""


class Treatment(enum.Enum):
    """What a dump does with a guest in a run state."""

    STOP = "is stopped, and runs again afterwards"
    LEAVE = "is dumped as it stands, and left so"
    REFUSE_INCOMING = "is refused: its memory is still to come"
    REFUSE_MIGRATING = "is refused: a migration, or a snapshot, is being written"


RUN_STATES: Mapping[str, Treatment] = {
    "running": Treatment.STOP,
    # Since QEMU 9.0; before, `stop` changes nothing, and it is dumped as it stands.
    "suspended": Treatment.STOP,
    "debug": Treatment.LEAVE,
    "guest-panicked": Treatment.LEAVE,
    "internal-error": Treatment.LEAVE,
    "io-error": Treatment.LEAVE,
    PAUSED: Treatment.LEAVE,
    "postmigrate": Treatment.LEAVE,
    RESET: Treatment.LEAVE,
    "restore-vm": Treatment.LEAVE,
    "shutdown": Treatment.LEAVE,
    "watchdog": Treatment.LEAVE,
    "inmigrate": Treatment.REFUSE_INCOMING,
    "colo": Treatment.REFUSE_MIGRATING,
    "finish-migrate": Treatment.REFUSE_MIGRATING,
    "save-vm": Treatment.REFUSE_MIGRATING,
}
"""Every run state of QEMU 7.2 and 11, by QMP's name."""

NO_MIGRATION = "none"
IDLE_MIGRATIONS = frozenset((NO_MIGRATION, "cancelled", "completed", "failed"))
"""What `query-migrate` says where no migration is under way."""
MIGRATION_REFUSED = "Live migration disabled: dump-guest-memory in progress"
"""What QEMU says to who wants to migrate a guest that is being dumped."""
REFUSED_BY_MIGRATION = (
    f"disallowing migration blocker (migration/snapshot in progress) for: {MIGRATION_REFUSED}"
)
"""What QEMU says to who wants to dump a guest that is being migrated."""


def treatment(state: str) -> Treatment:
    """Return what a dump does with a guest in a run state; one that is not known is left."""
    return RUN_STATES.get(state, Treatment.LEAVE)


def refused_by_incoming(version: QemuVersion) -> str:
    """Return what a QEMU says to who wants to dump a guest whose memory is still to come."""
    which = "" if version >= _INCOMING_WORDS_SINCE else "incoming "
    return f"Dump not allowed during {which}migration."
