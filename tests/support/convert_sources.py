"""What others write of one Linux guest that stands still, in each form that convert reads."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.internal_snapshots import add_disk, remove_disk, save_state
from tests.support.oracle import OracleDumps, elf_facts
from tests.support.raw_qmp import RawQmp
from tests.support.sample_cores import (
    PAGE,
    make_virtualbox,
    make_xen,
    virtualbox_notes,
    virtualbox_state,
    xen_context,
)
from tests.support.sample_ranges import make_avml, make_lime
from tests.support.waiting import wait_until

_LONG_MODE = 0xD01
"""EFER of Linux: SCE, LME, LMA and NXE."""


class ConvertSources:
    """Makes each form once, when it is first asked for."""

    def __init__(self, machine: QemuMachine, native: OracleDumps, folder: Path) -> None:
        self._machine = machine
        self._native = native
        self._folder = folder

    @cached_property
    def memory(self) -> Mapping[int, bytes]:
        """Content by gpa, as QEMU dumps it."""
        facts = elf_facts(self._native.elf)
        return {load[1]: data for load, data in zip(facts["loads"], facts["memory"], strict=True)}

    @cached_property
    def _registers(self) -> list[dict[str, int]]:
        with open_dump(self._native.elf) as dump:
            # QEMU's notes do not tell of the mode; that there is a form for it does.
            return [{**vcpu.registers, "efer": _LONG_MODE} for vcpu in StoredGuest(dump).vcpus]

    def make(self, name: str) -> Path:
        """Return the file of one form.

        Args:
            name: One of those below; `migration` leaves the guest as migrated.
        """
        path = self._folder / name
        match name:
            case "native-elf":
                return self._native.elf
            case "native-flattened":
                return self._native.kdump_zlib
            case "native-raw":
                return self._native.kdump_raw_zlib
            case "gcore":
                path = path.with_name(f"{name}.{self._machine.pid}")
            case _:
                pass
        if not path.exists():
            self._write(name, path)
        return path

    def _write(self, name: str, path: Path) -> None:
        match name:
            case "lime":
                path.write_bytes(make_lime(self.memory))
            case "avml":
                path.write_bytes(make_avml(self.memory))
            case "virtualbox":
                states = [virtualbox_state(registers) for registers in self._registers]
                path.write_bytes(make_virtualbox(self.memory, virtualbox_notes(states)))
            case "xen":
                path.write_bytes(make_xen(self._frames(), self._contexts()))
            case "savevm":
                with RawQmp(self._machine.qmp_sockets[0]) as qmp:
                    add_disk(qmp, path)
                    save_state(qmp, name, "crashed")
                    remove_disk(qmp, name)
            case "migration":
                with RawQmp(self._machine.qmp_sockets[0]) as qmp:
                    qmp.execute("migrate", uri=f"exec:cat >{path}")
                    wait_until(lambda: qmp.execute("query-migrate").get("status") == "completed")
            case "gcore":
                words = ["gcore", "-o", str(path.with_suffix("")), str(self._machine.pid)]
                subprocess.run(words, capture_output=True, check=True)
            case _:
                raise KeyError(name)

    def _frames(self) -> list[tuple[int, bytes]]:
        return [
            ((gpa + at) // PAGE, content[at : at + PAGE])
            for gpa, content in self.memory.items()
            for at in range(0, len(content), PAGE)
        ]

    def _contexts(self) -> list[bytes]:
        found = []
        for registers in self._registers:
            bases = registers["gs_base"], registers["kernel_gs_base"]
            kernel, user = bases if not registers["cs_selector"] & 3 else reversed(bases)
            found.append(xen_context(registers | {"gs_base_kernel": kernel, "gs_base_user": user}))
        return found
