"""What the host refuses: threads, and memory for them; which memory it is asked for."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_dump_ext.host_limits import Job, WorkerThreads, private_memory

_HARDLY_ANY = """
import resource, threading
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.host_limits import (
    WorkerThreads, require_room, start_needed_thread, start_thread,
)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (MIB << 20), resource.RLIM_INFINITY))
def has_room():
    try:
        require_room()
    except SourceError:
        return False
    return True
def is_started():
    try:
        start_needed_thread(threading.Thread(target=int, daemon=True), SourceError)
    except SourceError as error:
        assert "cannot start a thread: the host allows no more" in str(error), error
        return False
    return True
with WorkerThreads(2, "worker") as workers:
    result = workers.submit(lambda: threading.current_thread() is threading.main_thread()).result()
print(has_room(), start_thread(threading.Thread(target=int)), is_started(), result)
"""


@pytest.mark.parametrize(
    ("mib", "says"),
    [
        (9, "False False False True"),
        (36, "True False False True"),
        (400, "True True True False"),
    ],
)
def test_a_thread_begins_where_it_has_memory(mib: int, says: str):
    """Python waits for ever for one that has none."""
    script = _HARDLY_ANY.replace("MIB", str(mib))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == says.split()


def test_a_job_has_a_result_whatever_is_raised():
    def work() -> None:
        raise MemoryError

    with WorkerThreads(1, "worker") as workers, pytest.raises(MemoryError):
        workers.submit(work).result()


def test_a_job_that_was_given_up_is_not_begun():
    done = []
    job = Job(lambda: done.append(1))
    job.give_up()
    job.run()
    assert not done
    assert not job.is_done()


def test_private_memory_asks_for_large_pages():
    view = private_memory(4 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", _mappings(), flags=re.MULTILINE)[1:]:
        start, end = (int(part, 16) for part in mapping.split()[0].split("-"))
        if start <= address < end:
            assert mapping.split()[1] == "rw-p"
            assert " hg" in mapping.partition("VmFlags:")[2]
            return
    pytest.fail("the memory is nowhere")


def _mappings() -> str:
    text = Path("/proc/self/smaps").read_text("utf-8")
    if not Path("/sys/kernel/mm/transparent_hugepage").exists() or "VmFlags" not in text:
        pytest.skip("this kernel has no large pages, or does not tell")
    return text
