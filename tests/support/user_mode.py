"""Stop a booted guest while every vCPU runs a program, not the kernel."""

from __future__ import annotations

import re

from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.qemu.monitor_text import split_vcpus
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

# Typed into the guest's shell: one for each vCPU, and none makes a system call.
_SPIN = "(while :; do :; done) &\n"
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
    pattern = re.compile(_IN_USER_MODE[guest.image.name], re.MULTILINE)
    guest.send_console(_SPIN * guest.image.cpus)
    with RawQmp(guest.qmp_sockets[1]) as qmp:

        def is_in_user_mode() -> bool:
            qmp.execute("stop")
            text = qmp.execute("human-monitor-command", **{"command-line": "info registers -a"})
            if all(pattern.search(registers) for registers in split_vcpus(text).values()):
                return True
            qmp.execute("cont")
            return False

        wait_until(is_in_user_mode, f"{guest.image.name} is in user mode with every vCPU")
