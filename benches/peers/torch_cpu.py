"""Times torch.nn.EmbeddingBag on the lookups of the CPU benchmark (benches/cpu.rs), and prints how much faster this crate is.

    cargo bench -p benches --bench cpu
    python3 benches/peers/torch_cpu.py target/criterion

The table is the full one of a million rows. The gradient is sparse, except for max, where torch has none. Needs torch.
"""

import argparse
import json
import time
from pathlib import Path

import torch

NUM_EMBEDDINGS, NUM_BAGS, BAG_LEN = 1_000_000, 4_096, 20
MASK = 2**64 - 1


def row(i):
    """As in benches/cpu.rs: the finaliser of SplitMix64."""
    h = (i + 0x9E3779B97F4A7C15) & MASK
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & MASK
    return (h ^ (h >> 31)) % NUM_EMBEDDINGS


def fastest_seconds(run, samples=20, seconds=0.025):
    """Samples as criterion does: each sample is the mean of enough calls to fill some time. The fastest shows what the machine
    can do while others use it too."""
    run()
    start = time.perf_counter()
    run()
    calls = max(1, round(seconds / (time.perf_counter() - start)))
    times = []
    for _ in range(samples if calls > 1 else 5):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def ours(folder, group, name):
    """The fastest of criterion's samples, in seconds."""
    path = Path(folder) / group / name.replace("/", "_") / "new" / "sample.json"
    if not path.exists():
        return None
    sample = json.loads(path.read_text())
    return min(time / calls for time, calls in zip(sample["times"], sample["iters"])) * 1e-9


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("criterion", help="the folder of criterion's results")
    options = parser.parse_args()
    indices = torch.tensor([row(i) for i in range(NUM_BAGS * BAG_LEN)]).reshape(NUM_BAGS, BAG_LEN)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| | torch ms | default ms | | with a sparse gradient ms | | original ms | |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for dim in [64, 128]:
        for mode in ["sum", "mean", "max"]:
            sparse = mode != "max"
            bag = torch.nn.EmbeddingBag(NUM_EMBEDDINGS, dim, mode=mode, sparse=sparse)

            def forward():
                with torch.no_grad():
                    bag(indices)

            def step():
                bag.weight.grad = None
                out = bag(indices)
                out.backward(torch.ones_like(out))

            for group, run in [("forward", forward), ("forward and backward", step)]:
                theirs = fastest_seconds(run)
                cells = []
                for name in [f"default {mode} f32 {dim}", f"default {mode} f32 {dim} sparse", f"original {mode} f32 {dim}"]:
                    mine = ours(options.criterion, group, name)
                    cells.append(f"{mine * 1e3:.2f} | {theirs / mine:.2f}x" if mine else " | ")
                print(f"| {group}, {mode}, dim {dim} | {theirs * 1e3:.2f} | {' | '.join(cells)} |")
            if mode == "sum":
                optimizer = torch.optim.SGD(bag.parameters(), lr=0.01)
                theirs = fastest_seconds(lambda: (step(), optimizer.step()))
                for length in [1, 16, 64] if dim == 64 else [2]:
                    mine = ours(options.criterion, "step", f"{dim} {length}M")
                    if mine:
                        cells = f"| {mine * 1e3:.2f} | {theirs / mine:.2f}x"
                        print(f"| step, {length}M slots with Adagrad, torch with SGD, dim {dim} | {theirs * 1e3:.2f} | | {cells} | | |")
            del bag


main()
