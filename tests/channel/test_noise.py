"""The Noise core against public vectors, against another implementation, and against bent messages."""

from __future__ import annotations

import json
import secrets
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolate.channel.noise import LAST_NONCE, MAX_MESSAGE, CipherState, HandshakeState
from isolate.channel.patterns import PATTERNS, parse_pattern
from isolate.crypto.aead import Suite
from isolate.crypto.exchange import CurveKey, LatticeKey
from isolate.crypto.secret import Secret
from isolate.errors import HandshakeRefused, UsageError

FOLDER = Path(__file__).parents[1] / "vectors" / "noise"
SNOW, CACOPHONY, NOISE_C = (
    json.loads((FOLDER / name).read_text())["vectors"] for name in ("snow.json", "cacophony.json", "noise-c.json")
)
VECTORS = SNOW + CACOPHONY + [{"protocol_name": vector.pop("name"), **vector} for vector in NOISE_C]
HYBRID = "Noise_XXhfs_25519+MLKEM768_AESGCM_SHA256"
FIELDS = {
    "protocol_name", "messages", "handshake_hash",
    "pattern", "dh", "cipher", "hash",  # of noise-c: parts of the name
    "init_prologue", "init_psks", "init_static", "init_ephemeral", "init_remote_static",
    "resp_prologue", "resp_psks", "resp_static", "resp_ephemeral", "resp_remote_static",
}  # fmt: skip


def key(text: str | None) -> CurveKey | None:
    return CurveKey(Secret(bytes.fromhex(text))) if text else None


def state(vector: dict[str, Any], side: str) -> HandshakeState:
    remote = vector.get(f"{side}_remote_static")
    return HandshakeState(
        vector["protocol_name"],
        initiator=side == "init",
        prologue=bytes.fromhex(vector[f"{side}_prologue"]),
        static=key(vector.get(f"{side}_static")),
        ephemeral=key(vector.get(f"{side}_ephemeral")),
        remote_static=bytes.fromhex(remote) if remote else None,
        psks=[bytes.fromhex(one) for one in vector.get(f"{side}_psks", ())],
    )


def test_the_vectors_are_all_there() -> None:
    assert (len(SNOW), len(CACOPHONY), len(NOISE_C)) == (408, 7, 4)
    assert set().union(*VECTORS) == FIELDS
    bases = {parse for vector in SNOW for parse in [vector["protocol_name"].split("_")[1].split("psk")[0]]}
    assert bases == set(PATTERNS) - {"XXhfs"}


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["protocol_name"] for vector in VECTORS])
def test_public_vectors(vector: dict[str, Any]) -> None:
    """All of snow, and a few of cacophony and noise-c. The hash that cacophony names is not the final one."""
    initiator, responder = state(vector, "init"), state(vector, "resp")
    one_way = not parse_pattern(vector["protocol_name"].split("_")[1]).messages[1:]
    keys = None
    for turn, message in enumerate(vector["messages"]):
        payload, expected = bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"])
        forth = one_way or turn % 2 == 0
        if not initiator.finished:
            writer, reader = (initiator, responder) if forth else (responder, initiator)
            assert writer.write_message(payload) == expected
            assert reader.read_message(expected) == payload
            continue
        keys = keys or (initiator.split(), responder.split())
        assert initiator.hash == responder.hash
        ours, theirs = keys if forth else reversed(keys)
        which = 0 if forth else 1
        assert ours[which].encrypt(b"", payload) == expected
        assert theirs[which].decrypt(b"", expected) == payload
    assert initiator.finished and responder.finished
    if "pattern" in vector:
        assert initiator.hash == responder.hash == bytes.fromhex(vector["handshake_hash"])


def hybrid(**responder: Any) -> tuple[HandshakeState, HandshakeState]:
    return (
        HandshakeState(HYBRID, initiator=True, prologue=b"p", static=CurveKey.generate()),
        HandshakeState(HYBRID, initiator=False, **{"prologue": b"p", "static": CurveKey.generate(), **responder}),
    )


def finish(one: HandshakeState, other: HandshakeState) -> None:
    other.read_message(one.write_message(b"1"))
    one.read_message(other.write_message(b"2"))
    other.read_message(one.write_message(b"3"))


def test_the_hybrid_handshake_agrees_and_has_its_sizes() -> None:
    one, other = hybrid()
    first = one.write_message()
    assert len(first) == 32 + 1184
    other.read_message(first)
    second = other.write_message()
    assert len(second) == 32 + (1088 + 16) + (32 + 16) + 16
    one.read_message(second)
    third = one.write_message()
    assert len(third) == (32 + 16) + 16
    other.read_message(third)
    assert one.hash == other.hash and one.chaining_key().equals(other.chaining_key())
    sent, taken = one.split()[0].encrypt(b"", b"x"), other.split()[0]
    assert taken.decrypt(b"", sent) == b"x"


