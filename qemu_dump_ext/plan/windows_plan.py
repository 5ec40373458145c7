"""Decide what goes into a Windows dump. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.architectures import Core
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.plan.plan import DumpPlan
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.utsname import UtsName
from qemu_dump_ext.structures.win_dmp import PAGE_SIZE, PageRun, WindowsDump


def make_windows_plan(
    core: Core,
    ram_blocks: Sequence[RamBlock],
    covered_blocks: Sequence[RamBlock],
    windows: WindowsDump,
    *,
    dialect: Dialect,
    request: DumpRequest,
) -> DumpPlan:
    """Turn what is known of a guest into the contents of a Windows dump.

    Args:
        core: Form of the guest's other dumps.
        ram_blocks: What can be read of the guest, by ascending gpa.
        covered_blocks: What memory it has, likewise.
        windows: What its kernel, or a driver in it, tells.
        dialect: How the dump is spelt.
        request: What was asked for.

    Raises:
        RequestError: Its physical memory runs are not those of this guest.
    """
    runs = windows.runs
    _check_runs(runs, covered_blocks, dialect)
    blocks, covered = (tuple(blocks_in_runs(some, runs)) for some in (ram_blocks, covered_blocks))
    doubts = list(windows.doubts)
    if beside := sum(run.size for run in runs) - sum(block.size for block in covered):
        doubts.append(
            f"the header lists {beside / (1 << 20):.1f} MiB that are no guest memory, or are listed"
            " before: what is no memory is zero in the dump"
        )
    remarks = windows.remarks
    if request.omit_zero:
        remarks += ("pages of zeros are not in the dump: readers find no memory there",)
    return DumpPlan(
        core=core,
        dialect=dialect,
        ram_blocks=blocks,
        covered_blocks=covered,
        segments=(),
        notes=b"",
        vmcoreinfo_span=None,
        vcpu_count=0,
        page_size=PAGE_SIZE,
        phys_base=0,
        utsname=UtsName(),
        missing=windows.missing,
        remarks=remarks,
        doubts=tuple(doubts),
        windows=windows,
    )


def blocks_in_runs(blocks: Sequence[RamBlock], runs: Sequence[PageRun]) -> list[RamBlock]:
    """Return what of RAM blocks lies in runs of pages, each byte once, by ascending gpa."""
    merged: list[tuple[int, int]] = []
    for run in sorted(runs, key=lambda one: one.gpa):
        if merged and run.gpa <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], run.gpa + run.size)
        else:
            merged.append((run.gpa, run.gpa + run.size))
    return [
        block.part(max(block.gpa, low), min(block.end, high))
        for block in blocks
        for low, high in merged
        if max(block.gpa, low) < min(block.end, high)
    ]


def _check_runs(runs: Sequence[PageRun], blocks: Sequence[RamBlock], dialect: Dialect) -> None:
    """Refuse what no guest lists of its memory, in QEMU's words."""
    memory_end = -(-blocks[-1].end // PAGE_SIZE) * PAGE_SIZE
    left, position = memory_end, 0
    for run in runs:
        left -= run.size
        end = run.gpa + run.size
        if left < 0 or end > memory_end:
            raise RequestError(
                f"win-dump: failed to map physical range 0x{run.gpa:016x}-0x{end - 1:016x}",
                hint=f"guest memory ends at {blocks[-1].end - 1:#x}",
            )
        if run.size and run.gpa < position and not dialect.windows_as_qemu:
            raise RequestError(
                f"win-dump: invalid header: its physical memory runs do not ascend at {run.gpa:#x}"
            )
        position = max(position, end)
