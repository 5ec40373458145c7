"""What a guardian needs when it acts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from qemu_dump_ext.qemu import _guardian_program

_LATER = """
import io, runpy, sys

class Input:
    def read(self, size):
        sys.path.clear()  # the interpreter is gone
        return b""

class Stream:
    buffer = Input()

sys.stdin = Stream()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_nothing_is_imported_when_a_guest_is_to_run_by_libvirt(tmp_path: Path):
    virsh = tmp_path / "virsh"
    virsh.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\necho "paused (user)"\n', "ascii")
    virsh.chmod(0o700)
    address = json.dumps([str(virsh), "test:///", "guest", 0])
    argv = [sys.executable, "-I", "-S", "-c", _LATER, _guardian_program.__file__]
    done = subprocess.run(
        [*argv, "libvirt", address, ""], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "resume --domain guest" in (tmp_path / "asked").read_text("ascii")