@pytest.mark.threat("CHAN-1")
def test_hybrid_keys_need_both_kinds_of_secret() -> None:
    """Whoever has only one of the two ephemeral secrets (a quantum computer has the first) ends with other keys."""
    curve, lattice = CurveKey.generate(), LatticeKey.generate()
    static = CurveKey.generate()
    for stolen in ({"ephemeral": curve}, {"lattice": lattice}):
        one = HandshakeState(HYBRID, initiator=True, static=static, ephemeral=curve, lattice=lattice)
        other = HandshakeState(HYBRID, initiator=False, static=CurveKey.generate())
        thief = HandshakeState(
            HYBRID,
            initiator=True,
            static=static,
            **{"ephemeral": CurveKey.generate(), "lattice": LatticeKey.generate(), **stolen},  # type: ignore[arg-type]
        )
        first = one.write_message()
        thief.write_message()
        # The thief listened: it continues from the very same transcript.
        thief._symmetric.hash = one._symmetric.hash
        other.read_message(first)
        second = other.write_message()
        one.read_message(second)
        with pytest.raises(HandshakeRefused):
            thief.read_message(second)


def test_another_prologue_is_refused() -> None:
    one, other = hybrid(prologue=b"q")
    other.read_message(one.write_message())
    with pytest.raises(HandshakeRefused):
        one.read_message(other.write_message())


@pytest.mark.threat("CHAN-2")
@settings(max_examples=60)
@given(st.integers(0, 2), st.integers(0, 2**20), st.integers(1, 255))
def test_every_flipped_byte_is_noticed(turn: int, place: int, flip: int) -> None:
    """A change of any byte of any message ends the handshake at the next message that depends on it."""
    one, other = hybrid()
    sides = [one, other]
    with pytest.raises(HandshakeRefused):
        for number in range(3):
            writer, reader = sides[number % 2], sides[1 - number % 2]
            message = bytearray(writer.write_message(b"payload"))
            if number == turn:
                message[place % len(message)] ^= flip
            reader.read_message(bytes(message))
        one.split()[0].decrypt(b"", other.split()[0].encrypt(b"", b""))


@settings(max_examples=40)
@given(st.integers(0, 2), st.binary(max_size=2000))
def test_hostile_bytes_raise_only_our_error(turn: int, message: bytes) -> None:
    one, other = hybrid()
    sides = [one, other]
    for number in range(turn):
        sides[1 - number % 2].read_message(sides[number % 2].write_message())
    try:
        sides[1 - turn % 2].read_message(message)
    except HandshakeRefused:
        return
    assert turn == 0 and len(message) >= 32 + 1184


def test_after_a_refused_message_nothing_goes_on() -> None:
    """Hash and keys have moved on half a message: neither the genuine one nor another call brings them back."""
    one, other = hybrid()
    first = one.write_message()
    with pytest.raises(HandshakeRefused):
        other.read_message(first[:40])
    psk = HandshakeState("Noise_NNpsk0_25519_AESGCM_SHA256", initiator=False, psks=[bytes(32)])
    with pytest.raises(HandshakeRefused):
        psk.read_message(bytes(48))
    for core in (other, psk):
        for late in (lambda core=core: core.read_message(first), lambda core=core: core.write_message()):
            with pytest.raises(UsageError):
                late()
        assert not core.finished and not core.writes_next
    with pytest.raises(UsageError):
        other.split()


def test_points_of_small_order_are_refused() -> None:
    other = hybrid()[1]
    other.read_message(bytes(32) + LatticeKey.generate().public)
    with pytest.raises(HandshakeRefused, match="small order"):
        other.write_message()


def test_an_invalid_lattice_key_is_refused() -> None:
    other = hybrid()[1]
    other.read_message(CurveKey.generate().public + b"\xff" * 1184)
    with pytest.raises(HandshakeRefused):
        other.write_message()


