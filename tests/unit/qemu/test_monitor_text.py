from __future__ import annotations

from collections.abc import Callable

import pytest

from qemu_dump_ext.architectures._register_text import parse_named_values
from qemu_dump_ext.errors import MonitorAnswerError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.qemu.monitor_text import (
    parse_flat_view,
    parse_host_address,
    parse_physical_bytes,
    parse_physical_memory,
    parse_status,
    parse_vcpu_list,
    parse_version,
    split_vcpus,
)

_HVA = "Host virtual address for 0x0 (ram) is 0x"


def view(*ranges: str, spaces: str = ' AS "memory", root: system\n') -> str:
    return f"FlatView #3\n{spaces} Root memory region: system\n" + "".join(
        f"  {line}\n" for line in ranges
    )


def test_ranges_of_one_region_that_touch_become_one_block():
    #   c0000      ca000      cd000
    #     | rom: pc.ram | ram: pc.ram |        read-only or not does not matter
    text = view(
        "00000000000c0000-00000000000c9fff (prio 1, rom): pc.ram @00000000000c0000",
        "00000000000ca000-00000000000ccfff (prio 1, ram): pc.ram @00000000000ca000",
    )
    assert parse_flat_view(text) == [RamBlock(0xC0000, 0xD000, "pc.ram", 0xC0000)]


def test_ranges_that_touch_in_the_guest_but_not_in_the_region_stay_apart():
    text = view(
        "0000000000000000-0000000000000fff (prio 0, ram): a",
        "0000000000001000-0000000000001fff (prio 0, ram): b",
        "0000000000002000-0000000000002fff (prio 0, ram): b @0000000000009000",
    )
    assert [block.name for block in parse_flat_view(text)] == ["a", "b", "b"]


def test_only_ram_and_rom_are_dumped():
    text = view(
        "0000000000000000-0000000000000fff (prio 0, ram): r",
        "0000000000001000-0000000000001fff (prio 0, i/o): i",
        "0000000000002000-0000000000002fff (prio 0, romd): flash",
        "0000000000003000-0000000000003fff (prio 0, ramd): 0000:01:00.0 BAR 0 mmaps[0]",
        "0000000000004000-0000000000004fff (prio 0, container): c",
        "0000000000005000-0000000000005fff (prio -1, rom): bios",
    )
    assert [block.name for block in parse_flat_view(text)] == ["r", "bios"]


def test_the_name_of_the_accelerator_is_no_part_of_the_region():
    text = view("0000000000000000-0000000000000fff (prio 0, ram): pc.ram @0000000000002000 KVM KVM")
    assert parse_flat_view(text) == [RamBlock(0, 0x1000, "pc.ram", 0x2000)]


def test_the_view_is_found_by_its_address_space_not_by_its_number():
    smm = view(
        "0000000000000000-0000000000000fff (prio 0, ram): smram",
        spaces=' AS "cpu-smm-0", root: memory\n',
    )
    real = view(
        "0000000000000000-0000000000000fff (prio 0, ram): pc.ram",
        spaces=' AS "I/O", root: io\n AS "memory", root: system\n',
    )
    assert [block.name for block in parse_flat_view(smm + "\n" + real + "\n" + smm)] == ["pc.ram"]


def test_a_range_may_end_at_the_end_of_all_addresses():
    text = view("fffffffffffff000-ffffffffffffffff (prio 0, ram): top")
    assert parse_flat_view(text)[0].end == 1 << 64


def test_a_monitor_without_flat_views_is_an_error():
    with pytest.raises(MonitorAnswerError, match="unknown option"):
        parse_flat_view("info: unknown option -f\n")


def test_vcpus_are_split_by_their_number():
    text = "\nCPU#0\nRAX=01\n\nCPU#11\nRAX=02\n"
    texts = split_vcpus(text)
    assert {index: parse_named_values(body) for index, body in texts.items()} == {
        0: {"RAX": 1},
        11: {"RAX": 2},
    }


def test_names_and_values_may_have_blanks_between_them():
    assert parse_named_values("R8 =0f R9 = 10 [Z] CPL=0") == {"R8": 15, "R9": 16, "CPL": 0}


def test_version_status_and_bytes():
    assert parse_version("7.2.22Debian 1:7.2+dfsg-7") == (7, 2, 22)
    assert parse_status("VM status: paused (prelaunch)\n") == "prelaunch"
    assert parse_physical_bytes("0000000000001000: 0x01 0xff\n0000000000001002: 0x00\n") == (
        b"\x01\xff\x00"
    )
    for parse in (parse_version, parse_status):
        with pytest.raises(MonitorAnswerError):
            parse("unknown command: 'info'")


def test_a_window_to_flash_is_no_ram():
    """A read-only alias of flash is shown as `rom`, and QEMU does not dump it."""
    view = (
        "FlatView #0\n"
        ' AS "memory", root: system\n'
        " Root memory region: system\n"
        "  0000000000000000-00000000000bffff (prio 0, ram): pc.ram\n"
        "  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom\n"
        "  00000000000e0000-00000000000fffff (prio 0, rom): system.flash0 @00000000000e0000\n"
        "  0000000000100000-0000000003ffffff (prio 0, ram): pc.ram @0000000000100000\n"
        "  00000000fff00000-00000000ffffffff (prio 0, {kind}): system.flash0\n"
    )
    for kind in ("romd", "i/o"):
        blocks = parse_flat_view(view.replace("{kind}", kind))
        assert [block.name for block in blocks] == ["pc.ram", "pc.rom", "pc.ram"]


@pytest.mark.parametrize(
    "ranges",
    [
        ("0000000000000000-0000000000001fff", "0000000000001000-0000000000002fff"),
        ("0000000000001000-0000000000001fff", "0000000000000000-0000000000000fff"),
        ("0000000000001000-0000000000000fff",),
        ("0000000000001000-0000000000000000",),
        ("0000000000000000-0000000000000fff", "0000000000000000-0000000000000fff"),
        ("0000000000000000-ffffffffffffffff",),
        ("0000000000000000-000fffffffffffff", "8000000000000000-8000000000000000"),
    ],
)
def test_memory_that_cannot_be_is_refused(ranges: tuple[str, ...]):
    text = view(*(f"{place} (prio 0, ram): ram" for place in ranges))
    with pytest.raises(MonitorAnswerError, match="impossible"):
        parse_flat_view(text)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_version, "9" * 5000 + ".1.1"),
        (parse_version, "7.2.65536"),
        (lambda text: parse_host_address(text, 0), _HVA + "f" * 5000),
        (lambda text: parse_host_address(text, 0), _HVA + "8000000000000000"),
        (split_vcpus, f"CPU#{'9' * 5000}\nRAX=0"),
        (split_vcpus, "CPU#65536\nRAX=0"),
        (split_vcpus, "CPU#0\nRAX=" + "f" * 5000),
        (parse_vcpu_list, f"* CPU #{'9' * 5000}: thread_id=1"),
        (parse_vcpu_list, "* CPU #4294967296: thread_id=1"),
        (parse_physical_bytes, "0000000000001000: 0x100"),
        (parse_physical_bytes, "0000000000001000: 0x" + "f" * 5000),
        (parse_physical_bytes, "0000000000001000: 0x1g"),
        (parse_physical_bytes, "0000000000001000: -1"),
        (lambda text: parse_physical_memory(text, 32), "00001000: 0x100000000"),
    ],
)
def test_numbers_that_cannot_be_are_one_error(parse: Callable[[str], object], text: str):
    with pytest.raises(MonitorAnswerError) as caught:
        parse(text)
    assert len(str(caught.value)) < 300
