"""docs/operations.md: its operations are what they say, and run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate.enclave.view import View, pack_texts

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's first block of code, as a module."""
    (tmp_path / "operations_of_the_guide.py").write_text(
        re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0], encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import operations_of_the_guide

    return operations_of_the_guide


def test_the_operations_of_the_guide_run(guide: Any) -> None:
    table = {
        "patient": np.arange(30),
        "ward": np.repeat([0, 1, 2], [20, 9, 1]),
        "days": np.repeat([5.0, 50.0, 200.0], 10),
        "beds": np.array([25, 10, 8]),
        "beds_in_use": np.array([20, 9, 1]),
        **pack_texts("wards", guide.WARDS),
    }
    view = View(table)

    def run(operation: Any, **arguments: Any) -> Any:
        return operation.run(view, operation.decode(arguments) if "model" not in arguments else arguments)

    assert guide.occupancy.output.read(run(guide.occupancy, ward="heart")) == 0.8
    assert guide.stays.output.read(run(guide.stays)) == {"heart": {"patients": 20, "days": 28.0}}
    assert run(guide.names_of_wards, top=2) == "heart, lung"
    assert guide.names_of_wards.cost({"top": 3}) == 768
    made = guide.blurred.run(view, {"noise": 3}, seed=bytes(32))
    assert guide.blurred.run(view, {"noise": 3}, seed=bytes(32))["days"].tobytes() == made["days"].tobytes()
    assert 80 <= guide.mean_of_blurred.output.read(run(guide.mean_of_blurred, model=View(made))) <= 90
    assert len({one.digest for one in guide.OPERATIONS}) == 5
