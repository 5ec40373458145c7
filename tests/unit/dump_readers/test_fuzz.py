"""Whatever a file holds: an answer or a DumpError, soon, in little memory."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.inspect import describe
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import DumpError
from qemu_dump_ext.page_codecs import all_page_codecs
from qemu_dump_ext.structures.c_struct import ByteOrder
from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import BLOCK, flatten, make_kdump, note, prstatus

PAGES = {pfn: b"%04d" % (pfn % 3) * (BLOCK // 4) for pfn in (0, 1, 2, 5, 70, 71)} | {
    4: bytes(BLOCK)
}
KDUMP = bytes(make_kdump(PAGES, vmcoreinfo=b"A=1\n").data)
LOADS = [Load(0x1000, b"a" * 5000, memsz=9000), Load(0x100000, b"b" * 3000)]
NOTES = prstatus(1) + note(b"QEMU", 0, bytes(440)) + note(b"VMCOREINFO", 0, b"A=1\n")
SEEDS = {
    "kdump": KDUMP,
    "kdump, big endian": bytes(make_kdump(PAGES, order=">").data),
    "kdump, 32 bit": bytes(make_kdump(PAGES, word=4, packed=True).data),
    **{
        f"kdump, {codec.name}": bytes(
            make_kdump(PAGES, compress=codec.compressor(), flag=codec.page_flag).data
        )
        for codec in all_page_codecs().values()
    },
    "flattened": flatten(KDUMP, chunk=1000),
    "elf": bytes(make_elf(LOADS, notes=NOTES)),
    "elf, 32 bit, big endian": bytes(make_elf(LOADS, order=">", word=4)),
    "elf, many headers": bytes(make_elf(LOADS, sections_first=False, xnum=True)),
    "elf, flattened": flatten(make_elf(LOADS), chunk=1000),
}
# Where something is decided, so that mutations do not all land in page data.
HOT_SPOTS = {
    "kdump": (0, 464, BLOCK, BLOCK + 900, 2 * BLOCK, 2 * BLOCK + 16, 4 * BLOCK, 4 * BLOCK + 200),
    "flattened": (0, 32, 4096, 4112, 5112, 5128, 6128, 6144),
    "elf": (0, 700, 700, 1500),
}
NUMBERS = [0, 1, 2, 0x7F, 0xFF, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1]
NUMBERS += [1 << 63, (1 << 64) - 1, (1 << 64) - 2, (1 << 64) - 4096]
SECONDS, BYTES = 5, 64 << 20
"""Of CPU time: others may keep the machine busy."""


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(SEEDS)))
    data = bytearray(SEEDS[name])
    spots = HOT_SPOTS["flattened" if "flattened" in name else name.split(",")[0]]
    for _ in range(draw(st.integers(1, 4))):
        start, end = draw(
            st.sampled_from([*zip(spots[::2], spots[1::2], strict=True), (0, 1 << 20)])
        )
        at = draw(st.integers(start, min(end, len(data)) - 1))
        value, size = (
            draw(st.sampled_from(NUMBERS) | st.integers(0, 1 << 16)),
            draw(st.sampled_from([1, 2, 4, 8])),
        )
        order: ByteOrder = draw(st.sampled_from(("little", "big")))
        data[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, order)
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    return name, bytes(data)


def use(path: Path) -> None:
    with open_dump(path) as dump:
        verify_dump(dump)
        describe(str(path), dump)
        for gpa in (0, 0x1000, 0x100000, 70 * BLOCK, (1 << 64) - 1):
            with suppress(DumpError):
                dump.read(gpa, 3 * BLOCK)


def use_within_bounds(data: bytes) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory, "dump")
        path.write_bytes(data)
        tracemalloc.start()
        start = process_time()
        try:
            with suppress(DumpError):
                use(path)
            assert tracemalloc.get_traced_memory()[1] < BYTES
            assert process_time() - start < SECONDS
        finally:
            tracemalloc.stop()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_mutations(seed):
    use_within_bounds(seed[1])


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([b"", b"\x7fELF\x02\x01\x01", b"\x7fELF\x01\x02\x01", b"KDUMP   \x06\0\0\0"]),
    st.binary(max_size=6000),
)
def test_rubbish_behind_a_signature(signature, data):
    use_within_bounds(signature + data)


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_are_whole(tmp_path, name):
    path = tmp_path / "dump"
    path.write_bytes(SEEDS[name])
    with open_dump(path) as dump:
        assert not verify_dump(dump).problems
        assert not describe(str(path), dump)["problems"]


def test_sparse_file_with_headers_of_any_size(tmp_path):
    """A file may claim to be large: its size alone must not cost memory or time."""
    path = tmp_path / "dump"
    elf = make_elf(LOADS, xnum=True, sections_first=False)
    start = 64 + 3 * 56
    struct.pack_into("<I", elf, start + 44, (1 << 32) - 1)
    path.write_bytes(elf)
    with path.open("r+b") as file:
        file.truncate(1 << 42)
    begin = process_time()
    with pytest.raises(DumpError, match="more than any dump has"):
        open_dump(path)
    assert process_time() - begin < SECONDS
