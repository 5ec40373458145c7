"""Readers answer from dumps of level 31 and from mini dumps as from the whole one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import drgn
import pytest
from drgn.helpers.linux.fs import for_each_mount, mount_dst
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.printk import get_dmesg
from drgn.helpers.linux.slab import for_each_slab_cache

from qemu_dump_ext.guest_images.machine import BootedGuest
from tests.support.crash_reader import ask_crash
from tests.support.doors import run_cli
from tests.support.folders import folder_for

pytestmark = pytest.mark.guest

_DUMPS: Mapping[str, tuple[str, ...]] = {
    "whole": ("-z", "-R"),
    "level-31": ("-z", "-R", "--dump-level", "31!"),
    "mini": ("-R", "--mini", "--dump-level", "31!"),
    "smallest": ("-R", "--mini=smallest", "--dump-level", "31!"),
}
_SMALLER = tuple(_DUMPS)[1:]
_CRASH_COMMANDS = "sys\nlog\nbt -a\nps\nmod\nnet\nirq\ndev\nrunq\n"
DumpOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def dump_of(paused_linux: BootedGuest, request: pytest.FixtureRequest) -> DumpOf:
    """Takes each dump once."""
    directory = folder_for(request, "dumps")

    @cache
    def take(name: str) -> Path:
        path = directory / name
        done = run_cli("--qmp", paused_linux.qmp_sockets[0], *_DUMPS[name], path)
        assert done.returncode == 0, done.stderr
        needs = "crash opens it with --zero_excluded only" in done.stdout + done.stderr
        assert needs == (name == "smallest")
        return path

    return take


def _answers_of_drgn(dump: Path, vmlinux: Path) -> dict[str, object]:
    program = drgn.Program()
    program.set_core_dump(dump)
    program.load_debug_info([vmlinux])
    tasks = {task.pid.value_(): task for task in for_each_task(program)}
    modules = list_for_each_entry("struct module", program["modules"].address_of_(), "list")
    return {
        "log": get_dmesg(program),
        "tasks": {pid: task.comm.string_() for pid, task in tasks.items()},
        "stacks": {pid: _kernel_frames(program, task) for pid, task in tasks.items()},
        "modules": [module.name.string_() for module in modules],
        "mounts": [mount_dst(mount) for mount in for_each_mount(program)],
        "slab caches": sorted(
            (cache.name.string_(), int(cache.object_size)) for cache in for_each_slab_cache(program)
        ),
    }


def _kernel_frames(program: drgn.Program, task: drgn.Object) -> list[str]:
    if not task.stack:  # it has ended, and nobody has asked for its status yet
        return []
    # Frames of programs lie on pages of theirs, which are gone.
    names = [str(frame.name) for frame in program.stack_trace(task) if frame.pc >> 63]
    return [name for name in names if name != "None"]


@pytest.fixture(scope="module")
def answers_from_the_whole(dump_of: DumpOf, vmlinux: Path) -> dict[str, object]:
    """What drgn says of everything."""
    return _answers_of_drgn(dump_of("whole"), vmlinux)


@pytest.mark.parametrize("name", _SMALLER)
def test_drgn_answers_as_from_the_whole_dump(
    dump_of: DumpOf, vmlinux: Path, answers_from_the_whole: dict[str, object], name: str
):
    answers = _answers_of_drgn(dump_of(name), vmlinux)
    assert all(answers.values())
    assert answers == answers_from_the_whole


@pytest.fixture(scope="module")
def crash_on_the_whole(dump_of: DumpOf, vmlinux: Path) -> list[str]:
    """What crash says of everything."""
    return _lines_of_crash(vmlinux, dump_of("whole"))


def _lines_of_crash(*words: str | Path) -> list[str]:
    done = ask_crash(_CRASH_COMMANDS, *words)
    assert done.returncode == 0, done.stderr
    # The name of the dump, and that it is a partial one; a warning without the kernel's code.
    others = re.compile(r"DUMPFILE:|^crash: cannot determine thread return address$")
    return [line for line in done.stdout.splitlines() if not others.search(line)]


@pytest.mark.parametrize("name", _SMALLER[1:])
def test_crash_answers_as_from_the_whole_dump(
    dump_of: DumpOf, vmlinux: Path, crash_on_the_whole: list[str], name: str
):
    words = ("--zero_excluded",) if name == "smallest" else ()
    lines = _lines_of_crash(*words, vmlinux, dump_of(name))
    assert len(lines) > 300
    assert [line for line in lines if line not in crash_on_the_whole] == []
    assert lines == crash_on_the_whole


def test_each_is_smaller_than_the_one_before(dump_of: DumpOf):
    sizes = [dump_of(name).stat().st_size for name in _DUMPS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 20 << 20
    assert sizes[3] < 12 << 20
