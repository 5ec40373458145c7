"""The pure parts of the HMP proxy: lines, tables, JSON in a stream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hmp.human.command_table import parse_tables, with_our_help
from hmp.human.dump_line import BadExtension, DumpLine, NativeLine, parse_dump_line
from hmp.qmp.json_stream import JsonError, JsonStream
from hmp.readline import HISTORY_MAX, LINE_MAX, LineEditor
from qemu_dump_ext.plan.request import Live

CODECS = ("zlib", "lzo", "snappy", "zstd", "none")
SOURCES = ("auto", "pmemsave")


def parse(line: str) -> DumpLine | NativeLine | BadExtension:
    return parse_dump_line(line, CODECS, SOURCES)


@pytest.mark.parametrize(
    ("line", "flags", "codec", "filename", "bounds"),
    [
        ("dump-guest-memory f", "", None, "f", ""),
        ("  dump-guest-memory   -p  f ", "p", None, "f", ""),
        ("dump-guest-memory -p -d f 0 1", "pd", None, "f", "0 1"),
        ("dump-guest-memory -pd", "p", None, "d", ""),  # as QEMU: one letter, then the name
        ("dump-guest-memory -z f", "z", "zlib", "f", ""),
        ("dump-guest-memory -z zlib", "z", "zlib", "zlib", ""),
        ("dump-guest-memory -z zstd f", "z", "zstd", "f", ""),
        ("dump-guest-memory -d -z none -R f", "dzR", "none", "f", ""),
        ("dump-guest-memory -l -R f", "lR", "lzo", "f", ""),
        ("dump-guest-memory -R f", "R", None, "f", ""),
        ("dump-guest-memory -d -w f", "dw", None, "f", ""),
        ('dump-guest-memory "a b\\n\\"\\\\" 1', "", None, 'a b\n"\\', "1"),
        ('dump-guest-memory a"b', "", None, 'a"b', ""),
    ],
)
def test_line_of_ours(line: str, flags: str, codec: str | None, filename: str, bounds: str):
    named = codec in {"zstd", "none"}
    expected = DumpLine(filename, frozenset(flags), codec, bounds, names_codec=named)
    assert parse(line) == replace(expected, windows="w" in flags)


@pytest.mark.parametrize(
    "rest",
    [
        *("", "-q f", "-d -p f", "-R -z f", "-z -l f", "-z f 0 1", "-p -z f"),
        *("-p -w f", "-w f 0 1", "-w -z f", "-w -R f"),
        *("--nosuch f", "- f", '"f', '"\\q"', "-z -z f"),
    ],
)
def test_line_that_qemu_refuses_goes_to_qemu_as_it_is(rest: str):
    line = f" dump-guest-memory {rest}"
    assert parse(line) == NativeLine(line)


def test_extensions():
    assert parse("dump-guest-memory -d --native -z f") == NativeLine("dump-guest-memory -d -z f")
    assert parse("dump-guest-memory --memory pmemsave -p --mended f") == DumpLine(
        "f", frozenset("p"), None, "", memory="pmemsave", mended=True
    )
    for words, live in (("--live", Live.REQUIRE), ("--live=prefer", Live.PREFER)):
        line = parse(f"dump-guest-memory {words} -z f")
        assert isinstance(line, DumpLine)
        assert (line.filename, line.live, line.extends_qemu) == ("f", live, True)
    assert isinstance(parse("dump-guest-memory --live=now f"), BadExtension)
    assert isinstance(parse("dump-guest-memory --memory nosuch f"), BadExtension)
    assert isinstance(parse("dump-guest-memory --memory"), BadExtension)


HELP = """cont|c  -- resume emulation
dump-guest-memory [-p] filename [begin length] -- dump guest memory into file 'filename'.
\t\t\t-p: do paging to get guest's memory mapping.
info [subcommand] -- show various information about the system state
screendump filename [device [head]] [-f format] -- save screen
x /fmt addr -- virtual memory dump starting at 'addr'
"""
INFO = "info status  -- show the current VM status\ninfo stats target -- show statistics\n"


def test_completion(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    table = parse_tables(HELP, INFO)

    def complete(text: str) -> tuple[list[str], int]:
        found, typed = table.complete(text, tmp_path)
        return sorted(found), typed

    assert complete("co") == (["cont"], 2)
    assert complete("dump-") == (["dump-cancel", "dump-guest-memory"], 5)
    assert complete("info sta") == (["stats", "status"], 3)
    assert complete("help co") == (["cont"], 2)
    assert complete("screendump f") == (["file", "folder/"], 1)
    assert complete('dump-guest-memory -p "fi') == (['"file'], 3)
    assert complete("x f") == ([], 0)
    assert complete("nosuch f") == ([], 0)
    assert complete(f"screendump {tmp_path}/no/such") == ([], len(f"{tmp_path}/no/such"))


def test_help_gets_ours_in_place():
    text = with_our_help(HELP.replace("\n", "\r\n"), CODECS)
    lines = text.split("\r\n")
    assert lines[1].startswith("dump-cancel ")
    assert lines[2].startswith("dump-guest-memory [-p] [-d] [-z|-l|-s|-w] [-R] filename")
    assert lines.index("info [subcommand] -- show various information about the system state") > 5
    assert with_our_help("unknown command: 'x'\r\n", CODECS) == "unknown command: 'x'\r\n"


def test_history_and_line_are_bounded():
    editor = LineEditor((7, 2, 0))
    for number in range(2 * HISTORY_MAX):
        for key in b"line%d\n" % number:
            editor.feed(key)
    assert len(editor.history) == HISTORY_MAX
    for _ in range(LINE_MAX + 10):
        editor.feed(ord("x"))
        editor.take_output()
    assert editor.feed(10) == b"x" * LINE_MAX


def test_text_is_shown_above_the_line():
    editor = LineEditor((7, 2, 0))
    for key in b"ab":
        editor.feed(key)
    editor.take_output()
    editor.show_again(b"news\r\n")
    assert editor.take_output() == b"\r\x1b[Knews\r\n(qemu) ab\x1b[K"


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_json_in_any_pieces(step: int):
    text = b""" {"a":[1,{"b":"}\\"]"}]}{'c':'it\\'s "d"'}\r\n{"e":\n2}  [3]\nfoo\n{"f":4}"""
    stream = JsonStream()
    values = [
        value for start in range(0, len(text), step) for value in stream.feed(text[start:][:step])
    ]
    assert values[:4] == [{"a": [1, {"b": '}"]'}]}, {"c": 'it\'s "d"'}, {"e": 2}, [3]]
    assert values[4] == JsonError("JSON parse error, invalid keyword 'foo'")
    assert values[5:] == [{"f": 4}]


def test_json_without_end_is_bounded():
    stream = JsonStream()
    piece = b'{"a":"' + b"x" * (1 << 20)
    found = [value for _ in range(40) for value in stream.feed(piece)]
    assert JsonError("JSON token size limit exceeded") in found
