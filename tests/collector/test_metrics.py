"""The metrics, as Prometheus reads them."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qemu_dump_ext.crash_collector.collect.budget import LIMITS, DumpBudget, Refusal
from qemu_dump_ext.crash_collector.collect.collection import Collected
from qemu_dump_ext.crash_collector.config.settings import GuestEntry, Limits, Rate
from qemu_dump_ext.crash_collector.outlets.metrics import AgentState, Metrics
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.errors import RequestError
from tests.support.crashes import commit, make_record, make_store
from tests.support.waiting import wait_until

PREFIX = "qemu_crash_collector_"


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Return what is served: by name without the prefix, and labels in the order of their names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=300) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (
                sample.name.removeprefix(PREFIX),
                *(value for _, value in sorted(sample.labels.items())),
            ): sample.value
            for family in families
            for sample in family.samples
        }


def test_what_happened_and_what_there_is_is_served(tmp_path):
    store = make_store(tmp_path)
    state = AgentState(watched=5, connected=4, collecting=1, upload_backlog=3)
    metrics = Metrics(store, lambda: state)
    gone = replace(make_record("db1", dump=False), guest_stopped_seconds=0.0)
    refusal = Refusal("rate", "2 dumps of this guest in 1 s")
    begun = time.time()
    with metrics.served(0) as port:
        before = scrape(port)
        metrics.crash_stored(Collected(commit(store, make_record()), 2.0))
        metrics.crash_stored(Collected(gone, refusal=refusal))
        metrics.crash_stored(Collected(gone))
        metrics.crash_not_stored()
        after = scrape(port)
    assert after["crashes_total", "guest-panicked", "web1"] == 1
    assert after["crashes_total", "guest-panicked", "db1"] == 2
    assert after["dumps_kept_total",] == 1
    skipped = {key[1]: value for key, value in after.items() if key[0] == "dumps_skipped_total"}
    assert skipped == {"dumps_per_signature": 0, "rate": 1, "free": 0, "failed": 1}
    assert after["crashes_not_stored_total",] == 1
    assert (after["dump_seconds_count",], after["dump_seconds_sum",]) == (1, 2.0)
    assert (after["dump_bytes_count",], after["dump_bytes_sum",]) == (1, 7)
    assert after["guest_stopped_seconds_count",] == 1
    assert after["guest_stopped_seconds_sum",] == 0.5
    names = ("guests_watched", "guests_connected", "collections_under_way", "upload_backlog")
    assert [after[name,] for name in names] == [5, 4, 1, 3]
    assert after["store_bytes",] > before["store_bytes",]
    assert after["store_free_bytes",] > 0
    assert before["last_success_timestamp_seconds",] == 0
    assert begun <= after["last_success_timestamp_seconds",] <= time.time()
    assert after["process_resident_memory_bytes",] > 0


def test_nobody_else_can_ask(tmp_path):
    metrics = Metrics(make_store(tmp_path), lambda: AgentState(0, 0, 0))
    with metrics.served(0) as port, socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", port))  # loopback is a whole network


def test_one_that_says_nothing_keeps_nobody_up(tmp_path):
    metrics = Metrics(make_store(tmp_path), lambda: AgentState(1, 0, 0))
    with metrics.served(0) as port, socket.create_connection(("127.0.0.1", port)):
        assert scrape(port)["guests_watched",] == 1


def test_taken_port_is_said(tmp_path):
    metrics = Metrics(make_store(tmp_path), lambda: AgentState(0, 0, 0))
    with metrics.served(0) as port:
        other = Metrics(make_store(tmp_path), lambda: AgentState(0, 0, 0))
        with pytest.raises(RequestError, match="Address already in use"), other.served(port):
            pass


def test_names_of_guests_are_bounded(tmp_path):
    metrics = Metrics(make_store(tmp_path), lambda: AgentState(0, 0, 0))
    for number in range(2100):
        metrics.crash_stored(Collected(make_record(f"vm{number}")))
    with metrics.served(0) as port:
        counted = scrape(port)
    crashes = {key[2]: value for key, value in counted.items() if key[0] == "crashes_total"}
    assert len(crashes) == 2001
    assert crashes["(others)"] == 100


def test_every_refusal_of_the_budget_has_its_word(tmp_path):
    store = make_store(tmp_path)
    settings = GuestEntry(socket="x", dumps_per_signature=1, rate=Rate(dumps=1))
    guest = Guest("web1", "x", settings)
    budget = DumpBudget(store, Limits(free=0))
    with budget.collecting() as allowance:
        assert allowance.refusal(guest, "a" * 16) is None
        refusals = [allowance.refusal(guest, "a" * 16), allowance.refusal(guest, "b" * 16)]
        budget.limits = Limits(free=1 << 60)
        refusals.append(allowance.refusal(Guest("web2", "x", settings), "b" * 16))
    assert [refusal and refusal.limit for refusal in refusals] == [*LIMITS]


def test_idle_connections_take_few_threads(tmp_path):
    metrics = Metrics(make_store(tmp_path), lambda: AgentState(0, 0, 0))
    before = threading.active_count()
    with metrics.served(0) as port, ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(60)
        ]
        # Those that are too many are closed, from the last on.
        idle[-1].settimeout(60)
        assert idle[-1].recv(1) == b""
        assert threading.active_count() - before <= 10
        for connection in idle:
            connection.close()
        wait_until(lambda: threading.active_count() - before <= 1 and scrape(port), "it answers")
