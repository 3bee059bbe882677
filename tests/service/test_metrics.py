"""Figures: they count what happened, in labels of a closed set that no peer chooses."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from isolate.client.owner import Owner
from isolate.errors import IsolateError
from isolate.messages.attest import Challenge, ChallengeRequest
from isolate.messages.http import fetch, post
from isolate.service.metrics import FILES, LIMITS, MAX_CODES, Metrics
from isolate.service.routes import ROUTES


def figures(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample by its name and the values of its labels."""
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_running_service_tells_its_figures(serving: Callable[..., Any]) -> None:
    service = serving()

    def look() -> dict[tuple[str, tuple[str, ...]], float]:
        return figures(fetch(service.address, "/metrics", most=1 << 20).decode())

    before = look()
    owner = Owner(service.owner, service=service.address, lineage="acme")
    owner.set_rule("secret-asset")
    post(service.address, "challenge", ChallengeRequest(bytes(32), "secret-job", 0), Challenge)
    for route in ("nowhere", "secret-route/../x"):
        with pytest.raises(IsolateError):
            post(service.address, route, ChallengeRequest(bytes(32), "", 0), Challenge)
    after = look()
    assert after["isolate_requests_total", ("ok", "owner/rule")] == 1
    assert after["isolate_requests_total", ("ok", "challenge")] == 1
    assert after["isolate_requests_total", ("unknown_route", "unknown")] == 2
    assert after["isolate_request_seconds_count", ("challenge",)] == 1
    assert 0 < after["isolate_request_seconds_sum", ("owner/rule",)] < 10
    assert after["isolate_log_entries", ()] == before["isolate_log_entries", ()] + 1
    assert after["isolate_connections", ()] == 1
    assert abs(after["isolate_time_seconds", ()] - time.time()) < 10
    assert abs(after["isolate_clock_skew_seconds", ()]) < 10
    assert 85 < (after["isolate_certificate_end_seconds", ()] - time.time()) / 86400 <= 90
    assert 0 < after["isolate_uptime_seconds", ()] < 60
    assert {labels for name, labels in after if name == "isolate_limited_total"} == {(one,) for one in LIMITS}
    assert "secret" not in fetch(service.address, "/metrics", most=1 << 20).decode()


@pytest.mark.threat("SVC-38")
def test_no_label_holds_what_a_peer_chose() -> None:
    metrics, dice = Metrics(), random.Random(7)
    for number in range(3000):
        chosen = "".join(chr(dice.randrange(32, 1000)) for _ in range(dice.randrange(20)))
        metrics.answered(chosen, "ok", 0.1)
        metrics.answered("log", chosen, 0.1)
        metrics.answered("log", f"chosen_{number}", 0.1)
        metrics.limited(chosen)
    found = figures(metrics.text())
    routes = {labels[-1] for name, labels in found if name == "isolate_requests_total"}
    codes = {labels[0] for name, labels in found if name == "isolate_requests_total"}
    assert routes == {"log", "unknown"} <= {*ROUTES, *FILES, "unknown"}
    assert len(codes) <= MAX_CODES + 1
    assert all(re.fullmatch("[a-z0-9_]+", code) for code in codes)
    assert {labels for name, labels in found if name == "isolate_limited_total"} == {
        (one,) for one in (*LIMITS, "unknown")
    }


def test_each_service_counts_for_itself() -> None:
    one, other = Metrics(), Metrics()
    one.answered("log", "ok", 0.1)
    assert 'route="log"' in one.text() and 'route="log"' not in other.text()


def test_figures_of_a_state_that_fails_are_the_last_ones(realm: Any) -> None:
    from isolate.service.app import Application

    application = Application(realm.service)
    application._look()
    realm.fail("SAVEPOINT")
    realm.fail("BEGIN")
    application._look()
    assert figures(application.metrics.text())["isolate_log_entries", ()] == 1


def test_every_code_of_the_table_has_room() -> None:
    table = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    codes = {code.strip() for row in rows for code in row.split(",")}
    metrics = Metrics()
    for code in sorted(codes):
        metrics.answered("log", code, 0.1)
    assert {code for code in codes if f'code="{code}"' not in metrics.text()} == set()
