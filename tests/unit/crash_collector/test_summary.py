"""What lists show of crashes: the same as their records, from a part of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from qemu_dump_ext.crash_collector.store.files import RECORD_FILE
from qemu_dump_ext.crash_collector.store.summary import crash_directories, summaries
from tests.support.crashes import commit, make_record, make_store
from tests.support.doors import child_environment


def test_summary_says_what_the_record_does(tmp_path):
    store = make_store(tmp_path)
    later = "2026-02-01T12:00:00.000001+00:00"
    commit(store, make_record())
    last = commit(store, make_record("web2", time=later, dump=False))
    with store.locked():
        store.update(replace(last, held=True))
    records = {record.id: record for record in store.records()}
    found = {crash.id: crash for crash in summaries(store.path)}
    assert found.keys() == records.keys()
    for crash_id, record in records.items():
        crash = found[crash_id]
        assert (crash.guest, crash.moment, crash.cause, crash.held) == (
            record.guest,
            record.moment,
            record.cause.kind,
            record.held,
        )
        assert (crash.signature, crash.message) == (record.signature.id, record.signature.message)
        assert crash.dump_bytes == (record.dump.bytes if record.dump.file else None)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ((), []),
        (("id",), "web9/20260131T120000.000001Z-0123456789abcdef"),
        (("guest",), "web"),
        (("time",), "2026-01-31T12:00:00"),
        (("time",), 5),
        (("signature", "id"), "../../etc"),
        (("signature", "message"), None),
        (("cause",), "panic"),
        (("dump", "bytes"), {}),
        (("held",), ...),
    ],
)
def test_what_is_damaged_is_passed_over_and_said(tmp_path, caplog, keys, value):
    store = make_store(tmp_path)
    path = store.directory(commit(store, make_record()).id) / RECORD_FILE
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    elif keys:
        place[keys[-1]] = value
    else:
        content = value
    path.write_text(json.dumps(content))
    assert list(summaries(store.path)) == []
    assert f"{path.parent} is passed over: crash.json: " in caplog.text


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"1" * 10_000])
def test_what_is_no_json_is_passed_over(tmp_path, content):
    store = make_store(tmp_path)
    path = store.directory(commit(store, make_record()).id) / RECORD_FILE
    path.write_bytes(content)
    (store.path / "a-file").write_text("")
    assert list(summaries(store.path)) == []
    assert len(crash_directories(store.path)) == 1


def test_list_checks_no_more_than_it_shows(tmp_path):
    """What checks whole records takes longer to import than all of a list."""
    store = make_store(tmp_path)
    commit(store, make_record())
    store.change_states(lambda states: states.known.clear())
    (tmp_path / "c.yaml").write_text(f"store: {store.path}  # of this host\nguests: wrong\n")
    script = (
        "import sys; from qemu_dump_ext.entry import qemu_crash_collector as run; run();"
        " print({'pydantic', 'yaml', 'hashlib'} & {*sys.modules}, file=sys.stderr)"
    )
    for words in (["--store", str(store.path)], ["--config", str(tmp_path / "c.yaml")]):
        done = subprocess.run(
            [sys.executable, "-c", script, "list", *words],
            capture_output=True,
            text=True,
            check=True,
            env=child_environment(COLUMNS=None),
        )
        assert "sysrq triggered crash" in done.stdout
        assert done.stderr == "set()\n"
