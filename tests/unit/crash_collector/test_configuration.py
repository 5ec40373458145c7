from __future__ import annotations

from pathlib import Path

import pytest

from qemu_dump_ext.crash_collector.config.file import load_configuration, parse_configuration
from qemu_dump_ext.crash_collector.config.settings import DEFAULT_CAUSES, AfterCommand
from qemu_dump_ext.crash_collector.record import CAUSE_KINDS
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.plan.request import request_of_format

FULL = """
store: /var/crash
concurrent_dumps: 4
limits: {bytes: 20 GiB, count: 100, age: 30d, free: 512MiB}
defaults:
  labels: {farm: a}
  after: reset
guests:
  - socket: /run/a.qmp
    name: a
    format: kdump-raw-zstd
    heartbeat: {by: guest-agent, socket: "/run/{stem}.qga", interval: 500 ms, after: 2min}
    after: {command: [notify, me]}
  - glob: /run/vms/*/qmp
    name: "{directory}"
  - directory: /run/more
    causes: [shutdown, console]
    console_patterns: ["^oh no"]
"""


def test_everything_has_its_place_and_its_unit():
    configuration = parse_configuration(FULL, "test")
    assert configuration.control_socket == Path("/var/crash/.control")
    limits = configuration.limits
    assert (limits.bytes, limits.age, limits.free) == (20 << 30, 30 * 86400, 512 << 20)
    by_socket, by_glob, by_directory = configuration.guests
    assert isinstance(by_socket.after, AfterCommand)
    assert by_socket.after.command == ("notify", "me")
    assert by_socket.heartbeat is not None
    assert (by_socket.heartbeat.interval, by_socket.heartbeat.after) == (0.5, 120)
    assert (by_glob.after, by_glob.labels) == ("reset", {"farm": "a"})
    assert by_directory.causes == ("shutdown", "console")
    assert by_directory.console_patterns[0].search("oh no, it broke")


def test_two_lines_are_enough():
    configuration = parse_configuration("store: /x\nguests: [{socket: /run/a}]", "test")
    assert configuration.guests[0].causes == DEFAULT_CAUSES
    assert set(CAUSE_KINDS) - set(DEFAULT_CAUSES) == {"shutdown", "reset"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "test: it is no mapping of words"),
        ("- a", "test: it is no mapping of words"),
        ("store: /x\n  bad: [", "test:2:6: mapping values are not allowed here"),
        ("guests: []", "test:1:1: store: field required"),
        ("store: /x\nstore: /y", "test:2:1: store is there twice"),
        ("store: /x\nguest: []", "test:2:1: guest: unexpected keyword argument"),
        (
            "store: /x\nlimits:\n  free: 3 gigs",
            "test:3:9: limits.free: a size is a number of bytes, or one with B, KiB,",
        ),
        ("store: /x\nlimits: {count: 0}", "test:2:17: limits.count: input should be greater"),
        (
            "store: /x\nguests:\n  - name: a",
            "test:3:5: guests.0: a guest has one of `socket`, `glob` and `directory`",
        ),
        (
            "store: /x\nguests:\n  - {socket: /a, glob: /b}",
            "test:3:5: guests.0: a guest has one of",
        ),
        (
            "store: /x\nguests:\n  - socket: /a\n    causes: [panic]",
            "test:4:14: guests.0.causes.0: input should be 'guest-panicked', ",
        ),
        (
            "store: /x\ndefaults:\n  format: kdump-gzip\nguests: [{socket: /a}]",
            "test:3:11: defaults.format: a format is elf, or kdump- or kdump-raw- and one of",
        ),
        (
            "store: /x\nguests:\n  - socket: /a\n    console: '/run/{nmae}.log'",
            "test:4:14: guests.0.console: {nmae} is not known here, but {name}, {stem}",
        ),
        (
            "store: /x\nguests:\n  - socket: /a\n    console_patterns: ['(']",
            "test:4:24: guests.0.console_patterns.0: input should be a valid regular expression",
        ),
        (
            "store: /x\nguests:\n  - socket: /a\n    heartbeat: {by: guest-agent}",
            "test:4:5: guests.0.heartbeat: `socket` belongs to",
        ),
        ("store: /x\nguests:\n  - socket: /a\n    after: explode", "test:4:12: guests.0.after"),
        (
            "store: /x\nguests:\n  - socket: /a\n    level: 77",
            "test:3:5: guests.0: zlib has no level 77 (0 to 9)",
        ),
        (
            "store: /x\nguests:\n  - {socket: /a, format: zlib}",
            "test:3:26: guests.0.format: a format is elf, or",
        ),
        ("store: \x07", "test: unacceptable character"),
    ],
)
def test_mistake_is_shown_where_it_is(text, message):
    with pytest.raises(RequestError) as caught:
        parse_configuration(text, "test")
    assert caught.value.message.startswith(message)


def test_file_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(RequestError, match=r"cannot read .*: No such file"):
        load_configuration(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="it is not UTF-8"):
        load_configuration(tmp_path / "binary")


@pytest.mark.parametrize("name", ["elf", "kdump-zlib", "kdump-raw-zstd", "kdump-none"])
def test_format_is_that_of_the_request(name):
    assert request_of_format(name).format_name == name
