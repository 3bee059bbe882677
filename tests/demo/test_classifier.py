"""The demo's inference enclave by itself, on real digits, and a model that is fine-tuned inside it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate.cli.demo.story import load_digits, load_module
from isolate.enclave.view import View
from isolate.errors import IsolateError

ROOT = Path(__file__).parents[2]
APP = ROOT / "src" / "isolate" / "cli" / "demo" / "apps" / "classifier"


def a_model() -> dict[str, Any]:
    """A hidden layer at random, and a last one that was fitted to a thousand digits."""
    images, digits = load_digits()
    rng = np.random.default_rng(5)
    w1, b1 = rng.normal(size=(64, 64)).astype(np.float32) / 8, np.zeros(64, np.float32)
    hidden = np.maximum(images[:1000].astype(np.float32) / 16 @ w1 + b1, 0)
    w2 = np.linalg.lstsq(hidden, np.eye(10)[digits[:1000]] * 8, rcond=None)[0].astype(np.float32)
    return {"w1": w1, "b1": b1, "w2": w2, "b2": np.zeros(10, np.float32)}


def somebody() -> tuple[Any, Any]:
    """Twenty digits in white on black: a hand that the model has not seen."""
    images, digits = load_digits()
    return (16 - images[1000:1020]).astype(np.uint8), digits[1000:1020].astype(np.uint8)


def test_fine_tuning_learns_somebodys_hand() -> None:
    app, model = load_module(APP / "operations.py"), View(a_model())
    images, digits = somebody()
    before = [app.classify.run(model, {"image": image}) for image in images]
    tuned = app.adapt.run(model, {"images": images, "digits": digits})
    after = [app.classify_with.run(model, {"model": View(tuned), "image": image}) for image in images]
    assert (np.array(before) == digits).sum() <= 10 < 18 <= (np.array(after) == digits).sum()
    assert {name: tensor.shape for name, tensor in tuned.items()} == {
        name: tensor.shape for name, tensor in model.items()
    }


@pytest.mark.slow
@pytest.mark.threat("ENC-36")
def test_a_fine_tuned_model_outlives_the_enclave_and_not_the_handle(tmp_path: Path) -> None:
    """With real processes: sealed by one enclave, opened by the next, ended with the handle."""
    spec = importlib.util.spec_from_file_location("stage", ROOT / "examples" / "stage.py")
    assert spec is not None and spec.loader is not None
    stages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stages)
    app = load_module(APP / "operations.py")
    images, digits = somebody()
    with stages.Stage(tmp_path, "digits", "classifier") as stage:
        folder = stage.application(APP)
        stage.admit(folder, "digits/model")
        stage.seal("digits/model", a_model())
        stage.launch(folder)
        operations = [app.classify, app.adapt, app.classify_with]
        with stage.handle("digits/model", operations) as team, stage.handle("digits/model", operations) as other:
            model = team.invoke("adapt", images=images, digits=digits)
            answers = [team.invoke("classify_with", model=model, image=image) for image in images]
            assert (np.array(answers) == digits).sum() >= 18
            with pytest.raises(IsolateError, match="refused") as refused:
                other.invoke("classify_with", model=model, image=images[0])
            assert refused.value.code == "scope_exceeded"
        stage.launch(folder)
        with team:
            assert team.invoke("classify_with", model=model, image=images[0]) == answers[0]
            stage.owner.revoke(team.id)
            with pytest.raises(IsolateError, match="refused") as refused:
                team.invoke("classify_with", model=model, image=images[0])
            assert refused.value.code == "revoked"
