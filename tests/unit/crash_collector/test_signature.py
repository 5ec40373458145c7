from __future__ import annotations

import pytest

from qemu_dump_ext.crash_collector.collect.signature import make_signature, normalise
from qemu_dump_ext.crash_collector.record import CauseKind, CrashCause

SYSRQ = """\
[   10.1] usb: nothing
[  107.394] sysrq: Trigger a crash
[  107.395] Kernel panic - not syncing: sysrq triggered crash
[  107.396] CPU: 1 PID: 117 Comm: sh Not tainted 6.1.0-56-cloud-amd64 #1  Debian 6.1.174-1
[  107.397] Hardware name: QEMU Standard PC (Q35 + ICH9, 2009), BIOS 1.16.2-debian-1.16.2-1
[  107.398] Call Trace:
[  107.399]  <TASK>
[  107.399]  dump_stack_lvl+0x44/0x5c
[  107.399]  panic+0x118/0x2f2
[  107.399]  ? __flush_work+0x1/0x2
[  107.400]  sysrq_handle_crash+0x16/0x20
[  107.400]  __handle_sysrq.cold+0x7e/0x1e1
[  107.401]  write_sysrq_trigger+0x24/0x40
[  107.401]  </TASK>
[  107.402] Kernel Offset: 0x14600000 from 0xffffffff81000000
"""
NULL_POINTER = """\
[    5.0] WARNING: CPU: 0 PID: 1 at mm/slub.c:4023 old_warning+0x1/0x2
[  500.1] BUG: kernel NULL pointer dereference, address: 0000000000000042
[  500.2] #PF: supervisor write access in kernel mode
[  500.3] Oops: 0002 [#1] PREEMPT SMP NOPTI
[  500.4] CPU: 3 PID: 4711 Comm: fio Not tainted 6.1.0 #1
[  500.5] RIP: 0010:nvme_queue_rq.isra.0+0x12/0x340 [nvme]
[  500.6] Code: 00 00
[  500.7] Call Trace:
[  500.8]  <TASK>
[  500.9]  blk_mq_dispatch_rq_list+0x12e/0x7d0
[  500.9]  </TASK>
[  501.0] Kernel panic - not syncing: Fatal exception
"""
ARM64 = """\
[    9.1] Unable to handle kernel NULL pointer dereference at virtual address 0000000000000000
[    9.2] Internal error: Oops: 96000044 [#1] SMP
[    9.3] pc : do_bad+0x10/0x20
[    9.4] lr : do_worse+0x10/0x20
[    9.5] Call trace:
[    9.6]  do_bad+0x10/0x20
[    9.7]  do_worse+0x30/0x40
[    9.8] Code: d2800000
[    9.9] Kernel panic - not syncing: Oops: Fatal exception
"""
POWERPC = """\
[    8.0] Kernel panic - not syncing: sysrq triggered crash
[    8.1] CPU: 0 PID: 100 Comm: sh Not tainted 6.1.0 #1
[    8.2] Call Trace:
[    8.3] [c000000004b7bb20] [c0000000010c9b9c] dump_stack_lvl+0x74/0xa8 (unreliable)
[    8.4] [c000000004b7bb60] [c00000000014e5dc] panic+0x180/0x3f4
[    8.5] [c000000004b7bc00] [c0000000009ba4a8] sysrq_handle_crash+0x28/0x30
[    8.6] [c000000004b7bc60] [c0000000009bb0e8] __handle_sysrq+0xf8/0x2a0
[    8.7] --- interrupt: c00 at 0x7fff
"""
S390X = """\
[    7.0] Kernel panic - not syncing: sysrq triggered crash
[    7.1] CPU: 0 PID: 100 Comm: sh Not tainted 6.1.0 #1
[    7.2] Call Trace:
[    7.3]  [<00000000b1c2d4e6>] dump_stack_lvl+0x62/0x80
[    7.4]  [<00000000b1c1f2a0>] panic+0x128/0x340
[    7.5]  [<00000000b17a9c2e>] sysrq_handle_crash+0x2e/0x30
[    7.6]  [<00000000b17aa3c8>] __handle_sysrq+0x108/0x270
[    7.7] ---[ end Kernel panic - not syncing: sysrq triggered crash ]---
"""


