"""The agent shows what it stored: uploaded, in the report, in the metrics."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import pytest

from qemu_dump_ext.crash_collector.record import parse_record
from tests.collector.test_faults import trigger
from tests.collector.test_metrics import scrape
from tests.support.bare_crashes import bare_machine
from tests.support.crash_agent import CrashAgent, run_collector
from tests.support.ports import reserved_port
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as reserved:
        yield reserved


def test_crash_is_uploaded_reported_and_counted(tmp_path, port):
    report = tmp_path / "report.html"
    remote = tmp_path / "remote"
    remote.write_text("in the way")  # the upload is refused for now
    with bare_machine(tmp_path, "halt") as machine:
        agent = CrashAgent(
            tmp_path,
            guests=[{"socket": str(machine.qmp_sockets[0]), "name": "box"}],
            upload={"url": f"file://{remote}", "retry": "100ms", "retry_max": "200ms"},
            limits={"bytes": 1},
            report=str(report),
            metrics_port=port,
        )
        with agent.running():
            agent.wait_connected()
            assert scrape(port)["guests_connected",] == 1
            assert run_collector("trigger", "box", "--config", agent.config).returncode == 0
            (record,) = agent.wait_records()
            wait_until(
                lambda: report.exists() and record.id in report.read_text(), "it is in the report"
            )
            wait_until(lambda: scrape(port)["upload_failures_total",] >= 1, "the upload is refused")
            assert scrape(port)["upload_backlog",] == 1
            # The limits allow nothing at all, but it is nowhere else.
            assert run_collector("prune", "--config", agent.config).stdout == "removed: nothing\n"
            assert (agent.store.directory(record.id) / "vmcore.kdump").exists()
            agent.kill()
        agent.configure(
            store=str(agent.store.path), upload={"url": f"file://{remote}"}, metrics_port=port
        )
        remote.unlink()
        with agent.running():
            wait_until(lambda: scrape(port)["uploads_total",] == 1, "it is uploaded")
            there = remote / record.id
            argv = ["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"]
            subprocess.run(argv, cwd=there, check=True)
            assert parse_record((there / "crash.json").read_bytes()).uploaded is not None
            wait_until(lambda: scrape(port)["upload_backlog",] == 0, "nothing is left to upload")
            agent.signal(signal.SIGTERM)
            assert agent.wait() == 0
        agent.configure(
            store=str(agent.store.path), upload={"url": f"file://{remote}"}, limits={"bytes": 1}
        )
        pruned = run_collector("prune", "--config", agent.config)
        assert record.id in pruned.stdout
    assert (there / "vmcore.kdump").exists()


def test_metrics_of_a_stored_crash(tmp_path, port):
    with bare_machine(tmp_path, "halt", "-m", "320") as machine:
        guest = {"socket": str(machine.qmp_sockets[0]), "name": "box", "dumps_per_signature": 1}
        guest["memory"] = "pmemsave"  # slow enough to be seen at it
        nobody = {"socket": str(tmp_path / "nobody"), "name": "nobody"}
        agent = CrashAgent(tmp_path, guests=[guest, nobody], metrics_port=port)
        with agent.running():
            agent.wait_connected()
            trigger(agent)
            wait_until(lambda: scrape(port)["collections_under_way",] == 1, "it is collected")
            wait_until(lambda: scrape(port)["collections_under_way",] == 0, "it is over")
            assert run_collector("trigger", "box", "--config", agent.config).returncode == 0
            counted = scrape(port)
    assert (counted["guests_watched",], counted["guests_connected",]) == (2, 1)
    assert counted["crashes_total", "trigger", "box"] == 2
    assert counted["dumps_kept_total",] == 2  # somebody wanted each
    assert counted["dumps_skipped_total", "dumps_per_signature"] == 0
    assert counted["dump_seconds_count",] == 2
    assert 0 < counted["dump_seconds_sum",] < 120
    assert counted["collections_under_way",] == 0


def test_what_the_upload_lacks_is_said_before_anything_begins(tmp_path):
    agent = CrashAgent(tmp_path, upload={"url": "nonsense://x"})
    for command in ("check-config", "run"):
        done = run_collector(command, "--config", agent.config)
        assert done.returncode == 2
        assert "cannot upload to nonsense://" in done.stderr
        assert "Traceback" not in done.stderr
