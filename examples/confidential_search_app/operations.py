"""What a handle on the library may name: the titles nearest to a question. The texts themselves stay inside."""

import numpy as np
from seal_minilm import embed, tokenize

from isolate.enclave.operations import Integer, Text, operation

TOP = 3  # titles in one answer, at most
TITLE = 24  # tokens: 96 bytes
LONGEST = 96  # word pieces of a text that go into its vector


def price(question, top):
    """Bytes of budget: each title that is asked for costs as much as a reply, however short the titles are."""
    return 512 * top


class Library:
    """The vectors of all documents, made once inside the enclave from the sealed texts and the sealed weights."""

    def __init__(self, view):
        self._view = view
        self._vocabulary = {word: number for number, word in enumerate(view.texts("vocabulary"))}
        self._vectors = np.stack([self.vector(text) for text in view.texts("documents")])

    def vector(self, text):
        words = self._view["embeddings.word_embeddings.weight"]
        pieces = tokenize(text, self._vocabulary)[:LONGEST]
        return embed(pieces, self._view.__getitem__, lambda _, ids: words[ids])

    def nearest(self, question, top):
        return np.argsort(-(self._vectors @ self.vector(question)), kind="stable")[:top]


LIBRARY = []  # the one of this enclave, put there by main.py


@operation(inputs={"question": Text(64), "top": Integer(1, TOP)}, output=Text(TOP * TITLE), price=price)
def nearest_titles(view, question, top):
    titles = view.texts("titles")
    return "\n".join(titles[int(number)] for number in LIBRARY[0].nearest(question, top))
