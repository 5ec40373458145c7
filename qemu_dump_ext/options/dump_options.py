"""The options of `qemu-dump-guest-memory`, the same in gdb and on the command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from qemu_dump_ext.connections.target import add_target_arguments
from qemu_dump_ext.dump_formats import (
    all_dump_formats,
    find_dump_format,
    format_by_words,
    format_words,
)
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.access import Monitor
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from qemu_dump_ext.options.expressions import (
    is_expression,
    parse_expressions,
    registers_in,
    with_register,
)
from qemu_dump_ext.options.sizes import parse_size
from qemu_dump_ext.options.words import Words
from qemu_dump_ext.plan.request import (
    DUMP_LEVEL_MAX,
    MINI_DUMPS,
    WINDOWS_FORMAT,
    DumpRequest,
    Live,
    MemoryRange,
)
from qemu_dump_ext.value import Value

DEFAULT_CODEC = "zlib"
RESUME, STAY_STOPPED = "resume", "stay-stopped"
"""What becomes of the guest after a dump by a gdbstub, if the user says."""
PROGRESS_CHOICES = ("auto", "always", "never", "json")
_COUNT = re.compile(r"[0-9]{1,9}")
_ALONE = {"--mini": MINI_DUMPS[0], "--live": Live.REQUIRE}
"""What options stand for that have no word behind them."""
COMMAND = "dump-guest-memory"
"""QEMU's name of the command, for its messages."""


class DumpLevel(Value):
    """What `--dump-level` asks for; its text is what users write.

    Attributes:
        number: The level, as `DumpRequest` has it.
        required: Rather no dump than one of all pages, where they cannot be told apart.
    """

    number: int = 0
    required: bool = False

    def __str__(self) -> str:
        return f"{self.number}!" if self.required else str(self.number)


NO_DUMP_LEVEL = DumpLevel()


def add_dump_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that both doors have."""
    _add_form_arguments(parser)
    parser.add_argument(
        "--exact",
        action="store_true",
        help="write byte for byte what the attached QEMU would, its known defects included",
    )
    _add_content_arguments(parser)
    _add_guest_arguments(parser)
    _add_report_arguments(parser)


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a dump that is made of another one.

    What concerns a guest that runs is as where nobody asks for it.
    """
    every = argparse.ArgumentParser(add_help=False)
    add_dump_arguments(every)
    parser.set_defaults(
        bounds=[],
        **{action.dest: action.default for action in every._actions},  # noqa: SLF001
    )
    _add_form_arguments(parser)
    _add_content_arguments(parser)
    _add_report_arguments(parser)


def _add_form_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-p",
        dest="paging",
        action="store_true",
        help="write an ELF core with one segment for each range that the vCPUs' page tables map, at"
        " its virtual address",
    )
    codecs = parser.add_mutually_exclusive_group()
    codecs.add_argument(
        "-z",
        dest="codec",
        metavar="[CODEC]",
        choices=Words(format_words),
        help="write a kdump, packed by this codec (%(choices)s); without a word behind it:"
        f" {DEFAULT_CODEC}",
    )
    codecs.add_argument(
        "-l",
        dest="codec",
        action="store_const",
        const="lzo",
        help="write a kdump, pages packed by lzo",
    )
    codecs.add_argument(
        "-s",
        dest="codec",
        action="store_const",
        const="snappy",
        help="write a kdump, pages packed by snappy",
    )
    codecs.add_argument(
        "-w",
        dest="format",
        action="store_const",
        const=WINDOWS_FORMAT,
        help="write a crash dump of Windows, for a guest that runs it",
    )
    codecs.add_argument(
        "--format",
        metavar="NAME",
        choices=Words(all_dump_formats),
        help="format of the dump by its name in QMP: %(choices)s",
    )
    parser.add_argument(
        "-R",
        dest="raw",
        action="store_true",
        help="write a kdump as it is, not as makedumpfile's flattened stream; to a seekable file",
    )
    parser.add_argument(
        "--range",
        nargs=2,
        metavar=("BEGIN", "LENGTH"),
        help="guest physical memory to dump, as BEGIN LENGTH behind FILE, but also for a kdump:"
        " the pages that the range touches",
    )


