"""Nothing is imported while a guest stands still: numpy and codecs take longer than some dumps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.support.doors import child_environment

pytestmark = pytest.mark.qemu

_SCRIPT = """
import json, sys
from contextlib import contextmanager
from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.engine import stopped_guest as module

stop, imported = module.stopped, []

@contextmanager
def stopped(*arguments, **options):
    with stop(*arguments, **options) as pause:
        before = set(sys.modules)
        yield pause
        imported.extend(sorted(set(sys.modules) - before))

module.stopped = stopped
name = sys.argv[3]
status = main(["--qmp", sys.argv[1], "--format", name, f"{sys.argv[2]}/dump"])
print(json.dumps([name, status, imported]))
"""


@pytest.mark.parametrize("name", ["elf", "kdump-raw-zstd", "kdump-raw-zlib", "kdump-raw-snappy"])
def test_nothing_is_imported_while_the_guest_stands_still(tmp_path, name):
    with stopped_machine(["qemu-system-x86_64"], ["-m", "16"]) as machine:
        argv = [sys.executable, "-c", _SCRIPT, str(machine.qmp_sockets[0]), str(tmp_path), name]
        done = subprocess.run(
            argv, capture_output=True, text=True, check=True, env=child_environment(), timeout=300
        )
    assert json.loads(done.stdout) == [name, 0, []]
