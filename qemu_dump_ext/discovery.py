"""Collect the one declaration that each file of a folder makes.

Architectures, page codecs, formats, memory sources and sinks are found by scanning their folder,
so that adding one is adding a file. The name of the declaration is the name of the file.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from types import ModuleType
from typing import Protocol, TypeVar


class Named(Protocol):
    """A declaration that knows its own name."""

    @property
    def name(self) -> str:
        """The word that users see; equal to the file's name."""


NamedT = TypeVar("NamedT", bound=Named)


def names(package: ModuleType) -> list[str]:
    """Return the names of the public modules of `package`, sorted; none is imported.

    Raises:
        OSError: The host does not let us look.
    """
    for folder in package.__path__:
        os.listdir(folder)  # noqa: PTH208 - where this fails, what follows finds nothing
    found = (module_info.name for module_info in pkgutil.iter_modules(package.__path__))
    return [name for name in found if not name.startswith("_")]


def load(
    package: ModuleType, name: str, constant: str, kind: type[NamedT] | tuple[type[NamedT], ...]
) -> NamedT:
    """Import one of the `names` of `package` and return its `constant`.

    Raises:
        TypeError: The file lacks the constant, or its name differs from the file's.
    """
    module = importlib.import_module(f"{package.__name__}.{name}")
    declaration = getattr(module, constant, None)
    if not isinstance(declaration, kind) or declaration.name != name:
        raise TypeError(f"{module.__name__} must declare {constant} of its own name")
    return declaration


def collect(
    package: ModuleType, constant: str, kind: type[NamedT] | tuple[type[NamedT], ...]
) -> dict[str, NamedT]:
    """Import every public module of `package` and return its `constant`, by name, sorted.

    Raises:
        TypeError: As of `load`.
        OSError: As of `names`.
    """
    return {name: load(package, name, constant, kind) for name in names(package)}
