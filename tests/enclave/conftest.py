"""The realm of tests/service/conftest.py: a whole service in one process, and enclaves that speak to it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "realm_fixtures", Path(__file__).parents[1] / "service" / "conftest.py"
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

mould, realm, realms = _module.mould, _module.realm, _module.realms
