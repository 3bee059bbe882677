"""Ask the Nitro Security Module for a document, by ioctl on /dev/nsm (docs/spec/evidence.md, 8.2).

    >>> from isolate.attestation.attesters.nitro import NSM_IOCTL_RAW, request
    >>> hex(NSM_IOCTL_RAW), request(b"u", b"n")[:13]
    ('0xc0200a00', b'\\xa1kAttestation')

Written against the kernel's include/uapi/linux/nsm.h and the request of the vendor's library. It has been tested
against a fake that reads and writes the same memory, and never on a real Nitro enclave: none was at hand.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable
from typing import Any

from isolate.attestation.evidence import Runtime
from isolate.attestation.verifiers.cose import decode_lenient
from isolate.crypto import cbor
from isolate.errors import ControlMissing, MalformedError, UnavailableError

DEVICE = "/dev/nsm"
REQUEST_MAX = 0x1000  # bytes, NSM_REQUEST_MAX_SIZE
RESPONSE_MAX = 0x3000  # bytes, NSM_RESPONSE_MAX_SIZE
_RAW = struct.Struct("=QQQQ")  # struct nsm_raw: address and length of the request, then of the response
NSM_IOCTL_RAW = 3 << 30 | _RAW.size << 16 | 0x0A << 8  # _IOWR(0x0A, 0, struct nsm_raw)

Ioctl = Callable[[int, int, bytearray], Any]


def request(user_data: bytes, nonce: bytes) -> bytes:
    """The module's Attestation request: CBOR, keys by name, no public key (keys are bound in user_data)."""
    return cbor.encode({"Attestation": {"user_data": user_data, "nonce": nonce, "public_key": None}})


def _ioctl(descriptor: int, operation: int, argument: bytearray) -> Any:
    return fcntl.ioctl(descriptor, operation, argument, True)


class NitroAttester:
    """The inside of a Nitro enclave. ``ioctl`` takes (descriptor, operation, struct nsm_raw as a bytearray)."""

    kind = "nitro"

    def __init__(self, device: str = DEVICE, *, ioctl: Ioctl = _ioctl) -> None:
        self._device = device
        self._ioctl = ioctl

    def attest(self, runtime: Runtime) -> bytes:
        """A document with the runtime's binding as user_data and its nonce.

        Raises ControlMissing where there is no such device, UnavailableError when it does not answer, and
        MalformedError for an answer that is none.
        """
        answer = self._exchange(request(runtime.binding(), runtime.nonce))
        if not isinstance(answer, dict):
            raise MalformedError("the module's answer is no map")
        if "Error" in answer:
            raise UnavailableError("the Nitro Security Module refused the request")
        document = answer.get("Attestation")
        if not isinstance(document, dict) or type(document.get("document")) is not bytes:
            raise MalformedError("the module's answer holds no document")
        return bytes(document["document"])

    def _exchange(self, body: bytes) -> Any:
        question = ctypes.create_string_buffer(body, len(body))
        answer = ctypes.create_string_buffer(RESPONSE_MAX)
        raw = bytearray(_RAW.pack(ctypes.addressof(question), len(body), ctypes.addressof(answer), RESPONSE_MAX))
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ControlMissing(f"no Nitro Security Module here: {error.strerror}") from None
        try:
            self._ioctl(descriptor, NSM_IOCTL_RAW, raw)
        except OSError as error:
            raise UnavailableError(f"the Nitro Security Module failed: {error.strerror}") from None
        finally:
            os.close(descriptor)
        length = _RAW.unpack(raw)[3]
        if length > RESPONSE_MAX:
            raise MalformedError("the module's answer is longer than its buffer")
        return decode_lenient(answer.raw[:length])
