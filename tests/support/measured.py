"""Run a program, and tell what it took.

Of the memory of a program, wait4() tells at least what the process had that started it. So a small
one stands between, which starts nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_BETWEEN = """
import json, os, sys, time
told = int(sys.argv[1])
os.set_inheritable(told, False)
started = time.perf_counter()
program = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(program, 0)
seconds = time.perf_counter() - started
cost = seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10
os.write(told, json.dumps(cost).encode())
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


@dataclass(frozen=True)
class Cost:
    """What a program took.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Of the program, and of those that it started and waited for.
        peak_rss: The most memory that one of them had, in bytes.
        status: With which the program ended.
    """

    seconds: float
    cpu_seconds: float
    peak_rss: int
    status: int


def run_measured(argv: Sequence[object], **options: Any) -> Cost:
    """Run a program to its end.

    Args:
        argv: Its command line.
        options: Of `subprocess.run`.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as told:
        words = [sys.executable, "-I", "-S", "-c", _BETWEEN, str(writer), *map(str, argv)]
        try:
            done = subprocess.run(words, check=False, pass_fds=(writer,), **options)
        finally:
            os.close(writer)
        seconds, cpu_seconds, peak_rss = json.loads(told.read())
    return Cost(seconds, cpu_seconds, peak_rss, done.returncode)
