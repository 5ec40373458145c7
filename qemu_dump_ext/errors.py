"""The exceptions that every door knows how to tell: what the package raises on purpose is one.

::

    DumpError                        exit status 1
     +- RequestError                 2  asked for something impossible
     |   +- MissingPackageError         .package is not installed
     |   |   +- CodecUnavailableError
     |   +- UnsupportedTargetError
     |   +- NotDumpedByQemuError        QEMU refuses what is to be like its own
     |   +- PauseLimitError             the guest would stand still for too long
     |   +- NotLiveError                QEMU cannot stream this guest while it runs
     +- SourceError                  3  cannot get at the guest
     |   +- ConnectError
     |   +- GuestDisturbedError         somebody else let it run, or reset it
     |   +- GuestMemoryFaultError       .gpa .size
     |   +- MonitorAnswerError          .command .answer
     |       +- GuestBusyError          who manages the guest does something else with it
     +- DumpWriteError               4  the dump could not be written
     |   +- NoRoomLeftError             it would take what is to be kept free
     |   +- DumpTooLargeError           it would take more than it may
     +- CorruptDumpError             5  an existing dump is damaged
     |   +- NotADumpError               it is no dump that we know
     |       +- AnothersDumpError           it is one for another reader

Each carries one line that says what was wrong, and optionally a `hint`: one thing that the user
can do. A front end shows both and ends with `exit_status`. Where a room has an error that nobody
else tells from these, such as a stored crash that is damaged, it derives its own from them.
"""

from __future__ import annotations

EXIT_SUCCESS = 0
EXIT_FAILURE = 1
EXIT_INCOMPLETE = 6
"""The dump was written, and something in it could not be had, or is a guess."""
EXIT_INTERRUPTED = 130


class DumpError(Exception):
    """Root of all errors that a user can cause or mend."""

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        # A note says what could not be cleaned up.
        said = "; ".join((self.message, *getattr(self, "__notes__", ())))
        return f"{said} ({self.hint})" if self.hint else said


class RequestError(DumpError):
    """What was asked for is impossible or contradicts itself."""

    exit_status = 2


class MissingPackageError(RequestError):
    """A Python package is needed that this interpreter cannot import."""

    def __init__(self, message: str, *, package: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.package = package


class CodecUnavailableError(MissingPackageError):
    """The Python package of a page codec cannot be imported."""


class UnsupportedTargetError(RequestError):
    """No architecture file describes this guest."""


class NotDumpedByQemuError(RequestError):
    """The attached QEMU does not dump this target: no dump can be like its own."""


class PauseLimitError(RequestError):
    """The dump cannot be taken within the pause that the user allows."""


class NotLiveError(RequestError):
    """The guest cannot be dumped while it runs.

    Attributes:
        stands_still: For it does not run: there is no pause that could be shorter.
    """

    def __init__(
        self, message: str, *, stands_still: bool = False, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.stands_still = stands_still


class SourceError(DumpError):
    """The guest, its monitor or its memory cannot be reached."""

    exit_status = 3


class ConnectError(SourceError):
    """A socket or a debugger could not be connected to."""


class GuestDisturbedError(SourceError):
    """What was read of the guest does not fit together."""

    def __init__(self) -> None:
        super().__init__(
            "somebody else let the guest run, or reset it, while it was dumped",
            hint="dump it again, and keep other clients of QEMU from it meanwhile",
        )


class GuestMemoryFaultError(SourceError):
    """Guest memory could not be read."""

    def __init__(self, gpa: int, size: int, reason: str) -> None:
        super().__init__(f"cannot read {size:#x} bytes of guest memory at {gpa:#x}: {reason}")
        self.gpa = gpa
        self.size = size


class MonitorAnswerError(SourceError):
    """The monitor refused a command or gave an answer that cannot be understood."""

    def __init__(self, command: str, answer: str, *, hint: str | None = None) -> None:
        first_line = answer.strip().splitlines()[0][:200] if answer.strip() else "no answer"
        super().__init__(f"monitor command {command!r}: {first_line}", hint=hint)
        self.command = command
        self.answer = answer


class GuestBusyError(MonitorAnswerError):
    """Who manages the guest does something else with it; later it may be asked again."""


class DumpWriteError(DumpError):
    """The dump could not be written; no file of its name was left behind."""

    exit_status = 4


class NoRoomLeftError(DumpWriteError):
    """A dump would take what the file system is to have left."""


class DumpTooLargeError(DumpWriteError):
    """A dump would take more than what was asked for as the most."""


class CorruptDumpError(DumpError):
    """An existing dump contradicts its format."""

    exit_status = 5


class NotADumpError(CorruptDumpError):
    """The file is of no format that we read."""


class AnothersDumpError(NotADumpError):
    """The file is for another reader than that which was asked."""
