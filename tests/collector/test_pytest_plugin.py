"""A failing test leaves its guest behind: pytest's plugin, and the function that others call."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_dump_ext.crash_collector.collect_now import collect_crash
from qemu_dump_ext.crash_collector.record import CrashRecord, parse_record
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.bare_crashes import bare_machine
from tests.support.doors import guest_status
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

MODULE = "qemu_dump_ext.crash_collector.pytest_plugin"
RunTests = Callable[..., pytest.RunResult]


@pytest.fixture
def run_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> RunTests:
    """Run a file of tests in a pytest that has our plugin and no other; `{SOCKET}` is replaced."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def run(content: str, machine: QemuMachine, *words: str) -> pytest.RunResult:
        named = content.replace("SOCKET", repr(str(machine.qmp_sockets[0])))
        pytester.makepyfile(named.replace("CONSOLE", repr(str(machine.console_log))))
        return pytester.runpytest_subprocess("-p", MODULE, *words, timeout=300)

    return run


def _record(directory: Path) -> CrashRecord:
    argv = ["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"]
    subprocess.run(argv, cwd=directory, check=True)
    return parse_record((directory / "crash.json").read_bytes())


def _properties(junit: Path) -> dict[str, list[str]]:
    """Return what the report of each test says about its guests."""
    return {
        case.attrib["name"]: [
            one.attrib["value"]
            for one in case.iter("property")
            if one.attrib["name"] == "qemu_guest_crash"
        ]
        for case in ET.parse(junit).getroot().iter("testcase")  # noqa: S314 - pytest wrote it
    }


def test_guest_of_a_failing_test_is_stored_and_the_report_says_where(run_tests, tmp_path):
    content = """
    def test_bad(qemu_guest_crash):
        qemu_guest_crash(SOCKET, name="web1", console=CONSOLE)
        assert False, "the test's own message"

    def test_good(qemu_guest_crash):
        qemu_guest_crash(SOCKET, name="web2")
    """
    junit, crashes = tmp_path / "junit.xml", tmp_path / "crashes"
    with bare_machine(tmp_path, "spin") as machine:
        machine.console_log.write_bytes(b"what the console said\n")
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
        result = run_tests(
            content, machine, "--qemu-crash-dir", str(crashes), f"--junitxml={junit}"
        )
        assert guest_status(machine) == "running"
    result.assert_outcomes(failed=1, passed=1)
    stored = _properties(junit)
    assert stored["test_good"] == []
    (where,) = stored["test_bad"]
    result.stdout.fnmatch_lines(["*the test's own message", "*qemu guest crash*", where])
    directory = Path(where)
    assert directory.parent == crashes / "web1"
    record = _record(directory)
    assert record.labels["test"].endswith("::test_bad")
    assert record.signature.message == record.labels["test"]
    assert record.cause.kind == "trigger"
    assert record.cause.detail.endswith("::test_bad failed")
    assert (record.qemu.version.count("."), record.qemu.pid) == (2, machine.pid)
    assert record.qemu.command_line == tuple(machine.argv)
    assert record.guest_stopped_seconds > 0
    assert (directory / "console.txt").read_bytes() == b"what the console said\n"
    with open_dump(directory / str(record.dump.file)) as dump:
        assert verify_dump(dump).problem_count == 0
    assert [path.name for path in crashes.glob("[!.]*")] == ["web1"]


def test_report_has_what_the_kernel_said(run_tests, tmp_path):
    content = """
    def test_bad(qemu_guest_crash):
        qemu_guest_crash(SOCKET, name="web1", console=CONSOLE)
        assert False
    """
    said = b"[    1.5] Kernel panic - not syncing: sysrq triggered crash\n[    1.5] Call Trace:\n"
    with bare_machine(tmp_path, "panic", "-action", "panic=pause") as machine:
        machine.console_log.write_bytes(b"booting\n" + said + b"[    1.5]  panic+0x1/0x2\n")
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
        wait_until(lambda: guest_status(machine) == "guest-panicked", "it has panicked")
        result = run_tests(content, machine)
    lines = ["*qemu guest crash*", "*/web1/*", "Kernel panic - *", "Call Trace:", " panic+0x1/0x2"]
    result.stdout.fnmatch_lines(lines)


