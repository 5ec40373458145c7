"""Folders of fixtures that outlive a test: what is in them is large."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def folder_for(request: pytest.FixtureRequest, name: str) -> Path:
    """Make a folder that is removed when the fixture ends, unless a test has failed meanwhile.

    Args:
        request: Of the fixture.
        name: How the folder is called, with a number behind it.
    """
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    folder = factory.mktemp(name)
    failed_before = request.session.testsfailed

    def remove() -> None:
        if request.session.testsfailed == failed_before:
            shutil.rmtree(folder)

    request.addfinalizer(remove)
    return folder
