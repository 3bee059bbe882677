"""Fixtures of the crypto floor: Wycheproof files, read by a loader that does not skip what it does not know."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Case = tuple[dict[str, Any], dict[str, Any]]
Load = Callable[..., list[Case]]


@pytest.fixture(scope="session")
def vectors(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.rootpath) / "tests" / "vectors"


@pytest.fixture(scope="session")
def wycheproof(vectors: Path) -> Load:
    """``wycheproof(name, results={"valid": n, ...}, flags={...})`` -> [(group, test), ...].

    Fails unless the file has exactly these results, these flags and as many tests as it says.
    """

    def cases(body: dict[str, Any]) -> Iterator[Case]:
        for group in body["testGroups"]:
            for test in group["tests"]:
                yield group, test

    def load(name: str, *, results: dict[str, int], flags: set[str], folder: Path | None = None) -> list[Case]:
        body = json.loads(((folder or vectors / "wycheproof") / name).read_text())
        found = list(cases(body))
        if len(found) != body["numberOfTests"]:
            pytest.fail(f"{name} has {len(found)} tests and says {body['numberOfTests']}")
        if Counter(test["result"] for _, test in found) != results:
            pytest.fail(f"{name} has other results than {results}")
        if {flag for _, test in found for flag in test["flags"]} != flags:
            pytest.fail(f"{name} has other flags than {sorted(flags)}")
        return found

    return load
