"""What a handle on the model may name. The owner loads this file too, to learn the digests it grants."""

import numpy as np

from isolate.enclave.operations import Array, Label, Scalar, operation

IMAGE = Array("uint8", (64,))


def scores(view, image):
    inputs = image.astype(np.float32) / np.float32(16)
    hidden = np.maximum(inputs @ view["w1"] + view["b1"], 0)
    return hidden @ view["w2"] + view["b2"]


@operation(inputs={"image": IMAGE}, output=Label(10))
def classify(view, image):
    return int(scores(view, image).argmax())


@operation(inputs={"image": IMAGE}, output=Scalar(0, 1, 100))
def confidence(view, image):
    odds = np.exp(scores(view, image) - scores(view, image).max())
    return odds.max() / odds.sum()


@operation(inputs={}, output=Label(10))
def weights(view):
    """A careless operation: it answers weights. The declared type is what keeps them in."""
    return (view["w1"][32, :16] * 2**20).astype(int).tolist()


OPERATIONS = [classify, confidence, weights]
