"""The demo's attacks: that each does what the story says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isolate.cli.demo import attacks
from isolate.messages.attest import AttestRequest


def test_the_first_recorded_evidence_is_replayed_and_not_that_of_a_later_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name the tenth connection comes before the second: it may be that of the modified enclave."""
    head = b"POST /v1/attest HTTP/1.1\r\nContent-Length: 1\r\n\r\n"
    keys = {"box": b"b" * 32, "channel": b"c" * 32, "sign": b"s" * 64}
    for number, envelope in ((2, b"good"), (10, b"modified")):
        (tmp_path / f"service-{number}.up").write_bytes(head + AttestRequest(envelope, keys).encode())
    (tmp_path / "service-1.up").write_bytes(b"POST /v1/challenge HTTP/1.1\r\n\r\n")
    sent: list[Any] = []

    class Answer:
        token = "token"

    def post(service: str, route: str, request: Any, answer: Any) -> Answer:
        sent.append((service, route, request.envelope))
        return Answer()

    monkeypatch.setattr(attacks, "post", post)
    assert attacks.replay("tcp:here", tmp_path) == "token"
    assert sent == [("tcp:here", "attest", b"good")]
