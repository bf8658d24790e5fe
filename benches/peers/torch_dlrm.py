"""Times the training of the example recommender on a click log, and of the same DLRM with full tables in torch.

    cargo build --release -p recommender
    target/release/recommender generate clicks.txt --lines 1000000
    target/release/recommender prepare clicks.txt clicks.safetensors
    python3 benches/peers/torch_dlrm.py clicks.safetensors --batch-size 8192
    python3 benches/peers/torch_dlrm.py clicks.safetensors --batch-size 8192 --device cuda -- --resident

The recommender is timed from the file to the updated model, over an epoch. torch is timed on batches that are in its memory, as
long as --seconds: the model alone, with dense gradients and AdamW, and with sparse gradients and SGD for the tables. What follows
`--` goes to the recommender. Needs torch and numpy.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn


class Dlrm(nn.Module):
    """The model of examples/recommender/src/model.rs, its tables not hashed."""

    def __init__(self, options, numbers, tables, rows):
        super().__init__()
        dim, self.keep_all = options.dim, options.top_input == "vectors"
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(rows, dim, mode="mean", sparse=options.sparse) for _ in range(tables)
        )
        self.bottom = mlp([numbers, *options.bottom_mlp, dim])
        self.bottom.append(nn.ReLU())
        n = tables + 1
        kept = n * dim if self.keep_all else dim
        self.top = mlp([kept + n * (n - 1) // 2, *options.top_mlp, 1])
        self.register_buffer("pairs", torch.tril_indices(n, n, offset=-1))

    def forward(self, numbers, rows):
        dense = self.bottom(numbers)
        pooled = [table(rows[:, i : i + 1]) for i, table in enumerate(self.tables)]
        vectors = torch.stack([*(vector.to(dense.dtype) for vector in pooled), dense], dim=1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        kept = vectors.flatten(1) if self.keep_all else dense
        return self.top(torch.cat([kept, dots], dim=1)).squeeze(1)


def mlp(widths):
    layers = nn.Sequential()
    for inputs, outputs in zip(widths, widths[1:]):
        if len(layers) > 0:
            layers.append(nn.ReLU())
        layers.append(nn.Linear(inputs, outputs))
    return layers


def read(path):
    """The tensors of a prepared log, mapped, and what its metadata says."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    about = json.loads(header.pop("__metadata__")["clicks"])
    dtypes = {"F32": np.float32, "U32": np.uint32, "U8": np.uint8}
    tensors = {
        name: np.memmap(path, dtypes[info["dtype"]], "r", 8 + size + info["data_offsets"][0], tuple(info["shape"]))
        for name, info in header.items()
    }
    return tensors, about


def time_torch(options, tensors, about, sparse):
    """Examples per second, and the peak of the device's memory in bytes."""
    options.sparse = sparse
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    numbers, tables = tensors["numbers"].shape[1], tensors["rows"].shape[1]
    with device:
        model = Dlrm(options, numbers, tables, about["rows_per_field"])
    of_tables, of_mlps = model.tables.parameters(), [*model.bottom.parameters(), *model.top.parameters()]
    if sparse:
        optimizers = [torch.optim.SGD(of_tables, lr=0.01), torch.optim.AdamW(of_mlps, lr=0.002)]
    else:
        optimizers = [torch.optim.AdamW([*of_tables, *of_mlps], lr=0.002)]
    batches, size = [], options.batch_size
    for start in range(0, min(len(tensors["labels"]) // size, 16) * size, size):
        part = slice(start, start + size)
        batches.append(
            (
                torch.from_numpy(np.array(tensors["numbers"][part])).to(device),
                torch.from_numpy(tensors["rows"][part].astype(np.int64)).to(device),
                torch.from_numpy(tensors["labels"][part].astype(np.float32)).to(device),
            )
        )
    if not batches:
        raise SystemExit(f"the log has fewer than {size} examples")

    def step(i):
        inputs, rows, labels = batches[i % len(batches)]
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            logits = model(inputs, rows)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    for i in range(3):
        step(i)
    wait()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < options.seconds:
        for _ in range(8):
            step(steps)
            steps += 1
        wait()
    rate = steps * size / (time.perf_counter() - start)
    return rate, torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def time_recommender(options):
    """Examples per second, and the peak of the device's memory in bytes, as the driver counts it."""
    widths = lambda widths: ",".join(map(str, widths))
    with tempfile.TemporaryDirectory() as folder:
        command = [
            options.recommender, "train", "--data", options.log, "--format", "criteo", "--batch-size", options.batch_size,
            "--compression", options.compression, "--embedding-dim", options.dim, "--device", options.device,
            "--precision", options.precision, "--bottom-mlp", widths(options.bottom_mlp),
            "--top-mlp", widths(options.top_mlp), "--top-input", options.top_input,
            "--checkpoint", Path(folder) / "model.safetensors", *options.more,
        ]  # fmt: skip
        before = used_memory() if options.device == "cuda" else 0
        run = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
        peak, done = [before], threading.Event()

        def watch():
            while not done.wait(0.1):
                peak[0] = max(peak[0], used_memory())

        watcher = threading.Thread(target=watch)
        if options.device == "cuda":
            watcher.start()
        output, _ = run.communicate()
        done.set()
        if watcher.is_alive():
            watcher.join()
    found = re.search(r"([\d,]+) examples a second", output)
    if run.returncode != 0 or not found:
        raise SystemExit(f"the recommender failed:\n{output}")
    rate = float(found.group(1).replace(",", ""))
    return rate, peak[0] - before if options.device == "cuda" else None


def used_memory():
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.check_output(query, text=True).split()[0]) << 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    widths = lambda text: [int(width) for width in text.split(",")]
    parser.add_argument("log", help="a prepared click log")
    parser.add_argument("--recommender", default="target/release/recommender", help="the program; `none` times torch alone")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--compression", default="1/16", help="of the recommender")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--bottom-mlp", type=widths, default=[64, 32])
    parser.add_argument("--top-mlp", type=widths, default=[64, 32])
    parser.add_argument("--top-input", default="vectors", choices=["vectors", "bottom"])
    parser.add_argument("--precision", default="f32", choices=["f32", "tf32", "bf16"])
    parser.add_argument("--seconds", type=float, default=10, help="how long to time torch")
    parser.epilog = "What follows `--` goes to the recommender."
    # Divided here: argparse finds no arguments after `--` if options stand between them and the log.
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    options.more = more

    tensors, about = read(options.log)
    results = []
    if options.recommender != "none":
        results.append((f"recommender, {options.compression}", time_recommender(options)))
    for sparse, name in [(False, "AdamW, dense"), (True, "SGD of tables, sparse")]:
        try:
            result = time_torch(options, tensors, about, sparse)
        except torch.OutOfMemoryError:
            result = None
            torch.cuda.empty_cache()
        results.append((f"torch, full tables, {name}", result))
    ours = results[0][1]
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, batch {options.batch_size:,}, "
          f"{options.precision}, {tensors['rows'].shape[1]} tables of {about['rows_per_field']:,} x {options.dim}")  # fmt: skip
    print("| | examples/s | the first is so many times faster | peak of device memory, GB |")
    print("|---|---:|---:|---:|")
    for name, result in results:
        if result is None:
            print(f"| {name} | out of memory | | |")
            continue
        rate, memory = result
        times = "" if ours is None else f"{ours[0] / rate:.2f}"
        memory = "" if memory is None else f"{memory / 1e9:.1f}"
        print(f"| {name} | {rate:,.0f} | {times} | {memory} |")


if __name__ == "__main__":
    main()
