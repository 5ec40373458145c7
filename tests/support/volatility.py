"""Volatility 3 as an independent reader of files with guest memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from volatility3.framework import contexts
from volatility3.framework.layers import physical


@contextmanager
def volatility_layer(path: Path, layer_class: Any) -> Iterator[Any]:
    """Yield the layer of physical memory that a class of Volatility's makes of a file."""
    context = contexts.Context()
    context.config["file.location"] = path.as_uri()
    file = physical.FileLayer(context, "file", "file")
    context.add_layer(file)
    context.config["memory.base_layer"] = "file"
    try:
        with warnings.catch_warnings():
            # Of the package that checks Volatility's own tables of symbols.
            warnings.filterwarnings("ignore", "The metaschema", DeprecationWarning)
            layer = layer_class(context, "memory", "memory")
        context.add_layer(layer)
        yield layer
    finally:
        file.destroy()
