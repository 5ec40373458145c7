from __future__ import annotations

import pytest

from qemu_dump_ext.errors import MonitorAnswerError
from qemu_dump_ext.qemu.qmp_message import (
    command_names,
    monitor_text,
    parse_message,
    run_state,
    target_of,
    version_text,
)


def nested(depth: int) -> bytes:
    return b'{"return": ' + b"[" * depth + b"]" * depth + b"}"


def test_message_is_what_json_says():
    assert parse_message(b'{"return": {"a": [1, "\xc3\xa9"]}, "id": "x"}\n') == {
        "return": {"a": [1, "é"]},
        "id": "x",
    }
    assert parse_message(nested(199))["return"]
    wide = b'{"return": [' + b"[]," * 10_000 + b"0]}"
    assert len(parse_message(wide)["return"]) == 10_001
    assert parse_message(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "it is no JSON"),
        (b"{", "it is no JSON"),
        (b"[1]", "it is no JSON object"),
        (b"null", "it is no JSON object"),
        (nested(200), "it is nested more than 200 levels deep"),
        (nested(100_000), "it is nested more than 200 levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": 1e999}', "it has the number 1e999"),
        (b'{"a": NaN}', "it has the number NaN"),
        (b'{"a": -Infinity}', "it has the number -Infinity"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_message_that_makes_no_sense_is_said_in_one_line(line, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_message(line)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "line", [rb'{"a": "\ud800", "\udfff": 1}', b'{"a": "\xed\xa0\x80\xff"}', b'{"\xfe": 1}']
)
def test_text_of_a_message_can_be_written(line):
    str(parse_message(line)).encode()


@pytest.mark.parametrize("answer", [None, [], [None], 7, "x", {}, {"status": 7}, {"status": ""}])
def test_answer_of_the_wrong_kind_is_refused(answer):
    for read in (run_state, target_of):
        with pytest.raises(MonitorAnswerError, match="the answer makes no sense: it is"):
            read(answer)
    assert version_text(answer) == "unknown"
    if answer != []:
        with pytest.raises(MonitorAnswerError, match="query-commands"):
            command_names(answer)
    if not isinstance(answer, str):
        with pytest.raises(MonitorAnswerError, match="info x"):
            monitor_text("info x", answer)


def test_answer_of_the_right_kind_is_read():
    assert run_state({"status": "running", "running": True}) == "running"
    assert target_of({"arch": "mipsel"}) == "mipsel"
    assert command_names([{"name": "quit"}, {"name": "stop"}]) == ["quit", "stop"]
    assert version_text({"qemu": {"major": 7, "minor": 2, "micro": 22}}) == "7.2.22"
    assert version_text({"qemu": {"major": 7, "minor": 2, "micro": 10**4000}}) == "unknown"
    assert monitor_text("info x", "a\r\nb") == "a\nb"
