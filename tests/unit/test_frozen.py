"""Classes of ours do what those of the standard library's `dataclass(frozen=True)` do."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from qemu_dump_ext import frozen

Decorator = Callable[..., Any]


def _classes(dataclass: Decorator) -> Any:
    class Classes:
        @dataclass(frozen=True)
        class Base:
            a: int
            b: tuple[int, ...] = ()
            c: dict[str, int] = dataclasses.field(default_factory=dict, compare=False, repr=False)

        @dataclass(frozen=True)
        class Derived(Base):
            d: int = 4

        @dataclass(frozen=True, kw_only=True)
        class Named:
            a: int = 1
            b: int

        @dataclass(frozen=True, eq=False)
        class Same:
            a: int

        @dataclass(frozen=True)
        class Checked:
            a: int
            double: int = 0

            def __post_init__(self) -> None:
                object.__setattr__(self, "double", 2 * self.a)

            def __repr__(self) -> str:
                return "checked"

        @dataclass(frozen=True)
        class Empty:
            pass

    return Classes


OURS, THEIRS = (_classes(kind) for kind in (frozen.dataclass, dataclasses.dataclass))


def _attempt(work: Callable[[Any], object], classes: Any) -> object:
    try:
        return work(classes)
    except (TypeError, AttributeError) as error:
        return type(error)


CASES: tuple[Callable[[Any], object], ...] = (
    lambda of: repr(of.Base(1)),
    lambda of: repr(of.Derived(1, (2,), {}, 5)),
    lambda of: repr(of.Checked(3)) + str(of.Checked(3).double),
    lambda of: repr(of.Empty()),
    lambda of: of.Base(1),
    lambda of: of.Base(b=(1,)),
    lambda of: of.Base(1, (2,), {}, 3),
    lambda of: of.Base(1, z=3),
    lambda of: of.Named(1, 2),
    lambda of: repr(of.Named(b=2)),
    lambda of: of.Base(1) == of.Base(1, c={"x": 1}),
    lambda of: of.Base(1) == of.Base(2),
    lambda of: of.Base(1) == of.Derived(1),
    lambda of: of.Base(1) == 1,
    lambda of: hash(of.Base(1)) == hash(of.Base(1, c={"x": 1})),
    lambda of: len({of.Base(1), of.Base(1), of.Derived(1)}),
    lambda of: of.Same(1) == of.Same(1),
    lambda of: len({of.Same(1), of.Same(1)}),
    lambda of: hash(of.Base([])),
    lambda of: of.Base(1).c is of.Base(1).c,
    lambda of: setattr(of.Base(1), "a", 2),
    lambda of: setattr(of.Base(1), "new", 2),
    lambda of: delattr(of.Base(1), "a"),
    lambda of: dataclasses.asdict(of.Derived(1, c={"x": 2})),
    lambda of: repr(dataclasses.replace(of.Derived(1), d=9)),
    lambda of: [field.name for field in dataclasses.fields(of.Named)],
    lambda of: of.Derived.__match_args__,
    lambda of: repr(copy.copy(of.Derived(1, d=3))),
    lambda of: vars(of.Derived(7)),
)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_as_those_of_the_standard_library(number):
    ours, theirs = (_attempt(CASES[number], classes) for classes in (OURS, THEIRS))
    if isinstance(theirs, (THEIRS.Base,)):
        ours, theirs = vars(ours), vars(theirs)
    assert ours == theirs


@frozen.dataclass(frozen=True)
class AtTheTop:
    a: int


def test_they_are_pickled():
    assert pickle.loads(pickle.dumps(AtTheTop(3))) == AtTheTop(3)  # noqa: S301 - our own


def test_init_is_compiled_once_and_by_the_first_instance():
    @frozen.dataclass(frozen=True)
    class Counted:
        a: int

    first = Counted.__init__
    Counted(1)
    second = Counted.__init__
    Counted(2)
    assert first is not second
    assert second is Counted.__init__


def test_classes_whose_instances_change_are_refused():
    with pytest.raises(TypeError, match="dataclasses"):
        frozen.dataclass(frozen=False)
