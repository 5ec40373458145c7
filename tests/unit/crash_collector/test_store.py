from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from dataclasses import replace

import pytest

from qemu_dump_ext.crash_collector.outlets.report import write_report
from qemu_dump_ext.crash_collector.record import CorruptRecordError, parse_record
from qemu_dump_ext.crash_collector.store import store as crash_store
from qemu_dump_ext.errors import DumpWriteError, RequestError
from tests.support.crashes import commit, make_record, make_store


def test_record_is_read_back_as_written():
    record = make_record()
    assert parse_record(record.to_json()) == record
    keys = set(json.loads(record.to_json()))
    assert {"schema_version", "signature", "dump", "uploaded", "held", "files"} <= keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"cause": {"kind": "bad", "detail": "", "event": None}}, "cause.kind: "),
        ({"more": 1}, "more: Unexpected keyword argument"),
        ({"occurrence": -1}, "occurrence: "),
        ({"occurrence": 1 << 70}, "occurrence: "),
        ({"time": "yesterday"}, "time: "),
        ({"time": "2026-01-31T12:00:00"}, "time: .*no time zone"),
        ({"time": "0001-01-01T00:00:00+14:00"}, "time: .*no calendar"),
        ({"guest": "../x"}, "guest: "),
        ({"guest": "x" * 300}, "guest: "),
        ({"id": "web2/20260131T120000.000001Z-0123456789abcdef"}, "id: it is none of guest web1"),
        ({"id": "web1/../x-0123456789abcdef"}, "id: "),
        ({"signature": {"id": "../../x", "message": "", "frames": []}}, "signature.id: "),
        ({"guest_stopped_seconds": -1.0}, "guest_stopped_seconds: "),
        ({"guest_stopped_seconds": float("inf")}, "(Invalid JSON|guest_stopped)"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "files"),
        ({"files": {"x": {"bytes": 1, "sha256": "x"}}}, "files.x.sha256: "),
        ({"uploaded": {"url": "s3://x", "time": "now"}}, "uploaded.time: "),
        ({"dump": {"file": "/etc/passwd", "format": "elf"}}, "dump.file: .*no name of a file"),
        ({"dump": {"file": "..", "format": "elf"}}, "dump.file: .*no name of a file"),
        ({"occurrence": "1"}, "occurrence: Input should be a valid integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_record_of_another_form_is_refused(change, message):
    content = json.loads(make_record().to_json()) | change
    with pytest.raises(CorruptRecordError, match=message):
        parse_record(json.dumps(content))


@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 100_000, b'"\\ud800"', b"9" * 5000, b"x"])
def test_record_that_is_no_json_is_refused(text):
    with pytest.raises(CorruptRecordError, match=r"^crash.json: "):
        parse_record(text)
    content = make_record().to_json().encode()
    with pytest.raises(CorruptRecordError, match=r"^crash.json: "):
        parse_record(content.replace(b'"event": "GUEST_PANICKED"', b'"event": ' + text))


def test_record_of_what_is_no_text_is_written_and_read(tmp_path):
    store = make_store(tmp_path)
    record = make_record()
    cause = replace(record.cause, detail="a\ud800b", event={"\udc80": ["\ud800"]})
    record = commit(
        store, replace(record, cause=cause, remarks=("\udfff",), labels={"\ud800": "x"})
    )
    (read,) = store.records()
    assert (read.cause.detail, read.cause.event) == ("a?b", {"?": ["?"]})
    write_report(store, tmp_path / "report.html", now=read.moment)
    assert b"a?b" in (tmp_path / "report.html").read_bytes()


def test_stored_crash_is_private_and_sha256sum_accepts_it(tmp_path):
    store = make_store(tmp_path)
    record = commit(store, make_record())
    assert record.id == "web1/20260131T120000.000001Z-0123456789abcdef"
    directory = store.directory(record.id)
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=directory, check=True)
    listed = (directory / "SHA256SUMS").read_text().split()[1::2]
    assert sorted(listed) == ["crash.json", "dmesg.txt", "vmcore.kdump"]
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in (store.path, directory.parent, directory):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert store.record(record.id) == record
    assert list(store.records()) == [record]
    assert not list((store.path / ".incoming").iterdir())


def test_same_moment_twice_makes_two_crashes(tmp_path):
    store = make_store(tmp_path)
    first, second = (commit(store, make_record()) for _ in range(2))
    assert second.id == f"{first.id}.2"
    assert (first.occurrence, second.occurrence) == (1, 2)
    assert store.record(second.id) == second
    assert store.dumps_of(first.signature.id) == 2


def test_counts_survive_what_is_removed_and_begin_with_the_records_when_lost(tmp_path):
    store = make_store(tmp_path)
    first = commit(store, make_record(time="2026-01-31T12:00:00.000000+00:00"))
    second = commit(store, make_record(time="2026-02-01T12:00:00.000000+00:00"))
    with store.locked():
        store.remove(first)
    assert [record.id for record in store.records()] == [second.id]
    (count,) = store.signatures().values()
    assert (count.count, count.first_seen) == (2, first.time)
    (store.path / ".signatures.json").write_text("{")
    (count,) = store.signatures().values()
    assert (count.count, count.first_seen, count.last_seen) == (2, second.time, second.time)


@pytest.mark.parametrize("before", [0, 1])
def test_crash_that_was_stored_but_not_counted_is_counted_by_the_next_one(tmp_path, before):
    store = make_store(tmp_path)
    commit(store, make_record(signature="f" * 16))
    for _ in range(before):
        commit(store, make_record())
    counts = (store.path / ".signatures.json").read_bytes()
    commit(store, make_record())
    (store.path / ".signatures.json").write_bytes(counts)  # killed in between
    store.prepare()
    assert store.signatures()["0123456789abcdef"].count == before + 1
    assert commit(store, make_record()).occurrence == before + 2


