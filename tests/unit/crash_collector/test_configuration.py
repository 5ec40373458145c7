from __future__ import annotations

from pathlib import Path

import pytest

from qemu_dump_ext.crash_collector.config.file import load_configuration, parse_configuration
from qemu_dump_ext.crash_collector.config.settings import DEFAULT_CAUSES, AfterCommand
from qemu_dump_ext.crash_collector.record import CAUSE_KINDS
from qemu_dump_ext.errors import RequestError

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
    (after,) = by_socket.after
    assert isinstance(after, AfterCommand)
    assert after.command == ("notify", "me")
    assert by_socket.heartbeat is not None
    assert (by_socket.heartbeat.interval, by_socket.heartbeat.after) == (0.5, 120)
    assert (by_glob.after, by_glob.labels) == (("reset",), {"farm": "a"})
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
        ("guests: []", "test:1:1: store: it is missing, and must be there"),
        ("store: /x\nstore: /y", "test:2:1: store is there twice"),
        (
            "store: /x\nguest: []",
            "test:2:1: guest: there is no word guest here; did you mean guests?",
        ),
        (
            "store: /x\nguests: [{socket: /a, xyz: 1}]",
            "test:2:28: guests.0.xyz: there is no word xyz here; known here: causes, format, ",
        ),
        ("store: crashes", "test:1:8: store: it must begin with /, for the agent may be"),
        ("store: /x\nlimits: 7", "test:2:9: limits: it must be words with values, such as {...}"),
        ("store: /x\nguests: {a: 1}", "test:2:1: guests: it must be a list, such as [...], and"),
        (
            "store: /x\nguests:\n  - {socket: /a, name: {stem}}",
            "test:3:18: guests.0.name: it must be a text, and is words with values: what begins ",
        ),
        (
            "store: /x\nlimits:\n  free: 3 gigs",
            "test:3:9: limits.free: a size is a number of bytes, or one with B, KiB,",
        ),
        ("store: /x\nlimits: {count: 0}", "test:2:17: limits.count: input should be greater"),
        (
            "store: /x\nguests:\n  - name: a",
            (
                "test:3:5: guests.0: a guest has one of `socket`, `glob`, `directory`, `libvirt`,"
                " `monitor`, `guest` and `pid`"
            ),
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
            "test:3:11: defaults.format: unknown format 'kdump-gzip' (known: elf, kdump-lzo, ",
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
            "test:3:26: guests.0.format: unknown format 'zlib'",
        ),
        ("store: \x07", "test: unacceptable character"),
    ],
)
def test_mistake_is_shown_where_it_is(text, message):
    with pytest.raises(RequestError) as caught:
        parse_configuration(text, "test")
    assert caught.value.message.startswith(message)


NINES = "9" * 5000
ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [*{other}, *{other}, *{other}, *{other}, *{other}, *{other}, *{other}]\n"
    for other, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"store: /x\nconcurrent_dumps: {NINES}", "2:19: a number has at most 100 digits"),
        (f"store: /x\nguests: [{{socket: /a, level: {NINES[:99]}}}]", "2:30: guests.0.level: "),
        (f"store: /x\nscan_interval: {NINES[:400]} s", "2:16: scan_interval: a duration is"),
        (f"store: /x\nlimits: {{bytes: {NINES[:400]} B}}", "2:17: limits.bytes: a size is"),
        ("store: /x\nlimits: {bytes: 999999999999999999 TiB}", "2:17: limits.bytes: input"),
        ("store: /x\nlimits: {age: .inf}", "2:15: limits.age: input should be"),
        ("store: /x\nscan_interval: .nan", "2:16: scan_interval: input should be"),
        ("store: /x\nlimits: {count: .inf}", "2:17: limits.count: input should be"),
        (
            "store: /x\nguests: [{socket: /a, name: 'a{stem:9999999999}'}]",
            "2:29: guests.0.name: a {name} stands alone",
        ),
        (
            "store: /x\nguests: [{socket: /a, console: 'a{name!r}'}]",
            "2:32: guests.0.console: a {name} stands alone",
        ),
        (f"store: /x\nguests: [{{glob: '{'/*' * 3000}'}}]", "2:17: guests.0.glob: string should"),
        (
            "store: /x\nguests: [{socket: /a, console_patterns: ['a{99999999999}']}]",
            "2:42: guests.0.console_patterns.0: input should be a valid regular expression: the",
        ),
        (
            f"store: /x\nguests: [{{socket: /a, console_patterns: ['{'(' * 900}']}}]",
            "2:42: guests.0.console_patterns.0: input should be a valid regular expression: ",
        ),
        (f"store: {'[' * 5000}", " it is nested too deep, or in itself"),
        ("store: /x\nguests: &a [*a]", " it is nested too deep, or in itself"),
        (f"store: /x\n{ALIASES}", "2:23: there are more than 100000 values"),
        ("store: /x\n? [a]\n: 1", "2:3: a word is no list and no mapping"),
        ('store: "/\\ud800"', "1:8: it has half a character"),
        ('store: "/\\0"', "1:8: store: no path has a NUL"),
    ],
    ids=lambda value: value[:50],
)
def test_configuration_that_asks_for_too_much_is_refused_in_a_line(text, message):
    with pytest.raises(RequestError) as caught:
        parse_configuration(text, "test")
    assert caught.value.message.startswith(f"test:{message}"), caught.value.message[:300]
    assert len(caught.value.message.splitlines()) == 1
    assert len(caught.value.message) < 1000


def test_endless_file_is_no_configuration():
    with pytest.raises(RequestError, match="has more than"):
        load_configuration(Path("/dev/zero"))


def test_file_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(RequestError, match=r"cannot read .*: No such file"):
        load_configuration(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="it is not UTF-8"):
        load_configuration(tmp_path / "binary")
