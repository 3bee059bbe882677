"""Keys that stay in an HSM or a KMS: recipients that are never seen, only asked.

    >>> from isolate.sealed.wrappers import bounded
    >>> bounded(lambda: 6 * 7, 5.0, "the answer")
    42

``pkcs11.Pkcs11Wrapper`` (extra ``pkcs11``) and ``kms.KmsWrapper`` (extra ``kms``) implement the protocol
``KeyWrapper`` of recipients.py. docs/spec/sealed-folder.md, section 6, has what they put into a stanza. Each sees
the file key in plaintext, since it wraps it: whoever runs the KMS or the HSM can open what is sealed to it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from isolate.errors import KeyServiceUnavailable

T = TypeVar("T")


def bounded(call: Callable[[], T], timeout: float, what: str) -> T:
    """The answer of ``call``, or KeyServiceUnavailable after ``timeout`` seconds.

    A C library cannot be interrupted: after a timeout its thread goes on until the library answers, and what it
    answers then is dropped.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 (handed on, whatever it is)
            answer.set_exception(error)

    threading.Thread(target=run, name="isolate-key", daemon=True).start()
    with contextlib.suppress(TimeoutError):
        return answer.result(timeout)
    if not answer.done():
        raise KeyServiceUnavailable(f"{what} did not answer within {timeout:g} s")
    # The call's own TimeoutError, or an answer that came just when the time was up.
    return answer.result()