DAMAGE = {
    "no JSON": b"{",
    "list": b"[]",
    "deep": b"[" * 100_000,
    "wrong count": b'{"0123456789abcdef": {"message": "", "count": "1", "first_seen": "t"}}',
    "no time": b'{"0123456789abcdef": {"message": "", "count": 1, "first_seen": "t",'
    b' "last_seen": "t"}}',
    "zero": b'{"0123456789abcdef": {"message": "", "count": 0,'
    b' "first_seen": "2026-01-31T12:00:00+00:00", "last_seen": "2026-01-31T12:00:00+00:00"}}',
    "digits": b'{"0123456789abcdef": {"message": "", "count": ' + b"9" * 5000 + b"}}",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_counts_are_set_aside_and_counted_anew(tmp_path, caplog, kind):
    store = make_store(tmp_path)
    first = commit(store, make_record())
    (store.path / ".signatures.json").write_bytes(DAMAGE[kind])
    assert store.signatures()[first.signature.id].count == 1  # by whoever only looks
    assert "is counted anew" in caplog.text
    write_report(store, tmp_path / "report.html", now=first.moment)
    assert (store.path / ".signatures.json").read_bytes() == DAMAGE[kind]
    assert commit(store, make_record()).occurrence == 2
    (aside,) = store.path.glob(".signatures.json.damaged-*")
    assert aside.read_bytes() == DAMAGE[kind]
    assert "is damaged" in caplog.text
    assert store.signatures()[first.signature.id].count == 2
    assert [record.occurrence for record in store.records()] == [1, 2]


@pytest.mark.parametrize("what", ["counts", "names"])
def test_crash_is_stored_once_whatever_fails_behind_that(tmp_path, monkeypatch, what):
    """As when the disk is full: the directory has its name, and nothing else can be written."""
    store = make_store(tmp_path)
    commit(store, make_record())

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if what == "counts":
            patch.setattr(crash_store, "replace_file", fail)
        else:
            patch.setattr(os, "fsync", lambda fd: fail() if is_store(fd) else None)
        assert [commit(store, make_record()).occurrence for _ in range(3)] == [2, 3, 4]
    assert commit(store, make_record()).occurrence == 5
    assert len(list(store.records())) == 5
    assert not list((store.path / ".incoming").iterdir())
    assert make_store(tmp_path).signatures()["0123456789abcdef"].count == 5


def is_store(descriptor: int) -> bool:
    names = os.listdir(descriptor) if stat.S_ISDIR(os.fstat(descriptor).st_mode) else []
    return ".incoming" in names or any("-0123456789abcdef" in name for name in names)


def test_what_was_seen_longest_ago_is_not_counted_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(crash_store, "_SIGNATURES_MAX", 2)
    store = make_store(tmp_path)
    for number in range(3):
        time = f"2026-01-31T12:00:0{number}.000000+00:00"
        commit(store, make_record(signature=f"{number:016x}", time=time))
    assert sorted(store.signatures()) == [f"{1:016x}", f"{2:016x}"]


def test_removed_dump_leaves_the_rest_with_the_reason(tmp_path):
    store = make_store(tmp_path)
    record = commit(store, make_record())
    with store.locked():
        store.remove_dump(record, "room was needed")
    left = store.record(record.id)
    assert (left.dump.file, left.dump.reason) == (None, "room was needed")
    assert set(left.files) == {"dmesg.txt"}
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=store.directory(record.id), check=True)
    assert store.dumps_of(record.signature.id) == 0


def test_damaged_record_is_passed_over_and_said(tmp_path, caplog):
    store = make_store(tmp_path)
    good, bad = commit(store, make_record()), commit(store, make_record("web2"))
    (store.directory(bad.id) / "crash.json").write_text("{}")
    assert list(store.records()) == [good]
    assert "web2" in caplog.text
    with pytest.raises(CorruptRecordError):
        store.record(bad.id)


def test_crash_that_cannot_be_written_does_not_appear(tmp_path):
    store = make_store(tmp_path)
    incoming = store.new_incoming("web1")
    (incoming / "gone").symlink_to("/nonexistent")
    with pytest.raises(DumpWriteError, match="cannot store a crash of web1"):
        store.commit(incoming, make_record())
    assert list(store.records()) == []
    assert store.remove_incoming() == [incoming.name]
    assert not incoming.exists()


@pytest.mark.parametrize("crash_id", ["../x", "web1", "/etc/passwd", "web1/../../x", ""])
def test_id_never_leads_out_of_the_store(tmp_path, crash_id):
    with pytest.raises(RequestError, match="is no crash"):
        make_store(tmp_path).record(crash_id)


def test_store_is_shared_by_one_at_a_time(tmp_path):
    store = make_store(tmp_path)
    code = "import fcntl,sys;fcntl.flock(open(sys.argv[1],'a'),fcntl.LOCK_EX|fcntl.LOCK_NB)"
    argv = ["python3", "-c", code, os.fspath(store.path / ".lock")]
    with store.locked():
        assert subprocess.run(argv, check=False, stderr=subprocess.PIPE).returncode
    assert not subprocess.run(argv, check=False).returncode


def test_update_keeps_the_checksums_true(tmp_path):
    store = make_store(tmp_path)
    record = commit(store, make_record())
    with store.locked():
        store.update(replace(record, held=True))
    assert store.record(record.id).held
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=store.directory(record.id), check=True)
