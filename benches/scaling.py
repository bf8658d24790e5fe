"""Times the training of the example recommender on several GPUs of one host, and tries what happens when a rank is lost.

    cargo build --release -p recommender --features nccl
    target/release/recommender generate clicks.txt --lines 7000000     # 3.5 million a GPU are 42 steps an epoch
    target/release/recommender prepare clicks.txt clicks.safetensors --rows-per-field 1384616
    python3 benches/scaling.py clicks.safetensors --gpus 1,2

Weak scaling keeps the batch of a rank, strong scaling that of all ranks together. The losses of one GPU and of several on the same
batches stand beside each other; and a rank is killed, whereupon the others must end, and all go on from the last save. The defaults are
the layers of MLPerf's DLRM, 36 million rows of 128 columns at 1/1000. What follows `--` goes to the recommender. Needs torchrun.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(options, checkpoint, batch, more=()):
    words = [
        options.recommender, "train", "--data", options.log, "--format", "criteo", "--device", options.device, "--resident",
        "--compression", options.compression, "--embedding-dim", options.dim, "--bottom-mlp", options.bottom_mlp,
        "--top-mlp", options.top_mlp, "--top-input", "bottom", "--precision", options.precision,
        "--epochs", options.epochs, "--batch-size", batch, "--checkpoint", checkpoint, *options.more, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def number(text, pattern):
    found = re.search(pattern, text)
    return float(found.group(1).replace(",", "")) if found else None


def train(options, gpus, batch, more=()):
    """What a training on so many GPUs says of itself, as numbers and as text."""
    with tempfile.TemporaryDirectory() as folder:
        words = command(options, Path(folder) / "model", batch, more)
        if gpus > 1:
            launcher = ["torchrun", "--no-python", "--nproc-per-node", gpus, "--master-port", free_port()]
            words = [*map(str, launcher), *words]
        run = subprocess.run(words, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(words)}\n{run.stdout}{run.stderr}")
    rate = number(run.stdout, r"([\d,]+) examples a second")
    result = {
        "rate": rate,
        "step": 1e3 * batch / rate,
        "bytes": number(run.stdout, r"([\d,]+) bytes a step"),
        "mean": number(run.stdout, r"bytes a step in ([\d.]+) ms"),
        "fastest": number(run.stdout, r"fastest ([\d.]+) ms"),
        "bandwidth": number(run.stdout, r"([\d.]+) GB/s bus"),
    }
    return result, run.stdout


def scaling(options):
    print("| | GPUs | batch of all | examples/s | times one GPU | ms a step | ms of all-reduce, mean | its share "
          "| fastest | GB/s of the bus |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    one = None
    for kind in ["weak", "strong"]:
        for gpus in options.gpus:
            if kind == "strong" and gpus == 1:
                continue
            batch = options.batch_size * (gpus if kind == "weak" else 1)
            result, _ = train(options, gpus, batch)
            one = one or result["rate"]
            line = [kind, gpus, f"{batch:,}", f"{result['rate']:,.0f}", f"{result['rate'] / one:.2f}", f"{result['step']:.2f}"]
            if result["mean"] is None:
                line += [""] * 4
            else:
                share = 100 * result["mean"] / result["step"]
                line += [f"{result['mean']:.3f}", f"{share:.1f} %", f"{result['fastest']:.3f}", f"{result['bandwidth']:.1f}"]
            print("| " + " | ".join(map(str, line)) + " |", flush=True)
    if result["bytes"]:
        print(f"\n{result['bytes']:,.0f} bytes of gradients a step.")


def equality(options):
    """The same batches on one GPU and on several."""
    gpus = max(options.gpus)
    print(f"\nThe same batches, {options.batch_size:,} examples of all ranks:\n")
    for count in [1, gpus]:
        _, said = train(options, count, options.batch_size, ["--shards", gpus])
        for line in said.splitlines():
            if line.startswith("  epoch") or "│ test" in line or "│ ranks" in line:
                print(f"{count} GPU{'s' if count > 1 else ' '} {line}", flush=True)


def faults(options):
    """Kills one rank, then stops one so that it hangs, and lets the training go on each time."""
    gpus = max(options.gpus)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, state = Path(folder) / "model", Path(folder) / "model.resume"
        more = ["--save-every", 10, "--resume", "--rank-timeout", 20, "--shards", gpus]

        def start():
            port, words = free_port(), command(options, checkpoint, options.batch_size, more)
            ranks = []
            for rank in range(gpus):
                of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": gpus}
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                environment = {name: str(value) for name, value in {**of_rank, **place}.items()}
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
                ranks.append(subprocess.Popen(words, env={**os.environ, **environment}, text=True, **pipes))
            return ranks

        for name, sent in [("killed", signal.SIGKILL), ("stopped, and hangs", signal.SIGSTOP)]:
            before = state.stat().st_mtime_ns if state.exists() else None
            ranks = start()
            while not state.exists() or state.stat().st_mtime_ns == before:
                if any(rank.poll() is not None for rank in ranks):
                    raise SystemExit("".join("".join(rank.communicate()) for rank in ranks))
                time.sleep(0.01)
            ranks[-1].send_signal(sent)
            lost = time.perf_counter()
            print(f"\nRank {gpus - 1} is {name}:")
            for i, rank in enumerate(ranks[:-1]):
                said = rank.communicate(timeout=120)[1].strip()
                seconds = time.perf_counter() - lost
                print(f"  rank {i} ends after {seconds:.1f} s with status {rank.returncode}: {said}", flush=True)
            ranks[-1].kill()
            ranks[-1].wait()
        ranks = start()
        outputs = [rank.communicate() for rank in ranks]
        if any(rank.returncode != 0 for rank in ranks):
            raise SystemExit("".join("".join(output) for output in outputs))
        lines = [line for line in outputs[0][0].splitlines() if "resumed" in line or "│ test" in line]
        print("\nAll go on:", *lines, sep="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    counts = lambda text: sorted(int(count) for count in text.split(","))
    parser.add_argument("log", help="a prepared click log")
    parser.add_argument("--recommender", default="target/release/recommender")
    parser.add_argument("--gpus", type=counts, default=[1, 2], help="numbers of GPUs, such as 1,2,4,8")
    parser.add_argument("--batch-size", type=int, default=65_536, help="of a GPU in weak scaling, of all in strong scaling")
    parser.add_argument("--compression", default="1/1000")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--bottom-mlp", default="512,256")
    parser.add_argument("--top-mlp", default="1024,1024,512,256")
    parser.add_argument("--precision", default="bf16", choices=["f32", "tf32", "bf16"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--only", choices=["scaling", "equality", "faults"])
    parser.epilog = "What follows `--` goes to the recommender."
    # Divided here: argparse finds no arguments after `--` if options stand between them and the log.
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    options.more = more
    parts = {"scaling": scaling, "equality": equality, "faults": faults}
    for name, part in parts.items():
        if options.only in (None, name):
            part(options)


if __name__ == "__main__":
    main()
