from __future__ import annotations

from dataclasses import replace

import pytest

from qemu_dump_ext.crash_collector.store.states import (
    STATES_FILE,
    SignatureState,
    SignatureStates,
    check_merge,
    read_states,
    release_key,
)
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import RequestError
from tests.support.crashes import commit, make_record, make_store

A, B, C = "a" * 16, "b" * 16, "c" * 16


def set_state(store: CrashStore, signature: str, state: SignatureState) -> None:
    store.change_states(lambda states: states.known.update({signature: state}))


def crash(store: CrashStore, signature: str, kernel: str | None) -> str:
    commit(store, replace(make_record(signature=signature), kernel=kernel))
    return store.states().effective(signature).state


@pytest.mark.parametrize(
    ("kernel", "fixed_in", "expected"),
    [
        ("6.1.0-44-amd64", "6.1.0-45-amd64", "resolved"),
        ("6.1.0-45-amd64", "6.1.0-45-amd64", "regression"),
        ("6.10.0", "6.9", "regression"),
        ("6.9.0-rc3", "6.9", "resolved"),
        ("6.9.0", "6.9.0-rc3", "regression"),
        (None, "6.9", "regression"),
        ("5.10.0", None, "regression"),
    ],
)
def test_resolved_signature_that_comes_back_is_a_regression(tmp_path, kernel, fixed_in, expected):
    store = make_store(tmp_path)
    assert crash(store, A, kernel) == "open"
    set_state(store, A, SignatureState("resolved", "by Ada", fixed_in))
    assert crash(store, A, kernel) == expected
    assert store.states().of(A).note == "by Ada"


@pytest.mark.parametrize("state", ["acknowledged", "open", "regression"])
def test_other_states_stay_when_it_comes_back(tmp_path, state):
    store = make_store(tmp_path)
    set_state(store, A, SignatureState(state))
    assert crash(store, A, "6.1.0") == state


def test_merged_signatures_are_one(tmp_path):
    store = make_store(tmp_path)
    for signature in (A, B, C):
        commit(store, make_record(signature=signature))
    set_state(store, A, SignatureState("merged", into=B))
    set_state(store, B, SignatureState("merged", into=C))
    states = store.states()
    assert states.canonical(A) == C
    assert states.family(B) == {A, B, C}
    assert store.dumps_of(A) == store.dumps_of(C) == 3
    with pytest.raises(RequestError, match="are one already"):
        check_merge(states, C, A)
    set_state(store, C, SignatureState("resolved"))
    assert crash(store, A, "6.1.0") == "regression"


def test_circle_of_merges_has_an_end():
    states = SignatureStates(
        {A: SignatureState("merged", into=B), B: SignatureState("merged", into=A)}
    )
    assert states.canonical(A) in {A, B}


def test_damaged_states_are_open_and_kept_for_whoever_wants_to_know(tmp_path):
    store = make_store(tmp_path)
    path = store.path / STATES_FILE
    path.write_text('{"x": 1}')
    assert store.states().of(A).state == "open"
    assert crash(store, A, None) == "open"
    set_state(store, A, SignatureState("acknowledged"))
    assert store.states().of(A).state == "acknowledged"
    assert [p.read_text() for p in store.path.glob(f"{STATES_FILE}.damaged-*")] == ['{"x": 1}']


def test_releases_are_in_order():
    ordered = ["5.10.0", "6.1.0-9", "6.1.0-10", "6.9.0-rc1", "6.9.0-rc10", "6.9", "6.9.1", "6.10"]
    assert sorted(ordered, key=release_key) == ordered


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"x": {}}',
        '{"0123456789abcdef": []}',
        '{"0123456789abcdef": {"other": 1}}',
        '{"0123456789abcdef": {"state": "gone"}}',
        '{"0123456789abcdef": {"state": ["open"]}}',
        '{"0123456789abcdef": {"note": 1}}',
        '{"0123456789abcdef": {"into": "../x"}}',
        '{"0123456789abcdef": {"changed": "yesterday"}}',
        '{"0123456789abcdef": {"fixed_in": "%s"}}' % ("6" * 1000),
        "[" * 100_000,
    ],
)
def test_what_write_states_does_not_write_is_passed_over(tmp_path, caplog, content):
    path = tmp_path / STATES_FILE
    path.write_text(content)
    assert read_states(path).known == {}
    assert "is passed over: " in caplog.text