def sign(log: str, kind: CauseKind = "guest-panicked", detail: str = "the guest panicked"):
    return make_signature(CrashCause(kind, detail), log.splitlines())


@pytest.mark.parametrize(
    ("log", "message", "frames"),
    [
        (
            SYSRQ,
            "sysrq triggered crash",
            ("sysrq_handle_crash", "__handle_sysrq", "write_sysrq_trigger"),
        ),
        (
            NULL_POINTER,
            "BUG: kernel NULL pointer dereference, address: ?",
            ("nvme_queue_rq", "blk_mq_dispatch_rq_list"),
        ),
        (
            ARM64,
            "Unable to handle kernel NULL pointer dereference at virtual address ?",
            ("do_bad", "do_bad", "do_worse"),
        ),
        (POWERPC, "sysrq triggered crash", ("sysrq_handle_crash", "__handle_sysrq")),
        (S390X, "sysrq triggered crash", ("sysrq_handle_crash", "__handle_sysrq")),
    ],
    ids=["sysrq", "null pointer", "arm64", "powerpc", "s390x"],
)
def test_log_tells_what_happened_and_where(log, message, frames):
    signature = sign(log)
    assert (signature.message, signature.frames) == (message, frames)
    assert len(signature.id) == 16
    assert int(signature.id, 16) >= 0


def test_what_changes_from_crash_to_crash_changes_nothing():
    other = NULL_POINTER.replace("500.", "90210.").replace("4711", "12").replace("CPU: 3", "CPU: 0")
    other = other.replace("0000000000000042", "00000000000000f8").replace("+0x12/", "+0x14/")
    assert sign(other) == sign(NULL_POINTER)
    assert sign(SYSRQ).id != sign(NULL_POINTER).id
    assert sign(SYSRQ).id != sign(SYSRQ.replace("sysrq_handle_crash", "other")).id


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "[   22.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [kworker/0:1:123]",
            "watchdog: BUG: soft lockup - CPU#N stuck for Ns! [?]",
        ),
        ("kernel BUG at mm/slub.c:4023!", "kernel BUG at mm/slub.c:4023!"),
        (
            "VFS: Unable to mount root fs on unknown-block(0,0)",
            "VFS: Unable to mount root fs on unknown-block(N,N)",
        ),
        (
            "INFO: task dump-worker:123 blocked for more than 120 seconds.",
            "INFO: task ? blocked for more than N seconds.",
        ),
        (
            "Attempted to kill init! exitcode=0x0000000b",
            "Attempted to kill init! exitcode=0x?",
        ),
        ("x" * 5000, "x" * 300),
    ],
)
def test_message_is_normalised(message, expected):
    assert normalise(message) == expected


def test_log_is_not_asked_where_it_cannot_tell():
    old = sign(SYSRQ, "trigger", "somebody said so")
    assert (old.message, old.frames) == ("trigger", ())
    cause = CrashCause("no-progress", "nothing changed")
    found = make_signature(cause, SYSRQ.splitlines(), functions=["native_halt"])
    assert (found.message, found.frames) == ("no-progress", ("native_halt",))


def test_console_line_stands_for_the_log_that_there_is_not():
    assert sign("", "console", "[ 3.1] Oops: 0002").message == "console: Oops: N"


def test_hostile_log_is_bounded():
    log = "\n".join(["[ 1.0] Oops: 1", "Call Trace:", *["f" * 200 + "+0x1/0x2"] * 100_000])
    signature = sign(log)
    assert len(signature.frames) <= 32
    sign(" " * 100_000 + "BUG: " + "[" * 100_000)
