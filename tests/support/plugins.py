"""One more file in a folder of the package that is scanned for declarations."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


@contextmanager
def one_more_file(
    package: ModuleType, directory: Path, name: str, text: str, scan: Callable[[], Any]
) -> Iterator[None]:
    """Let a folder of the package have one more file.

    Args:
        package: The folder.
        directory: Where the file is put instead; in nobody else's use.
        name: Of the file, without `.py`.
        text: What is in it.
        scan: What scans the folder, and remembers what it found.
    """
    (directory / f"{name}.py").write_text(text)
    path = package.__path__
    package.__path__ = [*path, str(directory)]
    importlib.invalidate_caches()
    scan.cache_clear()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        package.__path__ = path
        sys.modules.pop(f"{package.__name__}.{name}", None)
        if hasattr(package, name):
            delattr(package, name)
        scan.cache_clear()  # type: ignore[attr-defined]
