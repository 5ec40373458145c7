"""The options of `qemu-dump-guest-memory`, the same in gdb and on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from qemu_dump_ext.dump_formats.kdump import UNCOMPRESSED
from qemu_dump_ext.dump_request import DumpRequest
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from qemu_dump_ext.page_codecs import all_page_codecs

DEFAULT_CODEC = "zlib"
PROGRESS_CHOICES = ("auto", "always", "never")
FILE_HELP = "PATH, file:PATH, fd:N (an open descriptor), '|COMMAND'"


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise RequestError with argparse's message."""
        raise RequestError(message, hint=f"'{self.prog} --help' shows the options")


def codec_names() -> list[str]:
    """Return every word that may follow -z."""
    return [*all_page_codecs(), UNCOMPRESSED]


def add_dump_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that both doors have."""
    codecs = parser.add_mutually_exclusive_group()
    codecs.add_argument(
        "-z",
        dest="codec",
        metavar=f"[{'|'.join(codec_names())}]",
        choices=codec_names(),
        help=f"kdump-compressed format; without a word behind it: {DEFAULT_CODEC}",
    )
    codecs.add_argument(
        "-l", dest="codec", action="store_const", const="lzo", help="kdump, pages packed by lzo"
    )
    codecs.add_argument(
        "-s",
        dest="codec",
        action="store_const",
        const="snappy",
        help="kdump, pages packed by snappy",
    )
    parser.add_argument(
        "-R",
        dest="raw",
        action="store_true",
        help="kdump as it is, not as makedumpfile's flattened stream; needs a seekable file",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="byte for byte what the attached QEMU would write, its known defects included",
    )
    parser.add_argument(
        "--level",
        type=int,
        metavar="N",
        help="of zlib (0 to 9) or zstd (0 to 19): low is fast, high is small",
    )
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="how many compress; default: all CPUs"
    )
    parser.add_argument(
        "--exclude-zero",
        action="store_true",
        help="leave pages of zeros out of a kdump, as makedumpfile -d 1 does",
    )
    parser.add_argument(
        "--sparse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave holes for zeros in an ELF file (default), or write them",
    )
    parser.add_argument(
        "--snapshot",
        action="store_true",
        help="copy guest memory, let the guest run again, and then write the dump",
    )
    parser.add_argument(
        "--max-pause",
        type=_seconds,
        metavar="SECONDS",
        help="give the dump up when the guest has stood still for so long",
    )
    parser.add_argument(
        "--memory",
        default=AUTO,
        choices=(AUTO, *all_memory_sources()),
        help="where guest memory comes from; auto takes the fastest that works",
    )
    parser.add_argument(
        "--qmp", metavar="SOCKET", help="QMP socket of the guest: unix path or HOST:PORT"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--json", action="store_true", help="report as one line of JSON")
    parser.add_argument(
        "--progress",
        choices=PROGRESS_CHOICES,
        default="auto",
        help="show progress; auto: where somebody watches",
    )


def parse_dump_arguments(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> argparse.Namespace:
    """Parse, with the word behind -z optional.

    Raises:
        RequestError: The options contradict each other or are unknown.
    """
    return parser.parse_args(_with_explicit_codec(words))


def _with_explicit_codec(words: Sequence[str]) -> list[str]:
    # `-z out.kdump` names a file, `-z lzo out.kdump` a codec and a file. A word of no codec with
    # another word behind it is a misspelt codec, and argparse says which there are.
    explicit: list[str] = []
    for index, word in enumerate(words):
        explicit.append(word)
        if word != "-z":
            continue
        rest = [later for later in words[index + 1 :] if not later.startswith("--")]
        following = words[index + 1] if index + 1 < len(words) else ""
        files_follow = len([later for later in rest if later == "-" or later[:1] != "-"])
        misspelt = files_follow > 1 and following[:1] != "-" and following in rest
        if following not in codec_names() and not misspelt:
            explicit.append(DEFAULT_CODEC)
    return explicit


def request_of(arguments: argparse.Namespace) -> DumpRequest:
    """Return what the options ask for."""
    return DumpRequest(
        codec=arguments.codec,
        raw=arguments.raw,
        exact=arguments.exact,
        level=arguments.level,
        threads=arguments.threads,
        exclude_zero=arguments.exclude_zero,
        sparse=arguments.sparse,
        snapshot=arguments.snapshot,
        max_pause=arguments.max_pause,
    )


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise ValueError(word)
    return number


def _seconds(word: str) -> float:
    seconds = float(word)
    if not 0 < seconds < float("inf"):
        raise ValueError(word)
    return seconds
