"""How large dumps of a guest will be, by what they leave out, before anything is written."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate

from qemu_dump_ext.dump_formats import DumpFormat, find_dump_format
from qemu_dump_ext.engine.guest_view import GuestView, Vmcoreinfo
from qemu_dump_ext.engine.stopped_guest import import_plug_ins, stopped_guest
from qemu_dump_ext.errors import DumpTooLargeError, GuestMemoryFaultError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.linux.page_filter import FilterRules
from qemu_dump_ext.pages.page_packing import Compression, pack_pages
from qemu_dump_ext.pages.page_set import PageSet
from qemu_dump_ext.pages.zero_pages import numpy_or_none
from qemu_dump_ext.plan.request import DUMP_LEVEL_MAX, ZERO, DumpRequest
from qemu_dump_ext.third_party import import_package
from qemu_dump_ext.value import Value

CACHE, USER, FREE = 2, 8, 16
LEVELS = (ZERO | FREE, ZERO | FREE | CACHE, DUMP_LEVEL_MAX)
"""Of dumps of ever less: first goes what is least likely to be looked for."""
_LEFT_OUT = ("free pages", "page cache", "programs")
_STRETCHES, _STRETCH = 128, 8
"""Of each class of pages, so many samples of so many pages are packed."""
_DESCRIPTOR_SIZE = 24
_HEADERS_SIZE = 1 << 14
_MARGIN = 1.1
"""What is taken for too small by the samples must not be written in vain."""


class PageClass(Value):
    """Pages that a dump has, or leaves out, together.

    Attributes:
        name: What they are.
        pages: How many.
        zero_pages: About how many of them are zeros.
        stored_bytes: About what they take in a dump.
    """

    name: str
    pages: int
    zero_pages: int
    stored_bytes: int


class SizeOfDump(Value):
    """One dump that could be taken.

    Attributes:
        words: What asks for it.
        level: The dump level.
        pages: That are in it.
        memory_bytes: Of guest memory in it.
        file_bytes: About how large it is.
    """

    words: str
    level: int
    pages: int
    memory_bytes: int
    file_bytes: int


class Estimate(Value):
    """What dumps of a guest will take.

    Attributes:
        format: Name of the format.
        page_size: In bytes.
        classes: All pages of the guest, each in one class.
        dumps: Those that could be taken, the largest first.
        remarks: What else there is to know.
    """

    format: str
    page_size: int
    classes: Sequence[PageClass]
    dumps: Sequence[SizeOfDump]
    remarks: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Say it in words."""
        lines = [f"{'pages':>12} {'about zeros':>12} {'in the file':>12}  what they are"]
        lines += [
            f"{one.pages:12} {one.zero_pages:12} {_mib(one.stored_bytes):>12}  {one.name}"
            for one in self.classes
        ]
        lines += ["", f"{'pages':>12} {'of memory':>12} {'in the file':>12}  {self.format} by"]
        lines += [
            f"{one.pages:12} {_mib(one.memory_bytes):>12} {_mib(one.file_bytes):>12}  {one.words}"
            for one in self.dumps
        ]
        return lines

    def to_json(self) -> str:
        """Say it to a machine: one line; keys are the attributes."""
        return json.dumps(asdict(self))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def estimate_running(
    access: GuestAccess, request: DumpRequest, memory: str, *, kernel: str | None
) -> Estimate:
    """Tell the same of a guest that is reached, and stands still meanwhile.

    Args:
        access: The ways to the guest.
        request: As of `estimate`.
        memory: Name of the memory source, or `auto`.
        kernel: Which kernel's pages, by its release, where memory has several.

    Raises:
        SourceError: It cannot be reached, or its pages cannot be told apart.
        MissingPackageError: A package is missing.
    """
    numpy_or_none()
    import_package("numpy", "to tell pages apart")
    import_plug_ins(access, "linux.kernel_pages")  # while the guest still runs
    with stopped_guest(access, memory) as guest:
        return estimate(guest, guest.find_vmcoreinfo(kernel), request)


class _Step(Value):
    # One dump, and what it leaves out beside what the one before left out.
    words: str
    left_out: str
    rules: FilterRules


