"""Add a file to a package for the time of a test, as one adds an architecture or a source."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

TOYS = Path(__file__).resolve().parents[1] / "toys"


@contextmanager
def toy_in(package: ModuleType) -> Iterator[None]:
    """Let a package have what stands in the folder of its name in tests/toys/."""
    folder = str(TOYS / package.__name__.rpartition(".")[2])
    before = {name for name in sys.modules if name.startswith(f"{package.__name__}.")}
    package.__path__.append(folder)
    _look_again(package)
    try:
        yield
    finally:
        package.__path__.remove(folder)
        for path in Path(folder).glob("*.py"):
            name = f"{package.__name__}.{path.stem}"
            if name not in before and name in sys.modules:
                del sys.modules[name]
                delattr(package, path.stem)
        _look_again(package)


def _look_again(package: ModuleType) -> None:
    """Forget what was found in the folder."""
    importlib.invalidate_caches()
    for found in vars(package).values():
        forget = getattr(found, "cache_clear", None)
        if forget is not None and found.__module__ == package.__name__:
            forget()
