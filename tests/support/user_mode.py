"""Stop a booted guest while every vCPU runs a program, or the kernel for a program."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.qemu.monitor_text import split_vcpus
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

# Typed into the guest's shell: one for each vCPU, and none makes a system call.
_SPIN = "(while :; do :; done) &\n"
# One that asks the kernel all the time.
_ASK = "(while :; do read -r _ </proc/uptime; done) & echo $! >/asking; echo 'it' asks\n"
_X86 = r"\bCPL=3\b"
_MIPS = r"^CP0 Status +0x[0-9a-f]{6}[13579bdf][01]\b"  # KSU is user; neither EXL nor ERL
# What `info registers` has of a vCPU in user mode, by name of the image.
_IN_USER_MODE = {
    "aarch64": r"\bEL0t\b",
    "arm": r"\busr32\b",
    "i386": _X86,
    "loongarch64": r"\bCRMD +(0x)?[0-9a-f]*[37bf]\b",  # PLV
    "mips64el": _MIPS,
    "mipsel": _MIPS,
    "ppc64le": r"\bMSR [0-9a-f]{12}[4-7c-f][0-9a-f]{3}\b",  # PR
    "riscv64": r"^ pc +0000(?!00008)",  # neither the kernel nor its firmware
    "s390x": r"^PSW=mask [0-9a-f]{3}[13579bdf]",  # problem state
    "x86_64": _X86,
}


def stop_in_user_mode(guest: BootedGuest) -> None:
    """Let programs spin in the guest, and stop it where they do."""
    guest.send_console(_SPIN * guest.image.cpus)
    with RawQmp(guest.qmp_sockets[1]) as qmp:
        _stop_where(guest, qmp, all, "is in user mode with every vCPU")


@contextmanager
def stopped_for_a_program(guest: BootedGuest) -> Iterator[None]:
    """Let a stopped guest run a program, whose page tables it has, and stop it in its kernel."""
    guest.send_console(_ASK)
    with RawQmp(guest.qmp_sockets[1]) as qmp:
        qmp.execute("cont")
        guest.wait_for_console(re.compile("it asks"), timeout_seconds=guest.image.timeout_seconds)
        _stop_where(guest, qmp, lambda found: not any(found), "is in its kernel for a program")
    try:
        yield
    finally:
        guest.send_console("kill $(cat /asking)\n")  # when it runs again


def _stop_where(
    guest: BootedGuest, qmp: RawQmp, are_right: Callable[[Iterable[bool]], bool], what: str
) -> None:
    """Let a guest run, and stop it where its vCPUs, each in user mode or not, are right."""
    pattern = re.compile(_IN_USER_MODE[guest.image.name], re.MULTILINE)

    def is_right() -> bool:
        qmp.execute("stop")
        text = qmp.execute("human-monitor-command", **{"command-line": "info registers -a"})
        if are_right(bool(pattern.search(one)) for one in split_vcpus(text).values()):
            return True
        qmp.execute("cont")
        return False

    wait_until(is_right, f"{guest.image.name} {what}")
