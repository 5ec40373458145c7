"""`qemu-dump targets`: what can be dumped of which QEMU target, as a table in Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from qemu_dump_ext.architectures import Architecture, all_architectures
from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.guest_images.manifest import load_manifest

_HEADER = (
    "target",
    "bits",
    "byte order",
    "ELF, kdump",
    "`-p`",
    "doors",
    "compared with QEMU's own",
    "guest image",
)


def _add_arguments(_parser: argparse.ArgumentParser) -> None:
    pass


def table_of_targets() -> Iterator[str]:
    """Yield the lines of the table."""
    images: dict[str, list[str]] = {}
    for image in load_manifest().values():
        images.setdefault(image.target, []).append(image.name)
    yield _row(_HEADER)
    yield _row(["---"] * len(_HEADER))
    for name, architecture in all_architectures().items():
        yield _row(
            (
                name,
                ", ".join(str(8 * size) for size in _sorted(architecture, "word_size")),
                ", ".join(_sorted(architecture, "byte_order")),
                "yes",
                _paging(architecture),
                "gdb, QMP",
                _oracle(architecture),
                ", ".join(images.get(name, ())) or "-",
            )
        )


def _sorted(architecture: Architecture, attribute: str) -> list[str]:
    return sorted({getattr(core, attribute) for core in architecture.cores})


def _paging(architecture: Architecture) -> str:
    if architecture.page_table_roots is not None:
        return "yes"
    return "physical" if architecture.kernel_page_tables is None else "kernel"


def _oracle(architecture: Architecture) -> str:
    since = architecture.dumped_by_qemu_since
    if since is None:
        return "QEMU refuses"
    return "byte for byte" if not any(since) else "QEMU dumps it since {}.{}".format(*since)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _run(_arguments: argparse.Namespace) -> int:
    print("\n".join(table_of_targets()))
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "targets", "show which targets can be dumped", _add_arguments, _run, examples=("",)
)
