# SPDX-License-Identifier: MIT
"""Training across a slow link: plain DDP, fp16, torch's PowerSGD and ours.   sudo python -m benchmarks.wire

Two network namespaces are two machines with a link of their own, whose rate is limited by tc; one process each, gloo.
Reports a step's seconds, of the processor too, and its bytes, by the interface and by our own count. Needs root and
iproute2 (Debian: apt-get install iproute2); leaves nothing behind. `--compute` measures the hooks alone, without root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dalle_fast.models import DALLE, DALLEConfig
from dalle_fast.parallel import PowerSGD, powersgd_hook

METHODS = ("DDP", "DDP fp16", "torch powerSGD_hook", "dalle_fast PowerSGD")
PREFIX = "df-wire"
ADDRESSES = ("192.0.2.1", "192.0.2.2")  # TEST-NET-1: nobody's
PORT = 29511


# ---- the model and the hooks


class Demo(nn.Module):
    """The demo's transformer at a larger width."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.dalle = DALLE(
            DALLEConfig(
                width=width,
                num_layers=layers,
                num_heads=width // 64,
                text_vocab_size=1024,
                text_len=12,
                image_vocab_size=256,
                grid=(8, 8),
            )
        )

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.dalle.loss(text, image).loss


class Given(nn.Module):
    """Parameters of a transformer's layers whose gradients are there at once: what is left is the hook."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
        self.weights = nn.ParameterList(torch.zeros(shape) for shape in shapes)
        self.grads = [torch.randn(shape) * 1e-3 for shape in shapes]

    def forward(self) -> torch.Tensor:
        return sum((weight * grad).sum() for weight, grad in zip(self.weights, self.grads))


def bucket_cap_mb(method: str) -> int | None:
    """One bucket for torch's hook: with several, ranks disagree on the order of its collectives and gloo aborts."""
    return 1000 if method == "torch powerSGD_hook" else None


def hook_up(ddp: DistributedDataParallel, method: str, rank: int, warm_start: bool = True) -> PowerSGD | None:
    if method == "DDP fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif method == "torch powerSGD_hook":
        state = powerSGD_hook.PowerSGDState(
            None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=2,
            min_compression_rate=1,
            use_error_feedback=True,
            warm_start=warm_start,
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif method == "dalle_fast PowerSGD":
        powersgd = PowerSGD(ddp, rank=rank, split={"*qkv.weight": 3, "*weights.?": 1})
        ddp.register_comm_hook(powersgd, powersgd_hook)
        return powersgd
    return None


# ---- one rank


def training(method: str, args: argparse.Namespace) -> Callable[[], dict]:
    """run() of one method: seconds of a step, of the processor too, and bytes sent as far as we count them."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Demo(args.width, args.layers), bucket_cap_mb=bucket_cap_mb(method))
    powersgd = hook_up(ddp, method, args.rank)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-4, fused=True)
    draw = torch.Generator().manual_seed(dist.get_rank())
    text = torch.randint(1024, (args.batch, 12), generator=draw)
    image = torch.randint(256, (args.batch, 64), generator=draw)

    def run() -> dict:
        before = powersgd.traffic.bytes_sent if powersgd else 0
        dist.barrier()
        start, used = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        ddp(text, image).backward()
        optimizer.step()
        sent = powersgd.traffic.bytes_sent - before if powersgd else None
        return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used, "counted": sent}

    for _ in range(3):  # torch's hook begins to compress in the third; DDP rebuilds its buckets after the first
        run()
    return run


def worker(args: argparse.Namespace) -> None:
    """Obeys the parent: a line of JSON in, one out."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{ADDRESSES[0]}:{PORT}", rank=args.worker, world_size=len(ADDRESSES)
    )
    runs = {method: training(method, args) for method in METHODS}
    numbers = sum(p.numel() for p in Demo(args.width, args.layers).parameters())
    print(json.dumps({"parameters": numbers}), flush=True)
    for line in sys.stdin:
        print(json.dumps(runs[json.loads(line)]()), flush=True)
    dist.destroy_process_group()


