from __future__ import annotations

import pytest

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.options.dump_options import (
    add_dump_arguments,
    add_file_arguments,
    parse_dump_arguments,
)
from qemu_dump_ext.options.expressions import is_expression, parse_expressions
from qemu_dump_ext.options.parsers import OneLineParser

# Values are those that QEMU 7.2's monitor prints for `print EXPRESSION`.
VALUES = {
    "0x1000": 0x1000,
    "0XfF": 255,
    "017": 15,
    "1 + 2 * 3": 7,
    "1 + 2 & 3": 3,  # & binds tighter than +
    "1 | 2 + 4 ^ 1": 8,
    "(1 + 2) * 3": 9,
    "-7 / 2": -3,
    "-7 % 2": -1,
    "~0": -1,
    "'a'": 97,
    "' ' + 1": 33,
    "0xffffffffffffffff": -1,
    "0x7fffffffffffffff + 1": -(1 << 63),
    "- - 5": 5,
}


@pytest.mark.parametrize("text", VALUES)
def test_value(text):
    assert parse_expressions(text, "print", 1) == [VALUES[text]]


@pytest.mark.qemu
def test_values_are_the_monitors(bare_machine):
    from tests.support.raw_qmp import RawQmp  # noqa: PLC0415

    with RawQmp(bare_machine.qmp_sockets[1]) as qmp:
        for text, value in VALUES.items():
            answer = qmp.execute("human-monitor-command", **{"command-line": f"print/d {text}"})
            assert int(answer) == value, text


REFUSED = {
    "4k": "invalid char 'k' in expression",
    "0 4k": "dump-guest-memory: extraneous characters at the end of line",
    "1 2 3": "dump-guest-memory: extraneous characters at the end of line",
    "(1": "')' expected",
    "1 +": "unexpected end of expression",
    "'": "character constant expected",
    "'ab'": "missing terminating ' character",
    "1 / 0": "division by zero",
    "0x10000000000000000": "number too large",
    "$nosuch": "unknown register",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text):
    with pytest.raises(RequestError) as error:
        parse_expressions(text, "dump-guest-memory", 2)
    assert error.value.message == REFUSED[text]


def test_hostile_nesting():
    with pytest.raises(RequestError):
        parse_expressions("(" * 100000, "x", 1)
    with pytest.raises(RequestError):
        parse_expressions("-" * 100000 + "1", "x", 1)


def test_two_values_behind_each_other():
    assert parse_expressions("0x10 + 1 (2)", "x", 2) == [17, 2]
    assert parse_expressions("4 -1", "x", 2) == [3]
    assert is_expression("0x10")
    assert not is_expression("out.elf")
    assert not is_expression("")


@pytest.mark.parametrize(
    ("words", "codec", "file", "bounds"),
    [
        (["f", "0", "1"], None, "f", ["0", "1"]),
        (["-z", "f", "0", "1"], "zlib", "f", ["0", "1"]),
        (["-z", "lzo", "f", "0", "1"], "lzo", "f", ["0", "1"]),
        (["-z", "--range", "0", "1", "f"], "zlib", "f", []),
        (["-z", "f", "--range", "0", "1"], "zlib", "f", []),
        (["f", "--exact", "0", "1"], None, "f", ["0", "1"]),
    ],
)
def test_words_behind_the_file(words, codec, file, bounds):
    parser = OneLineParser(prog="x")
    add_dump_arguments(parser)
    add_file_arguments(parser, "")
    arguments = parse_dump_arguments(parser, words)
    assert (arguments.codec, arguments.file, arguments.bounds) == (codec, file, bounds)


def test_a_misspelt_codec_is_still_named():
    parser = OneLineParser(prog="x")
    add_dump_arguments(parser)
    add_file_arguments(parser, "")
    with pytest.raises(RequestError, match="lz0"):
        parse_dump_arguments(parser, ["-z", "lz0", "f"])


@pytest.mark.parametrize(("letter", "value"), [("\udcff", -1), ("\udc80", -128), ("\ud800", 63)])
def test_a_character_that_is_no_utf_8(letter: str, value: int):
    assert parse_expressions(f"'{letter}'", "xp", 1) == [value]