def test_turns_and_names_are_kept() -> None:
    one, other = hybrid()
    for misuse in (
        lambda: one.read_message(b""),
        lambda: other.write_message(),
        lambda: one.split(),
        lambda: one.chaining_key(),
        lambda: one.write_message(bytes(MAX_MESSAGE)),
        lambda: HandshakeState("Noise_XX_448_AESGCM_SHA256", initiator=True),
        lambda: HandshakeState("Noise_XXhfs_25519_AESGCM_SHA256", initiator=True),
        lambda: HandshakeState("Noise_ZZ_25519_AESGCM_SHA256", initiator=True),
        lambda: HandshakeState("Noise_XXpsk9_25519_AESGCM_SHA256", initiator=True),
        lambda: HandshakeState("Noise_XXpsk1_25519_AESGCM_SHA256", initiator=True),
        lambda: HandshakeState("Noise_XXpsk\u0663_25519_AESGCM_SHA256", initiator=True, psks=[bytes(32)]),
        lambda: HandshakeState("Noise_XXpsk1+psk1_25519_AESGCM_SHA256", initiator=True, psks=[bytes(32)] * 2),
        lambda: HandshakeState("Noise_XXfallback_25519_AESGCM_SHA256", initiator=True),
        lambda: HandshakeState("Noise_NK_25519_AESGCM_SHA256", initiator=True, remote_static=b"short"),
        lambda: HandshakeState("Noise_KK_25519_AESGCM_SHA256", initiator=True),
        lambda: HandshakeState("nonsense", initiator=True),
    ):
        with pytest.raises(UsageError):
            misuse()


def test_nonces_end_and_rekey_changes_the_key() -> None:
    one = CipherState(Suite.CHACHA20_POLY1305, Secret(bytes(32)))
    other = CipherState(Suite.CHACHA20_POLY1305, Secret(bytes(32)))
    before = one.encrypt(b"", b"x")
    assert other.decrypt(b"", before) == b"x"
    one.rekey()
    other.rekey()
    assert other.decrypt(b"", one.encrypt(b"", b"x")) == b"x"
    one.nonce = LAST_NONCE
    with pytest.raises(HandshakeRefused):
        one.encrypt(b"", b"x")
    with pytest.raises(HandshakeRefused):
        one.decrypt(b"", before)


# noiseprotocol has the fundamental patterns, and any psk modifiers on them.
CHECKED = [name for name in PATTERNS if name != "XXhfs" and "1" not in name]


def modified(pattern: str) -> list[str]:
    """The pattern plain, with a pre-shared key at either end, and with both."""
    last = len(PATTERNS[pattern]) - 1
    return [pattern, f"{pattern}psk0", f"{pattern}psk{last}", f"{pattern}psk0+psk{last}"]


@pytest.mark.parametrize("pattern", CHECKED)
@pytest.mark.parametrize("suite", ["AESGCM_SHA256", "ChaChaPoly_BLAKE2s", "ChaChaPoly_SHA512", "AESGCM_BLAKE2b"])
def test_random_handshakes_agree_with_noiseprotocol(pattern: str, suite: str) -> None:
    """An implementation by others, with fresh keys and payloads, on either side."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from noise.connection import Keypair, NoiseConnection
    for name, we_begin in [(name, begin) for name in modified(pattern) for begin in (True, False)]:
        full = f"Noise_{name}_25519_{suite}"
        ours, theirs = Secret.generate(32), Secret.generate(32)
        psks = [secrets.token_bytes(32) for _ in range(name.count("psk"))]
        knows = PATTERNS[pattern][0]
        we, they = ("i", "r") if we_begin else ("r", "i")
        prologue = secrets.token_bytes(secrets.randbelow(50))
        core = HandshakeState(
            full,
            initiator=we_begin,
            prologue=prologue,
            static=CurveKey(ours),
            remote_static=CurveKey(theirs).public if they in knows else None,
            psks=psks,
        )
        oracle = NoiseConnection.from_name(full.encode())
        oracle.set_as_responder() if we_begin else oracle.set_as_initiator()
        oracle.set_prologue(prologue)
        oracle.set_keypair_from_private_bytes(Keypair.STATIC, bytes(theirs.expose()))
        if we in knows:
            oracle.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, CurveKey(ours).public)
        if psks:
            oracle.set_psks(psks=list(psks))
        oracle.start_handshake()
        while not core.finished:
            payload = secrets.token_bytes(secrets.randbelow(100))
            if core.writes_next:
                assert oracle.read_message(core.write_message(payload)) == payload
            else:
                assert core.read_message(bytes(oracle.write_message(payload))) == payload
        assert oracle.get_handshake_hash() == core.hash
        one_way = len(PATTERNS[pattern]) == 2
        sent, taken = core.split() if we_begin else reversed(core.split())
        if we_begin or not one_way:
            assert oracle.decrypt(sent.encrypt(b"", b"data")) == b"data"
        if not we_begin or not one_way:
            assert taken.decrypt(b"", bytes(oracle.encrypt(b"data"))) == b"data"
