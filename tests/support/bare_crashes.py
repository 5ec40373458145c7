"""Machines without an operating system that crash at once when they run: real mode in a ROM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qemu_dump_ext.guest_images.machine import QemuMachine

_ROM_SIZE = 0x10000
_RESET_VECTOR = 0xFFF0
_HALT = bytes.fromhex("fa f4 eb fd")  # cli; again: hlt; jmp again
_SPIN = bytes.fromhex("40 eb fd")  # again: inc ax; jmp again


def _write_port(port: int, value: int) -> bytes:
    return b"\xba" + port.to_bytes(2, "little") + b"\xb0" + bytes([value]) + b"\xee"


PROGRAMS: Mapping[str, bytes] = {
    "panic": _write_port(0x505, 1) + _HALT,  # pvpanic: panicked
    "panic-spin": _write_port(0x505, 1) + _SPIN,
    "crashloaded": _write_port(0x505, 2) + _SPIN,
    "watchdog": _write_port(0x443, 15) + _SPIN,  # ib700: 0 seconds
    "reset": _write_port(0x64, 0xFE) + _HALT,  # keyboard controller: reset
    "spin": _SPIN,
    "halt": _HALT,
}


def bare_rom(directory: Path, program: str) -> Path:
    """Return a ROM, in `directory`, that runs one of `PROGRAMS`."""
    rom = directory / f"{program}.rom"
    if not rom.exists():
        content = PROGRAMS[program].ljust(_RESET_VECTOR, b"\xf4")
        jump = bytes.fromhex("ea 00 00 00 f0")  # ljmp 0xf000:0
        rom.write_bytes((content + jump).ljust(_ROM_SIZE, b"\0"))
    return rom


def bare_machine(
    directory: Path,
    program: str,
    *arguments: str,
    qmp_socket: Path | None = None,
    command: Sequence[str] = ("qemu-system-x86_64",),
) -> QemuMachine:
    """Return a machine of 16 MiB that waits for `cont` and then runs a program.

    Args:
        directory: Where its ROM goes.
        program: One of `PROGRAMS`.
        arguments: Behind those of the machine.
        qmp_socket: For the agent.
        command: QEMU.
    """
    rom = bare_rom(directory, program)
    devices: Sequence[str] = ("-device", "pvpanic", "-device", "ib700")
    argv = [*command, "-S", "-m", "16", "-bios", str(rom), *devices]
    return QemuMachine(argv, arguments, qmp_socket=qmp_socket)
