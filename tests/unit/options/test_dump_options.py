from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.options.dump_options import (
    add_dump_arguments,
    add_file_arguments,
    parse_dump_arguments,
    request_of,
)
from qemu_dump_ext.options.parsers import OneLineParser


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="dump")
    add_dump_arguments(parser)
    add_file_arguments(parser, "a file")
    return parser


def parse(*words: str) -> tuple[str, str, str]:
    arguments = parse_dump_arguments(_parser(), words)
    return request_of(arguments).format, arguments.file, arguments.memory


@pytest.mark.parametrize(
    ("words", "dump_format", "file"),
    [
        (("out",), "elf", "out"),
        (("-R", "out"), "elf", "out"),
        (("-z", "out"), "kdump-zlib", "out"),
        (("-z", "zstd", "out"), "kdump-zstd", "out"),
        (("-zlzo", "out"), "kdump-lzo", "out"),
        (("-z", "-R", "out"), "kdump-raw-zlib", "out"),
        (("out", "-z"), "kdump-zlib", "out"),
        (("out", "-z", "snappy"), "kdump-snappy", "out"),
        (("-l", "out"), "kdump-lzo", "out"),
        (("-s", "-R", "out"), "kdump-raw-snappy", "out"),
        (("-z", "-"), "kdump-zlib", "-"),
        (("-z", "--memory", "gdbstub", "out"), "kdump-zlib", "out"),
        (("-z", "none", "out"), "kdump-none", "out"),
    ],
)
def test_formats(words: tuple[str, ...], dump_format: str, file: str):
    assert parse(*words)[:2] == (dump_format, file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-z", "zlob", "out"), "invalid choice: 'zlob'"),
        (("-z", "zlib"), "required: FILE "),
        (("-z", "-l", "out"), "not allowed with"),
        (("--memory", "tape", "out"), "invalid choice: 'tape'"),
        (("--frob", "out"), "unrecognized arguments"),
        ((), "required: FILE "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: tuple[str, ...], message: str):
    with pytest.raises(RequestError, match=message) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)


def test_an_interrupt_waits_until_the_words_are_parsed(monkeypatch: pytest.MonkeyPatch):
    """Argparse undoes on its way out what it has changed, and fails where that was not all yet."""
    parser = _parser()

    def interrupted(method: Callable[..., Any], *words: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return method(*words)

    # In the middle by the first before Python 3.12, and by the second since.
    for name in ("format_usage", "parse_known_intermixed_args"):
        monkeypatch.setattr(parser, name, partial(interrupted, getattr(parser, name)))
    with pytest.raises(KeyboardInterrupt):
        parse_dump_arguments(parser, ["file"])
