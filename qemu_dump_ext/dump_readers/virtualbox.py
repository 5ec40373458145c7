"""Read what VirtualBox writes of a guest: `VBoxManage debugvm NAME dumpvmcore --filename FILE`.

It is an ELF core whose notes have VirtualBox's own form of the registers.
"""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.dump_readers._declaration import DumpReader, Fit
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._made_notes import MadeNotes, verify_registers_and_memory
from qemu_dump_ext.dump_readers.elf import READER as ELF
from qemu_dump_ext.dump_readers.elf import CoreOf, ElfCoreFile
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.elf import ELF_MAGIC
from qemu_dump_ext.structures.virtualbox_core import virtualbox_vcpus


class VirtualBoxFile(MadeNotes, ElfCoreFile):
    """An open core of VirtualBox."""

    core_of = CoreOf.VIRTUALBOX
    what = "core"

    def __init__(self, image: DumpImage, format_suffix: str = "") -> None:
        super().__init__(image, format_suffix)
        self.format = f"virtualbox{format_suffix}"
        self.architecture = all_architectures()["x86_64"]
        self._vcpus = tuple(
            Vcpu(number, values)
            for number, values in enumerate(virtualbox_vcpus(self._read_notes()))
        )
        self.core = self.architecture.select_core(self._vcpus, (), MENDED, "")

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """The vCPUs, in the order of the notes."""
        return self._vcpus

    @property
    def lacking(self) -> Sequence[str]:
        """What of the guest is not in it, besides memory, in words."""
        without = [vcpu.index for vcpu in self._vcpus if "fxsave" not in vcpu.registers]
        words = (f"vCPU {index}: the core does not have its floating point" for index in without)
        return (*super().lacking, *words)


READER: DumpReader[VirtualBoxFile] = DumpReader(
    name="virtualbox",
    probe=lambda head: Fit.MAYBE if head.startswith(ELF_MAGIC) else Fit.NO,
    open=VirtualBoxFile,
    describe=ELF.describe,
    verify=verify_registers_and_memory,
)
