"""QEMU's migration stream is taken apart, and hostile ones are refused by what is wrong in them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pytest

from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures import migration
from qemu_dump_ext.structures.migration import (
    MigrationStream,
    StreamBlock,
    StreamBuffer,
    parse_stream,
)
from tests.support.sample_migration import (
    CONTINUE,
    DATA,
    EOF,
    EOS,
    HEAD,
    MEM_SIZE,
    PAGE,
    ZERO,
    block_list,
    configuration,
    description,
    field,
    footer,
    make_migration,
    name_of,
    part,
    ram_pages,
    ram_start,
    ram_word,
    section,
    subsection,
)

_START, _FULL = 1, 4
_BLOCKS = {"ram": 4 * PAGE}
_BEGIN = HEAD + configuration("virt") + ram_start(_BLOCKS)
_PAGE = bytes(range(256)) * 16


class Taken:
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.blocks: Sequence[StreamBlock] = ()
        self.pages: list[tuple[int, int, bytes]] = []
        self.places: list[int] = []

    def begin(self, blocks: Sequence[StreamBlock], page_size: int) -> None:
        self.blocks = blocks
        self.page_size = page_size

    def page(self, block: int, offset: int, data: memoryview, place: int) -> None:
        self.pages.append((block, offset, bytes(data)))
        self.places.append(place)

    def fill(self, block: int, offset: int, byte: int) -> None:
        self.pages.append((block, offset, bytes((byte,)) * PAGE))


def parse(data: bytes, taken: Taken | None = None, *, at_a_time: int = 1 << 20) -> MigrationStream:
    source = io.BytesIO(data)

    def fill(buffer: memoryview) -> int:
        return source.readinto(buffer[:at_a_time])

    return parse_stream(StreamBuffer(fill), taken or Taken())


def problem_of(data: bytes) -> str:
    try:
        problem = parse(data).problem
    except CorruptDumpError as error:
        problem = error
    assert problem is not None
    return str(problem)


def devices(*entries: tuple[dict[str, Any], bytes]) -> bytes:
    """Return all that stands behind RAM, of described devices and their data."""
    sections = [
        section(_FULL, number, entry["name"], data, entry["instance_id"])
        for number, (entry, data) in enumerate(entries, 3)
    ]
    return b"".join(sections) + EOF + description([entry for entry, _ in entries])


def device(*fields: dict[str, Any], name: str = "cpu", **more: Any) -> dict[str, Any]:
    return {"name": name, "instance_id": 0, "fields": list(fields), **more}


@pytest.mark.parametrize("at_a_time", [1, 7, 4096, 1 << 20])
def test_pages_come_with_their_places(at_a_time: int):
    data = make_migration(_PAGE + bytes(PAGE) + _PAGE[::-1])
    taken = Taken()
    stream = parse(data, taken, at_a_time=at_a_time)
    assert stream.problem is None
    assert stream.machine == "virt"
    assert taken.blocks == [StreamBlock("riscv_virt_board.ram", 3 * PAGE)]
    assert taken.pages == [(0, 0, _PAGE), (0, PAGE, bytes(PAGE)), (0, 2 * PAGE, _PAGE[::-1])]
    assert [data[place : place + PAGE] for place in taken.places] == [_PAGE, _PAGE[::-1]]


def test_a_page_goes_on_in_the_block_of_the_last_one_of_the_section_before():
    ram = part(2, ram_word(0, DATA, "ram") + _PAGE + ram_word(0, EOS))
    ram += part(2, ram_word(PAGE, ZERO | CONTINUE) + b"\xa5" + ram_word(0, EOS))
    taken = Taken()
    assert parse(_BEGIN + ram + devices(), taken).problem is None
    assert taken.pages == [(0, 0, _PAGE), (0, PAGE, b"\xa5" * PAGE)]


def test_the_page_size_of_the_target_is_told():
    bits = subsection("configuration/target-page-bits", (14).to_bytes(4, "big"))
    begin = HEAD + configuration("virt", bits) + ram_start({"ram": 4 << 14})
    ram = part(2, ram_word(1 << 14, DATA, "ram") + _PAGE * 4 + ram_word(0, EOS))
    taken = Taken()
    assert parse(begin + ram + devices(), taken).page_size == 1 << 14
    assert taken.pages == [(0, 1 << 14, _PAGE * 4)]


def test_fields_are_found_by_the_names_in_the_description():
    segment = {"vmsd_name": "segment", "fields": [field("selector", 4), field("base", 8)]}
    cpu = device(
        field("env.regs", 8, 2),
        field("env.segs", 12, 2, "struct", struct=segment),
        field("env.cr[0]", 8),
        field("env.part", 2, index=0),
        field("env.part", 2, index=1),
        field("nothing", 0),
        subsections=[{"vmsd_name": "cpu/vfp", "fields": [field("env.d", 8)]}],
    )
    words = [n.to_bytes(8, "big") for n in (1, 2)]
    segments = [n.to_bytes(4, "big") + (n << 40).to_bytes(8, "big") for n in (3, 4)]
    state = b"".join((*words, *segments, (5).to_bytes(8, "big"), b"\0\6\0\7"))
    state += subsection("cpu/vfp", (8).to_bytes(8, "big"))
    stream = parse(_BEGIN + devices((cpu, state)))
    assert stream.problem is None
    (found,) = stream.find("cpu")
    assert [found.fields.integer(f"env.regs[{index}]") for index in range(3)] == [1, 2, None]
    assert found.fields.integers("env.regs") == [1, 2]
    assert found.fields.integer("env.segs[1].base") == 4 << 40
    assert found.fields.integer("env.cr[0]") == 5
    assert found.fields.integer("env.part[1]") == 7
    assert found.fields.integer("cpu/vfp/env.d") == 8
    assert "nothing" not in found.fields
    assert found.fields.data("env.regs[x]") is None
    assert found.fields.integers("env.none") == ()


def test_a_device_before_ram_is_one_like_the_others():
    early = device(field("bitmap", 9), name="0000:00:02.0/virtio-mem-early")
    # Looks like the end of the section, but for what is behind.
    state = b"ab" + footer(2) + b"\xffc"
    late = device(field("env.pc", 8))
    data = HEAD + configuration("virt") + section(_FULL, 2, early["name"], state)
    data += ram_start(_BLOCKS).replace((2).to_bytes(4, "big"), (1).to_bytes(4, "big"))
    data += section(_FULL, 3, "cpu", bytes(7) + b"\x05") + EOF + description([early, late])
    stream = parse(data)
    assert stream.problem is None
    assert bytes(stream.devices[0].data) == state[:9]
    assert stream.find("cpu")[0].fields.integer("env.pc") == 5
    assert stream.find("virtio-mem-early")[0].fields.data("bitmap") == state[:9]


def test_a_device_that_is_not_as_it_is_described_does_not_hide_the_next_one():
    odd = device(field("css", 1, 4), name="s390_css")
    cpu = device(field("env.pc", 8))
    stream = parse(_BEGIN + devices((odd, b"0" * 20), (cpu, (9).to_bytes(8, "big"))))
    assert stream.problem is None
    with pytest.raises(CorruptDumpError, match="'s390_css' is not as it is described"):
        _ = stream.devices[0].fields
    assert stream.find("cpu")[0].fields.integer("env.pc") == 9


def test_machines_without_footers():
    cpu = device(field("env.pc", 8))
    data = _BEGIN + devices((cpu, (9).to_bytes(8, "big")))
    data = data.replace(footer(2), b"").replace(footer(3), b"")
    assert parse(data).find("cpu")[0].fields.integer("env.pc") == 9


def test_a_stream_that_does_not_describe_its_devices_says_so():
    stream = parse(_BEGIN + section(_FULL, 3, "cpu", bytes(8)) + EOF)
    assert stream.problem is None
    assert not stream.devices
    assert "suppress-vmdesc" in (stream.undescribed or "")


def test_parts_that_are_of_no_use_are_skipped():
    htab = section(_START, 5, "spapr/htab", (24).to_bytes(4, "big"))
    entry = bytes(4) + (7).to_bytes(4, "big") + b"\0\2\0\0" + bytes(32) + bytes(8)
    htab += part(5, entry) + part(5, b"\xff" * 4)
    skeys = section(_START, 6, "s390-storage_attributes", (1).to_bytes(8, "big"))
    skeys += part(
        6, (2).to_bytes(8, "big") + (3).to_bytes(8, "big") + b"abc" + (1).to_bytes(8, "big")
    )
    command = b"\x08\0\1\0\2ab"
    told = subsection("configuration/capabilities", (1).to_bytes(4, "big") + name_of("x-abc"))
    begin = HEAD + configuration("virt", told, subsection("configuration/uuid", bytes(16)))
    stream = parse(begin + ram_start(_BLOCKS) + htab + skeys + command + devices())
    assert stream.problem is None
    assert stream.capabilities == ["x-abc"]


def _ram(data: bytes) -> bytes:
    return _BEGIN + part(2, data)


def _described(text: bytes) -> bytes:
    return _BEGIN + EOF + b"\x06" + len(text).to_bytes(4, "big") + text


def _nested(depth: int) -> dict[str, Any]:
    inner = field("x", 1)
    for _ in range(depth):
        inner = field("x", 1, kind="struct", struct={"fields": [inner]})
    return inner


REFUSED = {
    "no stream": (b"QEVN" + bytes(100), "does not begin like a migration stream"),
    "another version": (b"QEVM\0\0\0\2" + bytes(100), "of version 2, not 3"),
    "empty": (b"", "ends at offset 0x0"),
    "no name of the machine": (HEAD + b"\x07" + bytes(4), "a name of 0 bytes"),
    "a long name of the machine": (HEAD + b"\x07\x7f" + bytes(2000), "a name of"),
    "an unknown part": (
        HEAD + configuration("virt", subsection("configuration/more", b"")),
        "unknown part 'configuration/more'",
    ),
    "pages of many bits": (
        HEAD + configuration("virt", subsection("configuration/target-page-bits", b"\0\0\0\xff")),
        "pages of 255 bits",
    ),
    "memory that is left out": (
        HEAD
        + configuration(
            "virt",
            subsection(
                "configuration/capabilities", (1).to_bytes(4, "big") + name_of("x-ignore-shared")
            ),
        )
        + ram_start(_BLOCKS),
        "shared memory is not in it, by the capability x-ignore-shared",
    ),
    "many capabilities": (
        HEAD + configuration("virt", subsection("configuration/capabilities", b"\xff" * 4)),
        "a count of 4294967295",
    ),
    "an unknown section": (
        HEAD + section(_START, 1, "block", bytes(8)),
        "section 'block', of which the length is not told, is not read",
    ),
    "an unknown kind": (HEAD + b"\x55", "section of type 85"),
    "a section that never began": (_BEGIN + part(77, b""), "section 77, which never began"),
    "another end": (
        _BEGIN + b"\x02" + (2).to_bytes(4, "big") + ram_word(0, EOS) + footer(9),
        "section 2 ends as another one",
    ),
    "xbzrle": (_ram(ram_word(0, 0x40, "ram")), "packed by xbzrle"),
    "multifd": (_ram(ram_word(0, 0x200 | CONTINUE)), "a page at"),
    "multifd, in a block": (_ram(ram_word(0, 0x200, "ram")), "by multifd"),
    "compress": (_ram(ram_word(0, 0x100, "ram")), "packed by the capability compress"),
    "rdma": (_ram(ram_word(0, 0x80, "ram")), "sent by RDMA"),
    "no kind of page": (_ram(ram_word(0, 0, "ram")), "of kind 0x0"),
    "no such block": (_ram(ram_word(0, DATA, "other") + _PAGE), "of a RAM block of 0x0 bytes"),
    "behind a block": (_ram(ram_word(4 * PAGE, DATA, "ram") + _PAGE), "a page at 0x4000"),
    "no RAM": (HEAD + section(_START, 2, "ram", ram_word(0, MEM_SIZE)), "RAM blocks of 0x0 bytes"),
    "RAM without end": (
        HEAD + section(_START, 2, "ram", ram_word(1 << 60, MEM_SIZE)),
        "RAM blocks of 0x1000000000000000 bytes",
    ),
    "blocks again": (_BEGIN + part(2, block_list(_BLOCKS)), "RAM blocks of 0x4000 bytes"),
    "a block of nothing": (
        HEAD + section(_START, 2, "ram", ram_word(PAGE, MEM_SIZE) + name_of("a") + bytes(8)),
        "RAM block 'a' of 0x0 bytes",
    ),
    "a larger block": (
        HEAD
        + section(
            _START, 2, "ram", ram_word(PAGE, MEM_SIZE) + name_of("a") + (1 << 40).to_bytes(8, "big")
        ),
        "RAM block 'a' of 0x10000000000 bytes",
    ),
    "cut in a page": (_ram(ram_word(0, DATA, "ram") + _PAGE)[:-500], "in the middle"),
    "no JSON": (_described(b"{nonsense"), "is no JSON"),
    "JSON without end": (_described(b'{"a":' + b"[" * 200_000), "is no JSON"),
    "a number without end": (_described(b'{"a":' + b"1" * 9000 + b"}"), "is no JSON"),
    "no list": (_described(b'{"devices": 5}'), "has no list of them"),
    "no objects": (_described(b'{"devices": [5]}'), "not well-formed"),
    "a device that is not there": (
        _BEGIN + EOF + description([device(field("a", 1))]),
        "is described that the stream does not have",
    ),
    "a field without end": (
        _BEGIN + devices((device(field("a", 1 << 60)), b"ab")),
        "has size 1152921504606846976",
    ),
    "a negative field": (_BEGIN + devices((device(field("a", -1)), b"ab")), "has size -1"),
    "another device": (
        _BEGIN + section(_FULL, 3, "gpu", b"a") + EOF + description([device(field("a", 1))]),
        "device 'gpu' is not the one that is described: 'cpu'",
    ),
    "a part without a name": (
        _BEGIN + devices((device(subsections=[{"fields": []}]), b"")),
        "has a part without a name",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_told(name: str):
    data, told = REFUSED[name]
    problem = problem_of(data)
    assert told in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    "fields",
    [
        [_nested(40)],
        [field("a", 1, 1 << 26)],
        [field("x", 1, kind="struct", struct=7)],
        [field("x", 2, kind="struct", struct={"fields": [field("y", 5)]})],
    ],
    ids=["nested", "array", "no struct", "larger than its struct"],
)
def test_a_description_that_lies_ends_in_an_error(fields: list[dict[str, Any]]):
    cpu = device(*fields)
    stream = parse(_BEGIN + devices((cpu, bytes(2))))
    if stream.problem is None:
        with pytest.raises(CorruptDumpError):
            _ = stream.find("cpu")[0].fields


@pytest.mark.parametrize(
    "fields",
    [
        [field("nothing", 0)] * 300,
        [field("x", 1, 150, "struct", struct={"fields": [field("nothing", 0)]})],
        [field("x", 1, 300, "struct", struct={})],
        [field("x", 1, 150, "struct", struct={"subsections": [{"vmsd_name": ""}]})],
    ],
    ids=["fields of no size", "in elements", "elements of nothing", "subsections of nothing"],
)
def test_what_a_description_makes_of_little_is_bounded(
    fields: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    data = bytes(sum(one["size"] * one.get("array_len", 1) for one in fields))
    hostile = _BEGIN + devices((device(*fields), data), (device(*fields), data))
    assert [one.fields.has_part("") for one in parse(hostile).devices] == [False, False]
    # All devices together, for there may be many.
    monkeypatch.setattr(migration, "_STEPS_MAX", 500)
    first, second = parse(hostile).devices
    assert not first.fields.has_part("")
    with pytest.raises(CorruptDumpError, match="the devices has too many fields"):
        _ = second.fields


def test_the_name_of_a_field_is_not_kept_for_each_element():
    inner = {"fields": [field("y" * 5000, 1)]}
    cpu = device(field("x", 1, 100, "struct", struct=inner))
    (found,) = parse(_BEGIN + devices((cpu, bytes(100)))).devices
    with pytest.raises(CorruptDumpError, match="a name of 5005 letters"):
        _ = found.fields


def test_names_are_printable():
    data = HEAD + configuration("a\x1b[31mb") + ram_start(_BLOCKS) + devices()
    assert parse(data).machine == "a\\u001b[31mb"


def test_a_stream_that_is_cut_keeps_what_came_before():
    whole = make_migration(_PAGE * 3)
    end = whole.index(footer(2), whole.index(_PAGE))
    for size in range(100, len(whole), 997):
        taken = Taken()
        try:
            stream = parse(whole[:size], taken)
        except CorruptDumpError:
            assert not taken.blocks
            continue
        assert stream.problem is not None or stream.undescribed
        assert len(taken.pages) == 3 or size <= end


def test_the_description_may_be_large_but_not_too_large():
    text = json.dumps({"devices": [], "more": "x" * (13 << 20)}).encode()
    assert "too large" in problem_of(_described(text))


def test_pages_of_all_blocks_are_told_apart():
    begin = HEAD + configuration("virt") + ram_start({"a": PAGE, "b": PAGE})
    taken = Taken()
    parse(begin + ram_pages("b", _PAGE) + ram_pages("a", _PAGE[::-1]) + devices(), taken)
    assert taken.pages == [(1, 0, _PAGE), (0, 0, _PAGE[::-1])]
