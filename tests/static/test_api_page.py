"""docs/api.md has every public name, in the order of their weight, and no other."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

import qemu_dump_ext as qd
from tests.support.api_page import PAGE


def test_the_table_of_names_is_the_list_of_names():
    table = PAGE.partition("## Names")[2].partition("##")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == qd.__all__


@pytest.mark.parametrize("kind", [qd.Guest, qd.StoppedGuest, qd.StoredDump])
def test_every_member_is_described(kind):
    for name, member in inspect.getmembers(kind):
        if not name.startswith("_"):
            called = r"\(" if inspect.isfunction(member) else ""
            assert re.search(rf"`{name}{called}", PAGE), name


@pytest.mark.parametrize("name", qd.__all__)
def test_every_name_has_a_docstring_of_a_sentence(name):
    assert str(inspect.getdoc(getattr(qd, name))).partition("\n")[0].endswith((".", ":"))


def test_names_are_imported_when_they_are_used():
    code = (
        "import sys, qemu_dump_ext as qd\n"
        "assert not [name for name in sys.modules if name.startswith('qemu_dump_ext.')]\n"
        "assert set(qd.__all__) <= set(dir(qd))\n"
        "qd.DumpError\n"
        "assert 'qemu_dump_ext.errors' in sys.modules\n"
        "assert 'qemu_dump_ext.api.guests' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'revert'"):
        qd.revert  # noqa: B018
