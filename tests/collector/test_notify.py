"""People are told of crashes: by a real HTTP server, and by a program."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qemu_dump_ext.crash_collector.config.settings import Notification
from qemu_dump_ext.crash_collector.outlets.notify import Notifier
from qemu_dump_ext.crash_collector.record import Signature
from qemu_dump_ext.crash_collector.store.states import SignatureState
from qemu_dump_ext.crash_collector.store.store import CrashStore
from tests.collector.test_faults import trigger
from tests.support.bare_crashes import bare_machine
from tests.support.crash_agent import CrashAgent
from tests.support.crashes import commit, make_record, make_store
from tests.support.waiting import wait_until

A, B = "a" * 16, "b" * 16


class Receiver:
    """An HTTP server that remembers what was posted, and answers as it is told to."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []
        self.answers: list[int] = []
        self.redirect = ""
        self.asked = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                status = receiver.answers.pop(0) if receiver.answers else 200
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", receiver.redirect)
                self.end_headers()
                if status == 200:
                    receiver.posted.append(json.loads(body))

            def do_GET(self) -> None:
                receiver.asked += 1
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    @contextmanager
    def running(self) -> Iterator[Receiver]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().running() as running:
        yield running


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def crash(store: CrashStore, notifier: Notifier, signature: str = A, number: int = 0) -> None:
    record = make_record(signature=signature, time=f"2026-01-31T12:00:{number:02}.000000+00:00")
    notifier.crash_stored(commit(store, record))


def whys(receiver: Receiver) -> list[str]:
    return [message["why"] for message in receiver.posted]


def test_new_signatures_and_regressions_are_told_and_what_repeats_is_not(tmp_path, receiver):
    store = make_store(tmp_path)
    notifier = Notifier(store, [Notification(webhook=receiver.url)])
    crash(store, notifier)
    assert notifier.tell_due() is None
    crash(store, notifier, number=1)
    store.change_states(lambda states: states.known.update({A: SignatureState("resolved")}))
    assert notifier.tell_due() is None
    crash(store, notifier, number=2)
    crash(store, notifier, B, number=3)
    assert notifier.tell_due() is None
    assert whys(receiver) == ["new", "regression", "new"]
    message = receiver.posted[1]
    assert message["text"].startswith("crash came back: sysrq triggered crash (web1) web1/2026")
    assert message["crash"]["occurrence"] == 3
    assert message["state"]["state"] == "regression"


def test_all_are_told_who_want_all(tmp_path, receiver):
    store = make_store(tmp_path)
    notifier = Notifier(store, [Notification(webhook=receiver.url, on=("all",))])
    crash(store, notifier)
    crash(store, notifier, number=1)
    assert notifier.tell_due() is None
    assert whys(receiver) == ["new", "again"]


def test_what_was_not_told_is_tried_again_later_and_by_the_next_agent(tmp_path, receiver):
    store, clock = make_store(tmp_path), Clock()
    targets = [Notification(webhook=receiver.url, retry=10.0, retry_max=15.0)]
    receiver.answers = [500, 404, 503]
    notifier = Notifier(store, targets, clock=clock)
    crash(store, notifier)
    assert notifier.tell_due() == 10
    clock.now = 9
    assert notifier.tell_due() == 1
    clock.now = 10
    assert notifier.tell_due() == 15
    following = Notifier(store, targets, clock=clock)
    clock.now = 25
    assert following.tell_due() == 15
    clock.now = 40
    assert following.tell_due() is None
    assert whys(receiver) == ["new"]
    assert Notifier(store, targets, clock=clock).tell_due() is None
    assert len(receiver.posted) == 1


def test_nobody_is_told_for_ever(tmp_path, receiver):
    store, clock = make_store(tmp_path), Clock()
    receiver.answers = [500, 500, 200]
    targets = [Notification(webhook=receiver.url, attempts=2)]
    notifier = Notifier(store, targets, clock=clock)
    crash(store, notifier)
    notifier.tell_due()
    clock.now = 1e9
    assert notifier.tell_due() is None
    assert receiver.posted == []


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\ncut",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000 + b"\r\n\r\n",
    ],
    ids=["no HTTP", "cut off", "too long"],
)
def test_answers_that_are_none_leave_it_to_be_told_later(tmp_path, answer):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=_answer_once, args=(listening, answer))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/hook"
        store = make_store(tmp_path)
        notifier = Notifier(store, [Notification(webhook=url)], clock=Clock())
        crash(store, notifier)
        assert notifier.tell_due() == 5
        thread.join()


def _answer_once(listening: socket.socket, answer: bytes) -> None:
    connected, _ = listening.accept()
    with connected, connected.makefile("rb") as asked:
        size = 0
        while (line := asked.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                size = int(line.split(b":")[1])
        asked.read(size)
        connected.sendall(answer)


def test_facts_go_to_no_other_place_than_was_said(tmp_path, receiver):
    """Nor is it told where another place is asked for something."""
    store = make_store(tmp_path)
    with Receiver().running() as other:
        receiver.answers, receiver.redirect = [302], other.url
        notifier = Notifier(store, [Notification(webhook=receiver.url)], clock=Clock())
        crash(store, notifier)
        assert notifier.tell_due() == 5
        assert other.posted == receiver.posted == []
        assert other.asked == 0


def test_program_gets_the_facts(tmp_path):
    store = make_store(tmp_path)
    script = 'cat >"$0"; echo "$CRASH_WHY $CRASH_GUEST $CRASH_TEXT" >"$0.env"'
    command = ("sh", "-c", script, str(tmp_path / "told"))
    notifier = Notifier(store, [Notification(command=command)])
    record = replace(make_record(), signature=Signature(A, "\x1b[2Jevil", ()))
    notifier.crash_stored(commit(store, record))
    assert notifier.tell_due() is None
    assert json.loads((tmp_path / "told").read_text())["why"] == "new"
    assert (tmp_path / "told.env").read_text().startswith("new web1 new crash: \\u001b[2Jevil")


@pytest.mark.parametrize("command", [("false",), ("/nonexistent",), ("sleep", "60")])
def test_program_that_fails_is_run_again(tmp_path, command):
    store = make_store(tmp_path)
    targets = [Notification(command=command, timeout=0.1)]
    notifier = Notifier(store, targets, clock=Clock())
    crash(store, notifier)
    assert notifier.tell_due() == 5


def test_damaged_list_is_kept_and_begun_anew(tmp_path):
    store = make_store(tmp_path)
    (store.path / ".notifications.json").write_text("[7]")
    assert Notifier(store, []).tell_due() is None
    assert len(list(store.path.glob(".notifications.json.damaged-*"))) == 1


@pytest.mark.qemu
def test_agent_tells_and_does_one_after_action_behind_the_other(tmp_path, receiver):
    done = tmp_path / "done"
    with bare_machine(tmp_path, "halt") as machine:
        entry = {
            "socket": str(machine.qmp_sockets[0]),
            "name": "box",
            "after": [{"command": ["sh", "-c", f"echo first >>{done}"]}, "quit"],
        }
        agent = CrashAgent(tmp_path, guests=[entry], notify=[{"webhook": receiver.url}])
        with agent.running():
            agent.wait_connected()
            trigger(agent)
            (record,) = agent.wait_records()
            assert record.after_action == "command, quit"
            wait_until(lambda: whys(receiver) == ["new"], "it is told")
            wait_until(lambda: not machine.is_running(), "QEMU has quit")
    assert done.read_text() == "first\n"
    assert receiver.posted[0]["crash"]["id"] == record.id
