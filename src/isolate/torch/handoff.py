"""From the workers of a DataLoader to the trainer: encrypted, and not through files of shared memory.

    >>> import torch
    >>> from isolate.torch.handoff import SealedDataLoader
    >>> [batch.tolist() for batch in SealedDataLoader(torch.arange(4), batch_size=2)]
    [[0, 1], [2, 3]]

torch moves every tensor that a worker gives back into a file in /dev/shm, and the trainer maps it: whoever can
open that file has the data. Here the worker packs a batch into bytes and encrypts them, and they go through the
pipe between the two processes. Each worker makes a key of its own and seals it (X-Wing) to an identity that the
loader makes for itself: so no key is in what is pickled for a worker that is spawned. A batch is opened once, in
the order in which its worker made them; anything else is Tampered. docs/spec/sealed-checkpoint.md, section 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from attrs import define, field, frozen
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert, get_worker_info

from isolate.crypto import cbor
from isolate.crypto.aead import Cipher, Suite, preferred_suite
from isolate.crypto.kem import Identity, Recipient
from isolate.crypto.secret import Secret
from isolate.errors import MalformedError, NoRecipient, Tampered, UsageError
from isolate.sealed.dtypes import tensor_bytes, torch_view
from isolate.torch.checkpoint_tensors import check_tensor, dtype_name
from isolate.torch.checkpoint_values import decode_value, encode_value

_INFO = b"isolate/v1/torch/handoff"
_LENGTH = 8  # bytes of the length before the description
_ALIGN = 64  # bytes: what vector instructions like
MAX_DESCRIPTION = 1 << 26
_TENSOR, _LIST, _TUPLE, _DICT, _VALUE = range(5)

# Whether this process is a worker whose batches are encrypted.
_ACTIVE = False


def active() -> bool:
    return _ACTIVE


@frozen
class SealedBatch:
    """What goes through the pipe: the worker's sealed key, the number of the batch under it, and the ciphertext."""

    suite: int
    box: bytes
    number: int
    data: bytearray = field(repr=False)


@define(eq=False)
class _Collate:
    """The collate function of a worker: what the user's makes, encrypted; in the trainer itself as it is."""

    collate: Callable[[Any], Any]
    recipient: bytes
    _sender: _Sender | None = field(default=None, init=False)

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        if get_worker_info() is None:
            return batch
        if self._sender is None:
            self._sender = _Sender(Recipient(self.recipient))
        return self._sender.seal(batch)

    def __getstate__(self) -> tuple[Callable[[Any], Any], bytes]:
        return self.collate, self.recipient

    def __setstate__(self, state: tuple[Callable[[Any], Any], bytes]) -> None:
        self.collate, self.recipient = state
        self._sender = None


@frozen
class _Begin:
    """The first thing in a worker: say that what it reads does not leave it in plaintext."""

    then: Callable[[int], None] | None

    def __call__(self, number: int) -> None:
        global _ACTIVE
        _ACTIVE = True
        if self.then is not None:
            self.then(number)


class _Sender:
    def __init__(self, recipient: Recipient) -> None:
        self._suite = preferred_suite()
        with Secret.generate(32) as key:
            self._box = recipient.seal(key.expose(), info=_INFO)
            self._cipher = Cipher(self._suite, key)
        self._number = 0

    def seal(self, batch: Any) -> SealedBatch:
        tensors: list[memoryview] = []
        description = cbor.encode(_describe(batch, tensors))
        parts = [len(description).to_bytes(_LENGTH, "little"), description, *tensors]
        data = bytearray(sum(_up(len(part)) for part in parts) + self._cipher.tag_size)
        start = 0
        for part in parts:
            data[start : start + len(part)] = part
            start += _up(len(part))
        number, self._number = self._number, self._number + 1
        nonce = number.to_bytes(self._suite.nonce_size, "big")
        self._cipher.seal_into(data, memoryview(data)[:start], nonce)
        return SealedBatch(int(self._suite), self._box, number, data)


