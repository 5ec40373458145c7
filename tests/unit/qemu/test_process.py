"""The process behind a connection of ours is found without looking at all others."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

from qemu_dump_ext.qemu import process
from qemu_dump_ext.qemu.process import find_qemu_process


def test_connection_with_that_very_name_is_found_by_it_alone(tmp_path, monkeypatch):
    """What else its name may mean is asked of the kernel, for each connection that there is."""
    asked = []
    monkeypatch.setattr(process, "_is_bound_to", lambda *words: asked.append(words))
    with ExitStack() as stack:
        paths = [str(tmp_path / f"{number}.qmp") for number in range(20)]
        for path in paths:
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(path)
            listening.listen()
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
            stack.callback(listening.accept()[0].close)
        for path in (paths[0], paths[-1]):
            assert find_qemu_process([path]) == os.getpid()
        assert not asked
        (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
        assert find_qemu_process([str(tmp_path / "link" / "19.qmp")]) == os.getpid()
        assert asked
