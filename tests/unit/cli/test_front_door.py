"""One program for all: its words, their help, versions, and what failures say to programs."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from docs.generate import PARSERS
from qemu_dump_ext import __version__
from qemu_dump_ext.cli import main as qemu_dump
from qemu_dump_ext.cli.crash_collector_command import main as crash_collector
from qemu_dump_ext.cli.dump_command import main as dump_guest_memory
from qemu_dump_ext.cli.hmp_proxy_command import main as hmp_proxy
from qemu_dump_ext.options.dump_options import parse_dump_arguments
from tests.support.doors import child_environment

PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "qemu-dump": qemu_dump,
    "qemu-dump-guest-memory": dump_guest_memory,
    "qemu-crash-collector": crash_collector,
    "qemu-hmp-proxy": hmp_proxy,
}


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                if subparser.add_help:  # or else it is a program that has its own
                    yield from parsers(subparser)


ALL_PARSERS = {parser.prog: parser for make in PARSERS.values() for parser in parsers(make())}


@pytest.mark.parametrize("prog", ALL_PARSERS)
def test_every_help_says_the_exit_status_and_ends_in_examples(prog):
    """A new subcommand has its `examples`."""
    text = ALL_PARSERS[prog].format_help()
    assert "\nexit status: 0" in text
    _, found, examples = text.rpartition("\nexamples:\n")
    assert found
    assert examples.strip()
    assert all(line.startswith(f"  {prog}") for line in examples.splitlines())


@pytest.mark.parametrize("prog", ALL_PARSERS)
def test_every_example_is_understood(prog):
    parser = ALL_PARSERS[prog]
    for line in str(parser.epilog).rpartition("examples:\n")[2].splitlines():
        words = shlex.split(re.split(r" [<>|]|    #", line.strip())[0])
        if "COMMAND" in words:
            continue
        if prog == "qemu-dump-guest-memory":
            parse_dump_arguments(parser, words[1:])
        else:
            PARSERS[words[0]]().parse_args(words[1:])


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_a_version(program, capsys):
    try:
        status: int | str | None = PROGRAMS[program](["--version"])
    except SystemExit as ended:  # as argparse does
        status = ended.code
    assert status in {0, None}
    assert capsys.readouterr().out == f"{program} {__version__}\n"


@pytest.mark.parametrize(
    ("words", "prog"),
    [
        ("dump", "qemu-dump dump"),
        ("proxy", "qemu-dump proxy"),
        ("collect list", "qemu-dump collect list"),
    ],
)
def test_other_programs_are_words_of_the_one(words, prog, capsys):
    with pytest.raises(SystemExit) as ended:
        qemu_dump([*words.split(), "--help"])
    assert ended.value.code in {0, None}
    assert capsys.readouterr().out.startswith(f"usage: {prog} ")


@pytest.mark.parametrize(
    ("program", "words", "status"),
    [
        ("qemu-dump", ["verify", "--json", "/nonexistent"], 2),
        ("qemu-dump", ["verify", "--json"], 2),
        ("qemu-dump", ["info", "--json", "--qmp", "/nonexistent/qmp"], 3),
        ("qemu-dump", ["collect", "list", "--json", "--store", "/nonexistent"], 2),
        ("qemu-dump-guest-memory", ["--json", "--qmp", "/nonexistent/qmp", "FILE"], 3),
        ("qemu-dump-guest-memory", ["--json", "--nope"], 2),
    ],
)
def test_failure_is_told_to_a_program_as_well(program, words, status, capsys, tmp_path):
    words = [word.replace("FILE", str(tmp_path / "vm.elf")) for word in words]
    assert PROGRAMS[program](words) == status
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert set(answer) == {"error", "hint", "exit_status"}
    assert answer["exit_status"] == status
    assert answer["error"] in told.err


@pytest.mark.parametrize("word", ["nope", "_guest_matrix", "../collector/list", ""])
def test_wrong_word_is_refused_in_one_line(word, capsys):
    assert qemu_dump([word]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(rf"qemu-dump: .*invalid choice: '{word}'.*\n", told.err)


def test_what_a_program_leaves_is_not_looked_through_when_it_ends():
    """Which takes longer than a question to QEMU: a tenth of a small dump."""
    script = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 1000))\n"
        "from qemu_dump_ext.entry import qemu_dump_guest_memory as run\n"
        "sys.argv[1:] = ['--help']; run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(),
        timeout=60,
    )
    assert done.stdout.endswith("\nTrue\n")


@pytest.mark.parametrize(
    ("program", "words", "prog"),
    [
        (qemu_dump, ["convert", "in", "out", "--exact"], "qemu-dump convert"),
        (qemu_dump, ["guests", "web1"], "qemu-dump guests"),
        (crash_collector, ["list", "--frob"], "qemu-crash-collector list"),
    ],
)
def test_what_a_subcommand_does_not_know_is_told_with_its_help(program, words, prog, capsys):
    assert program(words) == 2
    said = f"{prog}: unrecognized arguments: {words[-1]} ('{prog} --help' shows the options)\n"
    assert capsys.readouterr().err == said
