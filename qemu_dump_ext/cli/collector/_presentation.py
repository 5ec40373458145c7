"""How the commands of `qemu-crash-collector` show crashes to people."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qemu_dump_ext.crash_collector.store.states import SignatureState, SignatureStates
from qemu_dump_ext.printable import printable

if TYPE_CHECKING:
    from qemu_dump_ext.crash_collector.record import CrashRecord

_WIDTH_MIN = 60
_UNITS = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def age_text(moment: datetime, now: datetime | None = None) -> str:
    """Return how long ago something was, in one unit: `3 d`; `now` for what is to come."""
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    for size, unit in _UNITS:
        if seconds >= 2 * size or (size == 1 and seconds >= 1):
            return f"{seconds / size:.0f} {unit}"
    return "now"


def size_text(size: int | None) -> str:
    """Return the size of a dump in a few characters, or `-` of none."""
    if size is None:
        return "-"
    mib = size / (1 << 20)
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB" if mib >= 1 else "< 1 MiB"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows under a header; the last column is cut where a terminal has no more room."""
    lines = [head, *([printable(cell, keep="") for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    room = max(shutil.get_terminal_size((10_000, 24)).columns, _WIDTH_MIN)
    shown = []
    for line in lines:
        cells = [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)]
        text = "  ".join((*cells, line[-1]))
        shown.append((text if len(text) <= room else f"{text[: room - 1]}…").rstrip())
    return "\n".join(shown)


def state_lines(signature_id: str, states: SignatureStates) -> list[str]:
    """Return what people made of a signature, in words."""
    own, state = states.of(signature_id), states.effective(signature_id)
    lines = [f"state: {_state_words(state)}"]
    if own.state == "merged":
        lines.append(f"merged into: {states.canonical(signature_id)}")
    if state.note:
        lines.append(f"note: {state.note}")
    return lines


def _state_words(state: SignatureState) -> str:
    if state.fixed_in is None:
        return state.state
    behind = "came back although fixed in" if state.state == "regression" else "fixed in"
    return f"{state.state}, {behind} {state.fixed_in}"


def record_with_state(record: CrashRecord, states: SignatureStates) -> dict[str, Any]:
    """Return a crash for JSON: `crash.json`, and `state` as people made it."""
    return record.as_dict() | {"state": states_dict(record.signature.id, states)}


def states_dict(signature_id: str, states: SignatureStates) -> dict[str, Any]:
    """Return the state of a signature for JSON."""
    state = states.effective(signature_id)
    return {
        "state": state.state,
        "note": state.note,
        "fixed_in": state.fixed_in,
        "changed": state.changed,
        "signature": states.canonical(signature_id),
    }
