"""What README.md and docs/ say is true: what they name is there, and what they show would work."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from docs.generate import PARSERS, attribute_meanings, generated_files
from hmp.human.dump_line import BadExtension, parse_dump_line
from qemu_dump_ext import errors
from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.cli import tools_parser
from qemu_dump_ext.crash_collector.config.file import parse_configuration
from qemu_dump_ext.crash_collector.outlets.metrics import AgentState, Metrics
from qemu_dump_ext.crash_collector.record import CAUSE_KINDS
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.dump_formats import format_words
from qemu_dump_ext.guest_images.manifest import load_manifest
from qemu_dump_ext.memory_sources import all_memory_sources
from qemu_dump_ext.options.dump_options import (
    add_dump_arguments,
    add_file_arguments,
    parse_dump_arguments,
)
from qemu_dump_ext.options.parsers import OneLineParser

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
COLLECTOR = PAGES["docs/crash-collector.md"]
GENERATED = generated_files()
EVERY_PAGE = pytest.mark.parametrize("page", PAGES)


def _code_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith("    "):
            yield line.strip()


def _commands(text: str) -> Iterator[list[str]]:
    """Yield each command line of a shell that starts one of our programs, as words."""
    for line in _code_lines(text):
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a sentence with an apostrophe
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if word.strip("();<>|&"):
                command.append(word)
                continue
            if command and command[0] in PARSERS:
                yield command
            command = []


def _parse(words: list[str]) -> None:
    parser = PARSERS[words[0]]()
    if isinstance(parser, OneLineParser) and words[0] == "qemu-dump-guest-memory":
        parse_dump_arguments(parser, words[1:])
    else:
        parser.parse_args(words[1:])


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_generated_is_up_to_date(path: Path):
    # Where argparse breaks a line of usage depends on the version of Python.
    there, wanted = path.read_text("utf-8").split(), GENERATED[path].split()
    assert there == wanted, "run: python -m docs.generate"


@EVERY_PAGE
def test_every_link_leads_somewhere(page: str):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?:", target):
            continue
        file, _, heading = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, target


@EVERY_PAGE
def test_every_file_that_is_named_is_there(page: str):
    for name in re.findall(
        r"(?<![\w/.])((?:tests|images|docs|gdb|hmp|qemu_dump_ext)/[\w./-]*\w)", PAGES[page]
    ):
        if name not in {"images/cache", "gdb/NAME_command.py"}:
            assert (ROOT / name).exists(), name
    for name in re.findall(r"-m ((?:tests|docs)\.[\w.]+)", PAGES[page]):
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name


@EVERY_PAGE
def test_every_command_line_is_understood(page: str):
    for words in _commands(PAGES[page]):
        if "[OPTIONS]" not in words:
            _parse(words)


def test_there_are_command_lines_of_every_program():
    assert {words[0] for text in PAGES.values() for words in _commands(text)} == set(PARSERS)


@EVERY_PAGE
def test_every_line_in_gdb_and_in_the_monitor_is_understood(page: str):
    for code in _code_lines(PAGES[page]):
        prompt, _, command = code.partition(") ")
        if prompt == "(gdb" and command.startswith("qemu-dump-guest-memory"):
            parser = OneLineParser(prog="gdb")
            add_dump_arguments(parser)
            add_file_arguments(parser, "")
            parse_dump_arguments(parser, shlex.split(command)[1:])
        if prompt == "(qemu" and command.startswith("dump-guest-memory"):
            parsed = parse_dump_line(command, format_words(), all_memory_sources())
            assert not isinstance(parsed, BadExtension), command


@EVERY_PAGE
def test_every_option_that_is_named_is_one(page: str):
    ours = {
        option
        for parser_of in PARSERS.values()
        for parser in _with_subparsers(parser_of())
        for action in parser._actions
        for option in action.option_strings
    }
    # Of pytest, virsh, the monitor's command, benchmarks, mypy; --zero_excluded of crash.
    others = {
        "--qemu-crash-dir",
        "--collect-only",
        "--native",
        "--limits",
        "--strict",
        "--small",
        "--zero",
        "--memory-only",
    }
    for code in re.findall(r"`([^`\n]+)`", PAGES[page]):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            assert option in ours | others, code


def _with_subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _with_subparsers(subparser)


@EVERY_PAGE
def test_every_program_in_python_is_one(page: str):
    for block in re.findall(r"(?:^ {4}.*\n|^\n)+", PAGES[page], re.MULTILINE):
        program = textwrap.dedent(block).strip("\n")
        if re.match(r"(import|from|def|with) ", program):
            ast.parse(re.sub(r"(?m)^\.\.\.\n +", "class C:\n    ", program))


def test_every_exit_status_has_a_row():
    rows = re.findall(r"^\| (\d+) \|", PAGES["docs/dump.md"], re.MULTILINE)
    declared = {errors.EXIT_SUCCESS, errors.EXIT_INCOMPLETE, errors.EXIT_INTERRUPTED}
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.DumpError):
            declared.add(error.exit_status)
    assert sorted(map(int, rows)) == sorted(declared)


def test_every_memory_source_has_a_row():
    for name in all_memory_sources():
        assert f"| `{name}` |" in PAGES["docs/memory-sources.md"]


def test_every_setting_of_gdb_is_in_the_table():
    page = PAGES["docs/targets.md"]
    for name, architecture in all_architectures().items():
        if architecture.gdb_settings:
            rows = [line for line in page.splitlines() if re.match(rf"\| [^|]*\b{name}\b", line)]
            assert any(f"`{architecture.gdb_settings[0]}`" in row for row in rows), name


def test_the_readme_counts_the_targets():
    assert f"all {len(all_architectures())} in [the table]" in README


def test_every_extra_is_described():
    described = set(re.findall(r"`(\w+)`", README.partition("| extra |")[2].partition("\n\n")[0]))
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {"fast", "gdb", "proxy", "collector"} <= described & set(extras)


def test_every_guest_image_is_of_a_target_that_can_be_dumped():
    targets = {image.target for image in load_manifest().values()}
    assert targets <= set(all_architectures())


def test_every_subcommand_of_the_tools_says_what_it_does():
    for parser in _with_subparsers(tools_parser()):
        assert parser.description, parser.prog


def test_every_cause_is_described():
    for word in CAUSE_KINDS:
        assert re.search(rf"^\| .*`{word}`.* \| \w", COLLECTOR, re.MULTILINE), word


def test_configuration_of_the_crash_collector_is_right():
    text = COLLECTOR.partition("    store: /var/crash/guests  ")
    block = (text[1] + text[2]).partition("\n\n")[0]
    configuration = parse_configuration(block, "the example")
    assert configuration.guests[0].after == ("reset",)
    assert configuration.guests[0].labels == {"farm": "north"}
    for page in (README, COLLECTOR):
        short = re.search(r"printf '(.*)' >", page)
        assert short is not None
        assert parse_configuration(short[1].replace("\\n", "\n"), "the example").guests[0].glob


def test_where_crashes_go_is_a_right_configuration():
    (block,) = re.findall(r"(?:^    upload:\n)(?:^    .*\n)*", COLLECTOR, re.MULTILINE)
    configuration = parse_configuration("store: /x\n" + textwrap.dedent(block), "the example")
    assert configuration.upload is not None
    assert configuration.report is not None
    assert configuration.metrics_port is not None


def test_meanings_are_read_from_docstrings():
    class Sample:
        """One line.

        Attributes:
            first: What it is,
                and more.
            second: Another.

        Something else.
        """

    text = textwrap.indent(textwrap.dedent(" " * 8 + (Sample.__doc__ or "")), "    ")
    Sample.__doc__ = text
    assert attribute_meanings(Sample) == {"first": "What it is, and more.", "second": "Another."}


def test_the_daemon_set_is_well_formed():
    (block,) = re.findall(r"(?:^    apiVersion: .*\n)(?:^    .*\n)*", COLLECTOR, re.MULTILINE)
    template = yaml.safe_load(textwrap.dedent(block))["spec"]["template"]["spec"]
    (container,) = template["containers"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in template["volumes"]}


def test_every_metric_is_described(tmp_path):
    metrics = Metrics(CrashStore(tmp_path), lambda: AgentState(0, 0, 0))
    families = {family.name: family.type for family in metrics._registry.collect()}
    ours = {
        name.removeprefix("qemu_crash_collector_") + ("_total" if kind == "counter" else "")
        for name, kind in families.items()
        if name.startswith("qemu_crash_collector_")
    }
    assert ours <= set(re.findall(r"`(\w+)(?:\{[\w,]+\})?`", COLLECTOR))
    assert len(ours) == 16
