"""How much other libraries log is for programs to say, and not for whoever imports us."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.doors import child_environment

_CODE = """
import importlib, json, logging, pkgutil
import hmp, qemu_dump_ext
for package in (qemu_dump_ext, hmp):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        # These are started by other programs.
        if not module.name.endswith(("drgn_trace", "pytest_plugin", "_guardian_program")):
            importlib.import_module(module.name)
print(json.dumps({
    name: [logger.level, logger.propagate]
    for name, logger in logging.root.manager.loggerDict.items()
    if isinstance(logger, logging.Logger)
} | {"root": [logging.root.level, bool(logging.root.handlers)]}))
"""


def test_importing_everything_changes_no_logger():
    done = subprocess.run(
        [sys.executable, "-c", _CODE], capture_output=True, check=True, env=child_environment()
    )
    found = json.loads(done.stdout)
    assert found.pop("root") == [30, False]
    assert "qemu_dump_ext.crash_collector.agent.agent" in found
    assert {name: state for name, state in found.items() if state != [0, True]} == {}
