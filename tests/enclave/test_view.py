"""The view: read-only, silent, and empty once its invocation is over."""

from __future__ import annotations

import copy
import pickle  # tried, and refused
from typing import Any

import numpy as np
import pytest

from isolate.enclave.view import View, pack_texts
from isolate.errors import UsageError

TEXTS = ["", "canary", "Füße", "x" * 300, ""]


def view() -> View:
    return View({"canary_w": np.arange(4.0), **pack_texts("titles", TEXTS)})


@pytest.mark.threat("ENC-34")
def test_an_operation_prints_changes_or_keeps_its_view() -> None:
    mine = view()
    assert "canary" not in repr(mine) + str(mine) + f"{mine}" + repr(mine.texts("titles"))
    with pytest.raises(ValueError, match="read-only"):
        mine["canary_w"][0] = 1
    with pytest.raises(TypeError):
        mine["new"] = np.ones(1)  # type: ignore[index]
    with mine.lent() as lent:
        kept, texts = lent, lent.texts("titles")
        assert len(lent) == 3
        assert list(texts) == TEXTS
    assert (len(kept), list(kept)) == (0, [])
    with pytest.raises(KeyError):
        kept.texts("titles")
    assert len(mine) == 3
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        for thing in (mine, texts):
            with pytest.raises(UsageError):
                attempt(thing)


def test_texts_by_number_and_slice() -> None:
    texts = view().texts("titles")
    assert (len(texts), texts[-2], texts[2], texts[1:3]) == (5, TEXTS[-2], TEXTS[2], TEXTS[1:3])
    with pytest.raises(IndexError):
        texts[5]
    assert list(View(pack_texts("none", [])).texts("none")) == []


def test_the_owners_arrays_stay_writable() -> None:
    mine: Any = np.zeros(3)
    View({"w": mine})
    mine[0] = 1