def _add_content_arguments(parser: argparse.ArgumentParser) -> None:
    kernel = parser.add_mutually_exclusive_group()
    kernel.add_argument(
        "--no-vmcoreinfo",
        dest="vmcoreinfo",
        action="store_false",
        help="leave out the note in which a Linux kernel tells readers about itself; without a"
        " vmcoreinfo device it is looked for in guest memory",
    )
    kernel.add_argument(
        "--kernel",
        metavar="RELEASE",
        help="take the note of this kernel (as 'uname -r' prints it, or the note's address as"
        " 0x...) where guest memory has those of several",
    )
    parser.add_argument(
        "--level",
        type=int,
        metavar="N",
        help="the level of zlib (0 to 9) or zstd (0 to 19): low is fast, high is small",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="how many compress at the same time; default: all CPUs",
    )
    parser.add_argument(
        "--dump-level",
        type=parse_dump_level,
        default=NO_DUMP_LEVEL,
        metavar="N[!]",
        help="leave out pages that nobody will look for, as makedumpfile numbers them: the sum of"
        " 1 (zeros), 2 (cache), 4 (cache with private data), 8 (user) and 16 (free); 31 is all;"
        " with ! rather no dump than one of all pages where they cannot be told apart",
    )
    parser.add_argument(
        "--mini",
        nargs="?",
        const=MINI_DUMPS[0],
        choices=MINI_DUMPS,
        metavar="smallest",
        help="what triage needs, in a small kdump: --dump-level 31, and no struct pages of pages"
        " that are left out; --mini=smallest: nor the kernel's code, which readers have in its"
        " vmlinux",
    )
    parser.add_argument(
        "--max-bytes",
        type=parse_size_above_zero,
        metavar="SIZE",
        help="take the lowest dump level, from --dump-level on, of which the dump is no larger"
        " (2GiB); rather none than a larger one",
    )
    parser.add_argument(
        "--omit-zero",
        action="store_true",
        help="leave pages of zeros out: of a kdump, where they otherwise share one page (crash then"
        " opens it with --zero_excluded only), or of a dump of Windows, which then has a bitmap",
    )
    parser.add_argument(
        "--sparse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave holes for zeros in an ELF file or a dump of Windows (default), or write them",
    )


def _add_guest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--snapshot",
        action="store_true",
        help="copy guest memory, let the guest run again, and then write the dump",
    )
    parser.add_argument(
        "--live",
        choices=tuple(Live),
        metavar="[=prefer]",
        help="have QEMU stream the guest as it is at one moment, while it runs: it stands still for"
        " milliseconds; with =prefer as with --snapshot where that cannot be",
    )
    parser.add_argument(
        "--max-pause",
        type=positive_seconds,
        metavar="SECONDS",
        help="give the dump up when the guest has stood still for so long",
    )
    parser.add_argument(
        "--memory",
        default=AUTO,
        choices=(AUTO, *all_memory_sources()),
        help="where guest memory comes from; auto takes the fastest that works",
    )
    add_target_arguments(parser)


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    parser.add_argument(
        "--progress",
        choices=PROGRESS_CHOICES,
        default="auto",
        help="show progress; auto: where somebody watches; json: for a program, an object a second"
        " on standard error",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="also say which faster ways to guest memory were not taken, and why",
    )


def add_file_arguments(parser: argparse.ArgumentParser, file_help: str) -> None:
    """Declare the words that are no options: FILE, and as in HMP a range behind it."""
    parser.add_argument("file", metavar="FILE", help=file_help)
    parser.add_argument(
        "bounds",
        nargs="*",
        default=[],  # without, argparse takes it for required
        metavar="BEGIN LENGTH",
        help="guest physical memory to dump, in bytes: expressions as in QEMU's monitor",
    )


