"""Look up, download and unpack packages with the machine's apt, without touching the machine.

apt gets a configuration, package lists and an empty list of installed packages of its own, so that
any architecture and suite can be asked for, by any user. Mirrors and keys are those that the
machine already uses; apt verifies what it downloads.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.value import Value

_ROLLING_SUITES = frozenset(("stable", "testing", "unstable", "sid"))
_KEYRINGS = Path("/usr/share/keyrings")
_ONE_LINE_SOURCE = re.compile(r"deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<rest>\S.*)")
_DEPENDENCY = re.compile(r"(?P<name>[^\s:(]+)(?::\w+)?(?:\s*\(=\s*(?P<version>[^)\s]+)\s*\))?")


class PackageSource(Value):
    """Where apt finds packages; one stanza of a `.sources` file.

    Attributes:
        uris: Mirrors.
        suites: The suites, such as `bookworm bookworm-updates`.
        components: The components, such as `main`.
        signed_by: Value of `Signed-By`: a path or an indented key; empty: not given.
    """

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str

    def stanza(self) -> str:
        """Return it as apt reads it."""
        return (
            f"Types: deb\nURIs: {' '.join(self.uris)}\nSuites: {' '.join(self.suites)}\n"
            f"Components: {' '.join(self.components)}\nSigned-By: {self.signed_by}\n"
        )


def parse_deb822_sources(text: str) -> list[PackageSource]:
    """Return the enabled binary package sources of a `.sources` file."""
    sources = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1] in {" ", "\t"} and key:
                fields[key] += "\n" + line
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = value.strip()
        enabled = fields.get("enabled", "yes").lower() not in {"no", "false", "0", "off"}
        if enabled and "deb" in fields.get("types", "").split():
            sources.append(
                PackageSource(
                    uris=tuple(fields.get("uris", "").split()),
                    suites=tuple(fields.get("suites", "").split()),
                    components=tuple(fields.get("components", "").split()),
                    signed_by=fields.get("signed-by", ""),
                )
            )
    return sources


def parse_one_line_sources(text: str) -> list[PackageSource]:
    """Return the binary package sources of a `sources.list` file."""
    sources = []
    for line in text.splitlines():
        match = _ONE_LINE_SOURCE.fullmatch(line.partition("#")[0].strip())
        if not match:
            continue
        options = dict(
            option.split("=", 1) for option in (match["options"] or "").split() if "=" in option
        )
        uri, *words = match["rest"].split()
        sources.append(
            PackageSource(
                uris=(uri,),
                suites=tuple(words[:1]),
                components=tuple(words[1:]),
                signed_by=options.get("signed-by", ""),
            )
        )
    return sources


def read_machine_sources(folder: Path = Path("/etc/apt")) -> list[PackageSource]:
    """Return the package sources that apt of this machine is configured with."""
    sources = []
    for path in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        if not path.is_file():
            continue
        if path.suffix == ".sources":
            sources += parse_deb822_sources(path.read_text("utf-8"))
        elif path.suffix == ".list":
            sources += parse_one_line_sources(path.read_text("utf-8"))
    return sources


def select_sources(
    sources: Iterable[PackageSource], codename: str, distribution: str, suite: str | None
) -> list[PackageSource]:
    """Return the distribution's own sources, or the same mirror with another suite.

    Args:
        sources: All of the machine.
        codename: Suite of the machine; other suites that start with it and a dash belong to it.
        distribution: `ID` of os-release; names the keyring where a source names none.
        suite: The other suite; None or the codename: those of the machine.

    Raises:
        SourceError: No source is the distribution's own.
    """
    own = []
    for source in sources:
        suites = tuple(
            name
            for name in source.suites
            if name in _ROLLING_SUITES or name == codename or name.startswith(f"{codename}-")
        )
        if suites and "main" in source.components:
            signed_by = source.signed_by or str(_KEYRINGS / f"{distribution}-archive-keyring.gpg")
            own.append(PackageSource(source.uris, suites, source.components, signed_by))
    if suite is not None and suite != codename:
        base = suite.removesuffix("-backports")
        own = [
            PackageSource(source.uris, tuple(dict.fromkeys((base, suite))), ("main",), signed_by)
            for source in own
            for signed_by in (source.signed_by,)
            if codename in source.suites or _ROLLING_SUITES.intersection(source.suites)
        ][:1]
    if not own:
        raise SourceError(
            f"apt has no package source for {distribution} {codename}",
            hint="see /etc/apt/sources.list.d",
        )
    return own


class Distribution(Value):
    """What this machine runs.

    Attributes:
        name: `debian`, `ubuntu`.
        codename: The codename of its suite.
    """

    name: str
    codename: str


def this_distribution(known: Iterable[str]) -> Distribution:
    """Return the distribution of this machine, or the one of `known` that it derives from.

    Raises:
        RequestError: It is none of `known`.
    """
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    names = [release.get("ID", "linux"), *release.get("ID_LIKE", "").split()]
    known = list(known)
    for name in names:
        if name in known:
            return Distribution(name, release.get("VERSION_CODENAME", "sid"))
    raise RequestError(
        f"no packages of {names[0]} are known for this guest", hint=f"there are: {', '.join(known)}"
    )


class Package(Value):
    """A package as the index of the day describes it.

    Attributes:
        name: The name of the package.
        version: The version of the package.
        size: The size of the download, in bytes.
        depends: Names of dependencies, each with its version if that is pinned.
    """

    name: str
    version: str
    size: int
    depends: tuple[tuple[str, str | None], ...]


def parse_package(text: str) -> Package:
    """Return the first package of an answer of `apt-cache show`.

    Raises:
        KeyError: It is no such answer.
    """
    fields = dict(
        re.findall(r"^([A-Za-z-]+): *(.*)$", text.split("\n\n", maxsplit=1)[0], re.MULTILINE)
    )
    depends = [
        (match["name"], match["version"])
        for item in re.split(r"[,|]", fields.get("Depends", ""))
        if (match := _DEPENDENCY.match(item.strip()))
    ]
    return Package(fields["Package"], fields["Version"], int(fields["Size"]), tuple(depends))


class PackageArchive:
    """The packages of one suite and architecture.

    Several processes may use the same folder: whoever comes second waits for the first one's apt.

    Attributes:
        architecture: The architecture as the distribution spells it.
    """

    def __init__(
        self, folder: Path, *, distribution: Distribution, architecture: str, suite: str | None
    ) -> None:
        self.architecture = architecture
        name = f"{distribution.name}-{suite or distribution.codename}-{architecture}"
        self._folder = folder / name
        self._sources = select_sources(
            read_machine_sources(), distribution.codename, distribution.name, suite
        )

    def update(self) -> str | None:
        """Bring the index up to date; return what apt complains about.

        Part of the index may be out of step on a mirror or the network may be down: what else is
        there, or was there before, remains good.
        """
        folder = self._folder
        for name in ("state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        stanzas = "\n".join(source.stanza() for source in self._sources)
        configuration = self._configuration()
        with self._locked():
            (folder / "machine.sources").write_text(stanzas, "utf-8")
            (folder / "apt.conf").write_text(configuration, "utf-8")
        try:
            self._run("apt-get", "-q", "--error-on=any", "update")
        except SourceError as error:
            return error.message
        return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _configuration(self) -> str:
        """Return an apt.conf that replaces the machine's, but for how to download."""
        folder = self._folder.resolve()
        dump = run_tool("apt-config", "dump", environment=_environment())
        settings = {
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::Etc::sourcelist": folder / "machine.sources",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "APT::Architecture": self.architecture,
            "APT::Architectures::": self.architecture,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",  # the folders are the caller's: no other user to become
            "Acquire::Languages": "none",
        }
        return "".join(
            [
                *(line + "\n" for line in dump.splitlines() if line.startswith("Acquire::")),
                "#clear Acquire::Languages;\n",
                *(f'{key} "{value}";\n' for key, value in settings.items()),
            ]
        )

    def find(self, name: str, version: str | None = None) -> Package:
        """Return the newest package of a name, or the one of a version.

        Raises:
            SourceError: The index has no such package.
        """
        wanted = f"{name}={version}" if version else name
        try:
            return parse_package(self._run("apt-cache", "show", "--no-all-versions", wanted))
        except (SourceError, KeyError) as error:
            raise SourceError(
                f"the archive has no package {wanted} ({self.architecture})"
            ) from error

    def find_with_dependencies(
        self, name: str, pattern: re.Pattern[str], version: str | None = None
    ) -> list[Package]:
        """Return a package and, recursively, those it depends on whose names match `pattern`.

        This leads from a meta package to the versioned packages of the day.
        """
        found: dict[str, Package] = {}
        waiting: list[tuple[str, str | None]] = [(name, version)]
        while waiting:
            next_name, next_version = waiting.pop(0)
            if next_name not in found:
                package = self.find(next_name, next_version)
                found[next_name] = package
                waiting += [depend for depend in package.depends if pattern.fullmatch(depend[0])]
        return list(found.values())

    def download(self, packages: Sequence[Package], into: Path) -> list[Path]:
        """Download packages into a folder and return the `.deb` files in it.

        Raises:
            SourceError: apt could not.
        """
        names = [f"{package.name}={package.version}" for package in packages]
        self._run("apt-get", "-q", "download", *names, folder=into)
        return sorted(into.glob("*.deb"))

    def download_closure(self, names: Sequence[str], into: Path) -> list[Path]:
        """Download packages with all that they depend on, down to libc, into a folder.

        Raises:
            SourceError: apt could not.
        """
        (into / "partial").mkdir()
        archives = f"Dir::Cache::archives={into.resolve()}"
        self._run("apt-get", "-q", "-y", "-o", archives, "--download-only", "install", *names)
        return sorted(into.glob("*.deb"))

    def _run(self, *command: str, folder: Path | None = None) -> str:
        environment = _environment(APT_CONFIG=str(self._folder.resolve() / "apt.conf"))
        # apt itself does not wait for the lock on its lists.
        with self._locked():
            return run_tool(*command, folder=folder, environment=environment)


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8", **more}


