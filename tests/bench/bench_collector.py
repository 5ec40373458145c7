"""How much the crash collector costs when nothing happens, and how fast it is when all crash.

    .venv/bin/python -m tests.bench.bench_collector [GUESTS]

Real QEMUs of 2 MiB without an operating system. All panic at the end, one after the other; the
time is from QEMU's event to the moment that the journal has it, behind which the guest is read.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.bare_crashes import bare_machine
from tests.support.crash_agent import CrashAgent, wait_until
from tests.support.raw_qmp import RawQmp

_IDLE_SECONDS = 30
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Print the figures."""
    guests = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8 * guests)), hard))
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        machines = []
        for number in range(guests):
            place = directory / f"vm{number}.qmp"
            machine = bare_machine(directory, "panic", "-m", "2", qmp_socket=place)
            machines.append(stack.enter_context(machine))
        limits = {"count": 10 * guests}
        entry = {"glob": str(directory / "*.qmp")}
        agent = CrashAgent(directory, guests=[entry], limits=limits, scan_interval=1.0)
        stack.enter_context(agent.running())
        started = time.monotonic()
        wait_until(lambda: len(agent.guests() or ()) == guests, "found", 300)
        agent.wait_connected(guests)
        print(f"{guests} guests connected in {time.monotonic() - started:.1f} s")
        before = _cpu_seconds(agent.pid)
        time.sleep(_IDLE_SECONDS)
        idle = (_cpu_seconds(agent.pid) - before) / _IDLE_SECONDS
        print(f"idle: {100 * idle:.2f} % of one CPU, {_memory_mib(agent.pid):.0f} MiB")
        started = time.monotonic()
        for machine in machines:
            with RawQmp(machine.qmp_sockets[1]) as qmp:
                qmp.execute("cont")
        agent.wait_records(guests, seconds=1200)
        print(f"all collected {time.monotonic() - started:.1f} s after the first panic")
        delays = sorted(
            record.moment.timestamp() - stamp["seconds"] - stamp["microseconds"] / 1e6
            for record in agent.records()
            if (stamp := (record.cause.event or {}).get("timestamp"))
        )
        for share in (50, 99):
            print(
                f"seen after the event: {1000 * delays[len(delays) * share // 100]:.1f} ms"
                f" ({share} %)"
            )
        subprocess.run(["du", "-sh", agent.store.path], check=True)
    return 0


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _memory_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


if __name__ == "__main__":
    sys.exit(main())
