from __future__ import annotations

import pytest

from qemu_dump_ext.untrusted import parse_bytes, parse_unsigned


@pytest.mark.parametrize(
    ("text", "base", "value"),
    [
        ("0", 10, 0),
        ("007", 10, 7),
        ("18446744073709551615", 10, (1 << 64) - 1),
        ("0x10", 16, 16),
        ("fFfF", 16, 0xFFFF),
        ("17", 8, 15),
        ("0" * 150 + "1", 16, 1),
    ],
)
def test_numbers(text: str, base: int, value: int):
    assert parse_unsigned(text, base) == value


@pytest.mark.parametrize("base", [8, 10, 16])
@pytest.mark.parametrize(
    "text",
    [
        *("", "-1", "+1", " 1", "1\n", "1_0", "0x", "0o1", "x", "\0", "٣", "²", "\udcff"),
        *("9" * 5000, "0x" + "f" * 5000, "7" * 201, "1.5", "nan"),
    ],
)
def test_what_is_no_number(text: str, base: int):
    assert parse_unsigned(text, base) is None


def test_numbers_of_more_than_the_wanted_bits():
    assert parse_unsigned("255", bits=8) == 255
    assert parse_unsigned("256", bits=8) is None
    assert parse_unsigned("10000000000000000", 16) is None
    assert parse_unsigned("10000000000000000", 16, bits=65) == 1 << 64


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", b""),
        ("00fFA0", b"\0\xff\xa0"),
        ("0", None),
        ("0g", None),
        ("00 00", None),
        ("xx", None),
        ("E01", None),
        ("00" * 9, None),
    ],
)
def test_bytes(text: str, content: bytes | None):
    assert parse_bytes(text, most=8) == content
