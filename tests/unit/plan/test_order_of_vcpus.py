from __future__ import annotations

import pytest

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.plan.plan import DumpPlan, GuestSnapshot, make_plan
from qemu_dump_ext.structures.dialect import MENDED, Dialect, qemu_dialect
from qemu_dump_ext.structures.elf_notes import whole_notes
from qemu_dump_ext.structures.utsname import UtsName

_KERNEL_HALF = 0xFFFF888000000000
_QEMU = qemu_dialect((7, 2, 0))


def _plan(vcpus: dict[int, dict[str, int]], dialect: Dialect, name: str = "x86_64") -> DumpPlan:
    """Return the plan for vCPUs in the order in which QEMU made them."""
    snapshot = GuestSnapshot(
        all_architectures()[name],
        (RamBlock(0, 0x1000, "ram", 0),),
        tuple(Vcpu(index, registers) for index, registers in vcpus.items()),
        b"",
        UtsName(),
    )
    return make_plan(snapshot, dialect)


def _pids(plan: DumpPlan) -> list[int]:
    return [
        int.from_bytes(note.descriptor[32:36], plan.core.byte_order)
        for note in whole_notes(plan.notes, plan.core.byte_order)
        if note.type == 1
    ]


def _in_the_kernel(*indexes: int, order: tuple[int, ...] = ()) -> dict[int, dict[str, int]]:
    """Return vCPUs of which the kernel counts those in `order` so."""
    places = {index: place for place, index in enumerate(order or indexes)}
    # In user mode, the bases of kernel and process have changed places.
    names = ("gs_base", "kernel_gs_base")
    return {
        index: {
            "efer": 0x500,
            names[index % 2]: _KERNEL_HALF + (places[index] << 18),
            names[1 - index % 2]: 0x7F0000000000 - index,
        }
        for index in indexes
    }


@pytest.mark.parametrize("order", [(0, 3, 1), (0, 1, 3), (3, 0, 1)])
def test_notes_are_in_the_order_in_which_the_kernel_counts(order: tuple[int, ...]):
    vcpus = _in_the_kernel(0, 3, 1, order=order)
    plan = _plan(vcpus, MENDED)
    assert _pids(plan) == [index + 1 for index in order]
    assert f"the kernel counts them {', '.join(map(str, order))}" in plan.remarks[0]
    assert _pids(_plan(vcpus, _QEMU)) == [1, 4, 2]


def test_vcpus_that_were_made_in_their_order_stay_in_it():
    # With several NUMA nodes, the data of a CPU may be anywhere.
    plan = _plan(_in_the_kernel(0, 1, 2, order=(2, 1, 0)), MENDED)
    assert _pids(plan) == [1, 2, 3]
    assert not plan.remarks


@pytest.mark.parametrize("name", ["x86_64", "s390x"])
def test_where_the_order_of_the_kernel_is_not_known_it_is_said(name: str):
    plan = _plan({0: {"efer": 0x500}, 3: {}, 1: {}}, MENDED, name)
    assert _pids(plan) == [1, 4, 2]
    assert "plugged in the order 0, 3, 1, and so are the notes" in plan.remarks[0]