# ---- two machines


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Link:
    """Two namespaces and a veth pair between them."""

    def __init__(self) -> None:
        self.names = [f"{PREFIX}-{os.getpid()}-{i}" for i in range(2)]
        self.devices = [f"dfw{i}" for i in range(2)]
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.names[0], "link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1],
           "netns", self.names[1])  # fmt: skip
        for name, device, address in zip(self.names, self.devices, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")

    def limit(self, mbit: int) -> None:
        burst = max(64_000, mbit * 1_000_000 // 8 // 200)  # 5 ms, what the timer needs at high rates
        for name, device in zip(self.names, self.devices):
            subprocess.run(
                ["tc", "-n", name, "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{mbit}mbit",
                 "burst", str(burst), "latency", "50ms"],
                check=True,
            )  # fmt: skip

    def bytes_sent(self) -> int:
        """By the first machine, headers included."""
        (link,) = json.loads(ip("-n", self.names[0], "-s", "-j", "link", "show", "dev", self.devices[0]))
        return link["stats64"]["tx"]["bytes"]

    def close(self) -> None:
        remove_namespaces(self.names)


def remove_namespaces(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def remove_leftovers() -> None:
    """Namespaces of runs that were killed: ours by name, whose process is gone."""
    names = [line.split()[0] for line in ip("netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]
    remove_namespaces([name for name in names if not Path(f"/proc/{name.split('-')[2]}").exists()])


@contextlib.contextmanager
def machines(args: argparse.Namespace) -> Iterator[tuple[Link, list[subprocess.Popen]]]:
    remove_leftovers()
    link, processes = Link(), []
    try:
        link.limit(10_000)
        for rank, (name, device) in enumerate(zip(link.names, link.devices)):
            command = [sys.executable, "-m", "benchmarks.wire", "--worker", str(rank)]
            for option in ("width", "layers", "batch", "rank"):
                command += [f"--{option}", str(getattr(args, option))]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1"}
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    text=True,
                )
            )
        yield link, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
        link.close()


def answer(process: subprocess.Popen) -> dict:
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a worker ended; see its message above")
    return json.loads(line)


def measure(args: argparse.Namespace) -> list[dict]:
    rows = []
    with machines(args) as (link, processes):
        numbers, _ = (answer(process)["parameters"] for process in processes)
        print(f"{numbers / 1e6:.1f} million parameters, rank {args.rank}, batch {args.batch} a machine")
        print(
            f"\n{'link':>10}  {'':22}{'s a step':>9}{'ratio':>7}{'cpu s':>7}{'MB sent':>9}{'counted':>9}   (best step)"
        )
        for mbit in args.rates:
            link.limit(mbit)
            steps = {method: [] for method in METHODS}
            deadline = time.monotonic() + args.seconds
            while len(steps["DDP"]) < args.steps or (time.monotonic() < deadline and len(steps["DDP"]) < 20):
                for method, done in steps.items():  # in turn: all meet the same load
                    done.append(one_step(method, link, processes))
            rows += [summary(mbit, method, done) for method, done in steps.items()]
            plain = rows[-len(METHODS)]["best"]
            for row in rows[-len(METHODS) :]:
                counted = f"{row['counted_bytes'] / 1e6:9.2f}" if row["counted_bytes"] is not None else ""
                print(
                    f"{mbit:5d} Mbit  {row['method']:22}{row['best']:9.3f}{plain / row['best']:6.1f}x"
                    f"{row['cpu']:7.2f}{row['interface_bytes'] / 1e6:9.2f}{counted}",
                    flush=True,
                )
    return rows


def one_step(method: str, link: Link, processes: list[subprocess.Popen]) -> dict:
    """Seconds of the slower machine, of a processor, bytes by the interface and by our own count."""
    before = link.bytes_sent()
    for process in processes:
        process.stdin.write(json.dumps(method) + "\n")
        process.stdin.flush()
    answers = [answer(process) for process in processes]
    return {
        "seconds": max(a["seconds"] for a in answers),
        "cpu": sum(a["cpu"] for a in answers) / len(answers),
        "interface": link.bytes_sent() - before,
        "counted": answers[0]["counted"],
    }


def summary(mbit: int, method: str, steps: list[dict]) -> dict:
    return {
        "mbit": mbit,
        "method": method,
        "best": min(step["seconds"] for step in steps),
        "median": statistics.median(step["seconds"] for step in steps),
        "cpu": min(step["cpu"] for step in steps),
        "steps": len(steps),
        "interface_bytes": statistics.median(step["interface"] for step in steps),
        "counted_bytes": steps[0]["counted"],
    }


# ---- the hooks alone


def compute(args: argparse.Namespace) -> list[dict]:
    """Seconds of the processor a step that each hook adds to a backward pass, one thread, one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    kinds = {
        "no hook": ("DDP", True),
        "torch powerSGD_hook": ("torch powerSGD_hook", True),
        "torch powerSGD_hook, no warm start": ("torch powerSGD_hook", False),
        "dalle_fast PowerSGD": ("dalle_fast PowerSGD", True),
    }
    models = {}
    for kind, (method, warm_start) in kinds.items():
        torch.manual_seed(0)
        models[kind] = DistributedDataParallel(Given(args.width, args.layers), bucket_cap_mb=bucket_cap_mb(method))
        hook_up(models[kind], method, args.rank, warm_start)
    best = dict.fromkeys(kinds, float("inf"))
    for i in range(12):
        for kind, ddp in models.items():
            start = time.process_time()
            ddp().backward()
            if i > 2:
                best[kind] = min(best[kind], time.process_time() - start)
            ddp.zero_grad()
    dist.destroy_process_group()
    numbers = sum(p.numel() for p in models["no hook"].parameters())
    print(f"\nhooks alone, {numbers / 1e6:.1f} million numbers, rank {args.rank}, one thread, one rank")
    rows = []
    for kind in list(kinds)[1:]:
        seconds = best[kind] - best["no hook"]
        rows.append({"hook": kind, "seconds": seconds})
        print(f"  {kind:36}{seconds * 1e3:9.1f} ms  {rows[0]['seconds'] / seconds:5.2f}x")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, nargs="+", default=[50, 200, 1000, 10_000], metavar="MBIT")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="pictures a machine and step")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="of each method and rate, at least")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each rate, at least, up to 20 steps")
    parser.add_argument("--compute", action="store_true", help="only the hooks alone; needs no root")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "wire.json")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args)
        return
    if not args.compute:
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing:
            raise SystemExit(f"{' and '.join(missing)} missing: apt-get install iproute2")
        if os.geteuid() != 0:
            raise SystemExit("network namespaces need root: sudo python -m benchmarks.wire, or --compute without")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the namespaces go
    result = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "settings": {name: getattr(args, name) for name in ("width", "layers", "batch", "rank")},
        "steps": [] if args.compute else measure(args),
        "hooks_alone": compute(args),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{args.output}")


if __name__ == "__main__":
    main()
