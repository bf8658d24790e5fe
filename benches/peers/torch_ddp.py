"""Times torch's DistributedDataParallel on the DLRM of the example recommender, and NCCL's all-reduce alone.

    python3 benches/peers/torch_ddp.py --precision bf16
    torchrun --nproc-per-node 2 benches/peers/torch_ddp.py --precision bf16

The layers are those of benches/scaling.py. The tables have as many values as the recommender's after compression, so that the same
bytes are exchanged; rows are drawn at random among them. Weak scaling: --batch-size is that of a rank. Batches are on the device. Needs
torch and GPUs.
"""

import argparse
import os
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch_dlrm import Dlrm

NUMBERS, TABLES = 13, 26


def seconds(work, repeats):
    """The median time of a call on the device, after a warm-up."""
    times = []
    for i in range(repeats + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def all_reduce(size, device, world):
    """The time of one all-reduce of so many bytes of f32, and the bandwidth of the bus as nccl-tests define it."""
    values = torch.zeros(size // 4, device=device)
    time = seconds(lambda: dist.all_reduce(values, op=dist.ReduceOp.AVG), 50)
    return time, size / time * 2 * (world - 1) / world


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    widths = lambda text: [int(width) for width in text.split(",")]
    parser.add_argument("--batch-size", type=int, default=65_536, help="of a rank")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rows", type=int, default=36_000_000, help="of all tables, before compression")
    parser.add_argument("--compression", type=int, default=1000, help="rows per row that is kept")
    parser.add_argument("--bottom-mlp", type=widths, default=[512, 256])
    parser.add_argument("--top-mlp", type=widths, default=[1024, 1024, 512, 256])
    parser.add_argument("--precision", default="bf16", choices=["f32", "tf32", "bf16"])
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()

    for name, value in [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")]:
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")

    rows = max(options.rows // TABLES // options.compression, 1)
    layers = SimpleNamespace(
        dim=options.dim, top_input="bottom", bottom_mlp=options.bottom_mlp, top_mlp=options.top_mlp, sparse=False
    )
    with device:
        model = Dlrm(layers, NUMBERS, TABLES, rows)
        numbers = torch.randn(options.batch_size, NUMBERS)
        indices = torch.randint(rows, (options.batch_size, TABLES))
        labels = torch.randint(2, (options.batch_size,)).float()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    ddp = nn.parallel.DistributedDataParallel(model, device_ids=[device.index], gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.002, fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=options.precision == "bf16"):
            logits = ddp(numbers, indices)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(options.steps):
        step()
    torch.cuda.synchronize()
    dist.barrier()
    elapsed = (time.perf_counter() - start) / options.steps
    alone = all_reduce(size, device, world) if world > 1 else None
    if rank == 0:
        rate = world * options.batch_size / elapsed
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, "
              f"{options.precision}")  # fmt: skip
        print(f"{world} ranks of {options.batch_size:,}: {rate:,.0f} examples/s, {1e3 * elapsed:.2f} ms a step, "
              f"{size:,} bytes of gradients")  # fmt: skip
        if alone:
            print(f"all-reduce of these bytes alone: {1e3 * alone[0]:.3f} ms, {alone[1] / 1e9:.1f} GB/s of the bus")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
