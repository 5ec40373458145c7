"""Let a guest run that a dump has stopped which was killed: only such a guest."""

from __future__ import annotations

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.qemu.monitor_text import RUNNING
from qemu_dump_ext.qemu.run_state import change_run_state, inherited_debts, read_run_state
from qemu_dump_ext.qemu.run_states import PAUSED


def resume_guest(access: GuestAccess) -> str:
    """Let it run again; returns what was done, in words.

    Raises:
        RequestError: No dump has left it stopped.
        SourceError: QEMU does not answer, or does not let it run.
    """
    debts = inherited_debts(access)
    state = read_run_state(access)
    if not debts:
        raise RequestError(
            f"no dump has left this guest stopped: it is {state}",
            hint="what others have stopped is theirs to let run",
        )
    if state == PAUSED:
        change_run_state(access, "cont")
    for debt in debts:
        debt.settle()
    if state == PAUSED:
        return f"it runs again: a dump that was killed (PID {debts[0].dumper}) had stopped it"
    if state == RUNNING:
        return "it runs already"
    return f"somebody has changed it since a dump stopped it: it was left {state}"
