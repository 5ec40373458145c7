"""A script for drgn: the functions of the thread that crashed, or else of those on the vCPUs.

Started by `crash_readers.trace_by_drgn` in a process of its own: what it reads, a guest made.
"""

from __future__ import annotations

import json
import sys
from itertools import islice

import drgn
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.sched import cpu_curr

_THREADS_MAX = 64
_FRAMES_MAX = 64


def _threads(program: drgn.Program) -> list[drgn.Object]:
    try:
        return [program.crashed_thread().object]
    except LookupError:  # none did
        cpus = islice(for_each_online_cpu(program), _THREADS_MAX)
        running = [cpu_curr(program, cpu) for cpu in cpus]
        return [thread for thread in running if thread.pid]  # who waits for work tells nothing


def _functions(program: drgn.Program, thread: drgn.Object) -> list[str]:
    found: list[str] = []
    for frame in islice(program.stack_trace(thread), _FRAMES_MAX):
        try:
            symbol = frame.symbol().name
        except LookupError:  # behind the kernel is its process
            break
        if frame.interrupted:  # what interrupted it is not where it was
            found.clear()
        found.append(frame.name or symbol)
    return found


def _main(program: drgn.Program) -> None:
    names = [name for thread in _threads(program) for name in _functions(program, thread)]
    sys.stdout.write(f"TRACE {json.dumps(names)}\n")


_main(drgn.get_default_prog())
