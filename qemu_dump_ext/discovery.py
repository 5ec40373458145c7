"""Collect the one declaration that each file of a folder makes.

Architectures, page codecs, formats, memory sources and sinks are found by scanning their folder,
so that adding one is adding a file. The name of the declaration is the name of the file.
"""

from __future__ import annotations

import importlib
import os
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

    What else lies there is none, such as `.#elf.py`, by which an editor knows that it is open.

    Raises:
        OSError: The host does not let us look.
    """
    files = [file for folder in package.__path__ for file in os.listdir(folder)]  # noqa: PTH208
    found = {file[:-3] for file in files if file.endswith(".py")}
    return sorted(name for name in found if name.isidentifier() and name[0] != "_")


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
    package: ModuleType,
    constant: str,
    kind: type[NamedT] | tuple[type[NamedT], ...],
    only: str | None = None,
) -> dict[str, NamedT]:
    """Import every public module of `package`, or one, and return its `constant`, by name, sorted.

    Raises:
        TypeError: As of `load`.
        OSError: As of `names`.
    """
    wanted = names(package) if only is None else [only]
    return {name: load(package, name, constant, kind) for name in wanted}
