"""A second implementation of tokens and invocations, from docs/spec/capability.md and crypto.md alone.

It makes random chains and damages them; both must take the same ones, to the same meaning, and refuse the others
with the same code. The numbers are those of the sections.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from hashlib import sha256
from itertools import pairwise
from typing import Any

import nacl.bindings
import nacl.exceptions
import pytest

from isolate.capability import Invocation, Token, VerifiedToken, grant, hash_arguments, verify, verify_invocation
from isolate.capability.scope import Scope
from isolate.errors import IsolateError

MOST = 2**63 - 1
LESSER, GREATER = ("uses", "bytes_out", "expires", "depth", "lease"), ("minimum_group", "not_before")
SIZES = {"handle": 0, "label": 1, "scalar": 1, "text": 1, "vector": 2}
SMALL_ORDER = [
    number.to_bytes(32, "little")
    for y in (
        0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18,
        0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
        0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
    )
    for number in (y, y | 1 << 255)
]  # fmt: skip


class RefusedError(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def need(holds: object, code: str = "token_malformed") -> None:
    if not holds:
        raise RefusedError(code)


# crypto.md, 1


def head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes([major << 5 | number])
    place = next(place for place in range(4) if number < 256**2**place)
    return bytes([major << 5 | 24 + place]) + number.to_bytes(2**place, "big")


def encode(value: Any) -> bytes:
    if isinstance(value, bool) or value is None:
        return {False: b"\xf4", True: b"\xf5", None: b"\xf6"}[value]
    if isinstance(value, int):
        return head(0, value) if value >= 0 else head(1, -1 - value)
    if isinstance(value, bytes | str):
        raw = value if isinstance(value, bytes) else value.encode()
        return head(2 if isinstance(value, bytes) else 3, len(raw)) + raw
    if isinstance(value, list):
        return head(4, len(value)) + b"".join(map(encode, value))
    pairs = sorted((encode(name), encode(part)) for name, part in value.items())
    return head(5, len(pairs)) + b"".join(name + part for name, part in pairs)


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        need(self.at + size <= len(self.data))
        self.at += size
        return self.data[self.at - size : self.at]

    def value(self, depth: int = 0) -> Any:
        first = self.take(1)[0]
        major, number = first >> 5, first & 31
        if major == 7:
            need(number in (20, 21, 22))
            return {20: False, 21: True, 22: None}[number]
        need(number < 28 and major != 6)
        if number > 23:
            size = 1 << (number - 24)
            number = int.from_bytes(self.take(size), "big")
            need(number >= (24 if size == 1 else 256 ** (size // 2)))
        if major < 2:
            return number if major == 0 else -1 - number
        if major < 4:
            raw = self.take(number)
            try:
                return raw if major == 2 else raw.decode()
            except UnicodeDecodeError:
                raise RefusedError("token_malformed") from None
        need(depth < 16)
        if major == 4:
            return [self.value(depth + 1) for _ in range(number)]
        found: dict[Any, Any] = {}
        last, kinds = b"", set[type]()
        for _ in range(number):
            start = self.at
            name = self.value(depth + 1)
            kinds.add(type(name))
            need(kinds in ({str}, {int}) and self.data[start : self.at] > last)
            last = self.data[start : self.at]
            found[name] = self.value(depth + 1)
        return found


def decode(data: bytes) -> Any:
    reader = Reader(data)
    value = reader.value()
    need(reader.at == len(data))
    return value


def signed(key: bytes, purpose: str, message: bytes, signature: bytes) -> bool:
    try:
        nacl.bindings.crypto_sign_open(signature + b"isolate/v1/" + purpose.encode() + b"\0" + message, key)
    except nacl.exceptions.CryptoError:
        return False
    return True


# 2: scopes


def number(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= MOST


def named(pattern: str, value: Any) -> bool:
    return type(value) is str and re.fullmatch(pattern, value) is not None


def is_constraint(value: Any) -> bool:
    if type(value) is dict:
        ends = [value.get("least"), value.get("most")]
        return len(value) == 2 and all(number(end, -MOST) for end in ends) and ends[0] <= ends[1]
    if type(value) is not list or not all(type(one) is str or number(one, -MOST) for one in value):
        return False
    return all(one < other for one, other in pairwise(map(encode, value)))


def check_scope(scope: dict[Any, Any]) -> None:
    operation, parameter = r"[a-z][a-z0-9_.-]{0,63}", r"[A-Za-z_][A-Za-z0-9_]{0,63}"
    for name, value in scope.items():
        if name in LESSER + GREATER:
            need(number(value))
            continue
        need(type(value) is dict and name in ("operations", "parameters", "outputs", "rates"))
        for key, part in value.items():
            if name == "operations":
                need(named(operation, key) and type(part) is bytes and len(part) == 32)
            elif name == "parameters":
                need(named(operation, key) and type(part) is dict)
                need(all(named(parameter, one) and is_constraint(limit) for one, limit in part.items()))
            elif name == "outputs":
                need(key in SIZES and type(part) is list and len(part) == SIZES[key] and all(map(number, part)))
            else:
                need(number(key, 1) and number(part))


def permits(constraint: Any, value: Any) -> bool:
    if isinstance(constraint, list):
        return value in constraint
    return isinstance(value, int) and constraint["least"] <= value <= constraint["most"]


def both(one: Any, other: Any) -> Any:
    if isinstance(one, list):
        return [value for value in one if permits(other, value)]
    if isinstance(other, list):
        return both(other, one)
    least, most = max(one["least"], other["least"]), min(one["most"], other["most"])
    return {"least": least, "most": most} if least <= most else []


def joined(one: dict[Any, Any], other: dict[Any, Any], combine: Any) -> dict[Any, Any]:
    """All of both, combined where both have it."""
    return one | other | {name: combine(one[name], other[name]) for name in one.keys() & other.keys()}


def meet(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    shared = {
        "operations": lambda a, b: {name: a[name] for name in a if b.get(name) == a[name]},
        "outputs": lambda a, b: {
            kind: list(map(min, a[kind], b[kind])) if a[kind] else [] for kind in a.keys() & b.keys()
        },
        "parameters": lambda a, b: joined(a, b, lambda c, d: joined(c, d, both)),
        "rates": lambda a, b: joined(a, b, min),
        **dict.fromkeys(LESSER, min),
        **dict.fromkeys(GREATER, max),
    }
    return one | other | {name: shared[name](one[name], other[name]) for name in one.keys() & other.keys()}


# 3: tokens


def read_block(raw: bytes, first: bool) -> dict[str, Any]:
    block = decode(raw)
    kinds: dict[str, type] = {"holder": bytes, "nonce": bytes, "scope": dict}
    if first:
        kinds |= {"asset": str, "epoch": int, "owner": bytes}
    need(type(block) is dict and {name: type(part) for name, part in block.items()} == kinds)
    for key in {"holder", "owner"} & block.keys():
        need(len(block[key]) == 32 and block[key] not in SMALL_ORDER)
    need(len(block["nonce"]) == 16)
    check_scope(block["scope"])
    if first:
        need("operations" in block["scope"] and number(block["epoch"], 1) and 1 <= len(block["asset"]) <= 128)
        need(all(one == " " or unicodedata.category(one)[0] not in "CZ" for one in block["asset"]))
    return block  # type: ignore[no-any-return]


def ids(blocks: list[bytes]) -> list[bytes]:
    found = [bytes(32)]
    for block in blocks:
        found.append(sha256(b"isolate/v1/capability/handle\0" + found[-1] + block).digest())
    return found[1:]


def read_token(raw: bytes, owner: bytes, now: int, epoch: int) -> tuple[Any, ...]:
    """3.4: asset, ids, holders, and the effective scope of every prefix, encoded."""
    need(len(raw) <= 4096)  # 1
    token = decode(raw)
    need(type(token) is dict and token.keys() == {"version", "blocks", "signatures"})
    need(type(token["version"]) is int and token["version"] == 1)
    raws, signatures = token["blocks"], token["signatures"]
    need(type(raws) is list and type(signatures) is list and 1 <= len(raws) <= 8 and len(raws) == len(signatures))
    need(all(type(one) is bytes for one in raws + signatures) and all(len(one) == 64 for one in signatures))
    blocks = [read_block(one, not place) for place, one in enumerate(raws)]
    handles, holders = ids(raws), [block["holder"] for block in blocks]
    need(blocks[0]["owner"] == owner, "capability_refused")  # 2
    purposes = ["capability/grant"] + ["capability/block"] * 7
    for key, *proof in zip([owner, *holders], purposes, handles, signatures, strict=False):  # 3
        need(signed(key, *proof), "capability_refused")
    left, scope, scopes = 8, dict[str, Any](), []
    for block in blocks:
        need(left > 0, "depth_exceeded")  # 4
        left = min(left - 1, block["scope"].get("depth", MOST))
        scope = meet(scope, block["scope"])  # 5
        scopes.append(scope | {"depth": left})
    need(now >= scope.get("not_before", 0), "not_yet_valid")  # 6
    need(now < scope.get("expires", MOST + 1), "expired")
    need(blocks[0]["epoch"] == epoch, "epoch_ended")  # 7
    lease = scope.get("lease", 0) if "lease" in blocks[0]["scope"] else 0
    return blocks[0]["asset"], tuple(handles), tuple(holders), tuple(map(encode, scopes)), lease


# 4: invocations


def read_invocation(raw: bytes, token: tuple[Any, ...], binding: bytes, arguments: bytes) -> tuple[Any, ...]:
    signature, body, wrong = raw[:64], raw[64:], "invocation_malformed"
    need(154 <= len(body) <= 217 and body[0] == 1 and body[153:].isascii() and body[1] < 128, wrong)
    need(body[9:41] == token[1][-1], "holder_refused")  # 1
    need(signed(token[2][-1], "capability/invocation", body, signature), "holder_refused")  # 2
    need(body[105:137] == binding, "holder_refused")  # 3
    need(body[73:105] == arguments, "holder_refused")  # 4
    allowed = decode(token[3][-1])["operations"]
    need(allowed.get(body[153:].decode()) == body[41:73], "scope_exceeded")  # 5
    counter, name = int.from_bytes(body[1:9], "big"), body[153:].decode()
    return sha256(b"isolate/v1/capability/invocation-id\0" + body).digest(), name, counter


# Random chains


class Maker:
    """Makes chains with keys of its own, good ones and, where ``odd``, wrong ones."""

    def __init__(self, seed: int) -> None:
        self.dice, self.odd = random.Random(seed), False
        pairs = [nacl.bindings.crypto_sign_seed_keypair(bytes([one]) * 32) for one in range(1, 5)]
        self.keys = dict(pairs)
        self.owner, *self.people = [public for public, _ in pairs]

    def sign(self, key: bytes, purpose: str, message: bytes) -> bytes:
        framed = b"isolate/v1/" + purpose.encode() + b"\0" + message
        return nacl.bindings.crypto_sign(framed, self.keys[key])[:64]

    def rarely(self, good: Any, *wrong: Any, chance: float = 0.03) -> Any:
        return self.dice.choice(wrong) if self.odd and self.dice.random() < chance else good

    def some(self, *values: Any) -> list[Any]:
        return [one for one in values if self.dice.random() < 0.5]

    def number(self, *wrong: Any) -> Any:
        good = self.dice.choice([0, 1, 2, 23, 24, 255, 256, 2**32, MOST])
        return self.rarely(good, -1, MOST + 1, True, None, "1", [], b"", *wrong)

    def constraint(self) -> Any:
        if self.dice.random() < 0.5:
            least, most = self.dice.choice([(-5, 5), (0, 0), (3, 9), (-MOST, MOST)])
            return self.rarely(
                {"least": least, "most": most}, {"least": 1, "most": 0}, {"least": 1},
                {"least": -MOST - 1, "most": 0}, {"least": 0, "most": True}, {"least": 0, "most": 1, "step": 1}, 5,
            )  # fmt: skip
        choices = sorted(self.some(0, 1, -1, 300, MOST, -MOST, "", "a", "bb", "é"), key=encode)
        return self.rarely(choices, [2, 1], [1, 1], [True], [None], [MOST + 1], [-MOST - 1], [b"a"], [[]], "ab", {})

    def scope(self, *, first: bool = False) -> Any:
        operation = lambda: self.rarely(self.dice.choice(["a", "classify", "x.y-z_0"]), "A", "", "a" * 65, "a\n", 1)  # noqa: E731
        digest = lambda: bytes([self.dice.randrange(2)]) * 32  # noqa: E731
        found: dict[Any, Any] = {
            "operations": {operation(): self.rarely(digest(), bytes(31), "x" * 32, None) for _ in range(3)},
            "parameters": {
                operation(): {self.rarely(one, "", "9", "k\n", "k" * 65, 1): self.constraint()}
                for one in ("k", "_T9")
            },
            "outputs": {
                self.rarely(kind, "logits", 1): self.rarely([self.number() for _ in range(size)], [1] * 3, None, {})
                for kind, size in self.some(*SIZES.items())
            },
            "rates": {self.rarely(one, 0, -1, "1", MOST + 1): self.number() for one in self.some(1, 24, 60, MOST)},
            **{name: self.number() for name in (*LESSER, *GREATER)},
        }
        # Else little is valid for long.
        if self.dice.random() < 0.8:
            found |= {"not_before": 0, "expires": MOST, "depth": self.dice.choice([0, 1, 2, 8])}
        found = {name: self.rarely(part, None, [], 7) for name, part in found.items() if self.dice.random() < 0.4}
        if first:
            found.setdefault("operations", {"classify": digest()})
        return self.rarely(found, found | {"loan": 1}, found | {"uses ": 1}, {1: 1}, [], None)

    def block(self, holder: bytes, *, first: bool) -> dict[Any, Any]:
        found: dict[Any, Any] = {
            "holder": self.rarely(holder, b"", holder + b"x", *SMALL_ORDER),
            "nonce": self.rarely(self.dice.randbytes(16), bytes(15), "x" * 16),
            "scope": self.scope(first=first),
        }
        if first:
            found |= {
                "asset": self.rarely(
                    "data set/1", "", "a" * 129, "a\n", "\u2028", "\xa0", "\u200b", "\ue000", "\u0378", b"a",
                    "a" * 128, "é\u0301\U0001f600",
                ),
                "epoch": self.rarely(1, 0, 2, MOST + 1, True, MOST),
                "owner": self.rarely(self.owner, *self.people, *SMALL_ORDER),
            }  # fmt: skip
        found |= self.rarely({}, {"more": 1}, {"asset": "b"}, {"epoch": 2})
        found.pop(self.rarely(None, *found), None)
        return found

    def damaged(self, raw: bytes) -> bytes:
        bent, place = bytearray(raw), self.dice.randrange(min(len(raw), self.dice.choice([4, 40, len(raw)])))
        what = self.dice.randrange(6)
        if what == 0:
            bent[place] ^= 1 << self.dice.randrange(8)
        elif what == 1:
            del bent[place:]
        elif what == 2:
            bent += b"\0"
        elif what == 3 and bent[place] & 31 < 24:  # a head that is longer than it must be
            bent[place : place + 1] = bytes([bent[place] & 0xE0 | 24, bent[place] & 31])
        elif what == 4:
            bent[place] = self.dice.choice(b"\xc0\xf7\xf9\xff\x9f\xbf\x5f")
        else:
            bent.insert(place, self.dice.randrange(256))
        return bytes(bent)

    def token(self) -> bytes:
        self.odd = self.dice.random() < 0.6
        signer, purpose, raws, signatures = self.owner, "capability/grant", list[bytes](), list[bytes]()
        for place in range(self.dice.choice([1, 1, 2, 3, 4, self.rarely(2, 8, 9, chance=0.3)])):
            holder = self.dice.choice(self.people)
            raw = encode(self.block(holder, first=place == 0))
            raws.append(self.rarely(raw, self.damaged(raw)))
            signatures.append(self.sign(self.rarely(signer, *self.keys, chance=0.1), purpose, ids(raws)[-1]))
            signer, purpose = holder, "capability/block"
        fields: dict[str, Any] = {"version": self.rarely(1, 0, 2, True), "blocks": raws, "signatures": signatures}
        for parts in (raws, signatures):
            self.rarely(lambda _: None, self.dice.shuffle, list.pop, lambda of: of.append(of[0]))(parts)
        fields |= self.rarely({}, {"more": 1}, {"blocks": []}, {"signatures": [bytes(63)] * len(raws)})
        return self.rarely(encode(fields), self.damaged(encode(fields)))  # type: ignore[no-any-return]

    def invocation(self, token: tuple[Any, ...], binding: bytes, arguments: bytes) -> bytes:
        self.odd = self.dice.random() < 0.6
        operations = decode(token[3][-1])["operations"] or {"classify": bytes(32)}
        name, digest = self.dice.choice(list(operations.items()))
        body = (
            self.rarely(b"\x01", b"\x00", b"\x02", b"")
            + self.rarely(self.dice.randrange(2**63), 2**63, 2**64 - 1).to_bytes(8, "big")
            + self.rarely(token[1][-1], token[1][0], bytes(32), bytes(31))
            + self.rarely(digest, bytes([7]) * 32)
            + self.rarely(arguments, bytes(32))
            + self.rarely(binding, bytes(32))
            + self.dice.randbytes(self.rarely(16, 15, 17))
            + self.rarely(name.encode(), b"", b"x" * 64, b"x" * 65, b"\xc3\xa9", name.encode() + b"\0")
        )
        holder = token[2][-1] if token[2][-1] in self.keys else self.owner
        raw = self.sign(self.rarely(holder, *self.keys), "capability/invocation", body) + body
        return self.rarely(raw, raw[:63], b"", self.damaged(raw))  # type: ignore[no-any-return]


def outcome(read: Any, *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except (RefusedError, IsolateError) as error:
        return error.code


def ours(raw: bytes, owner: bytes, now: int, epoch: int) -> tuple[Any, ...]:
    seen = verify(raw, owner, now=now, epoch=epoch)
    return seen.asset, seen.handles, seen.holders, tuple(limit.encode() for limit in seen.limits), seen.lease


def used(raw: bytes, token: VerifiedToken, binding: bytes, arguments: bytes) -> tuple[Any, ...]:
    seen = verify_invocation(Invocation.parse(raw), token, channel_binding=binding, argument_hash=arguments)
    return seen.id, seen.operation, seen.counter


@pytest.mark.threat("CAP-2")
@pytest.mark.parametrize("seed", range(2))
def test_both_take_the_same_tokens_and_invocations_and_refuse_the_others_alike(seed: int) -> None:
    maker, seen = Maker(seed), Counter[str]()
    binding, arguments = b"c" * 32, hash_arguments(b"image")
    assert arguments == sha256(b"isolate/v1/capability/arguments\0image").digest()
    for _ in range(120):
        raw, now, epoch = maker.token(), maker.dice.choice([1, 2**32]), maker.dice.choice([1] * 9 + [2])
        meant = outcome(read_token, raw, maker.owner, now, epoch)
        assert outcome(ours, raw, maker.owner, now, epoch) == meant, raw.hex()
        seen[meant if isinstance(meant, str) else "good"] += 1
        if isinstance(meant, str):
            continue
        assert Token.parse(raw).encode() == raw
        verified = verify(raw, maker.owner, now=now)
        for _ in range(2):
            call = maker.invocation(meant, binding, arguments)
            said = outcome(read_invocation, call, meant, binding, arguments)
            assert outcome(used, call, verified, binding, arguments) == said, call.hex()
            seen["used" if isinstance(said, tuple) else said] += 1
    # Neither only good ones were made, nor only ones that fall at the first hurdle.
    assert min(seen[code] for code in ("good", "used", "token_malformed")) > 20, seen
    codes = {"capability_refused", "depth_exceeded", "expired", "not_yet_valid", "epoch_ended"}
    assert seen.keys() >= codes | {"invocation_malformed", "holder_refused", "scope_exceeded"}, seen


@pytest.mark.parametrize("seed", range(2))
def test_what_is_granted_and_narrowed_here_is_read_there(seed: int, people: Any) -> None:
    maker, owner, team = Maker(seed), people.owner, people.team
    for _ in range(20):
        token = grant(owner, asset="a", scope=Scope.from_value(maker.scope(first=True)), holder=people.pub(team))
        for _ in range(maker.dice.randrange(4)):
            if token.scope.depth:
                token = token.attenuate(team, Scope.from_value(maker.scope()))
        read = outcome(read_token, token.encode(), people.pub(owner), 1, 1)
        assert read == outcome(ours, token.encode(), people.pub(owner), 1, 1)
        if isinstance(read, tuple):
            digest, argument, binding = bytes(32), b"a" * 32, b"c" * 32
            call = Invocation.sign(
                token, team, operation="classify", operation_digest=digest, argument_hash=argument,
                channel_binding=binding, nonce=bytes(16), counter=MOST,
            )  # fmt: skip
            allowed = decode(read[3][-1])["operations"].get("classify") == digest
            expected = (call.id, "classify", MOST) if allowed else "scope_exceeded"
            assert outcome(read_invocation, call.encode(), read, binding, argument) == expected
