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


def collect(
    package: ModuleType, constant: str, kind: type[NamedT] | tuple[type[NamedT], ...]
) -> dict[str, NamedT]:
    """Import every public module of `package` and return its `constant`, by name, sorted.

    Raises:
        TypeError: A file lacks the constant, or its name differs from the file's.
        OSError: The host does not let us look.
    """
    found: dict[str, NamedT] = {}
    for folder in package.__path__:
        os.listdir(folder)  # noqa: PTH208 - where this fails, what follows finds nothing
    for module_info in pkgutil.iter_modules(package.__path__):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        declaration = getattr(module, constant, None)
        if not isinstance(declaration, kind) or declaration.name != module_info.name:
            raise TypeError(f"{module.__name__} must declare {constant} of its own name")
        found[declaration.name] = declaration
    return found
