"""Crash records as tests need them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qemu_dump_ext.crash_collector.record import (
    CrashCause,
    CrashRecord,
    DumpFacts,
    QemuFacts,
    Signature,
)
from qemu_dump_ext.crash_collector.store.states import SignatureState, StateName
from qemu_dump_ext.crash_collector.store.store import CrashStore

TIME = "2026-01-31T12:00:00.000001+00:00"


def make_record(
    guest: str = "web1", *, signature: str = "0123456789abcdef", time: str = TIME, dump: bool = True
) -> CrashRecord:
    """Return a record as it is before it is committed."""
    return CrashRecord(
        id="",
        guest=guest,
        labels={"team": "storage"},
        time=time,
        cause=CrashCause("guest-panicked", "the guest panicked", {"event": "GUEST_PANICKED"}),
        signature=Signature(signature, "sysrq triggered crash", ("panic", "sysrq_handle_crash")),
        dump=DumpFacts("vmcore.kdump" if dump else None, "kdump-raw-zlib", bytes=7 if dump else 0),
        qemu=QemuFacts("7.2.22", "x86_64", 4711, ("qemu-system-x86_64",)),
        guest_stopped_seconds=0.5,
        after_action="leave",
    )


def commit(
    store: CrashStore, record: CrashRecord, files: Mapping[str, bytes] | None = None
) -> CrashRecord:
    """Store a crash with these files, or a dump of 7 bytes and a log."""
    incoming = store.new_incoming(record.guest)
    if files is None:
        files = {"dmesg.txt": b"log"} | ({"vmcore.kdump": b"content"} if record.dump.file else {})
    for name, content in files.items():
        (incoming / name).write_bytes(content)
    return store.commit(incoming, record)


def make_store(path: Path) -> CrashStore:
    """Return a new store."""
    store = CrashStore(path / "store")
    store.prepare()
    return store


def say(store: CrashStore, signature: str, state: StateName, note: str, time: str = TIME) -> None:
    """Set the state of a signature, as people do."""
    said = SignatureState(state, note, changed=time)
    store.change_states(lambda states: states.known.update({signature: said}))
