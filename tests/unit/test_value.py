"""Plain data: equal by its fields, told by them, and taken by `dataclasses` as its own."""

from __future__ import annotations

from dataclasses import asdict, field, fields, is_dataclass, replace
from typing import Generic, TypeVar

import pytest

from qemu_dump_ext.value import Value

ItemT = TypeVar("ItemT")


class _Range(Value):
    start: int
    size: int = 4096
    notes: list[str] = field(default_factory=list, compare=False, repr=False)
    end: int = field(init=False, compare=False, default=0)


class _Named(_Range):
    name: str = "ram"


class _Pair(Value, Generic[ItemT], kw_only=True):
    first: ItemT
    second: ItemT


def test_equal_by_what_is_compared() -> None:
    assert _Range(1) == _Range(1, 4096, ["told"])
    assert hash(_Range(1)) == hash(_Range(1, 4096, ["told"]))
    assert _Range(1) != _Range(2)
    assert _Range(1) != _Named(1), "another class"
    assert _Range(1) != (1, 4096)
    assert len({_Range(1), _Range(1), _Range(2)}) == 2


def test_tells_its_fields() -> None:
    assert repr(_Named(1, name="rom")) == "_Named(start=1, size=4096, end=0, name='rom')"


def test_is_a_dataclass() -> None:
    assert is_dataclass(_Range)
    assert [each.name for each in fields(_Named)] == ["start", "size", "notes", "end", "name"]
    assert replace(_Named(1), name="rom") == _Named(1, name="rom")
    assert asdict(_Pair(first=1, second=2)) == {"first": 1, "second": 2}


def test_each_has_its_own_default() -> None:
    _Range(1).notes.append("told")
    assert _Range(1).notes == []


@pytest.mark.parametrize("arguments", [{}, {"start": 1, "length": 2}], ids=["missing", "unknown"])
def test_wrong_arguments(arguments: dict[str, int]) -> None:
    with pytest.raises(TypeError, match=r"start|length"):
        _Range(**arguments)  # type: ignore[arg-type]  # as from a table


def test_words_alone() -> None:
    with pytest.raises(TypeError, match="positional"):
        _Pair(1, 2)  # type: ignore[call-arg]
