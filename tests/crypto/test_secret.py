"""A secret is shown to nobody: every ordinary way to leak one is closed."""

from __future__ import annotations

import copy
import gc
import json
import logging
import pickle
import traceback
from collections.abc import Callable
from typing import ClassVar

import pytest

from isolate.crypto.secret import Secret, wipe
from isolate.errors import UsageError

VALUE = b"swordfish-swordfish-swordfish-32"


class ChannelKey(Secret):
    size: ClassVar[int | None] = 32


def shows(text: str) -> bool:
    return any(form in text for form in ("swordfish", VALUE.hex(), VALUE.hex().upper(), "115, 119, 111"))


@pytest.fixture(params=[Secret, ChannelKey])
def secret(request: pytest.FixtureRequest) -> Secret:
    made: Secret = request.param(VALUE)
    return made


@pytest.mark.threat("KEY-8")
@pytest.mark.parametrize(
    "form", [repr, str, ascii, "{}".format, lambda s: f"{s!r:>60}", "{0} {0!r}".format], ids=range(6)
)
def test_text_forms(secret: Secret, form: Callable[[object], str]) -> None:
    text = form(secret)
    assert not shows(text)
    assert type(secret).__name__ in text
    assert not shows(form({"nested": [secret]}))


@pytest.mark.threat("KEY-8")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(secret: Secret, protocol: int) -> None:
    with pytest.raises(UsageError):
        pickle.dumps(secret, protocol)
    with pytest.raises(UsageError):
        pickle.dumps({"nested": [secret]}, protocol)


COPIES: list[Callable[[object], object]] = [
    copy.copy,
    copy.deepcopy,
    lambda secret: copy.deepcopy([secret]),
    *(lambda secret, name=name: getattr(secret, name)() for name in ("__reduce__", "__getstate__", "__copy__")),
    lambda secret: secret.__deepcopy__({}),  # type: ignore[attr-defined]
    *(lambda secret, protocol=protocol: object.__reduce_ex__(secret, protocol) for protocol in range(6)),
]


@pytest.mark.threat("KEY-8")
@pytest.mark.parametrize("leak", COPIES, ids=range(len(COPIES)))
def test_copies(secret: Secret, leak: Callable[[object], object]) -> None:
    """``object``'s own ways too, which look past a class that refuses by __reduce_ex__ alone."""
    with pytest.raises(UsageError, match="not copied"):
        leak(secret)


def test_bytes_iteration_indexing_hash_and_json(secret: Secret) -> None:
    refusals: list[Callable[[], object]] = [
        lambda: bytes(secret),  # type: ignore[call-overload]
        lambda: list(secret),  # type: ignore[call-overload]
        lambda: secret[0],  # type: ignore[index]
        lambda: memoryview(secret),  # type: ignore[arg-type]
        lambda: hash(secret),
        lambda: {secret},
        lambda: json.dumps(secret),
        lambda: secret < secret,  # type: ignore[operator]
        lambda: vars(Secret(VALUE)),
    ]
    for refused in refusals:
        with pytest.raises(TypeError) as caught:
            refused()
        assert not shows(str(caught.value))


def test_equality_raises(secret: Secret) -> None:
    for other in (Secret(VALUE), VALUE, None):
        with pytest.raises(UsageError, match="equals"):
            assert secret == other
        with pytest.raises(UsageError, match="equals"):
            assert secret != other
        with pytest.raises(UsageError, match="equals"):
            assert other in [secret]
    assert secret.equals(Secret(VALUE))
    assert secret.equals(bytearray(VALUE))
    assert not secret.equals(VALUE[:-1])
    assert not secret.equals(b"")


def test_logs_and_tracebacks(secret: Secret, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("x").error("key %s %r", secret, {"key": secret})
    assert "hidden" in caplog.text
    assert not shows(caplog.text)
    try:
        local = secret
        raise ValueError(local)
    except ValueError as error:
        whole = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert "hidden" in whole
    assert not shows(whole)


def test_after_wipe_nothing_is_left(secret: Secret) -> None:
    view = secret.expose()
    secret.wipe()
    assert view == bytes(32)
    assert not shows(repr(secret))
    for use in (secret.expose, lambda: secret.equals(VALUE), lambda: Secret(VALUE).equals(secret)):
        with pytest.raises(UsageError, match="wiped"):
            use()
    secret.wipe()


def test_the_context_manager_wipes_also_after_an_error(secret: Secret) -> None:
    view = secret.expose()
    with pytest.raises(KeyError), secret:
        raise KeyError
    assert view == bytes(32)


def test_what_is_collected_is_wiped() -> None:
    secret = Secret(VALUE)
    memory = secret._buffer
    del secret
    gc.collect()
    assert not any(memory)


def test_collection_does_not_wipe_under_a_view_that_lives() -> None:
    """A cipher that still holds the view would otherwise go on with a key of zeros."""
    view = Secret(VALUE).expose()
    gc.collect()
    assert view == VALUE


def test_a_view_is_read_only(secret: Secret) -> None:
    with pytest.raises(TypeError):
        secret.expose()[0] = 0


def test_it_keeps_its_own_bytes() -> None:
    source = bytearray(VALUE)
    secret = Secret(source)
    wipe(source)
    assert source == bytes(32)
    assert secret.equals(VALUE)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_class_with_a_size_takes_no_other(size: int) -> None:
    with pytest.raises(UsageError, match="32 bytes") as caught:
        ChannelKey(b"s" * size)
    assert not shows(str(caught.value))


def test_generate() -> None:
    assert len(ChannelKey.generate()) == 32
    assert len(Secret.generate(16)) == 16
    assert not Secret.generate(16).equals(Secret.generate(16))
    with pytest.raises(UsageError, match="size"):
        Secret.generate()


def test_wiping_takes_any_writable_buffer() -> None:
    buffer = bytearray(b"abc" * 5)
    wipe(memoryview(buffer)[3:6])
    assert buffer == b"abc\0\0\0" + b"abc" * 3
