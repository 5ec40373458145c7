"""Upload, with real servers where one starts in a second."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import paramiko
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from qemu_dump_ext.crash_collector.config.settings import Upload
from qemu_dump_ext.crash_collector.outlets import upload
from qemu_dump_ext.crash_collector.outlets.destination import check_upload, without_password
from qemu_dump_ext.crash_collector.outlets.upload import Uploader
from qemu_dump_ext.crash_collector.record import parse_record
from qemu_dump_ext.crash_collector.store.states import StateName, parse_states
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import RequestError
from tests.support.crashes import commit, make_record, make_store, say
from tests.support.ports import reserved_port
from tests.support.waiting import wait_until

_SFTP_SERVER = "/usr/lib/openssh/sftp-server"
_STEPS = 7
_STATES: tuple[StateName, ...] = ("acknowledged", "resolved")
_EARLIER = "2026-01-31T12:00:00.000001+00:00"
_LATER = "2026-02-01T12:00:00.000001+00:00"


class _RefusingFileSystem(LocalFileSystem):  # type: ignore[misc]
    """Fails at any of its operations, or says nothing until an event, when `failing` says so."""

    protocol = "refusing"
    failing: ClassVar[list[Exception | threading.Event | None]] = []
    operations: ClassVar[list[str]] = []

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.operations.append("connect")

    def _maybe_fail(self, operation: str) -> None:
        self.operations.append(operation)
        failure = self.failing.pop(0) if self.failing else None
        if isinstance(failure, threading.Event):
            failure.wait()
        elif failure is not None:
            raise failure

    def makedirs(self, path, exist_ok=False):
        self._maybe_fail("makedirs")
        super().makedirs(path, exist_ok=exist_ok)

    def put_file(self, lpath, rpath, **kwargs):
        self._maybe_fail("put_file")
        super().put_file(lpath, rpath, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        self._maybe_fail("pipe_file")
        super().pipe_file(path, value, **kwargs)

    def mv(self, path1, path2, **kwargs):
        self._maybe_fail("mv")
        super().mv(path1, path2, **kwargs)


fsspec.register_implementation("refusing", _RefusingFileSystem, clobber=True)


@pytest.fixture
def refusing() -> Iterator[type[_RefusingFileSystem]]:
    _RefusingFileSystem.operations.clear()
    yield _RefusingFileSystem
    _RefusingFileSystem.failing.clear()


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _uploader(store: CrashStore, url: str, clock=None, jitter=lambda: 1.0, **settings) -> Uploader:
    return Uploader(store, Upload(url, **settings), clock=clock or _Clock(), jitter=jitter)


def _is_there(path: Path, word: str) -> bool:
    return path.exists() and word in path.read_text()


def _accepted_by_sha256sum(directory: Path) -> bool:
    argv = ["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"]
    return subprocess.run(argv, cwd=directory, check=False).returncode == 0


def test_crash_is_copied_whole_and_private(tmp_path):
    store = make_store(tmp_path)
    record = commit(store, make_record())
    uploader = _uploader(store, f"file://{tmp_path}/remote/{{host}}")
    assert uploader.upload_due() is None
    remote = tmp_path / "remote" / socket.gethostname() / record.id
    assert _accepted_by_sha256sum(remote)
    names = {path.name for path in store.directory(record.id).iterdir()}
    assert {path.name for path in remote.iterdir()} == names
    assert stat.S_IMODE(remote.stat().st_mode) == 0o700
    here, there = store.record(record.id), parse_record((remote / "crash.json").read_bytes())
    assert here == there
    assert here.uploaded is not None
    assert here.uploaded.url == f"file://{tmp_path}/remote/{socket.gethostname()}/{record.id}"
    assert (here.dump.file, uploader.backlog, uploader.uploaded) == ("vmcore.kdump", 0, 1)
    assert _accepted_by_sha256sum(store.directory(record.id))


@pytest.mark.parametrize("step", range(_STEPS))
def test_whatever_is_refused_is_complete_or_absent_and_arrives_in_the_end(tmp_path, refusing, step):
    store = make_store(tmp_path)
    record = commit(store, make_record())
    clock = _Clock()
    uploader = _uploader(store, f"refusing://{tmp_path}/remote", clock, keep_dump=False)
    remote = tmp_path / "remote" / record.id
    refusing.failing[:] = [None] * step + [PermissionError("refused")]
    pause = uploader.upload_due()
    assert pause == 5.0
    assert not (remote / "crash.json").exists()
    here = store.record(record.id)
    assert (here.uploaded, here.dump.file) == (None, "vmcore.kdump")
    assert (uploader.backlog, uploader.failures) == (1, 1)
    assert uploader.upload_due() == 5.0  # not before its time
    assert uploader.failures == 1
    clock.now = 5.0
    # Somebody begins anew, and knows nothing but the store.
    if step % 2:
        uploader = _uploader(store, f"refusing://{tmp_path}/remote", clock, keep_dump=False)
    assert uploader.upload_due() is None
    assert _accepted_by_sha256sum(remote)
    assert (remote / "vmcore.kdump").read_bytes() == b"content"
    here = store.record(record.id)
    assert here.dump.file is None
    assert here.dump.reason == f"uploaded to refusing://{tmp_path}/remote/{record.id}"
    assert not (store.directory(record.id) / "vmcore.kdump").exists()


def test_steps_are_as_many_as_the_test_above_refuses(tmp_path, refusing):
    store = make_store(tmp_path)
    for time_of_crash in (_EARLIER, _LATER):
        commit(store, make_record(time=time_of_crash))
    _uploader(store, f"refusing://{tmp_path}/remote").upload_due()
    one = ["makedirs", *["put_file"] * 2, *["pipe_file", "mv"] * 2]
    assert refusing.operations == ["connect", *one, *one]
    assert len(one) == _STEPS


def test_connection_that_failed_is_not_used_again(tmp_path, refusing):
    store = make_store(tmp_path)
    for time_of_crash in (_EARLIER, _LATER):
        commit(store, make_record(time=time_of_crash))
    refusing.failing[:] = [OSError("lost")]
    _uploader(store, f"refusing://{tmp_path}/remote").upload_due()
    assert refusing.operations[:4] == ["connect", "makedirs", "connect", "makedirs"]


def test_attempts_become_rarer_but_never_end(tmp_path, refusing):
    store = make_store(tmp_path)
    commit(store, make_record())
    clock = _Clock()
    uploader = _uploader(store, f"refusing://{tmp_path}/remote", clock, retry=1.0, retry_max=60.0)
    refusing.failing[:] = [OSError("no")] * 40
    pauses = []
    while (pause := uploader.upload_due()) is not None:
        pauses.append(pause)
        clock.now += pause
    assert pauses[:7] == [1, 2, 4, 8, 16, 32, 60]
    assert set(pauses[7:]) == {60}
    assert len(pauses) == 40


@pytest.mark.parametrize("step", [1, _STEPS - 1])
def test_attempt_that_hangs_is_given_up_and_made_again(tmp_path, refusing, step, caplog):
    store = make_store(tmp_path)
    record = commit(store, make_record())
    clock, answer = _Clock(), threading.Event()
    uploader = _uploader(store, f"refusing://{tmp_path}/remote", clock, timeout=2.0)
    refusing.failing[:] = [None] * step + [answer]
    assert uploader.upload_due() == 5.0
    assert "tried again in 5 s: not done within 2 s (timeout)" in caplog.text
    hanging = uploader._attempts[-1]  # one before it may not have ended yet
    uploader = _uploader(store, f"refusing://{tmp_path}/remote", clock)
    assert uploader.upload_due() is None
    uploaded = (tmp_path / "remote" / record.id / "crash.json").read_bytes()
    # What is answered at last must not undo it.
    operations = len(refusing.operations)
    answer.set()
    hanging.join(20)
    assert len(refusing.operations) == operations
    assert (tmp_path / "remote" / record.id / "crash.json").read_bytes() == uploaded
    assert _accepted_by_sha256sum(tmp_path / "remote" / record.id)


def test_attempts_that_hang_are_not_any_number(tmp_path, refusing, caplog):
    store = make_store(tmp_path)
    commit(store, make_record())
    clock, answer = _Clock(), threading.Event()
    uploader = _uploader(store, f"refusing://{tmp_path}/remote", clock, timeout=0.2)
    refusing.failing[:] = [answer] * 100
    for _ in range(20):
        clock.now += uploader.upload_due() or 0.0
    assert len(uploader._attempts) == 8
    assert "8 attempts hang; one must end before the next" in caplog.text
    refusing.failing.clear()
    answer.set()
    for attempt in uploader._attempts:
        attempt.join(20)
    uploader = _uploader(store, f"refusing://{tmp_path}/remote", clock)
    assert uploader.upload_due() is None


def test_hosts_do_not_come_back_at_once(tmp_path, refusing):
    store = make_store(tmp_path)
    commit(store, make_record())
    refusing.failing[:] = [OSError("no")] * 2
    pauses = [
        _uploader(store, f"refusing://{tmp_path}/r", jitter=lambda part=part: part).upload_due()
        for part in (0.0, 1.0)
    ]
    assert pauses == [2.5, 5.0]


def test_one_crash_that_cannot_be_uploaded_keeps_no_other_back(tmp_path):
    store = make_store(tmp_path)
    bad, good = commit(store, make_record()), commit(store, make_record(time=_LATER))
    (store.directory(bad.id) / "vmcore.kdump").write_bytes(b"CONTENT")  # the disk forgets
    uploader = _uploader(store, f"file://{tmp_path}/remote")
    assert uploader.upload_due() == 5.0
    assert store.record(good.id).uploaded is not None
    assert store.record(bad.id).uploaded is None
    assert not (tmp_path / "remote" / bad.id / "crash.json").exists()
    assert uploader.backlog == 1


def test_damage_on_the_way_is_noticed_and_sent_again(tmp_path, refusing, monkeypatch, caplog):
    store = make_store(tmp_path)
    record = commit(store, make_record())
    clock = _Clock()

    def damaged(_self, _local, remote, **_):
        Path(remote).write_bytes(b"CONTENT")

    with monkeypatch.context() as patch:
        patch.setattr(refusing, "put_file", damaged)
        pause = _uploader(store, f"refusing://{tmp_path}/remote", clock).upload_due()
    assert pause == 5.0
    assert "is not what was sent" in caplog.text
    assert _uploader(store, f"refusing://{tmp_path}/remote", clock).upload_due() is None
    assert _accepted_by_sha256sum(tmp_path / "remote" / record.id)


def test_what_has_arrived_is_not_sent_twice(tmp_path, refusing):
    store = make_store(tmp_path)
    record = commit(store, make_record())
    _uploader(store, f"refusing://{tmp_path}/remote").upload_due()
    with store.locked():  # killed before it was written down
        store.update(replace(store.record(record.id), uploaded=None))
    refusing.operations.clear()
    assert _uploader(store, f"refusing://{tmp_path}/remote").upload_due() is None
    assert refusing.operations == ["connect", "makedirs"]
    there = parse_record((tmp_path / "remote" / record.id / "crash.json").read_bytes())
    assert store.record(record.id) == there


def test_another_crash_of_this_name_is_not_overwritten(tmp_path, caplog):
    other = make_store(tmp_path / "other")
    record = commit(other, make_record(dump=False), {"dmesg.txt": b"of another host"})
    url = f"file://{tmp_path}/remote"
    _uploader(other, url).upload_due()
    store = make_store(tmp_path)
    commit(store, make_record())
    assert _uploader(store, url).upload_due() == 5.0
    assert "is another crash" in caplog.text
    assert (tmp_path / "remote" / record.id / "dmesg.txt").read_bytes() == b"of another host"


def test_held_crash_keeps_its_dump(tmp_path):
    store = make_store(tmp_path)
    record = commit(store, make_record())
    with store.locked():
        store.update(replace(record, held=True))
    _uploader(store, f"file://{tmp_path}/remote", keep_dump=False).upload_due()
    assert store.record(record.id).dump.file == "vmcore.kdump"


def test_states_of_signatures_go_along_and_whenever_they_change(tmp_path, refusing, monkeypatch):
    monkeypatch.setattr(upload, "_LOOK_SECONDS", 0.02)
    store = make_store(tmp_path)
    record = commit(store, make_record())
    uploader = _uploader(store, f"refusing://{tmp_path}/remote", time.monotonic, retry=0.05)
    there = tmp_path / "remote" / f".states-{socket.gethostname()}.json"
    uploader.start()
    try:
        wait_until(lambda: uploader.uploaded == 1)
        assert not there.exists()  # nobody has said anything
        refusing.failing[:] = [PermissionError("refused")]
        for state in _STATES:
            say(store, record.signature.id, state, "a note")
            wait_until(partial(_is_there, there, state))
    finally:
        uploader.stop()
    assert parse_states(there.read_bytes()).known == store.states().known
    assert uploader.failures == 1


def test_memory_file_system_is_an_object_store_without_directories(tmp_path):
    store = make_store(tmp_path)
    record = commit(store, make_record())
    assert _uploader(store, "memory://crashes").upload_due() is None
    memory = MemoryFileSystem()
    found = {Path(path).name for path in memory.find(f"/crashes/{record.id}")}
    assert found == {"SHA256SUMS", "crash.json", "dmesg.txt", "vmcore.kdump"}
    memory.rm("/crashes", recursive=True)


def test_thread_uploads_what_comes_and_ends(tmp_path):
    store = make_store(tmp_path)
    uploader = Uploader(store, Upload(f"file://{tmp_path}/remote"))
    uploader.start()
    record = commit(store, make_record())
    uploader.wake()
    wait_until(lambda: store.record(record.id).uploaded, "it is uploaded")
    uploader.stop()
    assert (tmp_path / "remote" / record.id / "crash.json").exists()


def test_unknown_kind_of_url_is_refused_at_once():
    with pytest.raises(RequestError, match="cannot upload to nonsense://: Protocol not known"):
        check_upload(Upload("nonsense://x"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://me:secret@host:22/a", "sftp://me@host:22/a"),
        ("s3://bucket/a", "s3://bucket/a"),
    ],
)
def test_passwords_are_not_shown(url, shown):
    assert without_password(url) == shown


class _Subsystem(paramiko.SubsystemHandler):  # type: ignore[misc]
    # OpenSSH's own, behind a connection of paramiko's.
    def start_subsystem(self, _name, _transport, channel):
        with subprocess.Popen([_SFTP_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as own:
            assert own.stdin
            assert own.stdout
            answers = own.stdout

            def answer() -> None:
                while block := os.read(answers.fileno(), 1 << 16):
                    channel.sendall(block)

            threading.Thread(target=answer, daemon=True).start()
            while block := channel.recv(1 << 16):
                own.stdin.write(block)
                own.stdin.flush()


class _Server(paramiko.ServerInterface):  # type: ignore[misc]
    def check_auth_password(self, username, password):
        accepted = (username, password) == ("farm", "secret")
        return paramiko.AUTH_SUCCESSFUL if accepted else paramiko.AUTH_FAILED

    def check_channel_request(self, _kind, _chanid):
        return paramiko.OPEN_SUCCEEDED


@contextmanager
def _sftp_server(port: int) -> Iterator[None]:
    key = paramiko.ECDSAKey.generate()
    transports: list[Any] = []

    def serve() -> None:
        with suppress(OSError):  # closed at the end
            while True:
                transport = paramiko.Transport(listener.accept()[0])
                transport.add_server_key(key)
                transport.set_subsystem_handler("sftp", _Subsystem)
                transport.start_server(threading.Event(), _Server())
                transports.append(transport)

    with socket.create_server(("127.0.0.1", port)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
    for transport in transports:
        transport.close()


@pytest.mark.skipif(not Path(_SFTP_SERVER).exists(), reason="sftp-server is not installed")
def test_sftp_server_that_comes_later_has_everything_in_the_end(tmp_path):
    store = make_store(tmp_path)
    record = commit(store, make_record(), {"vmcore.kdump": os.urandom(3 << 20)})
    remote = tmp_path / "crashes" / record.id
    clock = _Clock()
    with reserved_port() as port:
        url = f"sftp://127.0.0.1:{port}{tmp_path}/crashes"
        uploader = _uploader(store, url, clock, options={"username": "farm", "password": "secret"})
        assert uploader.upload_due() == 5.0
        clock.now = 5.0
        with _sftp_server(port):
            assert uploader.upload_due() is None
    assert _accepted_by_sha256sum(remote)
    assert stat.S_IMODE(remote.stat().st_mode) == 0o700
    uploaded = store.record(record.id).uploaded
    assert uploaded is not None
    assert uploaded.url == f"{url}/{record.id}"


def test_object_store_takes_a_crash_and_gives_it_back(tmp_path):
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - seconds

    store = make_store(tmp_path)
    record = commit(store, make_record(), {"vmcore.kdump": os.urandom(3 << 20), "dmesg.txt": b""})
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"key": "farm", "secret": "secret", "endpoint_url": f"http://{host}:{port}"}
        fsspec.filesystem("s3", **options).mkdir("crashes")
        assert _uploader(store, "s3://crashes/nightly", options=options).upload_due() is None
        bucket = fsspec.filesystem("s3", **options, skip_instance_cache=True)
        bucket.get(f"crashes/nightly/{record.id}", str(tmp_path / "back"), recursive=True)
    finally:
        server.stop()
    assert _accepted_by_sha256sum(tmp_path / "back")
    assert not list((tmp_path / "back").glob("*.part"))
    assert store.record(record.id).uploaded is not None
