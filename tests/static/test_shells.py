"""Manual pages render, and bash completes, from the files that are installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pexpect
import pytest

from docs.generate import PARSERS, ROOT
from tests.support.waiting import SECONDS

_READY = "READY> "
# What is typed before the Tab key, and what the line is afterwards.
_TYPED = {
    "qemu-dump-guest-memory --omi": "qemu-dump-guest-memory --omit-zero ",
    "qemu-dump-guest-memory --memory back": "qemu-dump-guest-memory --memory backing_file ",
    "qemu-dump-guest-memory --qmp sock": "qemu-dump-guest-memory --qmp socket ",
    "qemu-dump-guest-memory -z zl": "qemu-dump-guest-memory -z zlib ",
    "qemu-dump-guest-memory --guest web": "qemu-dump-guest-memory --guest web-front ",
    "qemu-dump insp": "qemu-dump inspect ",
    "qemu-dump inspect --js": "qemu-dump inspect --json ",
    "qemu-dump images matr": "qemu-dump images matrix ",
    "qemu-dump verify sock": "qemu-dump verify socket ",
    "qemu-crash-collector check": "qemu-crash-collector check-config ",
    "qemu-crash-collector open x --reader dr": "qemu-crash-collector open x --reader drgn ",
    "qemu-hmp-proxy --allow": "qemu-hmp-proxy --allow-remote ",
    "qemu-hmp-proxy --listen sock": "qemu-hmp-proxy --listen socket ",
}


@pytest.mark.parametrize("program", PARSERS)
def test_the_manual_page_renders(program: str):
    page = ROOT / f"docs/share/man/man1/{program}.1"
    argv = ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", str(page)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "SEE ALSO"):
        assert f"\n{heading}\n" in done.stdout
    # What whatis finds it by.
    name, _, what = " ".join(done.stdout.partition("NAME\n")[2].split()).partition(" - ")
    assert name == program
    assert what[0].isalpha()


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("bash")
    (folder / "socket").touch()
    names = folder / "qemu-dump"  # what is asked for guests
    names.write_text("#!/bin/sh\nprintf 'web-front\\nmail\\n'\n")
    names.chmod(0o755)
    terminal = pexpect.spawn(
        "bash",
        ["--noprofile", "--norc", "-i"],
        cwd=str(folder),
        env={"PATH": f"{folder}:/usr/bin:/bin", "TERM": "dumb", "INPUTRC": "/dev/null"},
        encoding="utf-8",
        timeout=SECONDS,
        dimensions=(50, 200),
    )
    for program in PARSERS:
        terminal.sendline(f"source '{ROOT}/docs/share/bash-completion/completions/{program}'")
    terminal.sendline("bind 'set bell-style none'; PS1=READ''Y'> '")
    terminal.expect_exact(_READY)
    yield terminal
    terminal.close(force=True)


@pytest.mark.parametrize("typed", _TYPED)
def test_bash_completes(bash: pexpect.spawn[str], typed: str):
    bash.send(f"{typed}\t")
    bash.expect_exact(_TYPED[typed])
    bash.send("\x15\n")  # forget the line
    bash.expect_exact(_READY)