def run_tool(
    *command: str, folder: Path | None = None, environment: dict[str, str] | None = None
) -> str:
    """Run a program and return its output.

    Raises:
        SourceError: It is missing or failed; the message has its first complaint.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise SourceError(
            f"there is no {command[0]}", hint="guest images need a Debian-like system"
        ) from error
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in complaints if line.startswith("E: ")] or complaints
        reason = errors[0] if errors else f"exit status {done.returncode}"
        raise SourceError(f"{' '.join(command[:2])}: {reason}")
    return done.stdout


def unpack(packages: Iterable[Path], into: Path) -> None:
    """Unpack `.deb` files into a folder.

    Raises:
        SourceError: A file is damaged or the disk is full.
    """
    for package in packages:
        run_tool("dpkg-deb", "--extract", str(package), str(into))


def unpack_members(package: Path, patterns: Sequence[str], into: Path) -> None:
    """Unpack only the members of a `.deb` that match shell patterns; nothing else is written.

    Raises:
        SourceError: Nothing matches, the file is damaged or the disk is full.
    """
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
    ) as unpacker:
        taken = subprocess.run(
            ["tar", "--extract", "--wildcards", f"--directory={into}", *patterns],
            stdin=unpacker.stdout,
            capture_output=True,
            text=True,
            check=False,
        )
    if taken.returncode or unpacker.returncode:
        reason = (taken.stderr.strip() or "it is damaged").splitlines()[0]
        raise SourceError(f"cannot unpack {package.name}: {reason}")
