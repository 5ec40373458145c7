"""What holds for each program that is installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

import qemu_dump_ext
from qemu_dump_ext.third_party import PACKAGES
from tests.support.doors import REPOSITORY, child_environment

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PROGRAMS = PROJECT["scripts"]
# What a Python without the package is asked for, and the extra that brings it.
_ASKED = {
    "qemu-crash-collector list": ("prometheus_client", "collector"),
    "qemu-crash-collector guests": ("pydantic", "collector"),
    "qemu-crash-collector check-config": ("yaml", "collector"),
    "qemu-dump images list": ("yaml", "images"),
    "qemu-dump targets": ("yaml", "images"),
    "qemu-dump info --qmp x": ("qemu.qmp", None),
    "qemu-dump dmesg --qmp x": ("qemu.qmp", None),
    "qemu-dump-guest-memory --qmp x y": ("qemu.qmp", None),
    "qemu-dump-guest-memory --gdb x y": ("pygdbmi", "gdb"),
    "qemu-hmp-proxy --qmp x": ("qemu.qmp", None),
}


def _run_program(line: str, *missing: str) -> subprocess.CompletedProcess[str]:
    program, *words = line.split()
    module, _, function = PROGRAMS[program].partition(":")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({missing}))
from {module} import {function} as run
sys.argv[0] = {program!r}
sys.exit(run())
"""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
        env=child_environment(),
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_tells_its_version(program: str):
    done = _run_program(f"{program} --version")
    assert done.stdout == f"{program} {qemu_dump_ext.__version__}\n"
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("line", "asked"), _ASKED.items(), ids=_ASKED)
def test_a_missing_package_is_one_line_with_the_command_that_brings_it(
    line: str, asked: tuple[str, str | None]
):
    module, extra = asked
    done = _run_program(line, module)
    package = PACKAGES[module].name
    wanted = package if extra is None else f"'qemu_dump_ext[{extra}]'"
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"needs the Python package {package}, which Python 3." in done.stderr
    assert done.stderr.endswith(f" lacks ({sys.executable} -m pip install {wanted})\n")
    assert (done.returncode, done.stdout) == (2, "")


def test_the_extras_bring_what_is_said_to_be_missing():
    extras = PROJECT["optional-dependencies"]
    brought = {
        extra: {re.split(r"[>=;\[]", requirement)[0] for requirement in requirements}
        for extra, requirements in extras.items()
    }
    for package in PACKAGES.values():
        assert {extra for extra in brought if package.name in brought[extra]} == set(package.extras)
    named = {package.name for package in PACKAGES.values() if package.extras}
    faster = {"isal", "numpy"}  # which nothing needs
    ours = {extra for extra in brought if extra not in {"test", "dev", "all", "demo"}}
    assert set().union(*(brought[extra] for extra in ours)) == named | faster
    assert PROJECT["dependencies"] == [f"{PACKAGES['qemu.qmp'].name}>=0.0.3"]
    (everything,) = extras["all"]
    assert set(re.findall(r"\w+", everything)) == {"qemu_dump_ext", *ours} - {"lzo"}
