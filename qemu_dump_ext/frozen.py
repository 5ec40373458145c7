"""`dataclass(frozen=True)` as that of the standard library, in a tenth of the time.

That one compiles six methods for each class, also of those that are never used: a quarter of what
a dump of a small guest took. Here `__init__` is compiled when the first instance is made, and the
other methods are the same functions for all classes. Whatever else `dataclasses` has works with
these classes and their instances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import MISSING, FrozenInstanceError
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

__all__ = ["dataclass"]

T = TypeVar("T")
Method = Callable[..., Any]


def _dataclass(
    *, frozen: bool, eq: bool = True, kw_only: bool = False
) -> Callable[[type[T]], type[T]]:
    if not frozen:
        raise TypeError("for classes whose instances change, there is dataclasses.dataclass")

    def decorate(cls: type[T]) -> type[T]:
        # Without methods, this compiles nothing; for a class without a docstring, it would ask for
        # the signature.
        cls.__doc__ = cls.__doc__ or cls.__name__
        dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=kw_only)(cls)
        methods = {
            "__setattr__": _refuse_to_set,
            "__delattr__": _refuse_to_delete,
            "__repr__": _represent,
        }
        if eq:
            methods |= _comparing([field.name for field in _fields(cls) if field.compare])
        for name, method in methods.items():
            if name not in vars(cls):
                setattr(cls, name, method)
        _set_init(cls, _init_at_first_use(cls))
        return cls

    return decorate


def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


def _set_init(cls: type, method: Method) -> None:
    cls.__init__ = method  # type: ignore[misc]  # what this is about


def _init_at_first_use(cls: type) -> Method:
    def first_init(self: Any, *arguments: Any, **named: Any) -> None:
        method = _compiled_init(cls)
        _set_init(cls, method)
        method(self, *arguments, **named)

    return first_init


def _compiled_init(cls: type) -> Method:
    names: dict[str, Any] = {"_set": object.__setattr__, "_missing": MISSING}
    by_place = ["self"]
    by_name: list[str] = []
    body: list[str] = []
    for field in _fields(cls):
        name = word = value = field.name
        if field.default is not MISSING:
            names[f"_default_{name}"] = field.default
            word = f"{name}=_default_{name}"
        elif field.default_factory is not MISSING:
            names[f"_make_{name}"] = field.default_factory
            word = f"{name}=_missing"
            value = f"_make_{name}() if {name} is _missing else {name}"
        (by_name if field.kw_only else by_place).append(word)
        body.append(f"    _set(self, {name!r}, {value})\n")
    if hasattr(cls, "__post_init__"):
        body.append("    self.__post_init__()\n")
    words = [*by_place, *(["*", *by_name] if by_name else [])]
    text = f"def __init__({', '.join(words)}):\n{''.join(body) or '    pass'}"
    exec(text, names)  # noqa: S102 - of names that stand in our sources
    method: Method = names["__init__"]
    method.__qualname__ = f"{cls.__qualname__}.__init__"
    return method


def _refuse_to_set(_self: object, name: str, _value: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(_self: object, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _represent(self: object) -> str:
    shown = (
        f"{field.name}={getattr(self, field.name)!r}" for field in _fields(type(self)) if field.repr
    )
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _comparing(names: Sequence[str]) -> dict[str, Method]:
    def values(self: object) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in names])

    def is_equal(self: object, other: object) -> Any:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return values(self) == values(other)

    return {"__eq__": is_equal, "__hash__": lambda self: hash(values(self))}


if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    dataclass = _dataclass