def test_without_a_directory_it_is_beside_those_of_tmp_path(run_tests, tmp_path):
    content = """
    def test_bad(qemu_guest_crash):
        qemu_guest_crash(SOCKET, name="web1")
        assert False
    """
    with bare_machine(tmp_path, "halt") as machine:
        run_tests(content, machine, f"--junitxml={tmp_path / 'junit.xml'}")
    (where,) = _properties(tmp_path / "junit.xml")["test_bad"]
    assert Path(where).parent.parent.name == "qemu-guest-crash0"
    assert _record(Path(where)).dump.complete


def test_every_guest_of_a_test_that_cannot_begin_is_stored_once(run_tests, tmp_path):
    content = """
    import pytest

    @pytest.fixture
    def broken(qemu_guest_crash):
        qemu_guest_crash(SOCKET, name="web1")
        qemu_guest_crash("/nonexistent/socket", name="gone", console=CONSOLE)
        raise RuntimeError("no")
        yield

    def test_bad(broken):
        pass
    """
    with bare_machine(tmp_path, "halt") as machine:
        machine.console_log.write_bytes(b"last words\n")
        result = run_tests(content, machine, f"--junitxml={tmp_path / 'junit.xml'}")
    result.assert_outcomes(errors=1)
    here, gone = (Path(where) for where in _properties(tmp_path / "junit.xml")["test_bad"])
    assert _record(here).dump.complete
    record = _record(gone)
    assert record.cause.kind == "qemu-died"
    assert record.dump.file is None
    assert "cannot connect to QMP socket /nonexistent/socket" in str(record.dump.reason)
    assert (gone / "console.txt").read_bytes() == b"last words\n"


def test_what_cannot_be_stored_does_not_hide_why_the_test_failed(run_tests, tmp_path):
    content = """
    def test_bad(qemu_guest_crash):
        qemu_guest_crash(SOCKET, name="../up")
        assert False, "the test's own message"
    """
    with bare_machine(tmp_path, "halt") as machine:
        result = run_tests(content, machine)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*the test's own message", "not stored: '../up' is no name for a directory*"]
    )


def test_panicked_guest_is_recognised_by_its_panic(tmp_path):
    with bare_machine(tmp_path, "panic", "-action", "panic=pause") as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
        wait_until(lambda: guest_status(machine) == "guest-panicked", "it panics")
        record = _record(collect_crash(machine.qmp_sockets[0], tmp_path / "crashes", name="box"))
        assert guest_status(machine) == "guest-panicked"
    assert record.cause.kind == "guest-panicked"
    assert record.guest_stopped_seconds == 0


def test_busy_socket_is_no_dead_qemu(tmp_path):
    with bare_machine(tmp_path, "halt") as machine, RawQmp(machine.qmp_sockets[0]):
        record = _record(collect_crash(machine.qmp_sockets[0], tmp_path / "crashes", name="box"))
    assert record.cause.kind == "trigger"
    assert "is busy" in str(record.dump.reason)


def test_every_failure_has_its_dump_and_braces_are_no_templates(tmp_path):
    console = tmp_path / "{name}"
    console.write_bytes(b"x")
    with bare_machine(tmp_path, "halt") as machine:
        records = [
            _record(collect_crash(machine.qmp_sockets[0], tmp_path / "crashes", console=console))
            for _ in range(5)
        ]
    assert all(record.dump.complete and "console.txt" in record.files for record in records)
    assert records[-1].occurrence == 5
    assert records[-1].guest == machine.qmp_sockets[0].stem


def test_unknown_format_is_refused(tmp_path):
    with pytest.raises(RequestError, match="unknown format"):
        collect_crash("/nonexistent", tmp_path / "crashes", dump_format="tar")
    assert not (tmp_path / "crashes").exists()


def test_pytest_finds_the_plugin_by_itself():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (module,) = project["project"]["entry-points"]["pytest11"].values()
    assert module == MODULE
    assert callable(importlib.import_module(module).qemu_guest_crash)


def test_plugin_costs_a_pytest_without_guests_nothing():
    code = f"import sys, {MODULE}; print({{'pydantic', 'numpy', 'qemu'}} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", code]
    assert subprocess.check_output(argv, env=environment, text=True) == "set()\n"
