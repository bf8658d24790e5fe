"""Times torch on the lookups of the benchmark `gpu` (benches/gpu.rs), from the same index files.

    gpu --save-indices DIR --json ours.json
    python3 benches/peers/torch_embedding_bag.py DIR --ours ours.json

Peers: torch.nn.EmbeddingBag on the full, uncompressed table, with dense and with sparse gradients; the same hash in plain
torch operations on the hashed weight; FBGEMM's table-batched embeddings on the full table where fbgemm_gpu is installed.
With --ours the two are printed side by side. Needs torch with CUDA and safetensors.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

NUM_EMBEDDINGS = 10_000_000
DEVICE = torch.device("cuda")


def median_ms(run, repeats=9, calls=50):
    """The median over repeats of the time per call, measured as in benches/gpu.rs: host clock, calls, a synchronisation."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(times)


def peak_bytes(run):
    """Peak device memory of a step, beyond what is in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Bags:
    def __init__(self, folder, rows):
        tensors = load_file(Path(folder) / f"{rows}.safetensors")
        self.indices = tensors["indices"].to(DEVICE)
        self.offsets = tensors["offsets"].to(DEVICE) if "offsets" in tensors else None
        if self.offsets is None:
            self.indices = self.indices.reshape(65_536, 20)

    def time(self, lookup, parameter, backward=True):
        """Forward, forward with backward of ones, and that with a step of SGD if the gradient is sparse."""

        def step():
            parameter.grad = None
            out = lookup(self.indices, self.offsets)
            out.backward(torch.ones_like(out))

        def forward():
            with torch.no_grad():
                lookup(self.indices, self.offsets)

        result = {"forward_ms": median_ms(forward)}
        if backward:
            result["forward_backward_ms"] = median_ms(step)
            if parameter.grad.is_sparse:
                optimizer = torch.optim.SGD([parameter], lr=0.01)
                result["step_ms"] = median_ms(lambda: (step(), optimizer.step()))
            parameter.grad = None
            result["step_peak_bytes"] = peak_bytes(step)
            parameter.grad = None
        return result


def full_table(embedding_dim, mode, dtype, sparse):
    bag = torch.nn.EmbeddingBag(
        NUM_EMBEDDINGS, embedding_dim, mode=mode, sparse=sparse, dtype=dtype, device=DEVICE
    )
    return bag, bag.weight


def hashed_in_torch(embedding_dim, length, block):
    """The signed mix hash of the crate, in torch's int64 (which wraps) and its own autograd."""
    weight = torch.nn.Parameter(torch.randn(length, device=DEVICE))

    def as_int64(x):
        return x - (1 << 64) if x >= 1 << 63 else x

    def shift(h, bits):  # logical, torch shifts arithmetically
        return (h >> bits) & ((1 << (64 - bits)) - 1)

    runs = torch.arange(embedding_dim // block, device=DEVICE) + 1
    steps = runs * as_int64(0x9E3779B97F4A7C15)
    within = torch.arange(block, device=DEVICE)

    def lookup(indices, offsets):
        assert offsets is None
        h = indices[..., None] + steps
        h = (h ^ shift(h, 30)) * as_int64(0xBF58476D1CE4E5B9)
        h = (h ^ shift(h, 27)) * as_int64(0x94D049BB133111EB)
        h = h ^ shift(h, 31)
        start = shift(shift(h, 32) * (length // block), 32) * block
        slots = (start[..., None] + within).flatten(-2)
        signs = (1 - 2 * ((h[..., None] >> within) & 1)).flatten(-2)
        return (weight[slots] * signs).sum(1)

    return lookup, weight


def fbgemm(embedding_dim):
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    spec = (NUM_EMBEDDINGS, embedding_dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    tables = SplitTableBatchedEmbeddingBagsCodegen([spec], pooling_mode=PoolingMode.SUM)
    offsets = torch.arange(0, 65_536 * 20 + 1, 20, device=DEVICE)
    return (lambda indices, _: tables(indices.reshape(-1), offsets)), tables.weights_dev


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("indices", help="the folder of --save-indices")
    parser.add_argument("--ours", help="the JSON of the benchmark gpu")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()

    results = {}
    table = lambda dim, sparse, mode="sum", dtype=torch.float32: lambda: full_table(dim, mode, dtype, sparse)
    peers = [
        # name, workload of the benchmark `gpu`, rows, what to build, with backward
        ("torch, full table, dense gradient", "default", "uniform", table(128, False), True),
        ("torch, full table, sparse gradient", "default", "uniform", table(128, True), True),
        ("torch, full table, sparse gradient", "zipf", "zipf", table(128, True), True),
        ("torch, full table, dense gradient", "max", "uniform", table(128, False, "max"), True),
        ("torch, full table", "f16", "uniform", table(128, False, dtype=torch.float16), False),
        ("torch, full table", "bf16", "uniform", table(128, False, dtype=torch.bfloat16), False),
        ("torch, full table, sparse gradient", "dim 16", "uniform", table(16, True), True),
        ("torch, full table, sparse gradient", "dim 64", "uniform", table(64, True), True),
        ("torch, full table, sparse gradient", "ragged", "ragged", table(128, True), True),
        ("torch, full table, sparse gradient", "heavy tail", "heavy-tail", table(128, True), True),
        ("torch operations, hashed", "default", "uniform", lambda: hashed_in_torch(128, 1_280_000, 16), True),
    ]
    try:
        import fbgemm_gpu  # noqa: F401

        peers.append(("FBGEMM, full table", "default", "uniform", lambda: fbgemm(128), False))
    except ImportError:
        print("FBGEMM is not measured: fbgemm_gpu is not installed")

    ours = {}
    if options.ours:
        ours = {w["name"]: w for w in json.loads(Path(options.ours).read_text())["workloads"]}
    print("| workload | peer | forward ms | fwd+bwd ms | with SGD ms | step peak MiB | ours: forward | fwd+bwd | with Adagrad |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, workload, rows, build, backward in peers:
        lookup, parameter = build()
        result = Bags(options.indices, rows).time(lookup, parameter, backward)
        results[f"{workload}: {name}"] = result

        def cell(key, form, scale=1):
            return form.format(result[key] * scale) if key in result else ""

        def ratio(key):
            mine = ours.get(workload)
            return f"{result[key] / mine[key]:.2f}x" if mine and key in result else ""

        print(
            f"| {workload} | {name} | {cell('forward_ms', '{:.3f}')} | {cell('forward_backward_ms', '{:.3f}')} | {cell('step_ms', '{:.3f}')} "
            f"| {cell('step_peak_bytes', '{:,.0f}', 2**-20)} | {ratio('forward_ms')} | {ratio('forward_backward_ms')} | {ratio('step_ms')} |"
        )
        del lookup, parameter
        torch.cuda.empty_cache()
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))


main()
