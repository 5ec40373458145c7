from __future__ import annotations

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.architectures._declaration import VcpuReadings
from qemu_dump_ext.guest_probe import merge_readings

S390X = all_architectures()["s390x"]
MERGED, STALE = 0x0704E001 << 32, 0x0704C001 << 32


def merged(**sources: dict[str, int]) -> tuple[int | None, int | None]:
    empty: dict[str, int] = {}
    values = merge_readings(
        S390X,
        VcpuReadings(
            gdb=sources.get("gdb", empty),
            monitor=sources.get("monitor", empty),
            native=sources.get("native", empty),
            hardware_segments=False,
        ),
    )
    return values.get("psw_mask"), values.get("psw_mask_as_stored")


def test_the_stub_has_the_condition_code_and_qemus_note_what_is_stored():
    stub, native = {"psw_mask": MERGED}, {"psw_mask": STALE}
    assert merged(gdb=stub, native=native) == (MERGED, STALE)
    assert merged(monitor=stub, native={"psw_mask_as_stored": STALE}) == (MERGED, STALE)


def test_what_one_source_does_not_tell_the_other_does():
    assert merged(native={"psw_mask": STALE}) == (STALE, STALE)
    assert merged(gdb={"psw_mask": MERGED}) == (MERGED, MERGED)
    assert merged() == (None, None)
