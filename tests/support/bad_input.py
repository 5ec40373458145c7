"""Words that `qemu-dump-guest-memory` must refuse, whatever the door."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BadInput:
    """One command line.

    Attributes:
        name: What is wrong.
        words: With placeholders of `strange_files`.
        status: Documented exit status.
        message: Regular expression in the one line.
    """

    name: str
    words: tuple[str, ...]
    status: int
    message: str

    def words_in(self, folder: Path) -> list[str]:
        """Return the words for the files that `strange_files` made in `folder`."""
        return [word.replace("@", str(folder)) for word in self.words]


def strange_files(folder: Path) -> None:
    """Make what the placeholders name: @/existing, @/link, @/loop."""
    (folder / "existing").write_text("precious")
    (folder / "link").symlink_to("existing")
    (folder / "loop").symlink_to("loop")


BAD_INPUT = (
    BadInput("codec", ("-z", "lzma", "@/new"), 2, r"'lzma' \(choose from .*'?zstd'?.*--help"),
    BadInput("two codecs", ("-l", "-s", "@/new"), 2, r"-s: not allowed with argument -l"),
    BadInput("codec twice", ("-z", "zstd", "-l", "@/new"), 2, r"-l: not allowed with .* -z"),
    BadInput("option", ("--frobnicate", "@/new"), 2, r"unrecognized arguments: --frobnicate"),
    BadInput(
        "dump level", ("--dump-level", "32", "@/new"), 2, r"'32' is no dump level from 0 to 31"
    ),
    BadInput("mini dump", ("--mini=tiny", "@/new"), 2, r"'tiny' \(choose from '?usual'?,"),
    BadInput("mini of a level", ("--mini", "--dump-level", "3", "@/new"), 2, r"of dump level 31"),
    BadInput("exact mini dump", ("--mini", "--exact", "@/new"), 2, r"QEMU has no mini dumps"),
    BadInput("threads", ("--threads", "0", "@/new"), 2, r"'0' is no number of 1 or more"),
    BadInput("memory", ("--memory", "aether", "@/new"), 2, r"'aether' \(choose from '?auto'?,"),
    BadInput("no file", (), 2, r"required: FILE"),
    BadInput("empty file", ("",), 2, r"the name of the dump is empty"),
    BadInput("no directory", ("@/no/new",), 4, r"there is no directory .*/no$"),
    BadInput("file as directory", ("@/existing/new",), 4, r"Not a directory"),
    BadInput("directory", ("@",), 2, r"is a directory \(name a file in it\)"),
    BadInput("directory by force", ("--force", "@"), 2, r"is a directory \(name a file in it\)"),
    BadInput("existing", ("@/existing",), 2, r"/existing exists \(--force replaces it\)"),
    BadInput("link to existing", ("@/link",), 2, r"/existing exists \(--force replaces it\)"),
    BadInput("loop of links", ("@/loop",), 2, r"names no file: .*[Ll]oop"),
    BadInput("no such home", ("~no-such-user/new",), 2, r"names no file: .*home"),
    BadInput("long name", ("@/" + "x" * 300,), 4, r"File name too long"),
    BadInput("no command", ("|",), 2, r"no command behind \|"),
    BadInput("failing command", ("|cat >/dev/null; exit 3",), 4, r"ended with status 3$"),
    BadInput("command that stops", ("|head -c 1000 >/dev/null",), 4, r"before it had read"),
    BadInput("missing command", ("|exec 2>/dev/null; no-such-word",), 4, r"ended with status 127"),
    BadInput("raw pipe", ("-z", "-R", "|cat >/dev/null"), 2, r"seekable file \(leave out -R\)"),
)
