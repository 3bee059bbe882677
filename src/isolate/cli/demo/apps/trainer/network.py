"""A small network in numpy, float32 and deterministic: 64 pixels, 32 hidden units, 10 digits."""

import numpy as np

HIDDEN, CLASSES, PIXELS = 32, 10, 64
BATCH, EPOCHS, RATE, MOMENTUM = 64, 40, 0.05, 0.9


def initial(seed):
    """Fresh weights, by name."""
    random = np.random.default_rng(seed)
    return {
        "w1": (random.standard_normal((PIXELS, HIDDEN)) * 0.15).astype(np.float32),
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": (random.standard_normal((HIDDEN, CLASSES)) * 0.15).astype(np.float32),
        "b2": np.zeros(CLASSES, np.float32),
    }


def forward(weights, pixels):
    """Hidden activations and class scores for pixels of shape (n, 64), 0 to 16."""
    inputs = pixels.astype(np.float32) / np.float32(16)
    hidden = np.maximum(inputs @ weights["w1"] + weights["b1"], 0)
    return inputs, hidden, hidden @ weights["w2"] + weights["b2"]


def predict(weights, pixels):
    return forward(weights, pixels)[2].argmax(axis=1)


def gradient(weights, pixels, digits):
    """The summed gradient of the cross entropy, as one flat vector in the order w1, b1, w2, b2."""
    inputs, hidden, scores = forward(weights, pixels)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    error = scores / scores.sum(axis=1, keepdims=True)
    error[np.arange(len(digits)), digits] -= 1
    back = (error @ weights["w2"].T) * (hidden > 0)
    parts = (inputs.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0))
    return np.concatenate([part.ravel() for part in parts]).astype(np.float32)


def batches(count, seed):
    """The order of the data: the same for every rank and for a run on one process."""
    random = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        order = random.permutation(count)
        for start in range(0, count - BATCH + 1, BATCH):
            yield order[start : start + BATCH]


def train(weights, pixels, digits, *, seed, summed):
    """Train in place. ``summed(batch)`` answers the gradient of the whole batch, whoever computes its halves."""
    velocity = {name: np.zeros_like(value) for name, value in weights.items()}
    for batch in batches(len(digits), seed):
        flat, at = summed(weights, pixels, digits, batch) / np.float32(BATCH), 0
        for name, value in weights.items():
            step = flat[at : at + value.size].reshape(value.shape)
            at += value.size
            velocity[name] = np.float32(MOMENTUM) * velocity[name] - np.float32(RATE) * step
            value += velocity[name]
    return weights


def half(weights, pixels, digits, batch, rank):
    """One rank's half of a batch."""
    mine = batch[rank::2]
    return gradient(weights, pixels[mine], digits[mine])


def on_one_process(weights, pixels, digits, *, seed):
    """The same training without any channel: both halves, added in the order of the ranks."""

    def summed(weights, pixels, digits, batch):
        return half(weights, pixels, digits, batch, 0) + half(weights, pixels, digits, batch, 1)

    return train(weights, pixels, digits, seed=seed, summed=summed)
