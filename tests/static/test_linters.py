"""The linters, the type checker and the layer contracts are tests like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
_MODULE = (sys.executable, "-m")


@pytest.mark.parametrize(
    "argv",
    [
        (*_MODULE, "ruff", "check", "."),
        (*_MODULE, "ruff", "format", "--check", "."),
        (*_MODULE, "mypy"),
        (str(Path(sys.executable).with_name("lint-imports")), "--no-cache"),
        ("sh", "-n", "images/demo.sh"),
        ("sh", "-n", "images/set_up.sh"),
        ("sh", "-n", "tests/run.sh"),
    ],
    ids=lambda argv: " ".join(argv[-3:]).replace(sys.prefix, ""),
)
def test_the_tree_is_clean(argv: tuple[str, ...]):
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