class _Receiver:
    """Opens what workers sealed to this loader. One key for each box; its batches in order."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._known: dict[bytes, tuple[Cipher, int]] = {}

    def open(self, batch: Any) -> Any:
        if not isinstance(batch, SealedBatch):
            return batch
        try:
            suite = Suite(batch.suite)
            if batch.box not in self._known:
                with self._identity.open(batch.box, info=_INFO) as key:
                    self._known[batch.box] = Cipher(suite, key), 0
        except (ValueError, NoRecipient):
            raise Tampered("handoff: a batch is not of a worker of this loader") from None
        cipher, least = self._known[batch.box]
        # Not the next one alone: workers that persist have batches of an epoch that was left early thrown away.
        fresh = least <= batch.number < 2**64
        nonce = (batch.number if fresh else 0).to_bytes(cipher.nonce_size, "big")
        size = len(batch.data) - cipher.tag_size
        # Fresh memory, which the tensors then stand in.
        plain = np.empty(max(size, 0), np.uint8)
        if not fresh or size < 0 or not cipher.open_into(plain.data, batch.data, nonce):
            raise Tampered("handoff: a batch was changed, repeated or put before another")
        self._known[batch.box] = cipher, batch.number + 1
        return _restore(plain)


def _up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _describe(value: Any, tensors: list[memoryview]) -> list[Any]:
    """What a batch is made of, its tensors apart. Raises UsageError for what has no form."""
    if isinstance(value, torch.Tensor):
        tensor = check_tensor(value)
        name = dtype_name(tensor.dtype)
        tensors.append(tensor_bytes(tensor)[2])
        return [_TENSOR, name, list(tensor.shape)]
    if type(value) is list:
        return [_LIST, [_describe(item, tensors) for item in value]]
    if type(value) is tuple:
        return [_TUPLE, [_describe(item, tensors) for item in value]]
    if type(value) is dict:
        if any(type(key) not in (str, int) for key in value):
            raise UsageError(
                "a batch has keys that are neither text nor numbers", hint="give it others in collate_fn"
            )
        return [_DICT, [part for key, item in value.items() for part in (key, _describe(item, tensors))]]
    try:
        return [_VALUE, encode_value(value)]
    except UsageError as error:
        hint = "let collate_fn make tensors, and lists, tuples, dicts, text and numbers of them"
        raise UsageError(f"a worker's batch: {error.message}", hint=hint) from None


def _restore(plain: np.ndarray[Any, Any]) -> Any:
    """The batch again. It was authenticated: what does not fit is our own mistake, and still typed."""
    length = int.from_bytes(plain[:_LENGTH].tobytes(), "little")
    if _up(_LENGTH) + length > len(plain):
        raise MalformedError("handoff: a batch ends too early")
    description = cbor.decode(plain[_up(_LENGTH) : _up(_LENGTH) + length].data, max_size=MAX_DESCRIPTION)
    raw, at = torch.from_numpy(plain), _up(_LENGTH) + _up(length)

    def build(part: list[Any]) -> Any:
        nonlocal at
        kind = part[0]
        if kind == _TENSOR:
            name, shape = part[1], part[2]
            size = math.prod(shape) * torch_view(raw[:0], name, (0,)).element_size()
            start, at = at, at + _up(size)
            packed = [*shape[:-1], shape[-1] * 2] if name == "F4" and shape else shape
            return torch_view(raw[start : start + size], name, packed)
        if kind == _VALUE:
            return decode_value(part[1])
        if kind == _DICT:
            keys, items = part[1][::2], part[1][1::2]
            return {key: build(item) for key, item in zip(keys, items, strict=True)}
        items = [build(item) for item in part[1]]
        return tuple(items) if kind == _TUPLE else items

    return build(description)


class SealedDataLoader(DataLoader[Any]):
    """torch's DataLoader, with what workers read handed over encrypted. Arguments and order are the same.

    Without workers it is that DataLoader. ``pin_memory``: pinned in the trainer, behind the decryption. A collate
    function makes tensors, and lists, tuples, dicts, text, numbers and bytes of them; anything else is UsageError.
    """

    def __init__(self, dataset: Any, *arguments: Any, pin_memory: bool = False, **options: Any) -> None:
        if arguments:
            raise UsageError("SealedDataLoader takes everything but the dataset by name")
        batched = options.get("batch_size", 1) is not None or options.get("batch_sampler") is not None
        collate = options.pop("collate_fn", None) or (default_collate if batched else default_convert)
        identity = Identity.generate()
        self._receiver, self._pin = _Receiver(identity), pin_memory
        super().__init__(
            dataset,
            collate_fn=_Collate(collate, identity.recipient.raw),
            worker_init_fn=_Begin(options.pop("worker_init_fn", None)),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers:
            for dataset in _inner(self.dataset):
                getattr(dataset, "_before_workers", lambda: None)()
        inner = super().__iter__()
        for sealed in inner:
            batch = self._receiver.open(sealed)
            yield _pinned(batch) if self._pin else batch


def _inner(dataset: Any) -> Iterator[Any]:
    """A dataset, and those that torch's Subset, ConcatDataset and ChainDataset wrap."""
    yield dataset
    for wrapped in (getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())):
        if isinstance(wrapped, Dataset):
            yield from _inner(wrapped)


def _pinned(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.pin_memory()
    if isinstance(batch, dict):
        return {key: _pinned(item) for key, item in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_pinned(item) for item in batch)
    return batch
