"""Writes the state dicts in the folder `structures` beside it: what training scripts save around a state dict, and in it.

    python3 tests/golden/structures.py     # needs torch 2.11 and numpy; the tests only read the files

The state dict itself is always the same, of a hashed layer `user` and a linear layer `head`; tests/suite/import/ knows its values.
"""

import argparse
import collections
import datetime
import enum
import pathlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

FOLDER = pathlib.Path(__file__).parent / "structures"


def state_dict(prefix="", first=0.0):
    """40 hashed values of `user`, counted from `first` in quarters, and `head`, a linear layer of 4 inputs and 2 outputs."""
    return OrderedDict(
        {
            f"{prefix}user.hashed_weight": first + torch.arange(40) / 4,
            f"{prefix}head.weight": torch.arange(8.0).reshape(2, 4),
            f"{prefix}head.bias": torch.tensor([0.5, -0.5]),
        }
    )


class AttributeDict(dict):
    """A dict with attributes, as PyTorch Lightning's hyper_parameters are."""

    __getattr__ = dict.__getitem__


class StateDict(OrderedDict):
    """A subclass that a framework might use for its state dicts."""


class Phase(enum.Enum):
    TRAIN = 1


@dataclass
class Options:
    lr: float
    names: list


class Countdown:
    def __init__(self):
        self.left = 3
        self.me = self  # an object within itself


def shared():
    """One state dict under several keys, in a list, and another beside it."""
    state, other = state_dict(), state_dict(first=100.0)
    return {
        "model": state,
        "state_dict": state,
        "models": [other, state],
        "ema": {"decay": 0.999, "shadow": state},
    }


def objects():
    """A state dict that is a subclass with attributes of its own, between objects of many classes."""
    state = StateDict(state_dict())
    state._metadata = OrderedDict({"": {"version": 1}})
    return {
        "hyper_parameters": AttributeDict(lr=0.1, widths=[64, 32], data=AttributeDict(path=pathlib.PurePosixPath("a/b"))),
        "queue": collections.deque([1.0, 2.0], maxlen=8),
        "seen": {1, 2, 3},
        "frozen": frozenset("ab"),
        "counts": collections.Counter("aab"),
        "groups": collections.defaultdict(list, {"a": [1]}),
        "args": argparse.Namespace(lr=0.1, names=("a", "b")),
        "options": Options(0.1, ["a"]),
        "phase": Phase.TRAIN,
        "countdown": Countdown(),
        "date": datetime.datetime(2026, 1, 2, 3, 4, 5),
        "rng": np.random.default_rng(1),
        "scores": np.arange(3.0),
        "large": 2**100,
        "negative": -(2**40),
        "bytes": b"\x00\xff",
        "array": bytearray(b"ab"),
        "surrogate": "a\ud800b",
        "complex": 1j,
        "function": torch.relu,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "nothing": None,
        "state_dict": state,
        "empty": StateDict(),
    }


def nested():
    """State dicts two levels down, one of them under a key that has a dot in it."""
    return {
        "epoch": 3,
        "state_dict": {"generator": state_dict(), "critic.v2": state_dict(first=100.0)},
        "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(40)}}, "param_groups": [{"lr": 0.1}]},
    }


def dtypes():
    """A state dict with tensors of dtypes and kinds that candle does not have."""
    state = state_dict()
    state["mask"] = torch.tensor([True, False, True])
    state["codes"] = torch.tensor([[-1, 2]], dtype=torch.int8)
    for dtype in ["uint8", "int16", "int32", "int64", "float16", "bfloat16", "float64"]:
        state[f"has.{dtype}"] = torch.tensor([1, 2]).to(getattr(torch, dtype))
    for dtype in ["uint16", "uint32", "float8_e4m3fn"]:
        state[f"has.{dtype}"] = torch.tensor([1, 2]).to(getattr(torch, dtype))
    for dtype in ["uint64", "float8_e5m2", "complex64", "complex128"]:
        state[f"lacks.{dtype}"] = torch.tensor([1, 2]).to(getattr(torch, dtype))
    # A parameter with an attribute, and one of a subclass.
    state["tagged"] = nn.Parameter(torch.arange(3.0))
    state["tagged"].tag = "encoder"
    state["sparse"] = torch.eye(2).to_sparse()
    state["meta"] = torch.empty(2, 3, device="meta")
    state["quantized"] = torch.quantize_per_tensor(torch.arange(3.0), 0.5, 0, torch.qint8)
    # A view that negates when it is read: the bytes are those of the positive numbers.
    state["negated"] = torch.view_as_complex(torch.tensor([[1.0, 2.0]])).conj().imag
    return state


def lacking():
    """The two dtypes that candle lacks and models use most."""
    state = state_dict()
    state["mask"] = torch.tensor([True, False, True])
    state["codes"] = torch.tensor([[-1, 2]], dtype=torch.int8)
    return state


def wrapped():
    """As DistributedDataParallel and torch.compile name the entries, compile around the model and around one part of it."""
    state = state_dict(prefix="module._orig_mod.")
    state["module._orig_mod.tower._orig_mod.weight"] = torch.ones(2)
    return state


def write(name, content, **options):
    torch.save(content, FOLDER / f"{name}.pth", **options)


def main():
    FOLDER.mkdir(exist_ok=True)
    write("shared", shared())
    write("objects", objects())
    write("nested", nested())
    write("dtypes", dtypes())
    write("lacking", lacking())
    write("wrapped", wrapped())
    # The protocols that torch.save takes besides its default, 2.
    write("protocol4", objects(), pickle_protocol=4)
    write("protocol5", objects(), pickle_protocol=5)


if __name__ == "__main__":
    main()
