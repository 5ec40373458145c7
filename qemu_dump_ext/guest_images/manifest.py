"""`images.yaml`: which guests there are, what they are made of and how they are started."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.third_party import import_package
from qemu_dump_ext.value import Value

_CHECKOUT_IMAGES = Path(__file__).parents[2] / "images"
_INSTALLED_IMAGES = Path(__file__).parents[1] / "images_data"
_MANIFEST_NAME = "images.yaml"


class PackageSpec(Value):
    """Where one distribution keeps what a guest is made of.

    Attributes:
        architecture: The architecture as the distribution spells it.
        kernel: A meta package, or any package that has the kernel.
        debug_symbols: Same for the kernel's `vmlinux` with DWARF; None: not in the archive.
        suite: A suite of the same archive, also of another release; None: those of this machine.
    """

    architecture: str
    kernel: str
    debug_symbols: str | None
    suite: str | None


class GuestImage(Value):
    """One entry of the manifest.

    Attributes:
        name: What users call it.
        target: QEMU's name of the architecture.
        description: One line.
        qemu: The emulator, found on PATH.
        machine: Arguments for machine and CPU.
        memory_mib: Guest RAM.
        cpus: Number of vCPUs.
        packages: The packages by distribution (`ID` of os-release).
        kernel_arguments: The kernel command line.
        devices: One `-device` each.
        modules: Kernel modules that `/init` loads.
        fill_modules: Those needed in addition to read a virtio disk.
        marker: Line on the console that says the guest is complete.
        failure_pattern: What the console shows when the marker will never come.
        timeout_seconds: How long the marker may take under TCG, with nothing to fill.
        kernel_log: Last line of the kernel log.
        processes: Names of processes that run in the guest.
    """

    name: str
    target: str
    description: str
    qemu: str
    machine: tuple[str, ...]
    memory_mib: int
    cpus: int
    packages: Mapping[str, PackageSpec]
    kernel_arguments: str
    devices: tuple[str, ...]
    modules: tuple[str, ...]
    fill_modules: tuple[str, ...]
    marker: str
    failure_pattern: re.Pattern[str]
    timeout_seconds: int
    kernel_log: str
    processes: tuple[str, ...]


class _Entry:
    """A YAML mapping whose keys are taken one by one; what is left over is a mistake."""

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise RequestError(f"{where} must be a mapping")
        self._where = where
        self._values: dict[str, Any] = dict(value)

    def take(self, key: str, kind: type, wanted: str) -> Any:
        if key not in self._values:
            raise RequestError(f"{self._where} lacks {key!r}")
        value = self._values.pop(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise RequestError(f"{self._where}: {key!r} must be {wanted}, not {value!r}")
        return value

    def text(self, key: str) -> str:
        value: str = self.take(key, str, "a text")
        if not value or "\n" in value:
            raise RequestError(f"{self._where}: {key!r} must be one line of text")
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if key in self._values else None

    def count(self, key: str) -> int:
        value: int = self.take(key, int, "a number")
        if value < 1:
            raise RequestError(f"{self._where}: {key!r} must be at least 1, not {value}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.take(key, list, "a list of texts")
        if not all(isinstance(value, str) for value in values):
            raise RequestError(f"{self._where}: {key!r} must be a list of texts, not {values!r}")
        return tuple(values)

    def pattern(self, key: str) -> re.Pattern[str]:
        text = self.text(key)
        try:
            return re.compile(text)
        except re.error as error:
            raise RequestError(f"{self._where}: {key!r} is no pattern: {error}") from error

    def entries(self, key: str) -> dict[str, _Entry]:
        values = self.take(key, dict, "a mapping")
        return {name: _Entry(f"{self._where}: {name}", value) for name, value in values.items()}

    def finish(self) -> None:
        if self._values:
            raise RequestError(f"{self._where} has unknown keys: {', '.join(sorted(self._values))}")


def _package_spec(entry: _Entry) -> PackageSpec:
    spec = PackageSpec(
        architecture=entry.text("architecture"),
        kernel=entry.text("kernel"),
        debug_symbols=entry.optional_text("debug_symbols"),
        suite=entry.optional_text("suite"),
    )
    entry.finish()
    return spec


def _guest_image(name: str, entry: _Entry) -> GuestImage:
    image = GuestImage(
        name=name,
        target=entry.text("target"),
        description=entry.text("description"),
        qemu=entry.text("qemu"),
        machine=entry.texts("machine"),
        memory_mib=entry.count("memory_mib"),
        cpus=entry.count("cpus"),
        packages={key: _package_spec(value) for key, value in entry.entries("packages").items()},
        kernel_arguments=entry.text("kernel_arguments"),
        devices=entry.texts("devices"),
        modules=entry.texts("modules"),
        fill_modules=entry.texts("fill_modules"),
        marker=entry.text("marker"),
        failure_pattern=entry.pattern("failure_pattern"),
        timeout_seconds=entry.count("timeout_seconds"),
        kernel_log=entry.text("kernel_log"),
        processes=entry.texts("processes"),
    )
    entry.finish()
    return image


def parse_manifest(text: str, where: str) -> dict[str, GuestImage]:
    """Return the guests of a manifest by name.

    Args:
        text: The YAML.
        where: What error messages call it.

    Raises:
        RequestError: A key is missing, unknown or of the wrong type.
    """
    yaml = import_package("yaml", where)
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{where} is not YAML: {reason}") from error
    top = _Entry(where, document)
    guests = top.entries("guests")
    top.finish()
    return {name: _guest_image(name, entry) for name, entry in guests.items()}


def load_manifest() -> dict[str, GuestImage]:
    """Return the guests that this installation or checkout knows."""
    folder = _CHECKOUT_IMAGES if _in_checkout() else _INSTALLED_IMAGES
    return parse_manifest((folder / _MANIFEST_NAME).read_text("utf-8"), _MANIFEST_NAME)


def find_image(name: str) -> GuestImage:
    """Return one guest of the manifest.

    Raises:
        RequestError: There is no guest of this name.
    """
    images = load_manifest()
    if name not in images:
        raise RequestError(f"no guest image {name!r}", hint=f"there are: {', '.join(images)}")
    return images[name]


def default_cache() -> Path:
    """Return the directory for what is fetched: in the checkout, else in the user's cache."""
    if _in_checkout():
        return _CHECKOUT_IMAGES / "cache"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qemu_dump_ext"


def _in_checkout() -> bool:
    return (_CHECKOUT_IMAGES / _MANIFEST_NAME).is_file()
