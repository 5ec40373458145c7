"""Dump levels of memory of all kinds, with kernels of several years.

What makedumpfile leaves out of a whole dump is left out, and what the guest's own kernel says of
its pages (/proc/kpageflags) agrees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.linux.page_filter import FilterRules
from tests.support.doors import run_cli
from tests.support.folders import folder_for
from tests.support.foreign_makedumpfile import (
    NEWER,
    foreign_makedumpfile,
    make_known_to_released_ones,
)
from tests.support.mixed_guests import MixedGuest, mixed_guest
from tests.support.page_flags import Pages
from tests.support.pages_of_dumps import bitmaps_by_makedumpfile

pytestmark = pytest.mark.guest

_PAGE = 4096
_ENDED_SINCE = 500
"""Pages: those of what printed the flags, which has ended since."""
_SUITES: Mapping[str, str | None] = {"6.1": None, "6.12": "trixie", "7": "sid"}
_BY_RELEASED_ONES = re.compile(rb"OFFSET\(page.compound_head\)")
# What a guest says of itself, and how much of it there must be: KiB, pages.
_KINDS = {"pages_sharing": 1, "SwapCached": 4, "AnonHugePages": 2048, "HugePages_Total": 8}
_NEWER_KINDS = {"HardwareCorrupted": 4, "ShmemHugePages": 2048}


@dataclass(frozen=True)
class Case:
    """A guest and its whole dump."""

    guest: MixedGuest
    whole: Path
    stored: StoredGuest

    def left_out(self, level: int, *, exact: bool) -> Pages:
        """Return the pages that our dump leaves out."""
        pages = self.stored.kernel_pages(self.stored.find_vmcoreinfo(None))
        out = np.zeros(self.guest.flags.count, bool)
        for first, end in pages.excluded(FilterRules(level, exact)).ranges:
            out[first:end] = True
        return out


@pytest.fixture(scope="module", params=_SUITES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    folder = folder_for(request, "mixed")
    whole = folder / "whole"
    with mixed_guest(_SUITES[request.param], folder) as guest:
        done = run_cli("--qmp", guest.machine.qmp_sockets[0], whole)
        assert done.returncode == 0, done.stderr
        with open_dump(whole) as dump:
            yield Case(guest, whole, StoredGuest(dump))
    whole.unlink()


def test_the_guest_has_pages_of_all_kinds(case: Case):
    kinds = _KINDS if "6.1.0" in case.guest.machine.files.release else _KINDS | _NEWER_KINDS
    for name, least in kinds.items():
        found = re.findall(rf"{name}: *(\d+)", case.guest.told)
        assert found, name
        assert int(found[-1]) >= least, name
    assert "/state:offline" in case.guest.told


@pytest.mark.parametrize("level", [2, 8, 16, 31])
def test_what_is_left_out_is_what_the_kernel_says_of_its_pages(case: Case, level: int):
    flags = case.guest.flags
    told = flags.left_out(level) & flags.there()
    ours = case.left_out(level, exact=True) & flags.there()
    assert told.sum() > 10 * _ENDED_SINCE
    # What has ended since is free since; nothing else can have become one to be left out.
    assert (ours & ~told).sum() < (_ENDED_SINCE if level & 16 else 30)
    assert (told & ~ours).sum() < _ENDED_SINCE
    safe = case.left_out(level, exact=False) & flags.there()
    assert not (safe & ~ours).any()
    assert safe.sum() > 0.8 * ours.sum()


def _kept_by_makedumpfile(case: Case, level: int) -> Pages:
    makedumpfile = foreign_makedumpfile("x86_64", NEWER)
    covered, kept = bitmaps_by_makedumpfile(makedumpfile, case.whole, level)
    pages = np.zeros(case.guest.flags.count, bool)
    # It leaves out what lies behind the last section of memory, a ROM, at every level.
    pages[[page for page in kept if page < len(pages)]] = True
    assert max(covered) < len(pages)
    return pages


def test_the_newest_kernel_is_newer_than_any_makedumpfile(case: Case):
    """It loses pages of which that kernel says that they are its own, and of no other one."""
    with case.whole.open("rb") as file:
        is_newer = _BY_RELEASED_ONES.search(file.read(1 << 20)) is None
    kept = _kept_by_makedumpfile(case, 8)
    lost = ~kept & ~case.left_out(8, exact=True) & case.guest.flags.there()
    assert (lost.sum() > 100) == is_newer
    assert not (lost & case.guest.flags.left_out(8)).any()


def test_what_is_left_out_is_what_makedumpfile_leaves_out(case: Case):
    make_known_to_released_ones(case.whole)
    for level in range(32):
        kept = _kept_by_makedumpfile(case, level)
        differs = kept == case.left_out(level, exact=True)
        assert not differs.any(), (level, np.flatnonzero(differs)[:10])
