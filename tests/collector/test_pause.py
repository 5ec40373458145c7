"""`pause`: how long a guest that runs stands still for what is taken of it."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from qemu_dump_ext.crash_collector.collect import collection
from qemu_dump_ext.crash_collector.collect.budget import DumpBudget
from qemu_dump_ext.crash_collector.collect.collection import Collected, CrashCollector
from qemu_dump_ext.crash_collector.collect.task import CrashTask
from qemu_dump_ext.crash_collector.config.settings import GuestEntry, Limits
from qemu_dump_ext.crash_collector.record import CrashCause, QemuFacts
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.pages import _copy_store as copy_store
from qemu_dump_ext.qemu.qmp import connect_qmp
from tests.oracle.test_live import capabilities_of, command_of
from tests.support.bare_guests import counting_arguments
from tests.support.crash_agent import CrashAgent, run_collector
from tests.support.crashes import make_store
from tests.support.doors import guest_status
from tests.support.newer_qemu import own_qemu_is_newer
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu

_BIOS_AT, _BIOS = 0xF0000, bytes.fromhex("fa2e660f")


@pytest.mark.parametrize(
    ("newer", "remark"),
    [(True, None), (False, "pause: not live, but a snapshot: this QEMU hangs the guest")],
    ids=["live", "a snapshot instead"],
)
def test_a_guest_that_runs_is_taken_and_runs_on(tmp_path: Path, newer: bool, remark: str | None):
    arguments = counting_arguments("x86_64", tmp_path, 1)
    with QemuMachine(command_of("x86_64", newer=newer), arguments) as machine:
        guest = {
            "socket": str(machine.qmp_sockets[0]),
            "name": "box",
            "pause": "live",
            "after": "leave",
        }
        with CrashAgent(tmp_path, guests=[guest]).running() as agent:
            agent.wait_connected()
            done = run_collector("trigger", "--config", agent.config, "box")
            assert done.returncode == 0, done.stderr
            (record,) = agent.wait_records(1)
        assert record.dump.file is not None, record
        assert record.dump.complete
        told = [text for text in record.remarks if text.startswith("pause:")]
        remark = None if own_qemu_is_newer() else remark
        assert [text.startswith(remark or "") for text in told] == [True] * (remark is not None)
        with open_dump(agent.store.directory(record.id) / record.dump.file) as dump:
            assert dump.read(_BIOS_AT, len(_BIOS)) == _BIOS
        assert guest_status(machine) == "running"
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            assert capabilities_of(qmp) == []


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuMachine]:
    """It counts, and can be taken live."""
    arguments = counting_arguments("x86_64", tmp_path_factory.mktemp("guest"), 1)
    with QemuMachine(command_of("x86_64", newer=True), arguments) as machine:
        yield machine


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """What a file system says that is full, for files above `size` only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


_Pause = Literal["snapshot", "live"]


def _collect(machine: QemuMachine, pause: _Pause, store: CrashStore, free: int) -> Collected:
    address = str(machine.qmp_sockets[0])
    settings = GuestEntry(socket=address, pause=pause)
    facts = QemuFacts("unknown", "unknown", None, None)
    cause, time = CrashCause("trigger", ""), "2026-01-01T00:00:00.000000+00:00"
    patience = Patience(math.inf, math.inf)
    with connect_qmp(address) as qmp:
        guest = Guest("box", address, settings)
        task = CrashTask(guest, cause, time, facts, qmp, "", {}, patience)
        budget = DumpBudget(store, Limits(free=free))
        return CrashCollector(task, store, budget, set_stopped=lambda _: None).collect()


@pytest.mark.parametrize("pause", ["snapshot", "live"])
def test_a_copy_for_which_there_is_no_room_costs_the_dump_alone(
    machine: QemuMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: _Pause
):
    monkeypatch.setattr(copy_store, "available_memory", lambda: 0)
    with _files_of_at_most(1 << 20):
        collected = _collect(machine, pause, make_store(tmp_path), free=0)
    record = collected.record
    assert record.dump.file is None
    assert "File too large" in str(record.dump.reason)
    assert collected.refusal is not None
    assert collected.refusal.limit == "free"
    assert "registers.txt" in record.files
    assert guest_status(machine) == "running"


@pytest.mark.parametrize("pause", ["snapshot", "live"])
def test_a_copy_leaves_free_what_is_to_be_free(
    machine: QemuMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: _Pause
):
    monkeypatch.setattr(collection, "_ROOM_EVERY_BYTES", 1)
    store = make_store(tmp_path)
    left = iter([9 << 30] * 2)  # and then nothing: the copy fills the disk
    monkeypatch.setattr(store, "free_bytes", lambda: next(left, 0))
    monkeypatch.setattr(DumpBudget, "allow", None)  # the copy is not whole: no dump is asked for
    collected = _collect(machine, pause, store, free=1 << 30)
    assert "0 MiB left, and 1024 MiB are kept free" in str(collected.record.dump.reason)
    assert collected.record.dump.file is None
    assert guest_status(machine) == "running"
