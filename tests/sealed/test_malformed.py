"""The malformed kit: well over 120 files, each with one fault, and the stage at which each must be refused.

Every file is valid but for its fault: keys, tags, digests and signature are made anew behind it (see Assembly), so
that the check that is meant is the one that refuses. The stages are those of docs/spec/sealed-file.md, section 8.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isolate import Epoch, Identity, SigningKey, sealed
from isolate.crypto import cbor
from isolate.crypto.signing import Purpose
from isolate.errors import IsolateError, NotSealed, RefusedError
from isolate.sealed import layout
from isolate.sealed.recipients import Passphrase
from isolate.sealed.stores import MemorySink, MemorySource

Change = Callable[[Any], Any]
STAGES = ("header", "trailer", "directory", "origin", "unlock", "manifest", "chunk")


def put(key: str, value: Any) -> Change:
    """Set a field of a map."""
    return lambda body: body | {key: value}


def drop(key: str) -> Change:
    return lambda body: {name: value for name, value in body.items() if name != key}


def tweak(key: str, change: Change) -> Change:
    return lambda body: body | {key: change(body[key])}


def flip(at: int) -> Change:
    """Flip one bit of a byte string; negative counts from the end."""

    def change(data: bytes) -> bytes:
        found = bytearray(data)
        found[at] ^= 1
        return bytes(found)

    return change


def row(number: int, change: Change) -> Change:
    """Change one row of the directory."""
    return tweak("compartments", lambda rows: [*rows[:number], change(rows[number]), *rows[number + 1 :]])


def stanza(change: Change) -> Change:
    return tweak("stanzas", lambda stanzas: [change(stanzas[0]), *stanzas[1:]])


def reordered(data: bytes) -> bytes:
    """The same map with its keys in another order: cbor2 keeps the order it is given."""
    value = cbor2.loads(data)
    return cbor2.dumps(dict(reversed(list(value.items()))))


def long_integer(data: bytes) -> bytes:
    """The same map head in a longer form than needed."""
    return bytes([0xB8, data[0] & 0x1F]) + data[1:]


def doubled_key(data: bytes) -> bytes:
    """One pair of the map twice."""
    value = cbor2.loads(data)
    key, first = next(iter(value.items()))
    return bytes([data[0] + 1]) + cbor2.dumps(key) + cbor2.dumps(first) + data[1:]


def said(value: Any) -> str:
    """A short name for a value."""
    return f"{len(value)} of {type(value).__name__}" if isinstance(value, bytes | str) else f"{value!r:.60}"


def non_canonical(step: str, stage: str, empty: str = "") -> Iterator[tuple[str, str, dict[str, Change]]]:
    for change in (reordered, long_integer, doubled_key):
        yield f"{step} {change.__name__}", stage, {step: change}
    yield f"{step} trailing byte", stage, {step: lambda data: data + b"\0"}
    yield f"{step} cut", stage, {step: lambda data: data[:-1]}
    yield f"{step} empty", empty or stage, {step: lambda data: b""}
    yield f"{step} no map", stage, {step: lambda data: cbor.encode([1])}


def fields(step: str, stage: str, names: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Change]]]:
    """Each field missing and of another type, and one too many."""
    for name, other in names.items():
        yield f"{step} without {name}", stage, {step: drop(name)}
        yield f"{step} {name} of another type", stage, {step: put(name, other)}
    yield f"{step} unknown field", stage, {step: put("more", 1)}


def header_faults() -> Iterator[tuple[str, str, dict[str, Change]]]:
    names = {"generation": "1", "suite": b"1", "chunk": "4096", "salt": "x", "commitment": 1, "stanzas": {}}
    yield from fields("slot", "header", names)
    yield from non_canonical("slot cbor", "header")
    for name, value in [
        ("generation", 0), ("generation", -1), ("generation", 1 << 63), ("suite", 0), ("suite", 4), ("chunk", 0),
        ("chunk", 4095), ("chunk", 6144), ("chunk", 1 << 25), ("chunk", 1 << 60), ("salt", bytes(31)),
        ("salt", bytes(33)), ("commitment", bytes(31)), ("commitment", bytes(33)), ("stanzas", []),
        ("stanzas", [1]), ("stanzas", [{}]), ("stanzas", [{"type": "x25519", "box": b"1"}]),
        ("stanzas", [{"type": 1}]),
    ]:  # fmt: skip
        yield f"slot {name} = {said(value)}", "header", {"slot": put(name, value)}
    for name, value in [
        ("hint", bytes(7)), ("hint", bytes(9)), ("hint", 1), ("box", b""), ("box", bytes(9000)), ("box", "text"),
        ("more", 1),
    ]:  # fmt: skip
        yield f"stanza {name} = {said(value)}", "header", {"slot": stanza(put(name, value))}
    yield "stanza without hint", "header", {"slot": stanza(drop("hint"))}
    yield "stanza without box", "header", {"slot": stanza(drop("box"))}
    yield "stanza twice", "header", {"slot": tweak("stanzas", lambda stanzas: stanzas * 2)}
    passphrase = {"type": "argon2id", "salt": bytes(16), "passes": 1, "memory": 8, "box": bytes(48)}
    yield "passphrase beside x-wing", "header", {"slot": tweak("stanzas", lambda old: [*old, passphrase])}
    for name, value in [
        ("passes", 0), ("passes", 65), ("memory", 7), ("memory", 1 << 21), ("salt", bytes(15)), ("salt", bytes(17)),
    ]:  # fmt: skip
        yield f"passphrase {name} = {said(value)}", "header", {"slot": put("stanzas", [passphrase | {name: value}])}
    yield "passphrase work", "header", {"slot": put("stanzas", [passphrase | {"passes": 64, "memory": 1 << 20}])}
    wrapped = {"type": "wrapped", "label": "classical", "key": "k", "box": b"1"}
    yield "classical beside pq", "header", {"slot": tweak("stanzas", lambda old: [*old, wrapped])}
    for name, value in [("label", "both"), ("key", ""), ("key", "k" * 513)]:
        yield f"wrapped {name} = {said(value)}", "header", {"slot": put("stanzas", [wrapped | {name: value}])}
    for name, at in [("magic", 0), ("version", 8), ("version high", 9), ("reserved", 10), ("length", 12)]:
        yield f"prefix {name}", "header", {"slot prefix": flip(at)}
    yield "checksum", "header", {"slot raw": flip(-1)}
    yield "slot beyond its area", "header", {"slot prefix": lambda raw: raw[:12] + b"\xff\xff\xff\x7f" + raw[16:]}
    for name, at in [
        ("second slot", layout.SLOT_SIZE), ("second slot inside", layout.SLOT_SIZE + 300),
        ("first slot inside", 300),
        ("padding", layout.SLOT_SIZE - 1), ("gap", 2 * layout.SLOT_SIZE + 5), ("journal", layout.JOURNAL_OFFSET),
        ("behind the journal", layout.JOURNAL_OFFSET + 8), ("last byte", layout.HEADER_SIZE - 1),
    ]:  # fmt: skip
        yield f"header {name}", "header", {"header": flip(at)}
    yield "first slot rolled back", "header", {"header": older_slot}
    yield "rewrap under way, no slot readable", "header", {"header": no_slot_in_rewrap}


def older_slot(area: bytes) -> bytes:
    """The first slot as it was before a rewrap, the second as after it, and no rewrap under way."""
    return b"\x89isolate" + bytes(20) + area[28:]


def no_slot_in_rewrap(area: bytes) -> bytes:
    return flip(300)(flip(layout.SLOT_SIZE + 300)(area))[: layout.JOURNAL_OFFSET] + layout.JOURNAL.ljust(
        4096, b"\0"
    )


def directory_faults() -> Iterator[tuple[str, str, dict[str, Change]]]:
    names = {
        "version": "1", "suite": "1", "chunk": b"1", "salt": "s", "commitment": "c", "model": b"kit", "epoch": "5",
        "previous": "", "signer": "s", "compartments": {},
    }  # fmt: skip
    yield from fields("directory", "directory", names)
    yield from non_canonical("directory cbor", "directory", empty="trailer")
    for name, value in [
        ("version", 0), ("version", 2), ("suite", 2), ("suite", 9), ("chunk", 8192), ("chunk", 1),
        ("salt", bytes(32)),
        ("salt", bytes(31)), ("commitment", bytes(32)), ("commitment", bytes(33)), ("model", "m" * 257),
        ("epoch", -1),
        ("epoch", 1 << 63), ("previous", bytes(31)), ("previous", bytes(33)), ("signer", bytes(63)),
        ("signer", bytes(64)), ("compartments", []), ("compartments", [1, 2]),
    ]:  # fmt: skip
        yield f"directory {name} = {said(value)}", "directory", {"directory": put(name, value)}
    for name in ("id", "length", "commitment", "table", "manifest", "size"):
        yield f"row without {name}", "directory", {"directory": row(1, drop(name))}
    for name, value in [
        ("id", ""), ("id", "a b"), ("id", "*"), ("id", "main"), ("id", "x" * 65), ("length", -4096), ("length", 1),
        ("length", 1 << 60), ("length", 4096), ("commitment", b""), ("table", bytes(31)), ("manifest", bytes(33)),
        ("size", 0), ("size", 33), ("size", 4096), ("size", 1 << 40), ("size", 8192 + 32), ("more", 1),
    ]:  # fmt: skip
        yield f"row {name} = {said(value)}", "directory", {"directory": row(1, put(name, value))}
    yield "own row has data", "directory", {"directory": row(0, put("length", 4096))}
    yield "own row missing", "directory", {"directory": tweak("compartments", lambda rows: rows[1:])}
    yield (
        "own row not first",
        "directory",
        {"directory": tweak("compartments", lambda rows: [rows[1], rows[0], rows[2]])},
    )
    yield "row removed", "directory", {"directory": tweak("compartments", lambda rows: rows[:-1])}
    yield "row twice", "directory", {"directory": tweak("compartments", lambda rows: [*rows, rows[-1]])}
    for name, at in [("ed25519", 0), ("ml-dsa key", 64), ("ml-dsa", 64 + 1952), ("last byte", -1)]:
        yield f"signature {name}", "directory", {"signature": flip(at)}
    yield "signature cut", "directory", {"directory raw": lambda raw: raw[:-1]}
    yield "signature long", "directory", {"directory raw": lambda raw: raw + b"\0"}
    yield "no signature", "trailer", {"directory raw": lambda raw: raw[:5325]}


def frame_faults(assembly: Any) -> Iterator[tuple[str, str, dict[str, Change]]]:
    """Truncation at every boundary, and what is put in or behind."""
    marks = dict(assembly.marks)
    for name, at in marks.items():
        if name == "data *":  # empty: it begins where the next one does
            continue
        for cut in dict.fromkeys((at - 1, at)):
            if layout.HEADER_SIZE <= cut < marks["end"]:
                yield f"cut at {name}, {cut - at}", "trailer", {"file": lambda raw, cut=cut: raw[:cut]}
    for cut in (0, 1, 7, 8, 15, 16, 4096, layout.SLOT_SIZE, layout.HEADER_SIZE - 1):
        yield f"cut to {cut}", "header", {"file": lambda raw, cut=cut: raw[:cut]}
    yield "one byte more", "trailer", {"file": lambda raw: raw + b"\0"}
    yield "the trailer twice", "directory", {"file": lambda raw: raw + raw[-16:]}
    for name in ("data main", "table *", "directory"):
        at = marks[name]
        yield f"4 KiB more at {name}", "directory", {"file": lambda raw, at=at: raw[:at] + bytes(4096) + raw[at:]}
        yield f"4 KiB less at {name}", "directory", {"file": lambda raw, at=at: raw[: at - 4096] + raw[at:]}
    for name, at in [("length", 0), ("length high", 7), ("magic", 8), ("last byte", 15)]:
        yield f"trailer {name}", "directory" if name == "length" else "trailer", {"trailer": flip(at)}
    yield "trailer of length 0", "trailer", {"trailer": lambda raw: bytes(8) + raw[8:]}
    plain = b'{"a":{"dtype":"U8","shape":[70000],"data_offsets":[0,70000]}}'.ljust(72)
    body = (72).to_bytes(8, "little") + plain + bytes(70000)
    yield "plain safetensors", "header", {"file": lambda raw: body}
    yield "small plain safetensors", "header", {"file": lambda raw: body[:80]}


def unlock_faults() -> Iterator[tuple[str, str, dict[str, Change]]]:
    def both(change: Change) -> dict[str, Change]:
        return {"slot": change, "directory": change}

    yield "mac", "unlock", {"mac": flip(0)}
    yield "mac short of a bit at its end", "unlock", {"mac": flip(-1)}
    yield "commitment of another key", "unlock", both(put("commitment", bytes(32)))
    shorter = {f"sections {name}": short_tags for name in ("*", "encoder", "main")}
    yield "suite changed everywhere", "unlock", both(put("suite", 3)) | shorter
    yield "salt changed everywhere", "unlock", both(put("salt", bytes(32)))
    yield "stanza removed", "unlock", {"slot": stanza(put("hint", bytes(8)))}
    yield "stanza box flipped", "unlock", {"slot": stanza(tweak("box", flip(700)))}
    yield "stanza box cut", "unlock", {"slot": stanza(tweak("box", lambda box: box[:-1]))}
    yield "stanza tag flipped", "unlock", {"slot": stanza(tweak("box", flip(-1)))}
    yield "stanza of another type", "unlock", {
        "slot": put("stanzas", [{"type": "wrapped", "label": "pq", "key": "k", "box": b"1"}])
    }  # fmt: skip
    yield "compartment commitment", "unlock", {"directory": row(1, tweak("commitment", flip(0)))}
    yield "own commitment", "unlock", {"directory": row(0, tweak("commitment", flip(5)))}
    yield "compartments renamed", "unlock", {"directory": row(1, put("id", "decoder"))}


def short_tags(sections: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """Sections as long as a suite with 16-byte tags would have them."""
    table, manifest = sections
    rows = (len(table) - 32) // 64
    return bytes(rows * 48 + 16), manifest[:-16]


def manifest_faults() -> Iterator[tuple[str, str, dict[str, Change]]]:
    stage = "manifest"
    yield from fields("manifest main", stage, {"tensors": {}, "metadata": []})
    yield from non_canonical("manifest cbor main", stage)
    for name, entry in [
        ("no list", "text"), ("of two", ["a", "F32"]), ("of four", ["a", "F32", [1], 0]),
        ("number", [1, "F32", [1]]),
        ("dtype unknown", ["a", "F128", [1]]), ("dtype lower", ["a", "f32", [1]]),
        ("shape text", ["a", "F32", "1"]),
        ("shape negative", ["a", "F32", [-1]]), ("shape bool", ["a", "F32", [True]]),
        ("shape huge", ["a", "U8", [1 << 51]]),
        ("product huge", ["a", "U8", [1 << 40, 1 << 40]]), ("shape null", ["a", "F32", [None]]),
        ("dimensions", ["a", "F32", [1] * 65]), ("half bytes", ["a", "F4", [3]]),
        ("long name", ["n" * 4097, "F32", [1]]),
    ]:  # fmt: skip
        yield (
            f"tensor {name}",
            stage,
            {"manifest main": tweak("tensors", lambda old, entry=entry: [entry, *old[1:]])},
        )
    yield "name twice", stage, {"manifest main": tweak("tensors", lambda old: [[old[1][0], *old[0][1:]], *old[1:]])}
    yield "name in two compartments", stage, {
        "manifest main": tweak("tensors", lambda old: [["encoder.bias", *old[0][1:]], *old[1:]])
    }  # fmt: skip
    yield "tensor removed", stage, {"manifest main": tweak("tensors", lambda old: old[:-1])}
    yield "tensor added", stage, {"manifest main": tweak("tensors", lambda old: [*old, ["x", "U8", [1]]])}
    yield (
        "tensor grown",
        stage,
        {"manifest main": tweak("tensors", lambda old: [[*old[0][:2], [9, 11, 40]], *old[1:]])},
    )
    yield "tensor in the own section", stage, {"manifest *": put("tensors", [["x", "U8", [0]]])}
    yield "metadata in a compartment", stage, {"manifest main": put("metadata", {"a": "b"})}
    yield "metadata number", stage, {"manifest *": put("metadata", {"a": 1})}
    yield "metadata keys", stage, {"manifest *": put("metadata", {1: "a"})}
    yield "section length short", stage, {"manifest section main": lambda raw: b"\1" + bytes(7) + raw[8:]}
    yield "section length huge", stage, {"manifest section main": lambda raw: b"\xff" * 8 + raw[8:]}
    yield "section padding", stage, {"manifest section main": flip(-1)}
    yield "table of zeros", stage, {"sections main": lambda pair: (bytes(len(pair[0])), pair[1])}
    yield "table tag", stage, {"sections main": lambda pair: (flip(-1)(pair[0]), pair[1])}
    yield "manifest tag", stage, {"sections main": lambda pair: (pair[0], flip(-1)(pair[1]))}
    yield "rows swapped", stage, {"directory": tweak("compartments", lambda rows: [rows[0], rows[2], rows[1]])}
    for name in ("table", "manifest"):
        yield f"{name} digest", stage, {"directory": row(1, tweak(name, flip(3)))}


def section_flips(assembly: Any) -> Iterator[tuple[str, str, dict[str, Change]]]:
    for name, at in assembly.marks.items():
        if name.split()[0] in ("table", "manifest"):
            yield f"{name} flipped", "manifest", {"file": flip(at)}
    at, to = assembly.marks["manifest main"], assembly.marks["manifest encoder"]
    yield "manifest of another compartment", "manifest", {
        "file": lambda raw: raw[:at] + raw[to : to + 4096 + 32] + raw[at + 4096 + 32 :]
    }  # fmt: skip


def chunk_faults(assembly: Any, other: bytes) -> Iterator[tuple[str, str, dict[str, Change], int]]:
    """With each, the number of tensors that may still be read before the damaged one (in file order)."""
    data, size = assembly.marks["data main"], 4096
    encoder = assembly.marks["data encoder"]

    def copy(raw: bytes, source: bytes, start: int, at: int) -> bytes:
        return raw[:at] + source[start : start + size] + raw[at + size :]

    yield "first bit of a chunk", "chunk", {"file": flip(data)}, 2
    yield "last bit of a chunk", "chunk", {"file": flip(data + 4095)}, 2
    yield "first chunk of the file", "chunk", {"file": flip(encoder)}, 0
    yield "padding of a tensor", "chunk", {"file": flip(assembly.marks["table *"] - 1)}, 4
    yield (
        "chunks swapped",
        "chunk",
        {"file": lambda raw: copy(copy(raw, raw, data, data + size), raw, data + size, data)},
        2,
    )
    yield "chunk repeated", "chunk", {"file": lambda raw: copy(raw, raw, data, data + size)}, 2
    yield "chunk of another compartment", "chunk", {"file": lambda raw: copy(raw, raw, encoder, data)}, 2
    yield "chunk of another file", "chunk", {"file": lambda raw: copy(raw, other, data, data)}, 2
    yield "chunk of zeros", "chunk", {"file": lambda raw: copy(raw, bytes(size), 0, data)}, 2
    # From here the owner signed it: digests fit, and the tags must speak.
    swapped: Change = lambda pair: ([pair[0][1], pair[0][0], *pair[0][2:]], [pair[1][1], pair[1][0], *pair[1][2:]])  # noqa: E731
    yield "chunks swapped with their rows", "chunk", {"chunks main": swapped}, 2
    tag: Change = lambda pair: (pair[0], [flip(0)(pair[1][0]), *pair[1][1:]])  # noqa: E731
    yield "tag flipped", "chunk", {"chunks main": tag}, 2
    digest: Change = lambda pair: (pair[0], [flip(40)(pair[1][0]), *pair[1][1:]])  # noqa: E731
    yield "digest flipped", "chunk", {"chunks main": digest}, 2
    last: Change = lambda pair: (pair[0], [*pair[1][:-1], flip(31)(pair[1][-1])])  # noqa: E731
    yield "last tag flipped", "chunk", {"chunks main": last}, 4


def origin_faults(stranger: SigningKey) -> Iterator[tuple[str, str, dict[str, Change]]]:
    def signed(raw: bytes) -> bytes:
        body = cbor.encode(cbor.decode(raw[:-5325]) | {"signer": stranger.verifying_key.to_bytes()})
        return body + stranger.sign_hybrid(Purpose.SEALED_DIRECTORY, body)

    yield "a stranger sealed it", "origin", {"directory raw": signed}
    yield "older epoch", "origin", {"directory": put("epoch", 4)}


@pytest.fixture(scope="module")
def kit(assemble: Callable[..., Any], stranger: SigningKey) -> list[tuple[str, str, bytes, int]]:
    """(name, stage, file, tensors that may be read before the fault)."""
    good = assemble()
    good.build()
    other = assemble(seed=b"another file").build()
    cases = [
        *header_faults(), *directory_faults(), *frame_faults(good), *unlock_faults(), *manifest_faults(),
        *section_flips(good), *origin_faults(stranger),
    ]  # fmt: skip
    files = [(name, stage, assemble(change=change).build(), 0) for name, stage, change in cases]
    files += [
        (name, stage, assemble(change=change).build(), readable)
        for name, stage, change, readable in chunk_faults(good, other)
    ]
    return files


def stage_of(error: IsolateError) -> str:
    return "header" if isinstance(error, NotSealed) else error.message.split(":")[0]


def test_the_kit_is_large_and_its_good_file_opens(
    kit: list[Any], assemble: Callable[..., Any], identity: Identity, owner: SigningKey, model: dict[str, Any]
) -> None:
    assert len(kit) >= 120
    assert len({name for name, *_ in kit}) == len(kit)
    assert {stage for _, stage, *_ in kit} == set(STAGES)
    found = sealed.load_file(MemorySource(assemble().build()), identity=identity, signed_by=owner.verifying_key)
    assert found.keys() == model.keys()
    for name, tensor in model.items():
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.threat("SEAL-1")
def test_every_malformed_file_is_refused_at_its_stage(
    kit: list[Any], identity: Identity, owner: SigningKey
) -> None:
    """Through open, public facts, lazy reads and unseal."""
    pins: dict[str, Any] = {"identity": identity, "signed_by": owner.verifying_key, "expect": Epoch(5)}
    wrong = []
    for name, stage, data, _ in kit:
        seen = {}
        try:
            sealed.SealedReader(MemorySource(data), **pins).close()
            seen["open"] = "opened"
        except IsolateError as error:
            seen["open"] = stage_of(error)
        try:
            sealed.public_facts(MemorySource(data))
            seen["inspect"] = "opened"
        except IsolateError as error:
            seen["inspect"] = stage_of(error)
        sink = MemorySink()
        try:
            sealed.unseal_file(MemorySource(data), sink, **pins)
            seen["unseal"] = "opened"
        except IsolateError as error:
            seen["unseal"] = stage_of(error)
        expected = {
            "open": "opened" if stage == "chunk" else stage,
            "inspect": stage if STAGES.index(stage) <= STAGES.index("directory") else "opened",
            "unseal": stage,
        }
        if seen != expected or sink.data or sink.parts:
            wrong.append((name, stage, seen))
    assert wrong == []


@pytest.mark.threat("SEAL-2")
def test_no_plaintext_leaves_but_what_the_kit_allows(
    kit: list[Any], identity: Identity, owner: SigningKey, model: dict[str, Any]
) -> None:
    """Tensor by tensor up to the damage, what is released hashes to what the kit says; then nothing comes."""
    order = ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.empty", "step"]
    for name, stage, data, readable in kit:
        if stage != "chunk":
            continue
        released = b""
        with sealed.SealedReader(MemorySource(data), identity=identity, signed_by=owner.verifying_key) as reader:
            count = 0
            for tensor in order:
                try:
                    released += reader.read(tensor).tobytes()
                    count += 1
                except IsolateError as error:
                    assert stage_of(error) == "chunk", name
                    break
            allowed = b"".join(model[tensor].tobytes() for tensor in order[:readable])
            assert count == readable, name
            assert hashlib.sha256(released).digest() == hashlib.sha256(allowed).digest(), name
            for tensor in order:
                with pytest.raises(IsolateError, match="an earlier read of this file failed"):
                    reader.read(tensor)


def test_a_failed_read_wipes_what_it_had_decrypted(
    assemble: Callable[..., Any], identity: Identity, owner: SigningKey
) -> None:
    assembly = assemble()
    data = bytearray(assembly.build())
    data[assembly.marks["data encoder"] + 3 * 4096] ^= 1
    with sealed.SealedReader(
        MemorySource(data), identity=identity, signed_by=owner.verifying_key, threads=1
    ) as reader:
        target = bytearray(b"x" * reader.places["encoder.weight"].entry.size)
        from isolate.sealed.reader import Piece

        with pytest.raises(IsolateError):
            reader.fill({"encoder": [Piece(0, memoryview(target))]})
        assert not any(target)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_is_refused_and_never_another_error(seal: Callable[..., bytes], data: Any) -> None:
    """Parts cut out, put in, doubled and overwritten, in what anyone can read."""
    raw = bytearray(seal({"a": np.zeros(3)}))
    for _ in range(data.draw(st.integers(1, 3))):
        base = data.draw(st.sampled_from([0, 16, 20, 60, 28672, 61440, 65536, len(raw) - 16]))
        at = base + data.draw(st.integers(-9, 900))
        at = max(0, min(at, len(raw)))
        stop = min(len(raw), at + data.draw(st.integers(0, 40)))
        new = data.draw(st.one_of(st.binary(max_size=40), st.just(bytes(raw[at:stop]) * 2)))
        raw[at:stop] = new
    with contextlib.suppress(RefusedError):
        sealed.public_facts(MemorySource(raw))
    facts = sealed.public_facts(MemorySource(seal({"a": np.zeros(3)})))
    for header, directory in ((raw[:900], facts.directory), (facts.header, bytes(raw[-6400:-16]))):
        with contextlib.suppress(RefusedError):
            sealed.PublicFacts.parse(bytes(header), directory)


def test_a_passphrase_is_not_tried_before_the_origin(assemble: Callable[..., Any], stranger: SigningKey) -> None:
    """Argon2id would cost a stranger nothing to ask for: the signer is checked first."""
    slow = Passphrase("p", memory=8, passes=1)
    data = assemble(recipients=[slow]).build()

    class Counting:
        calls = 0

        def unlock(self, facts: Any) -> Any:
            self.calls += 1
            return slow.unlock(facts)

    counting = Counting()
    with pytest.raises(IsolateError, match="somebody else"):
        sealed.SealedReader(MemorySource(data), identity=counting, signed_by=stranger.verifying_key)
    assert counting.calls == 0
