"""Writes the golden files beside it: state dicts as PyTorch saves them, and what their modules make of some indices.

    python3 tests/golden/make.py     # needs torch, numpy and safetensors; the tests only read the files

The modules are written here, from the formulas of the packages they stand for, out of plain torch ops; their gradients are
autograd's. Parameters and buffers have the names, shapes and dtypes of the packages' own, and share memory where those do, so
that `torch.save(module.state_dict(), path)` writes what the packages write. Nothing is computed by the crate.

All weights of a module are distinct, so a wrong slot shows. Weights and gradients are small multiples of a power of two and bags
hold 0, 1, 2, 4 or 8 rows, so every sum and mean is exact in any order: tests compare for equality.

NAME.pth                    the state dict
NAME.expected.safetensors   indices, offsets, grad_output; of each mode its output and grad_weight

`embedding_bag` is torch.nn.EmbeddingBag itself, whose options this crate shares. `optimizers` is torch.optim: two parameters after
each of 20 steps. `sparse_adam` is torch.optim.SparseAdam on the same parameters, with those of their gradients as sparse tensors that
are not below 0.5.

semantic.safetensors is not written here: it was computed from the formulas of LMA and SCMA in docs/format.md and src/semantic.rs, with
NumPy and Python integers. `a.*`, `b.*` and `c.*` are layers of LMA, whose `config` is num_embeddings, embedding_dim, uma_chunk_size,
key_bits, keys_to_use and the length of hashed_weight; their sums were taken in f64 and rounded to f32. `scma.*` is a table of SCMA with
the records and random numbers that it was made of, as pairs of a row and a record.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file, save_model
from torch import nn

HERE = Path(__file__).parent
INT64_MAX = 2**63 - 1


def weights(length, dtype=torch.float32):
    """Distinct, and none the negative of another: signs cannot hide behind a tie."""
    order = torch.from_numpy(np.random.RandomState(length).permutation(length))
    return ((order - length // 2).to(dtype) + 0.25) / 1024


def unsigned_remainder(x, modulus):
    """x, read as an unsigned 64-bit integer, modulo a number below 2^62."""
    wrapped = ((x & INT64_MAX) % modulus + 2**63 % modulus) % modulus
    return torch.where(x < 0, wrapped, x % modulus)


def shifted(x, bits):
    """x >> bits of an unsigned 64-bit integer."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def int64(x):
    """An unsigned 64-bit constant as torch holds it."""
    return x - 2**64 if x > INT64_MAX else x


class Hashed(nn.Module):
    """Looks up and pools rows of a virtual table; subclasses say which weight, and where in it the values lie."""

    def __init__(self, embedding_dim, mode="sum"):
        super().__init__()
        self.embedding_dim, self.mode = embedding_dim, mode

    def place(self, rows, columns):
        """The slots, and signs or 1, of these rows and columns."""
        raise NotImplementedError

    def table_weight(self):
        return self.hashed_weight

    def rows(self, indices):
        """One row per index: (...) to (..., embedding_dim)."""
        slots, signs = self.place(indices.unsqueeze(-1), torch.arange(self.embedding_dim))
        return self.table_weight()[slots] * signs

    def forward(self, indices, offsets):
        """One row per bag."""
        bags = torch.tensor_split(self.rows(indices), offsets[1:])
        pooled = [self.pool(bag) if len(bag) else torch.zeros_like(self.rows(torch.tensor(0))) for bag in bags]
        return torch.stack(pooled)

    def pool(self, bag):
        if self.mode == "max":
            return bag.gather(0, bag.argmax(0, keepdim=True)).squeeze(0)
        return bag.sum(0) / (len(bag) if self.mode == "mean" else 1)


class HashedEmbeddingBag(Hashed):
    """Of the package HashedEmbeddingBag: unsigned 64-bit arithmetic that wraps."""

    def __init__(self, embedding_dim, weight):
        super().__init__(embedding_dim)
        self.hashed_weight = nn.Parameter(weight)

    def place(self, rows, columns):
        mixed = unsigned_remainder(rows * 9824516537 + columns * 57857966300227 + 104729, 117130198221199)
        return mixed % len(self.hashed_weight), 1


