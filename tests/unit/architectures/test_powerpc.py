"""What the gdbstub of QEMU 11 says of PowerPC under wrong numbers."""

from __future__ import annotations

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.architectures._declaration import VcpuReadings
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.plan.plan import GuestSnapshot, make_plan
from qemu_dump_ext.registers.merge import merge_readings
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.utsname import UtsName

_ARCHITECTURE = all_architectures()["ppc64"]
_DESCRIBED = [f"vr{index}" for index in range(32)] + ["vscr", "vrsave"]
_DESCRIBED += [f"vs{index}h" for index in range(32)]


def _size(name: str) -> int:
    return 4 if name in {"vscr", "vrsave"} else 8 if name.startswith("vs") else 16


def _value(name: str) -> bytes:
    return name.encode().rjust(_size(name))


def test_each_answer_is_that_of_the_register_behind_it():
    behind = [*_DESCRIBED[1:], "xer"]
    sent = dict(zip(_DESCRIBED, map(_value, behind), strict=True)) | {"msr": bytes(8)}
    assert _ARCHITECTURE.correct_stub is not None
    corrected = _ARCHITECTURE.correct_stub(sent)
    expected = {name: _value(name) for name in _DESCRIBED if name != "vr0"}
    assert corrected == expected | {"msr": bytes(8)}


def test_a_processor_without_vsx_has_none_afterwards():
    described = _DESCRIBED[: _DESCRIBED.index("vs0h")]
    sent = dict(zip(described, map(_value, [*described[1:], "xer"]), strict=True))
    assert _ARCHITECTURE.correct_stub is not None
    assert "vs0h" not in _ARCHITECTURE.correct_stub(sent)


def test_what_is_sent_under_its_own_number_stays():
    sent = {name: _value(name) for name in _DESCRIBED}
    assert _ARCHITECTURE.correct_stub is not None
    assert _ARCHITECTURE.correct_stub(sent) == sent


def test_the_register_that_the_stub_hides_is_missing_and_not_zero():
    names = {register.name for register in _ARCHITECTURE.registers} - {"vr0"}
    readings = VcpuReadings(dict.fromkeys(names, 1), {}, {}, hardware_segments=False)
    vcpu = Vcpu(0, merge_readings(_ARCHITECTURE, readings))
    snapshot = GuestSnapshot(_ARCHITECTURE, [RamBlock(0, 4096, "ram", 0)], [vcpu], b"", UtsName())
    assert make_plan(snapshot, MENDED).missing == {("LINUX", 0): ["vr0"]}
