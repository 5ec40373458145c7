from __future__ import annotations

import pytest

from qemu_dump_ext.crash_collector.store.lookup import find_crash, find_signature, short_ids
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import RequestError
from tests.support.crashes import commit, make_record, make_store

A, B = "a" * 16, "b" * 16


@pytest.fixture
def store(tmp_path) -> CrashStore:
    store = make_store(tmp_path)
    for guest, signature, time in (
        ("web1", A, "2026-01-31T12:00:00.000001+00:00"),
        ("web1", B, "2026-01-31T12:00:00.000002+00:00"),
        ("web2", A, "2026-01-31T13:00:00.000000+00:00"),
        ("db", A, "2025-12-31T00:00:00.000000+00:00"),
    ):
        commit(store, make_record(guest, signature=signature, time=time))
    return store


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("latest", f"web2/20260131T130000.000000Z-{A}"),
        ("web1", f"web1/20260131T120000.000002Z-{B}"),
        ("web1/latest", f"web1/20260131T120000.000002Z-{B}"),
        ("db", f"db/20251231T000000.000000Z-{A}"),
        ("db/2025", f"db/20251231T000000.000000Z-{A}"),
        ("20251231", f"db/20251231T000000.000000Z-{A}"),
        ("web1/20260131T120000.000001", f"web1/20260131T120000.000001Z-{A}"),
        (A, f"web2/20260131T130000.000000Z-{A}"),
        (f"web1/20260131T120000.000001Z-{A}", f"web1/20260131T120000.000001Z-{A}"),
    ],
)
def test_crash_is_found_by_what_people_type(store, words, expected):
    assert find_crash(store, words) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("web1/2026", "'web1/2026' begins 2 crashes: ..., web1/20260131T120000.000001Z"),
        ("web", "'web' begins 3 crashes"),
        ("nobody", "there is no crash 'nobody' in "),
        ("", "there is no crash ''"),
        ("../store/web1", "there is no crash '../store/web1'"),
    ],
)
def test_what_means_none_or_several_is_refused(store, words, said):
    with pytest.raises(RequestError) as caught:
        find_crash(store, words)
    assert said in str(caught.value)


def test_empty_store_has_no_latest(tmp_path):
    with pytest.raises(RequestError, match="there is no crash in "):
        find_crash(make_store(tmp_path), "latest")


def test_short_ids_mean_the_same(store):
    shortened = short_ids(store.path)
    assert shortened[f"db/20251231T000000.000000Z-{A}"] == "db/20251231T000000"
    assert all(find_crash(store, short) == name for name, short in shortened.items())


def test_signature_is_found_by_its_beginning_or_a_crash_of_it(store):
    assert find_signature(store, "b") == B
    assert find_signature(store, "db") == A
    assert find_signature(store, "aa") == A
    with pytest.raises(RequestError, match="there is no crash 'c'"):
        find_signature(store, "c")
