"""Linux guests that panic: what is collected opens in the readers, and tells the truth."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drgn
import pytest
from drgn.helpers.linux.printk import get_dmesg
from drgn.helpers.linux.sched import cpu_curr
from pydantic import TypeAdapter

from qemu_dump_ext.crash_collector.collect.budget import DumpBudget
from qemu_dump_ext.crash_collector.collect.collection import CrashCollector
from qemu_dump_ext.crash_collector.collect.task import CrashTask
from qemu_dump_ext.crash_collector.config.settings import GuestEntry, Limits
from qemu_dump_ext.crash_collector.forms import utc_text
from qemu_dump_ext.crash_collector.record import CauseKind, CrashCause, CrashRecord, QemuFacts
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.engine.dump import dump_stopped
from qemu_dump_ext.engine.stopped_guest import stopped_guest
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from qemu_dump_ext.options.sizes import parse_size
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.sinks import open_sink
from tests.support.crash_agent import CrashAgent, run_collector
from tests.support.crash_reader import CRASH_SECONDS
from tests.support.doors import guest_status
from tests.support.folders import folder_for
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.guest, pytest.mark.qemu]

# Zeros over the program that init runs.
KILL_INIT = (
    "m=$(grep -m1 r-xp /proc/1/maps); "
    "dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$((0x${m%%-*} / 4096)) count=200\n"
)
# What is typed, in this order, each after a reset; the message that is expected.
CRASHES = {
    "sysrq": ("echo c >/proc/sysrq-trigger\n", "sysrq triggered crash"),
    "sysrq again": ("echo c >/proc/sysrq-trigger\n", "sysrq triggered crash"),
    "init": (KILL_INIT, "Attempted to kill init! exitcode=0x?"),
}
# Where x86_64 has the kernel itself, wherever KASLR puts it, and its modules.
KERNEL_IMAGE = range(0xFFFFFFFF80000000, 0xFFFFFFFFC0000000)
KERNEL = range(KERNEL_IMAGE.start, 1 << 64)
# Each byte is read by an instruction of its own, in the module itself.
READ_BY_MODULE = "cat /sys/firmware/qemu_fw_cfg/by_name/etc/acpi/tables/raw >/dev/null"


def wait_said(guest: BootedGuest, words: str) -> None:
    guest.wait_for_console(re.compile(words), timeout_seconds=guest.image.timeout_seconds)


@dataclass(frozen=True)
class Collected:
    agent: CrashAgent
    guest: BootedGuest
    vmlinux: Path
    records: dict[str, CrashRecord]

    def dump(self, name: str) -> Path:
        return self.agent.store.directory(self.records[name].id) / "vmcore.kdump"


@pytest.fixture(scope="module")
def collected(request: pytest.FixtureRequest) -> Iterator[Collected]:
    """One guest that crashes three times; the agent resets it after each."""
    directory = folder_for(request, "collector")
    image = find_image("x86_64")
    store = ImageStore(default_cache())
    files = store.fetch(image, debug_symbols=True)
    assert files.vmlinux is not None
    records: dict[str, CrashRecord] = {}
    with BootedGuest(image, files) as guest:
        # As QEMU is started by most: it would shut down on a panic.
        with RawQmp(guest.qmp_sockets[1]) as qmp:
            qmp.execute("set-action", panic="shutdown")
            qmp.execute("set-action", reboot="reset")
        entry = {
            "socket": str(guest.qmp_sockets[0]),
            "name": "linux",
            "console": str(guest.console_log),
            "after": "reset",
            "dumps_per_signature": 1,
            "verify_with": ["crash", "drgn"],
            "symbols": {"vmlinux": str(files.vmlinux)},
        }
        agent = CrashAgent(directory, guests=[entry])
        with agent.running():
            agent.wait_connected()
            for number, (name, (keys, _)) in enumerate(CRASHES.items(), 1):
                booted = re.compile(rf"(?s)({image.marker}.*){{{number}}}")
                guest.wait_for_console(booted, timeout_seconds=image.timeout_seconds)
                guest.send_console(keys)
                agent.wait_records(number, seconds=CRASH_SECONDS)
                records[name] = agent.records()[-1]
            wait_until(lambda: guest_status(guest) == "running", "it is reset")
            yield Collected(agent, guest, files.vmlinux, records)


@pytest.mark.parametrize("name", CRASHES)
def test_panic_is_recorded_as_it_was(collected, name):
    record = collected.records[name]
    assert record.cause.kind == "guest-panicked"
    assert record.signature.message == CRASHES[name][1]
    if record.occurrence == 1:
        assert record.dump.complete
        assert record.dump.verified_by == ("verify", "crash", "drgn"), record.dump.reason
    else:
        assert record.dump.reason == "1 dumps of this signature are kept (dumps_per_signature)"
    assert record.after_action == "reset"
    log = (collected.agent.store.directory(record.id) / "dmesg.txt").read_text()
    assert "Kernel panic - not syncing: " in log
    assert "Linux version" in log
    console = (collected.agent.store.directory(record.id) / "console.txt").read_bytes()
    assert b"Kernel panic" in console


def test_same_crash_has_the_same_signature_and_another_kind_another(collected):
    first, second, other = (record.signature for record in collected.records.values())
    assert first == second
    assert first.id != other.id
    assert first.frames[:2] == ("sysrq_handle_crash", "__handle_sysrq")
    assert "do_exit" in other.frames
    assert [record.occurrence for record in collected.records.values()] == [1, 2, 1]


def test_drgn_knows_the_log_and_who_panicked(collected):
    program = drgn.Program()
    program.set_core_dump(collected.dump("sysrq"))
    program.load_debug_info([collected.vmlinux])
    assert b"Kernel panic - not syncing: sysrq triggered crash" in get_dmesg(program)
    cpu = program["panic_cpu"].counter.value_()
    trace = program.stack_trace(program.crashed_thread().object)
    assert cpu in range(2)
    assert "sysrq_handle_crash" in {frame.name for frame in trace}


def opened(collected: Collected, reader: str, name: str, typed: str) -> str:
    words = ("--config", collected.agent.config, collected.records[name].id)
    done = run_collector("open", "--reader", reader, *words, input=typed, timeout=CRASH_SECONDS)
    return f"{done.stdout}{done.stderr}"


def test_crash_shows_the_panic_task_and_its_message(collected):
    said = opened(collected, "crash", "init", "sys\nbt\nquit\n")
    assert 'PANIC: "Kernel panic - not syncing: Attempted to kill init!' in said
    assert re.search(r"PID: 1 .*COMMAND: \"init\"", said), said
    assert "panic at" in said


def test_drgn_is_opened_with_the_right_files(collected):
    assert "unsigned long" in opened(collected, "drgn", "sysrq", "print(prog['jiffies'].type_)\n")


def drgn_trace(vmlinux: Path, dump: Path) -> tuple[drgn.Program, list[int]]:
    """Return the program, and where drgn finds the threads on its CPUs, innermost first."""
    program = drgn.Program()
    program.set_core_dump(dump)
    program.load_debug_info([vmlinux])
    counters: list[int] = []
    for cpu in range(2):
        thread = cpu_curr(program, cpu)
        found: list[int] = []
        for frame in program.stack_trace(thread) if thread.pid else ():
            if frame.pc not in KERNEL:
                break
            if frame.interrupted:  # what interrupted it is not where it was
                found.clear()
            if not frame.is_inline:
                found.append(frame.pc if frame.interrupted or not found else frame.pc - 1)
        counters += found
    return program, counters


def assert_named(program: drgn.Program, name: str, counter: int) -> None:
    # Labels in assembler have no size.
    ranges = [range(s.address, s.address + (s.size or 4096)) for s in program.symbols(name)]
    assert any(counter in one for one in ranges), (name, hex(counter), ranges)


@pytest.fixture(scope="module")
def reading(linux_guest: BootedGuest) -> Iterator[BootedGuest]:
    """A guest whose kernel reads zeros all the time, into memory that was there before."""
    linux_guest.send_console(
        "dd if=/dev/zero of=/dev/null bs=16M & "
        "until grep -q 'rchar: [0-9]\\{9\\}' /proc/$!/io; do :; done; echo 'dd' runs\n"
    )
    wait_said(linux_guest, "dd runs")
    yield linux_guest
    linux_guest.send_console("killall dd\n")


def collect(
    guest: BootedGuest, directory: Path, cause: CauseKind, **settings: Any
) -> tuple[CrashRecord, Path]:
    """Collect a crash as the agent does; returns what is stored, and where."""
    address = str(guest.qmp_sockets[0])
    store = CrashStore(directory / "store")
    store.prepare()
    entry = TypeAdapter(GuestEntry).validate_python({"socket": address, **settings})
    with connect_qmp(address) as monitor:
        task = CrashTask(
            guest=Guest("linux", address, entry),
            cause=CrashCause(cause, "it hangs"),
            time=utc_text(datetime.now(UTC)),
            facts=QemuFacts("unknown", "unknown", None, None),
            qmp=monitor,
            gone="",
            also={},
            patience=Patience(math.inf, math.inf),
        )
        budget = DumpBudget(store, Limits(free=0))
        with ThreadPoolExecutor(1) as pool:  # which leaves signals to this thread
            collector = CrashCollector(task, store, budget, set_stopped=lambda _stopped: None)
            record = pool.submit(collector.collect).result().record
    return record, store.directory(record.id)


def test_functions_without_any_symbols_are_those_that_drgn_names(reading, tmp_path):
    """By the tables in the memory of the guest."""
    files = ImageStore(default_cache()).fetch(reading.image, debug_symbols=True)
    record, directory = collect(reading, tmp_path, "trigger")
    assert {"read_zero", "vfs_read", "ksys_read"} <= set(record.signature.frames), record
    dump = directory / "vmcore.kdump"
    assert files.vmlinux is not None
    program, counters = drgn_trace(files.vmlinux, dump)
    for name, counter in zip(record.signature.frames, counters, strict=True):
        assert_named(program, name, counter)


def test_functions_of_modules_are_where_drgn_finds_them_and_named_as_the_kernel_does(
    linux_guest, tmp_path
):
    files = ImageStore(default_cache()).fetch(linux_guest.image, debug_symbols=True)
    linux_guest.send_console(
        "grep -h fw_cfg /proc/kallsyms; echo 'all' symbols; "
        f"while :; do {READ_BY_MODULE}; done & echo $! >/reader; sleep 1; echo 'module' is read\n"
    )
    wait_said(linux_guest, "module is read")
    listed = linux_guest.console_log.read_text("utf-8", "replace").partition("all symbols")[0]
    dump = tmp_path / "vm.elf"
    try:
        names = _dump_within(linux_guest, "fw_cfg_read_blob", dump)
    finally:
        # Each line is a shell's own, which has none of another one's jobs.
        linux_guest.send_console("kill $(cat /reader) && echo 'reader' is gone\n")
        wait_said(linux_guest, "reader is gone")
    assert files.vmlinux is not None
    program, counters = drgn_trace(files.vmlinux, dump)
    of_module = [
        (int(address, 16), name)
        for address, name in re.findall(r"(\w{16}) [tT] (\w+)\s+\[qemu_fw_cfg\]", listed)
    ]
    for name, counter in zip(names, counters, strict=True):
        if counter in KERNEL_IMAGE:
            assert_named(program, name, counter)
        else:
            assert name == max(one for one in of_module if one[0] <= counter)[1], of_module


def _dump_within(guest: BootedGuest, function: str, dump: Path) -> Sequence[str]:
    """Stop the guest until it is in a function; dump it, and return the functions it is in."""
    with connect_qmp(str(guest.qmp_sockets[0])) as monitor:
        for _ in range(100):
            with stopped_guest(GuestAccess.by_qmp(monitor), "auto") as still:
                found = still.functions_of_vcpus(still.find_vmcoreinfo())
                if function in found:
                    with open_sink(str(dump), force=False, standard_output=None) as sink:
                        dump_stopped(DumpRequest(), still, sink, progress=ProgressMeter(None))
                    return found
    pytest.fail(f"it never is in {function}")


def test_dump_of_a_hang_tells_where_the_guest_is(reading, tmp_path):
    """By drgn, so that a second one is known for the same before its dump is kept."""
    files = ImageStore(default_cache()).fetch(reading.image, debug_symbols=True)
    entry = {
        "socket": str(reading.qmp_sockets[0]),
        "name": "linux",
        "console": str(reading.console_log),
        "console_patterns": ["^it hangs"],
        "dumps_per_signature": 1,
        "symbols": {"vmlinux": str(files.vmlinux)},
    }
    agent = CrashAgent(tmp_path, guests=[entry])
    with agent.running():
        agent.wait_connected()
        # What a busy host keeps a vCPU from ending is in a trace now and then.
        for count in range(1, 9):
            reading.send_console("printf 'it %s\\n' hangs\n")
            if agent.wait_records(count)[-1].dump.file is None:
                break
        done = run_collector("trigger", "linux", "--config", agent.config)
        assert done.returncode == 0, done.stderr
    *first, second, wanted = agent.records()
    for record in first:
        assert record.signature.message == "console: it hangs"
        assert {"read_zero", "vfs_read", "ksys_read"} <= set(record.signature.frames), record
        assert record.dump.verified_by == ("verify",)
    assert second.signature.id in {record.signature.id for record in first}
    assert second.dump.file is None
    assert second.dump.reason == "1 dumps of this signature are kept (dumps_per_signature)"
    assert wanted.dump.file is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dumps_per_signature": 0, "further_dumps": "smallest"}, "mini dump: "),
        ({"max_bytes": "30MiB", "dump_level": 0}, "--dump-level 17 was taken"),
        ({"max_bytes": "18MiB", "dump_level": 0}, "mini dump: "),
        (
            {"keep": {"free": ["."], "cache": [], "user": []}},
            "free pages are to stay in the dump: ",
        ),
    ],
    ids=str,
)
def test_a_dump_is_as_small_as_it_has_to_be(reading, tmp_path, settings, said):
    record, directory = collect(reading, tmp_path, "console", **settings)
    assert record.signature.frames
    assert record.dump.verified_by == ("verify",), record.dump.reason
    assert any(remark.startswith(said) for remark in record.remarks), record.remarks
    if "keep" in settings:
        dump = directory / str(record.dump.file)
        assert struct.unpack_from("<i", dump.read_bytes(), 4096 + 8) == (15,)
    if "max_bytes" in settings:
        assert record.dump.bytes <= parse_size(settings["max_bytes"])


# By the event that its machine has for it; Debian's kernels for aarch64 have no driver for pvpanic.
OTHER_TARGETS = {"s390x": "guest-panicked", "ppc64le": "guest-panicked", "aarch64": "console"}
# What such a driver would do when the kernel panics.
WRITE_PVPANIC = (
    "for d in /sys/bus/pci/devices/*; do [ $(cat $d/device) = 0x0011 ] || continue; "
    "echo 1 >$d/enable; read -r bar _ <$d/resource; devmem $bar 8 1; done\n"
)


@pytest.fixture(scope="module")
def other_target(request) -> Iterator[tuple[BootedGuest, CrashAgent]]:
    """A guest of another target; with pvpanic, it runs on when its crash is stored."""
    image, after = find_image(request.param), "leave"
    if OTHER_TARGETS[image.name] == "console":
        image, after = replace(image, devices=(*image.devices, "pvpanic-pci")), "resume"
    directory = folder_for(request, image.name)
    with BootedGuest(image, ImageStore(default_cache()).fetch(image)) as guest:
        entry = {
            "socket": str(guest.qmp_sockets[0]),
            "name": image.name,
            "console": str(guest.console_log),
            "after": after,
        }
        agent = CrashAgent(directory, guests=[entry])
        with agent.running():
            agent.wait_connected()
            yield guest, agent


@pytest.mark.parametrize("other_target", ["aarch64"], indirect=True)
def test_event_of_pvpanic_pci_is_collected(other_target):
    guest, agent = other_target
    guest.send_console(WRITE_PVPANIC)
    (record,) = agent.wait_records()
    assert record.cause.kind == "guest-panicked"
    assert record.cause.event is not None
    assert record.cause.event["event"] == "GUEST_PANICKED"
    assert record.dump.verified_by == ("verify",)
    wait_until(lambda: guest_status(guest) == "running", "it runs on")


@pytest.mark.parametrize("other_target", OTHER_TARGETS, indirect=True)
def test_panic_of_another_target_is_collected(other_target):
    """With the log that its memory holds."""
    guest, agent = other_target
    known = len(agent.records())
    guest.send_console("echo c >/proc/sysrq-trigger\n")
    record = agent.wait_records(known + 1)[-1]
    assert record.cause.kind == OTHER_TARGETS[record.guest]
    assert record.signature.message == "sysrq triggered crash", record
    assert "__handle_sysrq" in record.signature.frames
    assert record.dump.complete
    assert record.dump.verified_by == ("verify",)
    assert record.qemu.target == guest.image.target
    directory = agent.store.directory(record.id)
    log = (directory / "dmesg.txt").read_text()
    assert "Linux version" in log, record.remarks
    assert "Kernel panic - not syncing: sysrq triggered crash" in log
    program = drgn.Program()
    program.set_core_dump(directory / "vmcore.kdump")
    assert b"OSRELEASE=" in program["VMCOREINFO"].string_()
