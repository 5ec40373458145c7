"""kdmp-parser, a reader of Windows dumps.

Its wheel for the stable ABI of Python 3.12 and later has the module under the name of 3.12 alone:
no later Python finds it by itself.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import files
from types import ModuleType

_MODULE = "kdmp_parser._kdmp_parser"


def import_kdmp_parser() -> ModuleType:
    """Return the package."""
    if _MODULE not in sys.modules:
        found = [file for file in files("kdmp-parser") or () if file.suffix == ".so"]
        specification = importlib.util.spec_from_file_location(_MODULE, found[0].locate())
        assert specification is not None
        assert specification.loader is not None
        sys.modules[_MODULE] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[_MODULE])
    return importlib.import_module("kdmp_parser")
