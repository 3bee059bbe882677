"""What a handle on the model may name. The owner loads this file too, to learn the digests it grants."""

import numpy as np

from isolate.enclave.operations import Array, Derived, Label, Scalar, operation

IMAGE = Array("uint8", (64,))
EXAMPLES, STEPS, RATE = 20, 200, 0.5  # of fine-tuning


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


@operation(
    inputs={"images": Array("uint8", (EXAMPLES, 64)), "digits": Array("uint8", (EXAMPLES,))}, output=Derived()
)
def adapt(view, images, digits):
    """Fine-tune the last layer to somebody's own handwriting. The new model stays inside, as the old one does."""
    inputs = images.astype(np.float32) / np.float32(16)
    hidden = np.maximum(inputs @ view["w1"] + view["b1"], 0)
    w2, b2 = view["w2"].copy(), view["b2"].copy()
    for _ in range(STEPS):
        odds = np.exp((logits := hidden @ w2 + b2) - logits.max(1, keepdims=True))
        error = odds / odds.sum(1, keepdims=True) - np.eye(10, dtype=np.float32)[digits]
        w2 -= np.float32(RATE) * hidden.T @ error / EXAMPLES
        b2 -= np.float32(RATE) * error.mean(0)
    return {"w1": view["w1"], "b1": view["b1"], "w2": w2, "b2": b2}


@operation(inputs={"model": Derived(), "image": IMAGE}, output=Label(10))
def classify_with(view, model, image):
    """By a model that ``adapt`` made, for whoever's handle it was made through."""
    return int(scores(model, image).argmax())


@operation(inputs={}, output=Label(10))
def weights(view):
    """A careless operation: it answers weights. The declared type is what keeps them in."""
    return (view["w1"][32, :16] * 2**20).astype(int).tolist()


OPERATIONS = [classify, confidence, adapt, classify_with, weights]
