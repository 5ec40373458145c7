"""Every option of the dump command reaches the command in the gdb that `--gdb` drives."""

from __future__ import annotations

import argparse
import shlex
from contextlib import suppress

import pytest

from qemu_dump_ext.cli.dump_command import dump_parser
from qemu_dump_ext.cli.gdb_driver import command_words
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.options.dump_options import (
    add_dump_arguments,
    add_file_arguments,
    parse_dump_arguments,
)
from qemu_dump_ext.options.parsers import OneLineParser

_VALUES = ("2", "0.5", "--odd", "a b\\c'd\"e", "0x1000 - 4")
_OF_THE_DRIVER = {"afterwards", "help", "version", "gdb", "description"}
# Says whether anybody watches, which is settled before gdb is started.
_SETTLED = {"progress"}
_OPTIONS = {
    option: action
    for action in dump_parser()._actions
    for option in action.option_strings
    if action.dest not in _OF_THE_DRIVER | _SETTLED
}


def _given(*words: str) -> argparse.Namespace:
    return parse_dump_arguments(dump_parser(), ["--gdb", ":1234", *words])


def _received(given: argparse.Namespace) -> argparse.Namespace:
    parser = OneLineParser(prog="inside")
    add_dump_arguments(parser)
    add_file_arguments(parser, "")
    # gdb splits a line into words as a shell does.
    return parse_dump_arguments(parser, shlex.split(command_words(given)))


def _facts(arguments: argparse.Namespace) -> dict[str, object]:
    return {k: v for k, v in vars(arguments).items() if k not in _OF_THE_DRIVER | _SETTLED}


def _ways_to_give(option: str) -> list[argparse.Namespace]:
    action = _OPTIONS[option]
    if action.nargs == 0:
        return [_given(option, "FILE")]
    values = _VALUES if action.choices is None else tuple(action.choices)
    ways = []
    for value in values:
        words = [f"{option}={value}"] if option.startswith("--") else [option, value]
        if isinstance(action.nargs, int):
            words = [option, *[value] * action.nargs]
        with suppress(RequestError):
            ways.append(_given("FILE", *words))
    return ways


@pytest.mark.parametrize("option", _OPTIONS)
def test_every_option_arrives(option: str):
    ways = _ways_to_give(option)
    usual = _facts(_given("FILE"))
    assert any(_facts(given) != usual for given in ways) or option == "--sparse"
    for given in ways:
        assert _facts(_received(given)) == _facts(given)


@pytest.mark.parametrize(
    "words",
    [
        ("FILE",),
        ("FILE", "0x1000", "4096"),
        ("FILE", "$pc - 4", "0x1000"),
        ("|gzip > 'a file' \\ \"x\"",),
        ("-l", "-R", "--exact", "--threads", "3", "FILE"),
        ("-z", "--omit-zero", "--level", "0", "FILE"),
        ("-p", "--no-sparse", "--json", "--force", "--snapshot", "--max-pause", "1.5", "FILE"),
        ("--live", "FILE"),
        ("--live=prefer", "FILE"),
    ],
    ids=str,
)
def test_the_words_that_are_no_options_arrive_too(words: tuple[str, ...]):
    given = _given(*words)
    assert _facts(_received(given)) == _facts(given)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--progress=always",), "always"),
        (("--progress=never",), "never"),
        (("--progress=always", "--json"), "never"),
    ],
)
def test_progress_is_shown_where_somebody_watches_the_driver(words: tuple[str, ...], expected: str):
    assert _received(_given("FILE", *words)).progress == expected
