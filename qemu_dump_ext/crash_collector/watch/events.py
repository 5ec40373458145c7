"""Which events and run states of QEMU count as a crash, and what they mean. Pure.

Source: QEMU qapi/run-state.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from qemu_dump_ext.crash_collector.record import CauseKind, CrashCause

Event: TypeAlias = Mapping[str, Any]
_Found: TypeAlias = tuple[CauseKind, str] | None

STOPPED_BY_QEMU: Mapping[str, tuple[CauseKind, str]] = {
    "guest-panicked": ("guest-panicked", "the guest has panicked"),
    "internal-error": ("internal-error", "QEMU stopped the guest: internal error"),
    "io-error": ("io-error", "QEMU stopped the guest: an error of a disk"),
    "watchdog": ("watchdog", "QEMU stopped the guest: its watchdog fired"),
}
"""Run states of `query-status` in which a guest needs somebody to look at it."""


def _panicked(data: Event) -> _Found:
    info = data.get("info")
    facts = f": {_words(info)}" if isinstance(info, Mapping) else ""
    return "guest-panicked", f"the guest panicked{facts}"


def _crashloaded(_data: Event) -> _Found:
    return "crashloaded", "the guest panicked and runs its own crash kernel"


def _watchdog(data: Event) -> _Found:
    return "watchdog", f"the watchdog fired: {data.get('action')}"


def _memory_failure(data: Event) -> _Found:
    if data.get("action") == "ignore":
        return None
    return "memory-failure", f"memory failed: {_words(data)}"


def _shutdown(data: Event) -> _Found:
    return ("shutdown", f"the guest shut down: {data.get('reason')}") if data.get("guest") else None


def _reset(data: Event) -> _Found:
    return ("reset", f"the guest reset itself: {data.get('reason')}") if data.get("guest") else None


_MEANING: Mapping[str, Callable[[Event], _Found]] = {
    "GUEST_PANICKED": _panicked,
    "GUEST_CRASHLOADED": _crashloaded,
    "WATCHDOG": _watchdog,
    "MEMORY_FAILURE": _memory_failure,
    "SHUTDOWN": _shutdown,
    "RESET": _reset,
}


def cause_of_event(event: Event) -> CrashCause | None:
    """Return why an event counts as a crash, or None: it does not.

    STOP does not tell; ask for the run state and `cause_of_status`.
    """
    meaning = _MEANING.get(str(event.get("event")))
    data = event.get("data")
    found = meaning(data if isinstance(data, Mapping) else {}) if meaning else None
    return None if found is None else CrashCause(*found, dict(event))


def cause_of_status(status: str) -> CrashCause | None:
    """Return why a run state of `query-status` counts as a crash, or None: it does not."""
    found = STOPPED_BY_QEMU.get(status)
    return None if found is None else CrashCause(*found)


def waits_for_stop(event: Event) -> bool:
    """Tell whether QEMU stops the guest by itself right behind this event."""
    data = event.get("data")
    return isinstance(data, Mapping) and data.get("action") == "pause"


def _words(facts: Event) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
