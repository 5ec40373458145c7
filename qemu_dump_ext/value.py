"""Plain data, whose classes are made in a sixth of the time that `dataclasses` takes.

A program declares a hundred of them before it does anything. Of what `dataclass(frozen=True)`
compiles for each, only `__init__` is compiled here: the other methods are the same for all, and
that nothing is assigned to later is for the type checker to see.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, dataclass_transform


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Value:
    """Base of classes whose annotations are their fields, as those of a frozen dataclass.

    `dataclasses.replace`, `fields` and `asdict` take their instances. Equal are two of the same
    class whose fields are, but for those that are declared with `compare=False`.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        super().__init_subclass__()
        if cls.__doc__ is None:
            cls.__doc__ = ""  # else dataclass looks for a signature to put there
        dataclass(eq=False, repr=False, kw_only=kw_only)(cls)

    def __repr__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr]
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return _compared(self) == _compared(other)

    def __hash__(self) -> int:
        return hash(_compared(self))


def _compared(value: Any) -> tuple[object, ...]:
    return tuple(getattr(value, f.name) for f in fields(value) if f.compare)