class HashedEmbedding(nn.Module):
    """Of the package HashedEmbeddingBag: the same, one row per index."""

    def __init__(self, embedding_dim, weight):
        super().__init__()
        self.hashed_embedding_bag = HashedEmbeddingBag(embedding_dim, weight)

    def forward(self, indices):
        return self.hashed_embedding_bag.rows(indices)


def random_numbers(count, seed=1024):
    drawn = np.random.RandomState(seed).randint(0, 2038074743, (count,))
    numbers = np.concatenate([[2038074743], drawn]).astype(np.int64)
    return nn.Parameter(torch.from_numpy(numbers), requires_grad=False)


class Robe(Hashed):
    """What the modules of ROBE share: signed arithmetic, chunks of columns, rows shifted by val_offset."""

    def __init__(self, embedding_dim, val_offset, chunk):
        super().__init__(embedding_dim)
        self.val_offset, self.chunk = val_offset, chunk

    def place(self, rows, columns):
        modulus, c, b, a = self.random_numbers[:4].tolist()
        mixed = ((rows + self.val_offset) * a + columns // self.chunk * b + c) % modulus
        return mixed % (len(self.table_weight()) - self.chunk + 1) + columns % self.chunk, 1


class RobeEmbeddingBag(Robe):
    """ROBE's module for the GPU: the weight under two names, and a signature that its default hash does not read."""

    def __init__(self, embedding_dim, weight, val_offset=0, chunk=1):
        super().__init__(embedding_dim, val_offset, chunk)
        self.random_numbers = random_numbers(50)
        self.signature = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
        self.hashed_weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.weight = self.hashed_weight


class RobeEmbeddingCPU(Robe):
    """ROBE's module for the CPU: one row per index, with constants of the hash spread over the columns."""

    def __init__(self, embedding_dim, weight, val_offset=0, chunk=1):
        super().__init__(embedding_dim, val_offset, chunk)
        self.weight = nn.Parameter(weight)
        self.random_numbers = random_numbers(10)
        columns = torch.arange(embedding_dim)
        self.helper_Eidx_base = nn.Parameter(columns // chunk, requires_grad=False)
        self.helper_Eidx_offset = nn.Parameter(columns % chunk, requires_grad=False)
        self.helper_E1sR = nn.Parameter(torch.full_like(columns, self.random_numbers[3]), requires_grad=False)

    def table_weight(self):
        return self.weight

    def forward(self, indices):
        return self.rows(indices)


class RobeDLRM(nn.Module):
    """The recommender of ROBE's authors: tables over one weight, each shifted past the rows of those before it."""

    def __init__(self, sizes, embedding_dim, weight, chunk):
        super().__init__()
        self.hashed_weight = nn.Parameter(weight)
        starts = [sum(sizes[:t]) for t in range(len(sizes))]
        tables = [RobeEmbeddingBag(embedding_dim, self.hashed_weight, start, chunk) for start in starts]
        self.emb_l = nn.ModuleList(tables)
        self.bot_l = nn.Sequential(nn.Linear(13, embedding_dim), nn.ReLU())


class Mix(Hashed):
    """The crate's own hash: block k of a row is output k of SplitMix64 started at that row, a bit of it each column's sign."""

    def __init__(self, embedding_dim, weight, seed, block):
        super().__init__(embedding_dim)
        self.hashed_weight = nn.Parameter(weight)
        self.key, self.block = self.finalize(torch.tensor(seed)), block

    @staticmethod
    def finalize(h):
        h = (h ^ shifted(h, 30)) * int64(0xBF58476D1CE4E5B9)
        h = (h ^ shifted(h, 27)) * int64(0x94D049BB133111EB)
        return h ^ shifted(h, 31)

    def place(self, rows, columns):
        h = self.finalize(self.key + rows + (columns // self.block + 1) * int64(0x9E3779B97F4A7C15))
        blocks = len(self.hashed_weight) // self.block
        slots = (shifted(h, 32) * blocks >> 32) * self.block + columns % self.block
        return slots, 1 - 2 * (h >> columns % self.block & 1)


def draw_gradient(rng, shape, dtype):
    return torch.from_numpy(rng.randint(-8, 9, shape)).to(dtype) / 8


def pooled(module, rng, num_embeddings):
    """Indices, offsets and a gradient, and what the module makes of them in each mode."""
    weight = module.table_weight()
    lengths = torch.tensor([2, 0, 1, 8, 4, 0, 1, 4, 2, 8, 8, 1])
    offsets = lengths.cumsum(0) - lengths
    indices = torch.from_numpy(rng.randint(0, num_embeddings, int(lengths.sum()), dtype=np.int64))
    indices[0], indices[-1] = num_embeddings - 1, 0
    grad_output = draw_gradient(rng, (len(lengths), module.embedding_dim), weight.dtype)
    arrays = dict(indices=indices, offsets=offsets, grad_output=grad_output)
    for module.mode in ["sum", "mean", "max"]:
        output = module(indices, offsets)
        (grad_weight,) = torch.autograd.grad(output, weight, grad_output)
        arrays |= {f"{module.mode}.output": output.detach(), f"{module.mode}.grad_weight": grad_weight}
    return arrays


def single(module, weight, rng, num_embeddings, embedding_dim):
    """The same of a module that has no bags."""
    indices = torch.from_numpy(rng.randint(0, num_embeddings, (5, 3)))
    output = module(indices)
    grad_output = draw_gradient(rng, output.shape, weight.dtype)
    (grad_weight,) = torch.autograd.grad(output, weight, grad_output)
    return dict(indices=indices, grad_output=grad_output, output=output.detach(), grad_weight=grad_weight)


def embedding_bag(rng, num_embeddings=50, embedding_dim=6, padding_idx=3):
    """torch.nn.EmbeddingBag itself, with all options that this crate has too; and its state dict."""
    bags = []
    for count, padding in [(2, 1), (0, 0), (1, 0), (4, 2), (0, 3), (4, 0), (1, 1)]:
        rows = [int(row) for row in rng.choice(np.delete(np.arange(num_embeddings), padding_idx), count)]
        bags.append(rng.permutation(rows + padding * [padding_idx]).astype(np.int64))
    indices = torch.from_numpy(np.concatenate(bags))
    offsets = torch.tensor([0] + [len(bag) for bag in bags]).cumsum(0)
    per_sample_weights = draw_gradient(rng, indices.shape, torch.float32).requires_grad_()
    grad_output = draw_gradient(rng, (len(bags), embedding_dim), torch.float32)
    arrays = dict(indices=indices, offsets=offsets, grad_output=grad_output)
    arrays["per_sample_weights"] = per_sample_weights.detach()
    table = weights(num_embeddings * embedding_dim).reshape(num_embeddings, embedding_dim)
    for mode in ["sum", "mean", "max", "weighted"]:
        module = nn.EmbeddingBag(
            num_embeddings,
            embedding_dim,
            mode=mode.replace("weighted", "sum"),
            padding_idx=padding_idx,
            include_last_offset=True,
            _weight=table,
        )
        output = module(indices, offsets, per_sample_weights if mode == "weighted" else None)
        output.backward(grad_output)
        arrays |= {f"{mode}.output": output.detach(), f"{mode}.grad_weight": module.weight.grad.flatten()}
    arrays["weighted.grad_per_sample_weights"] = per_sample_weights.grad
    return arrays, module.state_dict()


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, dict(lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)),
    "adagrad": (torch.optim.Adagrad, dict(lr=0.2, lr_decay=0.1, weight_decay=0.3, initial_accumulator_value=0.5, eps=1e-3)),
    "sgd": (torch.optim.SGD, dict(lr=0.1, weight_decay=0.2)),
    "momentum": (torch.optim.SGD, dict(lr=0.05, momentum=0.8, dampening=0.4, weight_decay=0.1)),
    "nesterov": (torch.optim.SGD, dict(lr=0.05, momentum=0.7, weight_decay=0.1, nesterov=True)),
}


def optimizers(rng, steps=20):
    """The optimisers of torch.optim: `always` has a gradient in each step, `sometimes` in every third one, from the second on;
    the learning rate is halved after half of the steps."""
    shapes = {"always": (3, 7), "sometimes": (5,)}
    arrays = {}
    for dtype in [torch.float32, torch.float64]:
        kind = str(dtype).removeprefix("torch.float")
        for name, shape in shapes.items():
            arrays[f"f{kind}.{name}"] = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
            arrays[f"f{kind}.{name}.grads"] = torch.from_numpy(rng.standard_normal((steps, *shape))).to(dtype)
        for key, (optimizer, options) in OPTIMIZERS.items():
            params = {name: nn.Parameter(arrays[f"f{kind}.{name}"].clone()) for name in shapes}
            optimizer = optimizer(params.values(), **options)
            after = {name: [] for name in shapes}
            for step in range(steps):
                for name, param in params.items():
                    has_grad = name == "always" or step % 3 == 1
                    param.grad = arrays[f"f{kind}.{name}.grads"][step].clone() if has_grad else None
                optimizer.step()
                if step == steps // 2 - 1:
                    optimizer.param_groups[0]["lr"] /= 2
                for name, param in params.items():
                    after[name].append(param.detach().clone())
            arrays |= {f"f{kind}.{key}.{name}": torch.stack(values) for name, values in after.items()}
    return arrays


def sparse_adam(arrays, steps=20):
    """The parameters of `optimizers` after each step of SparseAdam."""
    after = {}
    for dtype in ["f32", "f64"]:
        for name in ["always", "sometimes"]:
            param = nn.Parameter(arrays[f"{dtype}.{name}"].clone())
            optimizer = torch.optim.SparseAdam([param], lr=0.03, betas=(0.8, 0.95), eps=1e-3)
            values = []
            for grad in arrays[f"{dtype}.{name}.grads"]:
                param.grad = torch.where(grad.abs() < 0.5, 0, grad).to_sparse()
                optimizer.step()
                values.append(param.detach().clone())
            after[f"{dtype}.{name}"] = torch.stack(values)
    return after


def write(name, arrays, state=None):
    save_file(arrays, HERE / f"{name}.expected.safetensors")
    if state is not None:
        torch.save(state, HERE / f"{name}.pth")


def main():
    torch.manual_seed(0)
    rng = np.random.RandomState(0)

    module = HashedEmbeddingBag(16, weights(1600))
    write("original", pooled(module, rng, 1000), module.state_dict())

    # Rows whose hash wraps, in f64.
    module = HashedEmbeddingBag(6, weights(500, torch.float64))
    write("original_wide", pooled(module, rng, 2**40), module.state_dict())

    # Within a model, and that within what a training script saves.
    words = HashedEmbedding(10, weights(900))
    model = nn.ModuleDict({"words": words, "head": nn.Linear(10, 2)})
    arrays = single(words, words.hashed_embedding_bag.hashed_weight, rng, 3000, 10)
    write("original_embedding", arrays, {"epoch": 3, "state_dict": model.state_dict()})

    module = RobeEmbeddingBag(20, weights(500), val_offset=1234, chunk=8)
    write("robe", pooled(module, rng, 1000), module.state_dict())

    module = RobeEmbeddingCPU(10, weights(300), val_offset=77, chunk=4)
    write("robe_cpu", single(module, module.weight, rng, 1000, 10), module.state_dict())

    sizes = [100, 7, 1000]
    model = RobeDLRM(sizes, 16, weights(640), chunk=8)
    arrays = {}
    for t, (table, size) in enumerate(zip(model.emb_l, sizes)):
        arrays |= {f"{t}.{key}": array for key, array in pooled(table, rng, size).items()}
    write("robe_dlrm", arrays, {"state_dict": model.state_dict(), "test_acc": 0.5})
    # Each shared tensor once, as safetensors asks for.
    save_model(model, HERE / "robe_dlrm.safetensors")

    write("embedding_bag", *embedding_bag(rng))

    module = Mix(40, weights(640), seed=42, block=16)
    write("mix", pooled(module, rng, 1000) | {"hashed_weight": module.hashed_weight.detach()})

    of_optimizers = optimizers(rng)
    write("optimizers", of_optimizers)
    write("sparse_adam", sparse_adam(of_optimizers))


if __name__ == "__main__":
    main()
