"""What every test shares: the ``--slow`` option, and one Hypothesis profile."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

# No deadline: machines that share their cores miss it for no fault of the code. CI draws the same examples
# each time, so that a red run can be repeated; a developer's machine goes on looking for new ones.
settings.register_profile(
    "isolate", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("isolate")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


# Thousands of tests and all that they import stay to the end: the collector need not look at them again and again.


def pytest_collection(session: pytest.Session) -> None:
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    reason = pytest.mark.skip(reason="slow: run it with --slow, as .ci/run does")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(reason)