def estimate(
    guest: GuestView, vmcoreinfo: Vmcoreinfo, request: DumpRequest, *, mini: bool = True
) -> Estimate:
    """Tell what dumps of a guest will take, by samples of its memory.

    Args:
        guest: Does not change meanwhile.
        vmcoreinfo: Its kernel's.
        request: Of what format; the dump level that is left out in any case.
        mini: Look at mini dumps, too.

    Raises:
        SourceError: Its pages cannot be told apart.
        MissingPackageError: A package is missing.
    """
    pages = guest.kernel_pages(vmcoreinfo)
    left_out: list[tuple[_Step, PageSet]] = [
        (step, pages.excluded(step.rules)) for step in _steps(request, mini=mini)
    ]
    page_size = left_out[0][1].page_size
    whole = PageSet.touched_by(page_size, ((block.gpa, block.end) for block in guest.ram_blocks))
    sampler = _Sampler(guest, find_dump_format(request.format), request, page_size)
    left, classes = whole, []
    for step, excluded in left_out:
        behind = left.without(excluded)
        classes.append(sampler.look_at(step.left_out, left.without(behind)))
        left = behind
    rest = sampler.look_at("what stays", left)
    fixed = _HEADERS_SIZE + 2 * (guest.ram_blocks[-1].end // page_size) // 8
    dumps = []
    kept = [rest]
    for (step, _), one in zip(reversed(left_out), reversed(classes), strict=True):
        dumps.append(_size_of(step, kept, page_size, fixed))
        kept.append(one)
    return Estimate(
        request.format,
        page_size,
        [one for one in [*classes, rest] if one.pages],
        dumps[::-1],
        pages.remarks,
    )


def _size_of(step: _Step, kept: Sequence[PageClass], page_size: int, fixed: int) -> SizeOfDump:
    pages = sum(one.pages for one in kept)
    stored = sum(one.stored_bytes for one in kept)
    return SizeOfDump(step.words, step.rules.level, pages, pages * page_size, stored + fixed)


def _steps(request: DumpRequest, *, mini: bool) -> Iterator[_Step]:
    base = request.dump_level
    yield _Step(f"--dump-level {base}", f"left out by level {base}", _rules(base, request))
    last = base
    for level, name in zip(LEVELS, _LEFT_OUT, strict=True):
        if level | base != last:
            last = level | base
            yield _Step(f"--dump-level {last}", name, _rules(last, request))
    if mini:
        without = FilterRules(DUMP_LEVEL_MAX, without_struct_pages=True)
        yield _Step("--mini", "struct pages of those pages", without)
        without = FilterRules(DUMP_LEVEL_MAX, without_struct_pages=True, without_text=True)
        yield _Step("--mini=smallest", "the kernel's code", without)


def _rules(level: int, request: DumpRequest) -> FilterRules:
    return FilterRules(level, request.exact)


class _Sampler:
    def __init__(
        self, guest: GuestView, dump_format: DumpFormat, request: DumpRequest, page_size: int
    ) -> None:
        self._guest = guest
        self._page_size = page_size
        self._compress = None
        if dump_format.codec is not None:
            compression = Compression(dump_format.codec, request.exact, request.level)
            self._compress = compression.compressor()

    def look_at(self, name: str, pages: PageSet) -> PageClass:
        seen = zeros = stored = 0
        for gpa, count in _stretches(pages):
            try:
                content = bytearray(self._guest.read(gpa, count * self._page_size))
            except GuestMemoryFaultError:
                continue
            seen += count
            zeros += sum(
                not any(content[start : start + self._page_size])
                for start in range(0, len(content), self._page_size)
            )
            stored += self._stored(content)
        share = pages.page_count / max(seen, 1)
        return PageClass(name, pages.page_count, round(zeros * share), round(stored * share))

    def _stored(self, content: bytearray) -> int:
        if self._compress is None:
            return len(content)
        sizes = pack_pages(memoryview(content), self._page_size, self._compress)
        return sum(sizes) + _DESCRIPTOR_SIZE * len(sizes)


def _stretches(pages: PageSet) -> Iterator[tuple[int, int]]:
    """Yield gpa and number of pages of samples from all over a set."""
    ends = list(accumulate(end - first for first, end in pages.ranges))
    if not ends:
        return
    count = min(_STRETCHES, -(-ends[-1] // _STRETCH))
    for number in range(count):
        position = (2 * number + 1) * ends[-1] // (2 * count)
        index = bisect_right(ends, position)
        end = pages.ranges[index][1]
        first = end - (ends[index] - position)
        yield first * pages.page_size, min(_STRETCH, end - first)


def level_that_fits(guest: GuestView, vmcoreinfo: Vmcoreinfo, request: DumpRequest) -> SizeOfDump:
    """Return the lowest dump level of which a dump takes no more than it may.

    Args:
        guest: Does not change meanwhile.
        vmcoreinfo: Its kernel's.
        request: With `max_bytes`; the dump level that is left out in any case.

    Raises:
        DumpTooLargeError: There is none.
        SourceError: Its pages cannot be told apart.
        MissingPackageError: A package is missing.
    """
    most = request.max_bytes or 0
    dumps = estimate(guest, vmcoreinfo, request, mini=False).dumps
    for one in dumps:
        if one.file_bytes * _MARGIN <= most:
            return one
    raise DumpTooLargeError(
        f"the dump would take about {_mib(dumps[-1].file_bytes)} even at level"
        f" {dumps[-1].level}: more than {_mib(most)}",
        hint="--mini takes less",
    )
