from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from qemu_dump_ext.cli import main
from qemu_dump_ext.cli.collector import run as run_command
from qemu_dump_ext.cli.crash_collector_command import main as collector_main
from qemu_dump_ext.printable import printable
from tests.support.crashes import commit, make_record, make_store
from tests.support.sample_kdump import BLOCK, make_kdump

HOSTILE = "\x1b]0;x\x07\x1b[2J\x9b31m\x7f\u202e\r\x00\ud800"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("as it is é 😀", "as it is é 😀"),
        ("two\nlines\tand", "two\nlines\tand"),
        ("\x1b[31m", "\\u001b[31m"),
        ("\x9b31m\r\x7f\u202e\ud800", "\\u009b31m\\u000d\\u007f\\u202e\\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_by_its_number(text, shown):
    assert printable(text) == shown


def test_line_stays_one_line():
    assert printable("a\nb\tc", keep="\t") == "a\\u000ab\tc"


@pytest.fixture
def hostile_store(tmp_path):
    store = make_store(tmp_path)
    record = make_record()
    record = replace(
        record,
        cause=replace(record.cause, detail=HOSTILE),
        signature=replace(record.signature, message=HOSTILE, frames=(HOSTILE,)),
        dump=replace(record.dump, left_out=(HOSTILE,), reason=HOSTILE),
        labels={HOSTILE: HOSTILE},
        remarks=(HOSTILE,),
    )
    return store, commit(store, record)


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["list", "--json"],
        ["list", "--signatures"],
        ["list", "--signatures", "--json"],
        ["show", "ID"],
        ["show", "--json", "ID"],
        ["show", f"x{HOSTILE[:-1]}"],
        ["report", "--output", "OUTPUT"],
    ],
    ids=" ".join,
)
def test_commands_of_the_collector_print_what_is_printable(hostile_store, tmp_path, capsys, words):
    store, record = hostile_store
    given = {"ID": record.id, "OUTPUT": str(tmp_path / "a\x1b[2J.html")}
    words = [given.get(word, word) for word in words]
    collector_main([words[0], "--store", str(store.path), *words[1:]])
    out, err = capsys.readouterr()
    assert out or err
    assert all(line.replace("\t", "").isprintable() for line in (out + err).splitlines())
    if words[:2] == ["show", "--json"]:
        assert json.loads(out)["remarks"][0].startswith("\x1b]0;x")


@pytest.mark.parametrize("kind", [run_command.TextFormatter, run_command.JsonFormatter])
def test_log_of_the_agent_is_printable(kind):
    info = (RuntimeError, RuntimeError(HOSTILE), None)
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "said %s\nforged", (HOSTILE,), info)
    record.guest = "box"
    text = kind().format(record)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\nforged" not in text


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_a_dump_tells_is_printed_so(tmp_path, capsys, command):
    text = HOSTILE.encode("utf-8", "replace").replace(b"\x00", b"")
    sample = make_kdump(
        {0: b"text" * 1024, 1: bytes(BLOCK)},
        vmcoreinfo=b"OSRELEASE=" + text.replace(b"\r", b"") + b"\nPAGESIZE=4096\n" + text + b"=1\n",
    )
    (tmp_path / "dump").write_bytes(bytes(sample.data))
    main([command, str(tmp_path / "dump")])
    out, err = capsys.readouterr()
    assert all(line.replace("\t", "").isprintable() for line in (out + err).splitlines()), out
