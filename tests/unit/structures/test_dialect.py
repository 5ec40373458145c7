from __future__ import annotations

import pytest

from qemu_dump_ext.structures.dialect import MENDED, qemu_dialect


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((2, 0, 0), (False, False, "never", "target")),
        ((3, 1, 0), (False, False, "always", "target")),
        ((7, 1, 0), (False, True, "always", "target")),
        ((7, 2, 22), (True, True, "always", "target")),
        ((11, 1, 3), (True, True, "always", "unknown")),
    ],
)
def test_each_version_of_qemu_spells_its_dumps_in_its_way(
    version: tuple[int, int, int], expected: tuple[bool, bool, str, str]
):
    dialect = qemu_dialect(version)
    assert expected == (
        dialect.sections_first,
        dialect.vaddr_is_paddr,
        dialect.kernel_gs_base,
        dialect.utsname,
    )


def test_the_default_has_none_of_qemus_defects():
    assert not MENDED.sections_first
    assert not MENDED.phys_base_is_hex
    assert not MENDED.first_vcpu_decides
    assert MENDED.vaddr_is_paddr
    assert MENDED.utsname == "facts"