def parse_dump_arguments(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> argparse.Namespace:
    """Parse, with the word behind -z optional.

    Raises:
        RequestError: The options contradict each other or are unknown.
    """
    with uninterrupted():  # in the middle of it, argparse cannot put right what it has changed
        return parser.parse_intermixed_args(with_explicit_codec(words))


def with_explicit_codec(words: Sequence[str], files: int = 1) -> list[str]:
    """Return the words with a codec behind each -z, as argparse wants it.

    Args:
        words: Of a command line.
        files: How many words that are no options name files.
    """
    # `-z out.kdump` names a file, `-z lzo out.kdump` a codec and a file. A word of no codec with
    # another word behind it is a misspelt codec, and argparse says which there are.
    # What is behind `--mini` is none of its words, which stand behind `--mini=`; so with `--live`.
    explicit: list[str] = []
    for index, word in enumerate(words):
        explicit.append(f"{word}={_ALONE[word]}" if word in _ALONE else word)
        if word != "-z":
            continue
        rest = [later for later in words[index + 1 :] if not later.startswith("--")]
        following = words[index + 1] if index + 1 < len(words) else ""
        plain = [later for later in rest if later == "-" or later[:1] != "-"]
        misspelt = (
            len(plain) > files
            and not is_expression(plain[files])  # BEGIN behind FILE
            and following[:1] != "-"
            and following in rest
        )
        if following not in format_words() and not misspelt:
            explicit.append(DEFAULT_CODEC)
    return explicit


def words_of_options(
    arguments: argparse.Namespace,
    declare: Callable[[argparse.ArgumentParser], None] = add_dump_arguments,
) -> list[str]:
    """Return the options that give these arguments, but for what is as it is without any.

    Args:
        arguments: With everything that `declare` declares.
        declare: Adds the options to a parser.
    """
    parser = argparse.ArgumentParser(add_help=False)
    declare(parser)
    words: list[str] = []
    given = {
        action.dest: getattr(arguments, action.dest)
        for action in parser._actions  # noqa: SLF001 - argparse has no other way
        if getattr(arguments, action.dest) != action.default
    }
    for action in parser._actions:  # noqa: SLF001
        if action.dest in given and (found := _words_for(action, given[action.dest])):
            words += found
            del given[action.dest]
    if given:
        raise TypeError(f"no option gives {given}")
    return words


def _words_for(action: argparse.Action, value: object) -> list[str]:
    """Return how an option is written that gives `value`; nothing where it cannot."""
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [option if value else action.option_strings[-1]]
    if action.nargs == 0:
        return [option] if value == action.const else []
    if action.nargs not in {None, "?"}:
        return [option, *value] if isinstance(value, list) else []
    return [f"{option}={value}"] if option.startswith("--") else [option, str(value)]


def names_registers(arguments: argparse.Namespace) -> bool:
    """Tell whether BEGIN or LENGTH names a register, which the guest must be asked for."""
    return any(registers_in(word) for word in (*arguments.bounds, *(arguments.range or ())))


def read_registers(arguments: argparse.Namespace, monitor: Monitor) -> None:
    """Put values where BEGIN and LENGTH name registers.

    Raises:
        RequestError: QEMU's monitor knows no such register.
        SourceError: It does not answer.
    """
    arguments.bounds = [_with_registers(word, monitor) for word in arguments.bounds]
    if arguments.range is not None:
        arguments.range = [_with_registers(word, monitor) for word in arguments.range]


def request_of(arguments: argparse.Namespace) -> DumpRequest:
    """Return what the options ask for; registers have been read.

    Raises:
        RequestError: They contradict each other.
    """
    request = DumpRequest(
        format=_format_of(arguments),
        exact=arguments.exact,
        paging=arguments.paging,
        vmcoreinfo=arguments.vmcoreinfo,
        kernel=arguments.kernel,
        level=arguments.level,
        threads=arguments.threads,
        omit_zero=arguments.omit_zero,
        dump_level=arguments.dump_level.number,
        mini=arguments.mini,
        max_bytes=arguments.max_bytes,
        dump_level_required=arguments.dump_level.required,
        sparse=arguments.sparse,
        snapshot=arguments.snapshot,
        live=None if arguments.live is None else Live(arguments.live),
        max_pause=arguments.max_pause,
    )
    request = replace(request, memory_range=_range_of(arguments, request))
    find_dump_format(request.format).check(request)
    return request


def _format_of(arguments: argparse.Namespace) -> str:
    if arguments.format is None:
        codec = arguments.codec or (DEFAULT_CODEC if arguments.mini else None)
        return format_by_words(codec, raw=arguments.raw)
    if arguments.raw:
        raise RequestError("-R goes with -z, -l or -s", hint="--format kdump-raw-zlib says it all")
    return str(arguments.format)


def _range_of(arguments: argparse.Namespace, request: DumpRequest) -> MemoryRange | None:
    if arguments.range is not None:
        if arguments.bounds:
            raise RequestError("--range and BEGIN LENGTH are the same: give one of them")
        begin, length = (
            value for word in arguments.range for value in parse_expressions(word, "--range", 1)
        )
        return MemoryRange(begin, length, is_extension=True)
    # As one line: the monitor, too, takes `0x1000 - 4` for one number.
    try:
        values = parse_expressions(" ".join(arguments.bounds), COMMAND, 2)
    except RequestError as error:
        raise RequestError(
            f"BEGIN LENGTH behind FILE are no numbers: {error.message}",
            hint="one FILE, and behind it at most a range of guest physical memory",
        ) from error
    if not values:
        return None
    if len(values) == 1:
        # A format that has no range says so first.
        find_dump_format(request.format).check(replace(request, memory_range=MemoryRange(0, 0)))
        raise RequestError("Parameter 'length' is missing")
    begin, length = values
    return MemoryRange(begin, length)


def _with_registers(text: str, monitor: Monitor) -> str:
    for register in registers_in(text):
        text = with_register(text, register, monitor.execute(f"print {register}"))
    return text


def _positive(word: str) -> int:
    if not _COUNT.fullmatch(word) or not int(word):
        raise argparse.ArgumentTypeError(f"{word!r} is no number of 1 or more")
    return int(word)


def positive_seconds(word: str) -> float:
    """Return the seconds that a word asks for.

    Raises:
        argparse.ArgumentTypeError: It is no number above 0.
    """
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{word!r} is no number of seconds above 0")
    return seconds


def parse_size_above_zero(word: str) -> int:
    """Return the bytes that a word asks for, as `parse_size` reads it.

    Raises:
        argparse.ArgumentTypeError: It is no size above 0.
    """
    try:
        size = parse_size(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is no size: {error}") from error
    if not size:
        raise argparse.ArgumentTypeError(f"{word!r} is no size above 0")
    return size


def parse_dump_level(word: str) -> DumpLevel:
    """Return the dump level that a word asks for.

    Args:
        word: `N`, or `N!` for a level that is required.

    Raises:
        argparse.ArgumentTypeError: It is no level.
    """
    number = word.removesuffix("!")
    if not _COUNT.fullmatch(number) or int(number) > DUMP_LEVEL_MAX:
        raise argparse.ArgumentTypeError(f"{word!r} is no dump level from 0 to {DUMP_LEVEL_MAX}")
    return DumpLevel(int(number), word.endswith("!"))
