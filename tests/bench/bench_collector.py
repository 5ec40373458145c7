"""Measure the crash collector: what watching costs, and how soon a crash is dumped.

    .venv/bin/python -m tests.bench.bench_collector [--guests N] [--crashes N] [--seconds N]

Starts N real QEMUs, all without a machine but a few that can panic, and an agent that watches them
all. Prints a table in Markdown. The time to the dump is between two events of QEMU's own clock:
GUEST_PANICKED, and STOP, from which on the guest stands still for its dump.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.bare_crashes import bare_machine
from tests.support.crash_agent import CrashAgent
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

_CRASHING = 20
_START_SECONDS = 600.0
_TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def idle_guests(directory: Path, count: int) -> Iterator[None]:
    """Start QEMUs that do nothing but have a QMP socket in `directory`."""
    argv = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S"]
    with ExitStack() as stack:
        for number in range(count):
            path = directory / f"idle{number}.qmp"
            qemu = stack.enter_context(
                subprocess.Popen([*argv, "-qmp", f"unix:{path},server=on,wait=off"])
            )
            stack.callback(qemu.kill)
        wait_until(
            lambda: sum(1 for _ in directory.glob("idle*.qmp")) == count,
            "sockets of all guests",
            _START_SECONDS,
        )
        yield


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory_mib(pid: int, word: str) -> float:
    """Return one line of a process's `status`, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{word}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def _moment(event: dict[str, dict[str, int]]) -> float:
    stamp = event["timestamp"]
    return stamp["seconds"] + stamp["microseconds"] / 1e6


def crash_all(agent: CrashAgent, monitors: Sequence[RawQmp]) -> float:
    """Let all guests panic at once; returns the seconds until all crashes are stored."""
    known = len(list(agent.store.path.glob("[!.]*/*")))
    started = time.monotonic()
    for monitor in monitors:
        monitor.execute("system_reset")
        monitor.execute("cont")
    wait_until(
        lambda: len(list(agent.store.path.glob("[!.]*/*"))) >= known + len(monitors),
        "all are stored",
        _START_SECONDS,
    )
    return time.monotonic() - started


def crash_once(agent: CrashAgent, monitor: RawQmp) -> float:
    """Let a guest panic; returns the seconds from the panic to its being stopped."""
    known = len(list(agent.store.path.glob("[!.]*/*")))
    monitor.events.clear()
    monitor.execute("system_reset")
    monitor.execute("cont")
    panic = monitor.wait_for_event("GUEST_PANICKED")
    stop = monitor.wait_for_event("STOP")
    wait_until(lambda: len(list(agent.store.path.glob("[!.]*/*"))) > known, "it is stored")
    monitor.wait_for_event("RESUME")
    return _moment(stop) - _moment(panic)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guests", type=int, default=500, help="that are watched")
    parser.add_argument("--crashes", type=int, default=200, help="one after the other")
    parser.add_argument("--seconds", type=float, default=60.0, help="of watching idle guests")
    arguments = parser.parse_args()
    # So that every QEMU ends, as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        directory = Path(name)
        sockets = directory / "qmp"
        sockets.mkdir()
        machines = [
            stack.enter_context(
                bare_machine(
                    directory,
                    "panic",
                    "-action",
                    "panic=none",
                    qmp_socket=sockets / f"crash{number}.qmp",
                )
            )
            for number in range(_CRASHING)
        ]
        stack.enter_context(idle_guests(sockets, arguments.guests - _CRASHING))
        agent = CrashAgent(
            directory,
            guests=[{"directory": str(sockets)}],
            defaults={"dumps_per_signature": 10000, "rate": {"dumps": 10000, "per": 1}},
            scan_interval=1,
        )
        started = time.monotonic()
        stack.enter_context(agent.running())
        # By its log: to be asked how the guests are is work for it.
        wait_until(
            lambda: agent.log.read_bytes().count(b'"connected: QEMU') >= arguments.guests,
            "all are connected",
            _START_SECONDS,
        )
        print(
            f"{arguments.guests} guests connected in {time.monotonic() - started:.1f} s,"
            f" {cpu_seconds(agent.pid):.1f} s of CPU time\n"
        )
        time.sleep(5)
        before, begun = cpu_seconds(agent.pid), time.monotonic()
        time.sleep(arguments.seconds)
        share = (cpu_seconds(agent.pid) - before) / (time.monotonic() - begun)
        idle_mib = memory_mib(agent.pid, "VmRSS")
        monitors = [stack.enter_context(RawQmp(machine.qmp_sockets[1])) for machine in machines]
        delays = sorted(
            crash_once(agent, monitors[number % _CRASHING]) for number in range(arguments.crashes)
        )
        percentile = delays[min(len(delays) - 1, int(0.99 * len(delays)))]
        storm = crash_all(agent, monitors)
        print(
            "| guests | CPU, idle | memory, idle | at most | panic to dump, median | 99 %"
            f" | {_CRASHING} panics at once are stored in |"
        )
        print("|---|---|---|---|---|---|---|")
        print(
            f"| {arguments.guests} | {100 * share:.1f} % of one core | {idle_mib:.0f} MiB"
            f" | {memory_mib(agent.pid, 'VmHWM'):.0f} MiB"
            f" | {1000 * statistics.median(delays):.0f} ms | {1000 * percentile:.0f} ms"
            f" | {storm:.1f} s |"
        )


if __name__ == "__main__":
    main()
