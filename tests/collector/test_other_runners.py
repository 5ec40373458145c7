"""What the documentation shows for avocado and labgrid, run by them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.crash_collector.store.store import CrashStore
from tests.support.bare_crashes import bare_machine, bare_rom
from tests.support.doors import guest_status

pytestmark = pytest.mark.qemu

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/crash-collector.md").read_text()


def _run(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", *words]
    # avocado keeps things at home; pytest has no other plugin than those that are named.
    environment = os.environ | {
        "HOME": str(directory),
        "PYTHONPATH": str(REPOSITORY),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    return subprocess.run(
        argv,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _page(pattern: str) -> str:
    match = re.search(pattern, PAGE, re.DOTALL)
    assert match is not None
    return match[1]


def _stored(store: Path) -> Sequence[CrashRecord]:
    return list(CrashStore(store).records())


def test_guest_of_a_failing_avocado_test_is_stored(tmp_path):
    begin = _page(r"this test of avocado:\n\n    (from [^\n]*\n)")
    end = _page(r"( {8}def tearDown\(self\):\n.*?)\n\nIt returns").replace("\n    ", "\n")[4:]
    tests = f"""{begin}
from avocado import Test

class Boot(Test):
    def test_bad(self):
        self.fail("the test's own message")

    def test_good(self):
        pass

{end}
"""
    with bare_machine(tmp_path, "spin") as machine:
        assert '"/run/vm.qmp"' in tests
        (tmp_path / "boot.py").write_text(tests.replace("/run/vm.qmp", str(machine.qmp_sockets[0])))
        done = _run(tmp_path, "avocado", "run", "--disable-sysinfo", "boot.py")
        assert guest_status(machine) == "prelaunch"
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL: the test's own message" in done.stdout
    assert "PASS 1" in done.stdout
    (bad,) = tmp_path.glob("avocado/job-results/job-*/test-results/*test_bad/data")
    (record,) = _stored(bad)
    assert record.guest == "vm"
    assert record.dump.verified_by == ("verify",)
    (good,) = tmp_path.glob("avocado/job-results/job-*/test-results/*test_good/data")
    assert not any(good.iterdir())


def test_guest_of_a_failing_labgrid_test_is_stored(tmp_path):
    extra = _page(r"`extra_args: ([^`]*)`")
    socket = tmp_path / "vm.qmp"
    assert "/run/vm.qmp" in extra
    driver = {
        "qemu_bin": "qemu",
        "machine": "pc",
        "cpu": "qemu64",
        "memory": "16M",
        "bios": "rom",
        "extra_args": extra.replace("/run/vm.qmp", str(socket)),
    }
    environment = {
        "targets": {"main": {"drivers": {"QEMUDriver": driver}}},
        "tools": {"qemu": "/usr/bin/qemu-system-x86_64"},
        "images": {"rom": str(bare_rom(tmp_path, "spin"))},
    }
    (tmp_path / "environment.yaml").write_text(yaml.safe_dump(environment))
    (tmp_path / "test_boot.py").write_text(f"""
def test_bad(target, qemu_guest_crash):
    qemu = target.get_driver("QEMUDriver")
    qemu.on()
    qemu_guest_crash({str(socket)!r}, name="vm")
    assert qemu.monitor_command("query-status")["running"]
    assert False, "the test's own message"
""")
    done = _run(
        tmp_path,
        *("pytest", "-p", "labgrid.pytestplugin"),
        *("-p", "qemu_dump_ext.crash_collector.pytest_plugin"),
        *("--lg-env", "environment.yaml", "--qemu-crash-dir", "crashes"),
    )
    assert "the test's own message" in done.stdout, done.stdout + done.stderr
    (record,) = _stored(tmp_path / "crashes")
    assert record.guest == "vm"
    assert record.dump.verified_by == ("verify",)
    assert record.qemu.command_line is not None
    assert record.qemu.command_line[0] == "/usr/bin/qemu-system-x86_64"
