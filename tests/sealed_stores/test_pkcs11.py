"""A key in a software token: SoftHSM, a real PKCS#11 module, through python-pkcs11."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolate import KeyWrapper, SigningKey, sealed
from isolate.crypto.secret import Secret
from isolate.errors import KeyServiceRefused, KeyServiceUnavailable, NoRecipient, Tampered, UsageError
from isolate.sealed import wrappers
from isolate.sealed.wrappers import bounded, pkcs11

CONTEXT = b"which file this is"
KEY = Secret(bytes(range(32)))


def wrapper(hsm: Any, **options: Any) -> pkcs11.Pkcs11Wrapper:
    return pkcs11.Pkcs11Wrapper(hsm.module, **({"token": hsm.label, "key": hsm.key, "pin": hsm.pin} | options))


def test_it_is_a_key_wrapper_and_shows_no_pin(hsm: Any) -> None:
    found = wrapper(hsm)
    assert isinstance(found, KeyWrapper)
    assert hsm.pin not in repr(found)
    assert found.name == "pkcs11:token=isolate%20tests;object=kek;type=secret-key"


@pytest.mark.threat("SEAL-40")
def test_a_wrapped_key_opens_with_the_same_key_and_context_only(hsm: Any) -> None:
    box = wrapper(hsm).wrap(KEY, CONTEXT)
    assert bytes(KEY.expose()) not in box
    assert bytes(wrapper(hsm).unwrap(box, CONTEXT).expose()) == bytes(KEY.expose())
    for key, blob, context in (
        (hsm.key, box, b"another file"),
        ("another", box, CONTEXT),
        (hsm.key, box[:-1] + bytes([box[-1] ^ 1]), CONTEXT),
        (hsm.key, bytes([box[0] ^ 1]) + box[1:], CONTEXT),
        (hsm.key, box[:-1], CONTEXT),
        (hsm.key, b"", CONTEXT),
    ):
        with pytest.raises(Tampered, match="unlock"):
            wrapper(hsm, key=key).unwrap(blob, context)


def test_two_boxes_of_one_key_differ(hsm: Any) -> None:
    assert wrapper(hsm).wrap(KEY, CONTEXT) != wrapper(hsm).wrap(KEY, CONTEXT)


def test_a_sealed_file_opens_through_the_token(hsm: Any, owner: SigningKey, other: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.sealed"
    sealed.save_file({"w": np.arange(5)}, path, recipients=[wrapper(hsm), other.recipient], sign=owner)
    signer = owner.verifying_key
    for identity in (wrapper(hsm), other):
        assert sealed.load_file(path, identity=identity, signed_by=signer)["w"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(NoRecipient):
        sealed.load_file(path, identity=wrapper(hsm, key="another"), signed_by=signer)
    sealed.rewrap(path, identity=wrapper(hsm), recipients=[wrapper(hsm, key="another")])
    assert "w" in sealed.load_file(path, identity=wrapper(hsm, key="another"), signed_by=signer)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pin": "0000"}, KeyServiceRefused),
        ({"pin": "1"}, KeyServiceRefused),
        ({"token": "none of that name"}, KeyServiceRefused),
        ({"key": "none of that name"}, KeyServiceRefused),
        ({"key": "twice"}, KeyServiceRefused),
        ({"pin": Secret(b"\xff\xfe")}, UsageError),
    ],
    ids=["pin", "short-pin", "token", "key", "two-keys", "no-text"],
)
def test_what_the_token_does_not_allow_is_a_typed_error(hsm: Any, change: dict[str, Any], error: type) -> None:
    for use in (lambda w: w.wrap(KEY, CONTEXT), lambda w: w.unwrap(bytes(60), CONTEXT)):
        with pytest.raises(error) as caught:
            use(wrapper(hsm, **change))
        assert caught.value.__cause__ is None
        assert "0000" not in str(caught.value)
    # And the token still works for who may use it: no login is left behind.
    assert wrapper(hsm).wrap(KEY, CONTEXT)


def test_a_module_that_is_not_there(hsm: Any, tmp_path: Path) -> None:
    broken = pkcs11.Pkcs11Wrapper(str(tmp_path / "no.so"), token="t", key="k", pin="1234")
    with pytest.raises(KeyServiceUnavailable):
        broken.wrap(KEY, CONTEXT)


def test_a_token_that_hangs_costs_no_more_than_the_timeout(hsm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested with a library in Python that sleeps; C code that hangs is waited for in the same way."""
    library, go = pytest.importorskip("pkcs11"), threading.Event()
    monkeypatch.setattr(library, "lib", lambda path: go.wait(30))
    before, begin = set(threading.enumerate()), time.monotonic()
    for _ in range(2):  # the second finds the first still busy
        with pytest.raises(KeyServiceUnavailable):
            wrapper(hsm, timeout=0.2).unwrap(bytes(60), CONTEXT)
    assert time.monotonic() - begin < 0.9
    go.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    monkeypatch.undo()


def test_an_answer_at_the_last_moment_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Future[int]):
        """There when the time is up, and not before."""

        def result(self, timeout: float | None = None) -> int:
            found = super().result()
            if timeout is not None:
                raise TimeoutError
            return found

    monkeypatch.setattr(wrappers, "Future", Late)
    assert bounded(lambda: 42, 0.1, "it") == 42


def test_an_error_of_the_call_is_the_callers() -> None:
    def late() -> None:
        raise TimeoutError("of the call itself")

    with pytest.raises(TimeoutError, match="itself"):
        bounded(late, 5.0, "it")


def test_odd_arguments_are_refused() -> None:
    for options in ({"timeout": 0}, {"key": ""}, {"token": "x" * 600}):
        with pytest.raises(UsageError):
            pkcs11.Pkcs11Wrapper("m", **({"token": "t", "key": "k", "pin": "1"} | options))
