"""Of what guest a dump is: what its headers say, its notes, and the kernel in its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Protocol

from qemu_dump_ext.architectures import Architecture, Core, all_architectures
from qemu_dump_ext.dump_readers import DumpFile
from qemu_dump_ext.errors import CorruptDumpError, RequestError, UnsupportedTargetError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.linux.kernel_memory import read_utsname
from qemu_dump_ext.linux.vmcoreinfo_search import NoteSearch
from qemu_dump_ext.registers.from_dump_notes import (
    DumpNotes,
    exact_dump_notes,
    read_dump_notes,
)
from qemu_dump_ext.structures.elf_notes import Note
from qemu_dump_ext.value import Value

_UNKNOWN = "Unknown"
"""The machine in a kdump by QEMU of all but x86, and since 9.2 of every target."""
_SEARCH_SECONDS = 60.0
_CANDIDATES_MAX = 64
"""Notes that are looked at; a guest has one, and one of each kernel that ran before."""


class MemoryWithBlocks(GuestMemory, Protocol):
    """Guest memory that knows where it is."""

    @property
    def blocks(self) -> Sequence[RamBlock]:
        """By ascending gpa."""


MemoryOf = Callable[[Architecture], MemoryWithBlocks]
"""Returns the memory of a dump, taken for one of an architecture."""


class Recognized(Value):
    """What a dump is of.

    Attributes:
        architecture: Of the guest.
        core: The form of the dump.
        notes: What its notes say.
    """

    architecture: Architecture
    core: Core
    notes: DumpNotes


def machine_of(dump: DumpFile) -> int | str | None:
    """Return what a dump says of its machine: EM_* or utsname.machine; None: nothing."""
    return None if dump.machine in {_UNKNOWN, ""} else dump.machine


def notes_of(dump: DumpFile) -> tuple[Sequence[Note], str | None]:
    """Return the notes of a dump, and what is wrong with them or None."""
    try:
        return dump.notes, None
    except CorruptDumpError as error:
        return (), str(error)


def vmcoreinfo_of(dump: DumpFile) -> bytes | None:
    """Return the text of a dump's VMCOREINFO; None where there is none, or none that is whole."""
    with suppress(CorruptDumpError):
        return dump.vmcoreinfo
    return None


def recognize(dump: DumpFile, memory_of: MemoryOf, target: str | None = None) -> Recognized:
    """Find out of what guest a dump is.

    Args:
        dump: The dump.
        memory_of: Gives its memory.
        target: Name of the architecture where it is known; None: it is not.

    Raises:
        UnsupportedTargetError: Nothing tells.
        RequestError: There is no architecture of that name.
    """
    if target is not None and target not in all_architectures():
        known = ", ".join(all_architectures())
        raise RequestError(f"unknown target {target!r}", hint=f"known: {known}")
    machine = machine_of(dump)
    forms = [
        (architecture, core)
        for architecture in all_architectures().values()
        for core in architecture.cores
        if target in {None, architecture.name}
    ]
    notes, _ = notes_of(dump)
    if machine is not None or notes:
        forms = [form for form in forms if form[1].byte_order == dump.byte_order]
    # A dump of 32-bit words may be of a guest whose memory, or whose kernel, needs more.
    forms.sort(key=lambda form: form[1].word_size != dump.word_size)
    if machine is not None:
        forms = [
            (architecture, core)
            for architecture, core in forms
            if machine in {core.e_machine, core.uname_machine, architecture.qemu_uname_machine}
        ]
    found = _by_notes(dump, forms, notes) or next(_by_kernel(dump, forms, memory_of), None)
    if found is None and forms and (machine is not None or target is not None):
        found = _of(dump, *forms[0])
    if found is None:
        raise _unknown(dump, machine, target)
    return found


def _unknown(
    dump: DumpFile, machine: int | str | None, target: str | None
) -> UnsupportedTargetError:
    if machine is None:
        words = ("nothing tells of what target the dump is", *dump.image.problems)
        return UnsupportedTargetError("; ".join(words), hint="--target NAME")
    if target is not None:
        return UnsupportedTargetError(f"the dump is of machine {machine!r}, and not of {target}")
    return UnsupportedTargetError(f"a guest of machine {machine!r} is none that we know")


def _of(dump: DumpFile, architecture: Architecture, core: Core) -> Recognized:
    notes = read_dump_notes(architecture, dump, notes_of(dump)[0])
    return Recognized(architecture, core if notes.core is None else notes.core, notes)


def _by_notes(
    dump: DumpFile, forms: Sequence[tuple[Architecture, Core]], notes: Sequence[Note]
) -> Recognized | None:
    """Return the target that makes such notes; None where none does."""
    fitting: dict[str, Recognized] = {}
    for architecture, _ in forms:
        if architecture.name not in fitting:
            exact = exact_dump_notes(architecture, dump, notes)
            if exact is not None and exact.core is not None:
                fitting[architecture.name] = Recognized(architecture, exact.core, exact)
    # What QEMU dumps itself is what most dumps are of.
    ranked = sorted(fitting.values(), key=lambda one: one.architecture.dumped_by_qemu_since is None)
    return ranked[0] if ranked else None


def _by_kernel(
    dump: DumpFile, forms: Sequence[tuple[Architecture, Core]], memory_of: MemoryOf
) -> Iterator[Recognized]:
    """Yield the targets of the kernels whose names are found in memory."""
    forms = [form for form in forms if form[0].kernel_page_tables is not None]
    if not forms or (len({architecture.name for architecture, _ in forms}) == 1):
        return
    known = vmcoreinfo_of(dump)
    for text in (known,) if known else _texts_in_memory(*forms[0], memory_of):
        for architecture, core in forms:
            memory = memory_of(architecture)
            # The kernel's own name is found only where addresses are translated rightly.
            name = read_utsname(memory, architecture, memory.blocks, text)
            if name.machine and name.machine == core.uname_machine:
                yield _of(dump, architecture, core)


def _texts_in_memory(
    architecture: Architecture, core: Core, memory_of: MemoryOf
) -> Iterator[bytes]:
    """Yield the texts of what looks like a VMCOREINFO, one at a time: hostile memory has many."""
    memory = memory_of(architecture)
    search = NoteSearch(
        architecture, core.byte_order, memory, memory.blocks, seconds=_SEARCH_SECONDS
    )
    for note in islice(search.candidates(), _CANDIDATES_MAX):
        yield note.text
