"""What verifying a dump finds, and the threads that do it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from qemu_dump_ext.host_limits import Job, WorkerThreads

PROBLEMS_KEPT = 20

Progress: TypeAlias = Callable[[int, int], None]
"""Called with bytes of guest memory done and in all."""
JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


@dataclass
class VerifyReport:
    """What was found.

    Attributes:
        problems: The first `PROBLEMS_KEPT`, one line each.
        problem_count: Of all.
        remarks: What is odd and does no harm.
        memory_bytes: Of guest memory in the file that was looked at.
        counts_pages: The format stores page by page, so that they are counted.
        zero_pages: Pages that share the page of zeroes.
        raw_pages: Pages stored as they are.
        packed_pages: Other pages that unpacked well.
    """

    problems: list[str] = field(default_factory=list)
    problem_count: int = 0
    remarks: list[str] = field(default_factory=list)
    memory_bytes: int = 0
    counts_pages: bool = False
    zero_pages: int = 0
    raw_pages: int = 0
    packed_pages: int = 0

    def add_problem(self, text: object) -> None:
        """Count a problem, and keep its text if there is room."""
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(str(text))

    def expect(self, condition: object, text: str) -> None:
        """Add the problem `text` unless `condition` holds."""
        if not condition:
            self.add_problem(text)


class OrderedPool:
    """Threads whose results come in the order of the jobs, few of them under way at a time."""

    def __init__(self, threads: WorkerThreads, window: int) -> None:
        self._threads = threads
        self._window = window

    def map(self, work: Callable[[JobT], ResultT], jobs: Iterable[JobT]) -> Iterator[ResultT]:
        """Yield `work(job)` for each job."""
        pending: deque[Job[ResultT]] = deque()
        try:
            for job in jobs:
                pending.append(self._threads.submit(work, job))
                if len(pending) >= self._window:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for given in pending:
                given.give_up()
