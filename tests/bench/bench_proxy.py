"""Measure what the HMP proxy adds to a command: through it, and from QEMU directly, in turn.

    .venv/bin/python -m tests.bench.bench_proxy [--rounds N]

Prints a table in Markdown: medians of the time from the line to the next prompt, or from a QMP
request to its answer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.support.hmp_proxy import HmpSocket, Proxy, QmpSocket, monitor_arguments

HMP_LINES = ("info status", "info registers", "info mtree", "help")
QMP_COMMANDS = ("query-status", "query-version", "query-commands")


@contextmanager
def clients() -> Iterator[tuple[HmpSocket, HmpSocket, QmpSocket, QmpSocket]]:
    """Connect to one machine, directly and through a proxy: HMP, HMP, QMP, QMP."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["-M", "q35", "-smp", "2", *monitor_arguments(folder / "monitor")]
        with (
            stopped_machine(["qemu-system-x86_64"], arguments) as machine,
            Proxy(folder, "--qmp", machine.qmp_sockets[0], qmp=True) as proxy,
            HmpSocket(folder / "monitor") as direct,
            HmpSocket(proxy.socket) as proxied,
            QmpSocket(machine.qmp_sockets[1]) as direct_qmp,
            QmpSocket(proxy.qmp_socket) as proxied_qmp,
        ):
            for client in (direct_qmp, proxied_qmp):
                client.execute("qmp_capabilities")
            yield direct, proxied, direct_qmp, proxied_qmp


def in_turn(
    direct: Callable[[], object], proxied: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Return the median seconds of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for work, times in zip((direct, proxied), seconds, strict=True):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    print("| command | QEMU | through the proxy | added |\n|---|---|---|---|")
    with clients() as (direct, proxied, direct_qmp, proxied_qmp):
        for line in HMP_LINES:
            both = in_turn(
                lambda line=line: direct.exchange(line),  # type: ignore[misc]
                lambda line=line: proxied.exchange(line),  # type: ignore[misc]
                rounds,
            )
            print(_row(line, *both))
        for name in QMP_COMMANDS:
            both = in_turn(
                lambda name=name: direct_qmp.execute(name),  # type: ignore[misc]
                lambda name=name: proxied_qmp.execute(name),  # type: ignore[misc]
                rounds,
            )
            print(_row(f"QMP {name}", *both))


def _row(name: str, direct: float, proxied: float) -> str:
    return (
        f"| {name} | {1000 * direct:.2f} ms | {1000 * proxied:.2f} ms"
        f" | {1000 * (proxied - direct):.2f} ms |"
    )


if __name__ == "__main__":
    main()
