"""Everything that reads what others wrote: seeds that are valid, and how each is used.

A parser may refuse an input by a DumpError, or by what its own contract says; any other exception
is a fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice

from hmp.human.dump_line import parse_dump_line
from hmp.qmp.json_stream import JsonStream
from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.crash_collector.agent.journal import replay
from qemu_dump_ext.crash_collector.config.file import parse_configuration
from qemu_dump_ext.crash_collector.record import parse_record
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.convert import convert
from qemu_dump_ext.engine.dmesg import read_log
from qemu_dump_ext.engine.inspect import describe
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import DumpError
from qemu_dump_ext.linux.kernel_log import read_kernel_log
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from qemu_dump_ext.linux.page_filter import FilterRules
from qemu_dump_ext.linux.vmcoreinfo_search import NoteSearch
from qemu_dump_ext.options.expressions import parse_expressions
from qemu_dump_ext.plan.plan import GuestSnapshot, make_plan
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.probe import probe_guest
from qemu_dump_ext.registers.from_native_notes import parse_native_notes
from qemu_dump_ext.sinks import Sink
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.utsname import UtsName
from tests.fuzz.recorded import Recorded, recorded_guests
from tests.support.crashes import make_record
from tests.support.fake_kernel import KERNEL_MAP, LOG_AT, FlatMemory, plant_kernel, vmcoreinfo
from tests.support.fake_pages import GuestWithPages
from tests.support.sample_cores import (
    make_virtualbox,
    make_xen,
    virtualbox_notes,
    virtualbox_state,
    xen_context,
)
from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import BLOCK, flatten, make_kdump, note, prstatus
from tests.support.sample_migration import make_mapped, make_migration
from tests.support.sample_qcow2 import make_qcow2
from tests.support.sample_ranges import make_avml, make_lime, make_qemu_core, ram_with_kernel
from tests.support.sample_save_image import PACKINGS, make_save_image, pack

_MIB = 1 << 20
_X86_64 = all_architectures()["x86_64"]


@dataclass(frozen=True)
class Parser:
    """One of them.

    Attributes:
        seeds: Inputs that it takes.
        use: Gives it one.
        most: How long an input is, at most, in bytes.
    """

    seeds: Callable[[], Sequence[bytes]]
    use: Callable[[bytes], object]
    most: int = 1 << 17


_SEPARATOR = "\n\0\n"
"""Between command and answer, and between answers, of what is mutated as one text."""


def _joined(answers: Mapping[str, str]) -> bytes:
    return _SEPARATOR.join(part for pair in answers.items() for part in pair).encode("latin-1")


def _split(data: bytes) -> dict[str, str]:
    parts = data.decode("latin-1").split(_SEPARATOR)
    return dict(zip(parts[::2], parts[1::2], strict=False))


def _probe(guest: Recorded) -> None:
    """Probe it, and lay out its dump."""
    found = probe_guest(guest.access())
    core = found.architecture.select_core(found.vcpus, found.ram_blocks, MENDED, found.machine)
    snapshot = GuestSnapshot(
        architecture=found.architecture,
        ram_blocks=found.ram_blocks,
        vcpus=found.vcpus,
        guest_note=found.guest_note or b"",
        utsname=UtsName(),
        machine=found.machine,
    )
    make_plan(snapshot, MENDED, DumpRequest())
    assert core in found.architecture.cores


def _use_monitor(data: bytes) -> None:
    target, _, rest = data.partition(b"\n")
    guest = recorded_guests().get(target.decode("latin-1"))
    if guest is not None:
        _probe(replace(guest, answers=_split(rest)))


def _use_stub(data: bytes) -> None:
    target, _, rest = data.partition(b"\n")
    guest = recorded_guests().get(target.decode("latin-1"))
    if guest is not None:
        _probe(replace(guest, replies=_split(rest)))


def _use_native(data: bytes) -> None:
    target, _, rest = data.partition(b"\n")
    architecture = all_architectures().get(target.decode("latin-1"))
    if architecture is not None:
        for vcpu_count in (1, 2):
            with suppress(DumpError):
                parse_native_notes(rest, architecture, range(vcpu_count))


def _of_guests(part: Callable[[Recorded], bytes]) -> Callable[[], Sequence[bytes]]:
    return lambda: [
        name.encode() + b"\n" + part(guest) for name, guest in recorded_guests().items()
    ]


class _Nowhere(Sink):
    """Takes a dump as an empty file does, and keeps nothing of it."""

    def _open(self) -> int:
        return os.memfd_create(self.name, os.MFD_CLOEXEC)

    def _place(self, offset: int, view: memoryview) -> None:
        pass

    def commit(self) -> None:
        os.close(self._descriptor)

    def abort(self) -> None:
        os.close(self._descriptor)


@cache
def _scratch() -> int:
    """Return the descriptor of a file in memory."""
    return os.memfd_create("dump", os.MFD_CLOEXEC)


def _use_dump(data: bytes) -> None:
    file = _scratch()
    os.ftruncate(file, 0)
    os.pwrite(file, data, 0)
    with open_dump(f"/proc/self/fd/{file}") as dump:
        verify_dump(dump, workers=1)
        describe("dump", dump)
        for gpa in (0, 0x1000, 0x100000, 70 * BLOCK, (1 << 64) - 1):
            with suppress(DumpError):
                dump.read(gpa, 3 * BLOCK)
        with suppress(DumpError):
            read_log(StoredGuest(dump, search_seconds=1))
        request = DumpRequest(format="kdump-raw-zlib", threads=1)
        with suppress(DumpError), _Nowhere("converted") as sink:
            convert(request, dump, sink, progress=ProgressMeter(None), search_seconds=1)


_LOADS = [Load(0x1000, b"a" * 5000, memsz=9000), Load(0x100000, b"b" * 3000)]
_NOTES = prstatus(1) + note(b"QEMU", 0, bytes(440)) + note(b"VMCOREINFO", 0, b"A=1\n")
_PAGES = {pfn: b"%04d" % (pfn % 3) * (BLOCK // 4) for pfn in (0, 1, 2, 5, 70)} | {4: bytes(BLOCK)}


def _elf_seeds() -> list[bytes]:
    return [
        bytes(make_elf(_LOADS, notes=_NOTES)),
        bytes(make_elf(_LOADS, order=">", word=4)),
        bytes(make_elf(_LOADS, sections_first=False, xnum=True)),
        *(guest.native for guest in recorded_guests().values() if guest.native),
    ]


def _kdump_seeds() -> list[bytes]:
    return [
        bytes(make_kdump(_PAGES, vmcoreinfo=b"A=1\n").data),
        bytes(make_kdump(_PAGES, order=">").data),
        bytes(make_kdump(_PAGES, word=4, packed=True).data),
    ]


def _flattened_seeds() -> list[bytes]:
    return [flatten(seed, chunk=1000) for seed in (_elf_seeds()[0], _kdump_seeds()[0])]


def _migration_seeds() -> list[bytes]:
    content = b"".join(_PAGES.get(pfn, b"")[:BLOCK].ljust(BLOCK, b"\0") for pfn in range(12))
    table = bytearray(BLOCK)
    table[16:24] = (0x80000 << 10 | 0xF).to_bytes(8, "little")  # the third GiB is RAM
    satp = 8 << 60 | 0x80000
    mapped = make_migration(bytes(table) + content, satp=satp)
    return [make_migration(content), mapped, make_mapped(content)]


def _save_image_seeds() -> list[bytes]:
    stream = _migration_seeds()[0]
    return [make_save_image(stream), *(make_save_image(stream, name) for name in PACKINGS)]


def _packed_seeds() -> list[bytes]:
    return [pack(_migration_seeds()[0], name) for name in PACKINGS]


def _qcow2_seeds() -> list[bytes]:
    plain, mapped, _ = _migration_seeds()
    return [
        make_qcow2({"one": mapped}),
        make_qcow2({"disk": b"", "old": plain}, version=2, extra=False),
    ]


def _core_seeds() -> Mapping[str, Sequence[bytes]]:
    state = virtualbox_state({"rip": 0x1234, "cr0": 1 << 31, "cr3": BLOCK}, xsave_size=4096)
    context = xen_context({"rip": 0x1234, "cr0": 1 << 31, "cr3": BLOCK, "cr4": 32})
    frames = [(pfn, page[:BLOCK].ljust(BLOCK, b"\0")) for pfn, page in _PAGES.items()]
    blocks = {0x1000: b"a" * 5000, 0x100000: b"b" * 3000}
    return {
        "virtualbox": [make_virtualbox(blocks, virtualbox_notes([state, state[:1000]]))],
        "xen": [make_xen(frames, [context] * 2), make_xen(frames[::-1], machine=183)],
    }


_FUZZED_RAM = 0x34000
"""Bytes; as little as a kernel with all that belongs to it needs."""


def _range_seeds() -> Mapping[str, Sequence[bytes]]:
    blocks = {0x1000: b"a" * 5000, 0x100000: bytes(range(256)) * 300}
    ram = ram_with_kernel(_FUZZED_RAM, phys_base=0)
    return {
        "lime": [make_lime(blocks), make_lime({0: bytes(BLOCK)})],
        "avml": [make_avml(blocks), make_avml({0x1000: b"b" * BLOCK})],
        "raw": [ram],
        "qemu_core": [make_qemu_core(ram + bytes(1 << 20))],
    }


_RING = (
    f"SYMBOL(prb)={KERNEL_MAP + LOG_AT:x}",
    *("SIZE(printk_ringbuffer)=80", "OFFSET(printk_ringbuffer.desc_ring)=0"),
    *("OFFSET(printk_ringbuffer.text_data_ring)=48", "OFFSET(prb_desc_ring.count_bits)=0"),
    *("OFFSET(prb_desc_ring.descs)=8", "OFFSET(prb_desc_ring.infos)=16"),
    *("OFFSET(prb_desc_ring.head_id)=24", "OFFSET(prb_desc_ring.tail_id)=32"),
    *("OFFSET(prb_data_ring.size_bits)=0", "OFFSET(prb_data_ring.data)=8", "SIZE(prb_desc)=24"),
    *("OFFSET(prb_desc.state_var)=0", "OFFSET(prb_desc.text_blk_lpos)=8"),
    *("OFFSET(prb_data_blk_lpos.begin)=0", "OFFSET(prb_data_blk_lpos.next)=8"),
    *("SIZE(printk_info)=88", "OFFSET(printk_info.ts_nsec)=8", "OFFSET(printk_info.text_len)=16"),
    "OFFSET(atomic_long_t.counter)=0",
)
_RECORDS = (
    *(
        f"SYMBOL({name})={KERNEL_MAP + LOG_AT + 8 * index:x}"
        for index, name in enumerate(("log_buf", "log_buf_len", "log_first_idx", "log_next_idx"))
    ),
    *("SIZE(printk_log)=16", "OFFSET(printk_log.ts_nsec)=0"),
    *("OFFSET(printk_log.len)=8", "OFFSET(printk_log.text_len)=10"),
)
_LOG_BASE = 2 * _MIB


@cache
def _kernel() -> FlatMemory:
    memory = FlatMemory(8 * _MIB)
    plant_kernel(memory, _LOG_BASE, "6.1.0")
    return memory


def _vmcoreinfo_seeds() -> list[bytes]:
    return [vmcoreinfo("6.1.0", _LOG_BASE, *lines) for lines in (_RING, _RECORDS)]


def _use_vmcoreinfo(data: bytes) -> None:
    memory = _kernel()
    for architecture in all_architectures().values():
        if architecture.kernel_page_tables is not None:
            with suppress(DumpError):
                kernel = KernelMemory(architecture, memory, memory.blocks, data)
                for _ in islice(read_kernel_log(data, kernel.read, "little", 8), 1000):
                    pass
    NoteSearch(_X86_64, "little", memory, memory.blocks)._evidence(data)


def _log_seeds() -> list[bytes]:
    ring = bytearray(_MIB)
    here = KERNEL_MAP + LOG_AT

    def put(at: int, *words: int) -> None:
        for index, word in enumerate(words):
            ring[at + 8 * index : at + 8 * index + 8] = word.to_bytes(8, "little")

    put(0, here + 0x100)
    put(0x100, 3, here + 0x200, here + 0x800, 2, 0, 0, 8, here + 0x1000)
    for number in range(3):
        put(0x200 + 24 * number, 2 << 62 | number, 64 * number, 64 * number + 64)
        put(0x800 + 88 * number, 0, 10**9 * number, 20)
        ring[0x1000 + 64 * number + 8 : 0x1000 + 64 * number + 28] = b"a line of the log..."
    records = bytearray(0x1000)
    records[:32] = b"".join(n.to_bytes(8, "little") for n in (here + 0x100, 256, 0, 96))
    for number in range(3):
        at = 0x100 + 32 * number
        records[at : at + 16] = (10**9).to_bytes(8, "little") + b"\x20\0\x10\0\0\0\0\0"
        records[at + 16 : at + 32] = b"a line of a log."
    return [b"1" + bytes(ring[:0x1200]), b"2" + bytes(records[:0x200])]


def _use_log(data: bytes) -> None:
    memory = FlatMemory(8 * _MIB)
    memory.data[:] = _kernel().data
    memory.put(_LOG_BASE + LOG_AT, data[1:_MIB])
    text = vmcoreinfo("6.1.0", _LOG_BASE, *(_RECORDS if data[:1] == b"2" else _RING))
    kernel = KernelMemory(_X86_64, memory, memory.blocks, text)
    for record in read_kernel_log(text, kernel.read, "little", 8):
        record.line()


def _use_json(data: bytes) -> None:
    stream = JsonStream()
    for start in range(0, len(data), 1000):
        for _ in stream.feed(data[start : start + 1000]):
            pass


_RULES = (
    FilterRules(31),
    FilterRules(31, exact=True),
    FilterRules(31, without_struct_pages=True, without_text=True),
)


def _use_pages(data: bytes) -> None:
    guest = GuestWithPages()
    only_struct_pages_lie = guest.take(data)
    rules = _RULES[sum(data) % len(_RULES)]
    found = guest.pages().excluded(rules)
    if only_struct_pages_lie and not rules.exact:
        excluded = {page for first, end in found.ranges for page in range(first, end)}
        for name, pages in guest.needed().items():
            missing = excluded & set(pages)
            assert not missing or (rules.without_struct_pages and name == "struct pages"), name


def _lines(*lines: str) -> Callable[[], Sequence[bytes]]:
    return lambda: [line.encode() for line in lines]


def _text(use: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: use(data.decode("utf-8", "surrogateescape"))


def _journal_lines() -> Iterator[bytes]:
    for state in ("collecting", "stored"):
        yield json.dumps(
            {
                "guest": "web1",
                "state": state,
                "cause": {"kind": "guest-panicked", "detail": "pvpanic"},
                "time": "2026-01-31T12:00:00.000000+00:00",
                "qemu": 4711,
                "stopped": True,
                "stored": "web1/x",
            }
        ).encode()


_CONFIGURATION = """store: /var/crash
concurrent_dumps: 4
limits: {bytes: 20 GiB, count: 100, age: 30d, free: 512MiB}
defaults: {labels: {farm: a}, after: reset}
guests:
  - {socket: /run/a.qmp, name: a, format: kdump-raw-zstd, after: {command: [notify, me]}}
  - {glob: /run/vms/*/qmp, name: "{directory}"}
  - {directory: /run/more, causes: [shutdown, console], console_patterns: ["^oh no"]}
"""

PARSERS: Mapping[str, Parser] = {
    "monitor": Parser(_of_guests(lambda guest: _joined(guest.answers)), _use_monitor),
    "stub": Parser(_of_guests(lambda guest: _joined(guest.replies)), _use_stub),
    "native": Parser(_of_guests(lambda guest: guest.native), _use_native),
    "elf": Parser(_elf_seeds, _use_dump),
    "kdump": Parser(_kdump_seeds, _use_dump),
    "flattened": Parser(_flattened_seeds, _use_dump),
    "lime": Parser(lambda: _range_seeds()["lime"], _use_dump),
    "avml": Parser(lambda: _range_seeds()["avml"], _use_dump),
    "raw": Parser(lambda: _range_seeds()["raw"], _use_dump, most=1 << 18),
    "qemu_core": Parser(lambda: _range_seeds()["qemu_core"], _use_dump, most=1 << 21),
    "migration": Parser(_migration_seeds, _use_dump),
    "libvirt_save": Parser(_save_image_seeds, _use_dump),
    "packed_migration": Parser(_packed_seeds, _use_dump),
    "qcow2": Parser(_qcow2_seeds, _use_dump),
    "virtualbox": Parser(lambda: _core_seeds()["virtualbox"], _use_dump),
    "xen": Parser(lambda: _core_seeds()["xen"], _use_dump),
    "vmcoreinfo": Parser(_vmcoreinfo_seeds, _use_vmcoreinfo),
    "kernel-log": Parser(_log_seeds, _use_log, most=_MIB),
    "pages": Parser(lambda: [GuestWithPages().to_bytes()], _use_pages),
    "expressions": Parser(
        _lines("0x1000 4096", "0x8 + 8 * (3 - -1) & ~0xf 'a'", "1 + 2/3 % 4 | 5 ^ 6"),
        _text(lambda text: parse_expressions(text, "dump-guest-memory", 2)),
    ),
    "dump-line": Parser(
        _lines(
            'dump-guest-memory -z zstd -R --memory process "/tmp/a b\\n"',
            "dump-guest-memory -p /tmp/x 0x1000 4096",
            "dump-guest-memory -d -l --snapshot --exact x",
        ),
        _text(lambda text: parse_dump_line(text, ("zlib", "zstd"), ("auto", "process"))),
    ),
    "json-stream": Parser(
        _lines(
            '{"execute": "dump-guest-memory", "arguments": {"paging": false, "begin": 4096}}\n',
            "{'execute': 'query-status', 'id': \"a\\\\n\\u00e9\"}{}[1, 2.5, null]",
        ),
        _use_json,
    ),
    "record": Parser(lambda: [make_record().to_json().encode()], parse_record),
    "journal": Parser(
        lambda: [b"\n".join(_journal_lines())],
        lambda data: replay(data.split(b"\n")),
    ),
    "configuration": Parser(
        lambda: [_CONFIGURATION.encode()],
        _text(lambda text: parse_configuration(text, "configuration")),
    ),
}
