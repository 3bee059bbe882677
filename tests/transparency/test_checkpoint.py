"""Checkpoints: the notes of others verify, ours are theirs, and nothing hostile is taken."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolate.crypto.merkle import EMPTY_ROOT
from isolate.crypto.signing import Purpose, verify_note
from isolate.errors import LogRefused, UsageError
from isolate.transparency import Checkpoint, Witness, cosign, sign_checkpoint, verifier_key

NOTES = Path(__file__).parents[1] / "vectors" / "note"
GO_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
SUMDB_KEY = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"


def public_of(text: str) -> tuple[str, bytes]:
    name, _, body = text.split("+", 2)
    return name, base64.b64decode(body)[1:]


@pytest.mark.parametrize(
    ("file", "key", "message"),
    [
        ("go_note.txt", GO_KEY, "lacks its origin, size or root"),
        ("sumdb_checkpoint.txt", SUMDB_KEY, "is of another log"),
    ],
)
def test_notes_of_the_go_checksum_database_verify(file: str, key: str, message: str) -> None:
    """Their signatures hold here; they are refused only for what they say, which is checked after that."""
    name, public = public_of(key)
    assert verifier_key(name, public) == key
    text = (NOTES / file).read_text(encoding="utf-8")
    with pytest.raises(LogRefused, match=message):
        Checkpoint.verify(text, name, public)
    body, signature = text.rsplit("\n\n", 1)
    raw = base64.b64decode(signature.split()[-1])
    assert verify_note(public, (body + "\n").encode(), raw[4:])
    with pytest.raises(LogRefused, match="signature of the log"):
        Checkpoint.verify(text.replace("go.sum", "go.sam").replace("problem is", "problem was"), name, public)


def test_a_checkpoint_has_the_bytes_of_the_specification(log: Any) -> None:
    note = log.note(3)
    lines = note.split("\n")
    assert lines[0:2] == [log.origin, "3"] and lines[3] == "" and lines[5] == "" and len(lines) == 6
    assert lines[4].startswith(f"\u2014 {log.origin} ")
    key_id = base64.b64decode(lines[4].split()[-1])[:4]
    assert verifier_key(log.origin, log.public).split("+")[1] == key_id.hex()
    seen = Checkpoint.verify(note.encode(), log.origin, log.public)
    assert (seen.size, base64.b64encode(seen.root).decode()) == (3, lines[2])
    assert seen.text == note and seen.body == "\n".join(lines[:3]) + "\n"


@pytest.mark.threat("LOG-2")
def test_another_key_and_another_origin_are_refused(log: Any, witnesses: Any) -> None:
    other = witnesses.keys[0]
    with pytest.raises(LogRefused, match="not signed by the log's key"):
        Checkpoint.verify(log.note(3), log.origin, other.verifying_key.ed25519)
    with pytest.raises(LogRefused, match="not signed by the log's key"):
        Checkpoint.verify(log.note(3), "example.com/other", log.public)
    # The log signs under its own name a checkpoint of another log.
    foreign = sign_checkpoint(log.key, "example.com/other", 3, log.seen(3).root)
    with pytest.raises(LogRefused):
        Checkpoint.verify(
            foreign.replace("\u2014 example.com/other", f"\u2014 {log.origin}"), log.origin, log.public
        )


@pytest.mark.threat("LOG-2")
def test_every_byte_of_a_checkpoint_changed_is_refused(log: Any) -> None:
    raw = log.note(300).encode()
    for position in range(len(raw)):
        for flip in (0x01, 0x20, 0x80):
            changed = bytearray(raw)
            changed[position] ^= flip
            with pytest.raises(LogRefused):
                Checkpoint.verify(bytes(changed), log.origin, log.public)


@pytest.mark.threat("LOG-2")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_damage_is_refused_and_never_another_error(log: Any, data: st.DataObject) -> None:
    raw = log.note(300).encode()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, len(raw)))
    changed = raw[:start] + data.draw(st.binary(max_size=40)) + raw[end:]
    if changed != raw:
        with pytest.raises(LogRefused):
            Checkpoint.verify(changed, log.origin, log.public)


def signed(log: Any, body: str) -> str:
    """Any body, truly signed by the log."""
    real = sign_checkpoint(log.key, log.origin, 0, EMPTY_ROOT)
    line = real.rsplit("\n\n", 1)[1]
    key_id = base64.b64decode(line.split()[-1])[:4]
    signature = base64.b64encode(key_id + log.key.sign_note(body.encode())).decode()
    return f"{body}\n\u2014 {log.origin} {signature}\n"


ROOT = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    "lines",
    [
        ["3", ROOT],
        ["03", ROOT, "x"],
        ["-3", ROOT],
        ["3.0", ROOT],
        ["\u0663", ROOT],
        [str(2**62 + 1), ROOT],
        ["9" * 30, ROOT],
        ["3", ROOT[:-1]],
        ["3", base64.b64encode(bytes(31)).decode()],
        ["3", ROOT[:-2] + "B="],
        ["3", "-" + ROOT[1:]],
        ["3"],
        ["3", ROOT, ""],
        ["0", ROOT],
    ],
    ids=repr,
)
def test_what_the_log_itself_signs_wrongly_is_refused(log: Any, lines: list[str]) -> None:
    origin = log.origin if lines != ["3", ROOT] else "example.com/another"
    with pytest.raises(LogRefused):
        Checkpoint.verify(signed(log, "\n".join([origin, *lines]) + "\n"), log.origin, log.public)


def test_extension_lines_and_unknown_signatures_are_passed_over(log: Any) -> None:
    text = signed(log, f"{log.origin}\n3\n{ROOT}\nextension\n")
    assert Checkpoint.verify(text, log.origin, log.public).size == 3
    more = text + "\u2014 stranger " + base64.b64encode(bytes(100)).decode() + "\n"
    assert Checkpoint.verify(more, log.origin, log.public).size == 3


def test_control_characters_are_refused_also_where_the_log_signed_them(log: Any) -> None:
    with pytest.raises(LogRefused, match="control characters"):
        Checkpoint.verify(signed(log, f"{log.origin}\n3\n{ROOT}\n\x1b[2J\n"), log.origin, log.public)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "\n\n",
        "a\nb\nc\n",
        "a\n\n\u2014 x AAAAAAA=\n",
        b"\xff\n\n\xe2\x80\x94 x AAAAAAA=\n",
        "a\n\nno dash x AAAA\n",
        "a\n\n\u2014 x !!!!\n",
        "a\n\n\u2014 x\n",
        "a\n\n\u2014  AAAAAAA=\n",
        "a\n\n\u2014 x AAAAAAA=",
        "a\r\n\n\u2014 x AAAAAAA=\n",
        "a\x00\n\n\u2014 x AAAAAAA=\n",
        "\ud800\n\n\u2014 x AAAAAAA=\n",
        "x" * 70_000,
        "a\n\n" + "\u2014 x AAAAAAA=\n" * 65,
    ],
    ids=lambda text: repr(text)[:30],
)
def test_what_is_no_note_is_refused(log: Any, text: Any) -> None:
    with pytest.raises(LogRefused):
        Checkpoint.verify(text, log.origin, log.public)


@pytest.mark.threat("LOG-3")
def test_a_quorum_of_witnesses(log: Any, witnesses: Any) -> None:
    note = log.note(5)
    for number in range(2):
        note = cosign(
            Checkpoint.verify(note, log.origin, log.public),
            witnesses.keys[number],
            witnesses.known[number].name,
            at=100 + number,
        )
    seen = Checkpoint.verify(note, log.origin, log.public, witnesses=witnesses.known, quorum=2)
    assert dict(seen.witnessed) == {"example.com/w0": 100, "example.com/w1": 101}
    with pytest.raises(LogRefused, match="2 known witnesses cosigned the checkpoint, 3 are asked for"):
        Checkpoint.verify(note, log.origin, log.public, witnesses=witnesses.known, quorum=3)
    with pytest.raises(UsageError):
        Checkpoint.verify(note, log.origin, log.public, witnesses=witnesses.known, quorum=4)


@pytest.mark.threat("LOG-3")
def test_one_witness_under_two_names_counts_once(log: Any, witnesses: Any) -> None:
    key = witnesses.keys[0]
    names = ["example.com/one", "example.com/two"]
    note = log.note(5)
    for name in names:
        note = cosign(Checkpoint.verify(note, log.origin, log.public), key, name, at=1)
    known = [Witness(name, key.verifying_key.ed25519) for name in names]
    with pytest.raises(UsageError):
        Checkpoint.verify(note, log.origin, log.public, witnesses=known, quorum=2)
    with pytest.raises(LogRefused, match="1 known witnesses"):
        Checkpoint.verify(note, log.origin, log.public, witnesses=[*known, *witnesses.known[1:]], quorum=2)


@pytest.mark.threat("LOG-3")
def test_a_false_or_moved_cosignature_is_refused(log: Any, witnesses: Any) -> None:
    line = cosign(log.seen(4), witnesses.keys[0], witnesses.known[0].name, at=9).splitlines(keepends=True)[-1]
    raw = bytearray(base64.b64decode(line.split()[-1]))
    raw[11] ^= 1
    later = f"\u2014 {witnesses.known[0].name} {base64.b64encode(bytes(raw)).decode()}\n"
    short = f"\u2014 {witnesses.known[0].name} {base64.b64encode(bytes(raw[:-1])).decode()}\n"
    for note in (log.note(5) + line, log.note(4) + later, log.note(4) + short):
        with pytest.raises(LogRefused, match=r"cosignature of example\.com/w0"):
            Checkpoint.verify(note, log.origin, log.public, witnesses=witnesses.known)
        Checkpoint.verify(note, log.origin, log.public)


@pytest.mark.threat("LOG-3")
def test_the_logs_own_signature_is_no_cosignature(log: Any) -> None:
    """The same key as log and as witness: the types differ in key id and in what is signed."""
    watch = Witness(log.origin, log.public)
    with pytest.raises(LogRefused, match="0 known witnesses"):
        Checkpoint.verify(log.note(5), log.origin, log.public, witnesses=[watch], quorum=1)


def test_a_note_signature_is_none_for_a_purpose_and_none_of_them_for_it(log: Any) -> None:
    body = log.seen(5).body.encode()
    assert not verify_note(log.public, body, log.key.sign(Purpose.RECEIPT, body))
    assert not log.key.verifying_key.verify(Purpose.RECEIPT, body, log.key.sign_note(body))
    with pytest.raises(UsageError):
        log.key.sign_note(b"isolate/v1/capability/grant\0" + bytes(32) + b"\n")
    framed = b"isolate/v1/capability/grant\0" + bytes(32)
    assert not verify_note(log.public, framed, log.key.sign(Purpose.GRANT, bytes(32)))


@pytest.mark.parametrize("origin", ["", "a b", "a+b", "a\nb", "caf\u00e9", "x" * 201])
def test_names_that_no_log_should_have_are_refused(log: Any, origin: str) -> None:
    with pytest.raises(UsageError):
        sign_checkpoint(log.key, origin, 0, EMPTY_ROOT)


def test_misuse(log: Any) -> None:
    with pytest.raises(UsageError):
        sign_checkpoint(log.key, log.origin, -1, EMPTY_ROOT)
    with pytest.raises(UsageError):
        sign_checkpoint(log.key, log.origin, 1, b"short")
    with pytest.raises(UsageError):
        cosign(log.seen(1), log.key, "w", at=-1)
    with pytest.raises(UsageError):
        Witness("w", bytes([1]) + bytes(31))
    seen = log.seen(1)
    with pytest.raises(UsageError):
        Checkpoint(seen.origin, 2, seen.root, seen.text, seen.body, {}, object())
    with pytest.raises(UsageError):
        attrs.evolve(seen, size=2)
