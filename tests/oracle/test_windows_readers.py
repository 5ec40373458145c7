"""Independent readers find in a Windows dump what was planted: Volatility 3, and kdmp-parser."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from volatility3.framework import contexts
from volatility3.framework.layers import crash, intel, physical

from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from tests.support.folders import folder_for
from tests.support.kdmp import import_kdmp_parser
from tests.support.windows_guest import (
    CONTEXT_SIZES,
    KDBG_AT,
    PAGE,
    RUNS,
    VCPUS,
    WindowsImage,
    floating_value,
    register_value,
    vector_value,
    windows_machine,
)

pytestmark = [
    pytest.mark.qemu,
    # Of the package that checks Volatility's own tables of symbols, once for each user.
    pytest.mark.filterwarnings("ignore:The metaschema:DeprecationWarning"),
]

_KINDS: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "full at once": ("--no-sparse",),
    "bitmap": ("--omit-zero",),
    "copied": ("--snapshot",),
}
_END = 2 * PAGE * sum(RUNS[-1])
"""Behind all memory."""
_CRASH = (0xE2, 5, 6, 7, 8)


@dataclass(frozen=True)
class Dumped:
    """An image, and dumps of it by their kind."""

    image: WindowsImage
    paths: Mapping[str, Path]


@pytest.fixture(scope="module", params=[8, 4], ids=["64", "32"])
def dumped(request: pytest.FixtureRequest) -> Dumped:
    folder = folder_for(request, "windows")
    image = WindowsImage(request.param)
    image.crash(*_CRASH)
    paths = {kind: folder / kind for kind in _KINDS}
    with windows_machine(["qemu-system-x86_64"], folder) as machine:
        machine.plant(image)
        for kind, words in _KINDS.items():
            argv = ["--qmp", str(machine.qmp_sockets[0]), "-w", *words, str(paths[kind])]
            assert main(argv) == 0
    return Dumped(image, paths)


def _volatility(dumped: Dumped, kind: str) -> tuple[Any, Any]:
    """Return the layers of physical memory and of the kernel's addresses."""
    wide = dumped.image.word_size == 8
    context = contexts.Context()
    context.config["file.location"] = dumped.paths[kind].as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.config["dump.base_layer"] = "file"
    physical_layer = crash.WindowsCrashDump64Layer if wide else crash.WindowsCrashDump32Layer
    layer = physical_layer(context, "dump", "dump")
    context.add_layer(layer)
    context.config["kernel.memory_layer"] = "dump"
    context.config["kernel.page_map_offset"] = layer.dtb
    virtual_layer = intel.WindowsIntel32e if wide else intel.WindowsIntelPAE
    virtual = virtual_layer(context, "kernel", "kernel")
    context.add_layer(virtual)
    return layer, virtual


