"""Writes the golden files beside it: outputs and gradients of hashed embedding bags, computed with NumPy alone.

    python3 tests/golden/make.py

The formulas are those of the PyTorch package HashedEmbeddingBag, of ROBE, and of this crate's own hash, written with
Python's unbounded integers; nothing here is computed by the crate. Needs numpy; the tests only read the files.
"""

from pathlib import Path

import numpy as np

MASK = 2**64 - 1


def affine(a, b, c, modulus, block):
    """(row * a + (column / block) * b + c) mod 2^64 mod modulus mod (len - block + 1) + column % block"""

    def slot(row, column, length):
        mixed = ((row & MASK) * a + (column // block) * b + c) & MASK
        return mixed % modulus % (length - block + 1) + column % block, 1.0

    return slot


def mix(seed, block, signed):
    """Block k of a row is output k of SplitMix64 started at that row; one bit of it per column is the sign."""

    def finalize(h):
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & MASK
        return h ^ (h >> 31)

    def slot(row, column, length):
        start = finalize(seed) + (row & MASK) + (column // block + 1) * 0x9E3779B97F4A7C15
        h = finalize(start & MASK)
        place = ((h >> 32) * (length // block)) >> 32
        negative = signed and (h >> (column % block)) & 1
        return place * block + column % block, -1.0 if negative else 1.0

    return slot


# name: slot function, num_embeddings, embedding_dim, len(hashed_weight)
LAYERS = {
    "original": (affine(9824516537, 57857966300227, 104729, 117130198221199, 1), 1000, 16, 1600),
    "robe": (affine(871205356, 1825252241, 634329019, 2038074743, 8), 1000, 20, 500),
    "mix": (mix(42, 16, True), 1000, 40, 640),
}


def golden(name):
    slot, num_embeddings, embedding_dim, length = LAYERS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    hashed_weight = rng.uniform(-1, 1, length)
    lengths = rng.integers(0, 7, 18)
    lengths[3] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    indices = rng.integers(0, num_embeddings, lengths.sum())
    grad_output = rng.uniform(-1, 1, (len(lengths), embedding_dim))
    arrays = dict(hashed_weight=hashed_weight, indices=indices, offsets=offsets, grad_output=grad_output)

    for mode in ["sum", "mean", "max"]:
        output = np.zeros((len(lengths), embedding_dim))
        grad_weight = np.zeros(length)
        for bag, (start, count) in enumerate(zip(offsets, lengths)):
            rows = [int(row) for row in indices[start : start + count]]
            for column in range(embedding_dim):
                places = [slot(row, column, length) for row in rows]
                if not places:
                    continue
                values = [sign * hashed_weight[at] for at, sign in places]
                grad = grad_output[bag, column]
                if mode == "max":
                    first = int(np.argmax(values))
                    output[bag, column] = values[first]
                    grad_weight[places[first][0]] += places[first][1] * grad
                    continue
                scale = 1 / count if mode == "mean" else 1.0
                output[bag, column] = scale * np.sum(values)
                for at, sign in places:
                    grad_weight[at] += sign * scale * grad
        arrays[f"{mode}.output"] = output
        arrays[f"{mode}.grad_weight"] = grad_weight
    np.savez(Path(__file__).with_name(f"{name}.npz"), **arrays)


for name in LAYERS:
    golden(name)