@pytest.mark.parametrize("kind", _KINDS)
def test_volatility(dumped: Dumped, kind: str):
    image = dumped.image
    layer, kernel = _volatility(dumped, kind)
    header = layer.get_header()
    assert int(header.BugCheckCode) == _CRASH[0]
    assert [int(parameter) for parameter in header.BugCheckCodeParameter] == list(_CRASH[1:])
    assert int(header.RequiredDumpSpace) == dumped.paths[kind].stat().st_size
    assert layer.dtb == image.root
    assert kernel.read(image.base + KDBG_AT + 0x10, 4) == b"KDBG"
    for gpa, page in image.pages.items():
        if not _is_changed(image, gpa) and (any(page) or kind != "bitmap"):
            assert layer.read(gpa, PAGE) == bytes(page)
    segments = [(gpa // PAGE, size // PAGE) for gpa, _, size, _ in layer._segments]
    if kind != "bitmap":
        assert segments == list(RUNS)
    assert not layer.is_valid(0xB8000, 1)


@pytest.mark.parametrize("kind", _KINDS)
def test_the_contexts_are_those_of_the_processors(dumped: Dumped, kind: str):
    image = dumped.image
    _, kernel = _volatility(dumped, kind)
    wide = image.word_size == 8
    place, names = (0x78, "rax rcx rdx rbx") if wide else (0xA4, "rbx rdx rcx rax")
    for vcpu in range(VCPUS):
        context = kernel.read(image.base + image.context_at(vcpu), CONTEXT_SIZES[image.word_size])
        size = image.word_size
        for index, name in enumerate(names.split()):
            found = int.from_bytes(context[place + index * size :][:size], "little")
            number = "rax rbx rcx rdx".split().index(name)
            assert found == register_value(vcpu, number, long=wide), name
        if wide:
            fields = struct.unpack_from("<IIHHB", context, 0x30)[:2] + struct.unpack_from(
                "<HHB", context, 0x100
            )
            assert fields == (0x10001F, 0x1F80 + vcpu, 0x27F, 0x3800, 0)
            for index in range(8):
                # The top of the stack is register 7 of the processor.
                found = int.from_bytes(context[0x120 + 16 * index :][:16], "little")
                assert found == floating_value(vcpu, (7 + index) % 8)
            for index in range(16):
                found = int.from_bytes(context[0x1A0 + 16 * index :][:16], "little")
                assert found == vector_value(vcpu, index)


@pytest.mark.parametrize("kind", _KINDS)
def test_kdmp_parser(dumped: Dumped, kind: str):
    image = dumped.image
    if image.word_size == 4:
        return  # it reads dumps of 64 bits
    kdmp_parser = import_kdmp_parser()
    dump = kdmp_parser.KernelDumpParser(dumped.paths[kind])
    expected = kdmp_parser.DumpType.BMPDump if kind == "bitmap" else kdmp_parser.DumpType.FullDump
    assert dump.type == expected
    assert dump.directory_table_base == image.root
    assert dump.header.NumberProcessors == VCPUS
    assert dump.header.BugCheckCode == _CRASH[0]
    kdbg = image.base + KDBG_AT
    assert dump.header.KdDebuggerDataBlock == kdbg
    assert dump.translate_virtual(kdbg) == image.gpa_of(kdbg)
    with open_dump(dumped.paths[kind]) as ours:
        pages = {
            gpa for first, size in ours.memory_ranges() for gpa in range(first, first + size, PAGE)
        }
    # One by one: its list of them ends Python 3.13.
    assert {gpa for gpa in range(0, _END, PAGE) if dump.read_physical_page(gpa)} == pages


@pytest.mark.parametrize("kind", _KINDS)
def test_our_own_reader(dumped: Dumped, kind: str):
    with open_dump(dumped.paths[kind]) as dump:
        report = verify_dump(dump)
        assert not report.problems
        assert not report.remarks
        ranges = [(gpa // PAGE, size // PAGE) for gpa, size in dump.memory_ranges()]
        assert kind == "bitmap" or ranges == [RUNS[0], (0x100, 0xEFF)]
        for gpa, page in dumped.image.pages.items():
            if not _is_changed(dumped.image, gpa) and (any(page) or kind != "bitmap"):
                assert dump.read(gpa, PAGE) == bytes(page)


def test_all_kinds_have_the_same_memory(dumped: Dumped):
    full = dumped.paths["full"].read_bytes()
    assert dumped.paths["full at once"].read_bytes() == full
    assert dumped.paths["copied"].read_bytes() == full
    with open_dump(dumped.paths["full"]) as whole, open_dump(dumped.paths["bitmap"]) as part:
        for gpa, size in part.memory_ranges():
            assert part.read(gpa, size) == whole.read(gpa, size)
        left = sum(size for _, size in part.memory_ranges())
        assert left < sum(size for _, size in whole.memory_ranges()) // 50


def _is_changed(image: WindowsImage, gpa: int) -> bool:
    """Tell whether a page has registers of a processor in the dump, or is no memory in it."""
    contexts_at = {
        image.gpa_of(image.base + image.context_at(vcpu) + offset) & -PAGE
        for vcpu in range(VCPUS)
        for offset in (0, CONTEXT_SIZES[image.word_size])
    }
    return gpa in contexts_at or gpa == 0
