# SPDX-License-Identifier: MIT
"""Training across a slow link: plain DDP, fp16, torch's PowerSGD and ours.   sudo python -m benchmarks.wire

Two network namespaces are two machines with a link of their own, whose rate is limited by tc; one process each, gloo.
Reports a step's seconds, of the processor too, and its bytes, by the interface and by our own count, beside what the
model of `dalle-fast plan` predicts from the parts of a step without the link and from the link's latency and rate, all
measured. Needs root and iproute2 (Debian: apt-get install iproute2); leaves nothing behind. `--compute` measures the
hooks alone, without root. Runs of some rates add to the file that others have written.

How far the hook can be sped up: three products of 2 m n r operations in float32 are most of it. At torch.mm's rate, and
with the bytes that have to move, they take half of the time of torch's hook: a ratio of 2 to it, not 4. `--compute`
prints that floor beside ours, which is at 0.8 of it (AMD EPYC, one thread).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
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

from benchmarks.wire_table import HEADER, describe, lines, merged
from dalle_fast.bench.report import machine
from dalle_fast.models import DALLE, DALLEConfig
from dalle_fast.parallel import PowerSGD, powersgd_hook
from dalle_fast.plan import Block, Load, plain_loads, powersgd_loads, ring_load, step_seconds

METHODS = ("DDP", "DDP fp16", "torch powerSGD_hook", "dalle_fast PowerSGD")
PREFIX = "df-wire"
ADDRESSES = ("192.0.2.1", "192.0.2.2")  # TEST-NET-1: nobody's
PORT = 29511
SPLIT = {"*qkv.weight": 3, "*weights.?": 1}


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
    group = ddp.process_group
    if method == "DDP fp16":
        ddp.register_comm_hook(group, default_hooks.fp16_compress_hook)
    elif method == "torch powerSGD_hook":
        state = powerSGD_hook.PowerSGDState(
            group,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=2,
            min_compression_rate=1,
            use_error_feedback=True,
            warm_start=warm_start,
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif method == "dalle_fast PowerSGD":
        powersgd = PowerSGD(ddp, rank=rank, split=SPLIT)
        ddp.register_comm_hook(powersgd, powersgd_hook)
        return powersgd
    return None


# ---- one rank


Run = Callable[[], dict[str, float | None]]


def training(method: str, args: argparse.Namespace, group: dist.ProcessGroup) -> Run:
    """run() of one method: seconds of a step, its parts and the processor; bytes sent, where we count them."""
    torch.manual_seed(0)
    model = Demo(args.width, args.layers)
    ddp = DistributedDataParallel(model, process_group=group, bucket_cap_mb=bucket_cap_mb(method))
    powersgd = hook_up(ddp, method, args.rank)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-4, fused=True)
    draw = torch.Generator().manual_seed(dist.get_rank())
    text = torch.randint(1024, (args.batch, 12), generator=draw)
    image = torch.randint(256, (args.batch, 64), generator=draw)
    finishing = [0.0]
    if powersgd:
        finish = powersgd.finish

        def timed(*arguments) -> None:
            start = time.perf_counter()
            finish(*arguments)
            finishing[0] = time.perf_counter() - start

        powersgd.finish = timed

    def run() -> dict[str, float | None]:
        before = powersgd.traffic.bytes_sent if powersgd else 0
        dist.barrier()
        used, times = time.process_time(), [time.perf_counter()]
        optimizer.zero_grad()
        loss = ddp(text, image)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        times.append(time.perf_counter())
        return {
            "seconds": times[3] - times[0],
            "forward": times[1] - times[0],
            "backward": times[2] - times[1] - finishing[0],
            "update": times[3] - times[2] + finishing[0],
            "cpu": time.process_time() - used,
            "counted": powersgd.traffic.bytes_sent - before if powersgd else None,
        }

    for _ in range(3):  # torch's hook begins to compress in the third; DDP rebuilds its buckets after the first
        run()
    return run


def measure_link(mbit: int) -> dict[str, float]:
    """Seconds of a message and bytes/s, from an all-reduce of one number and one of a fifth of a second."""
    numbers = max(1, mbit * 1_000_000 // 8 // 4 // 5)
    best = {}
    for count, repeats in ((1, 20), (numbers, 4)):
        flat = torch.zeros(count)
        seconds = []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(flat)
            seconds.append(time.perf_counter() - start)
        best[count] = min(seconds)
    load = ring_load(numbers, len(ADDRESSES), 4)
    latency = best[1] / load.messages
    return {"latency": latency, "rate": load.bytes / (best[numbers] - best[1])}


def worker(args: argparse.Namespace) -> None:
    """Obeys the parent: a line of JSON in, one out."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{ADDRESSES[0]}:{PORT}", rank=args.worker, world_size=len(ADDRESSES)
    )
    alone = dist.new_group([args.worker], use_local_synchronization=True)
    runs = {f"{method}, {kind}": training(method, args, group)
            for kind, group in (("alone", alone), ("linked", dist.group.WORLD)) for method in METHODS}  # fmt: skip
    numbers = sum(p.numel() for p in Demo(args.width, args.layers).parameters())
    print(json.dumps({"parameters": numbers}), flush=True)
    for line in sys.stdin:
        command, what = json.loads(line)
        print(json.dumps(measure_link(what) if command == "link" else runs[what]()), flush=True)
    dist.destroy_process_group()


# ---- what the model of `dalle-fast plan` expects


def buckets(model: nn.Module, cap_mb: int | None) -> list[Block]:
    """DDP's: gradients from the last to the first, a bucket of 1 MiB, then of 25."""
    limits = [cap_mb << 20] if cap_mb else [1 << 20, 25 << 20]
    blocks: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, parameter in reversed(list(model.named_parameters())):
        if size >= limits[min(len(blocks), len(limits)) - 1]:
            blocks.append({})
            size = 0
        blocks[-1][name] = tuple(parameter.shape)
        size += 4 * parameter.numel()
    return blocks


def loads_of(method: str, args: argparse.Namespace) -> list[Load]:
    """What each bucket sends."""
    with torch.device("meta"):
        blocks, ranks = buckets(Demo(args.width, args.layers), bucket_cap_mb(method)), len(ADDRESSES)
    if method == "dalle_fast PowerSGD":
        return powersgd_loads(blocks, args.rank, ranks, split=SPLIT)
    if method != "torch powerSGD_hook":
        return plain_loads(blocks, ranks, 2 if method == "DDP fp16" else 4)
    plain = left = right = 0  # float32 factors of whatever has two dimensions and shrinks
    for shape in blocks[0].values():
        m, n = shape[0], math.prod(shape[1:])
        small = len(shape) > 1 and (m + n) * args.rank < m * n
        plain += 0 if small else m * n
        left, right = left + m * args.rank * small, right + n * args.rank * small
    loads = [ring_load(count, ranks, 4) for count in (plain, left, right)]
    return [Load(sum(load.bytes for load in loads), sum(load.messages for load in loads))]


def predict(method: str, args: argparse.Namespace, alone: dict[str, float], link: dict[str, float]) -> float:
    """Seconds of a step: what a rank computes alone, measured, and what its buckets send by latency and rate."""
    exchange = [load.seconds(link["rate"], link["latency"]) for load in loads_of(method, args)]
    return step_seconds(alone["forward"], alone["backward"], alone["update"], exchange)


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


def ask(processes: list[subprocess.Popen], command: str, what: str | int) -> list[dict]:
    for process in processes:
        process.stdin.write(json.dumps([command, what]) + "\n")
        process.stdin.flush()
    return [answer(process) for process in processes]


def measure(args: argparse.Namespace) -> list[dict]:
    rows = []
    with machines(args) as (link, processes):
        numbers, _ = (answer(process)["parameters"] for process in processes)
        print(f"{numbers / 1e6:.1f} million parameters, rank {args.rank}, batch {args.batch} a machine\n\n{HEADER}")
        alone = {method: compute_alone(method, processes) for method in METHODS}
        for mbit in args.rates:
            link.limit(mbit)
            found = {name: max(a[name] for a in answers) if name == "latency" else min(a[name] for a in answers)
                     for answers in [ask(processes, "link", mbit)] for name in ("latency", "rate")}  # fmt: skip
            steps = {method: [] for method in METHODS}
            deadline = time.monotonic() + args.seconds
            while len(steps["DDP"]) < args.steps or (time.monotonic() < deadline and len(steps["DDP"]) < 20):
                for method, done in steps.items():  # in turn: all meet the same load
                    done.append(one_step(method, link, processes))
            for method, done in steps.items():
                row = summary(mbit, method, done)
                row |= {"link": found, "alone": alone[method], "predicted": predict(method, args, alone[method], found)}
                rows.append(row)
            print(*lines(rows[-len(METHODS) :]), sep="\n", flush=True)
    return rows


def compute_alone(method: str, processes: list[subprocess.Popen]) -> dict[str, float]:
    """Seconds of the parts of a step without the link, both machines at work; of the quickest of several steps."""
    steps = [ask(processes, "step", f"{method}, alone") for _ in range(6)]
    best = min(steps, key=lambda answers: max(a["seconds"] for a in answers))
    return {name: max(a[name] for a in best) for name in ("seconds", "forward", "backward", "update")}


def one_step(method: str, link: Link, processes: list[subprocess.Popen]) -> dict:
    """Seconds of the slower machine, of a processor, bytes by the interface and by our own count."""
    before = link.bytes_sent()
    answers = ask(processes, "step", f"{method}, linked")
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
    seconds = {kind: best[kind] - best["no hook"] for kind in list(kinds)[1:]}
    seconds["floor: torch.mm's products, bytes of a copy"] = floor(models["no hook"].module.grads, args.rank)
    return [{"hook": kind, "seconds": value, "numbers": numbers} for kind, value in seconds.items()]


def floor(grads: list[torch.Tensor], rank: int) -> float:
    """Seconds of the three products of each gradient, as torch.mm multiplies float32, and of the bytes that must move.

    Of a number: the gradient is read and written (4 + 4 bytes), its code in the error buffer read and written with the
    gradient (2 + 2), read for the second product (2), read and written at the end (2 + 2).
    """
    best = [float("inf")] * (3 * len(grads) + 1)
    source, target = torch.ones(1 << 24), torch.ones(1 << 24)

    def timed(i: int, function: Callable[..., object], *arguments, **options) -> None:
        start = time.process_time()
        function(*arguments, **options)
        best[i] = min(best[i], time.process_time() - start)

    for _ in range(8):
        for i, grad in enumerate(grads):
            m, n = grad.shape
            left, right = torch.ones(m, rank), torch.ones(n, rank)
            timed(3 * i, torch.mm, grad, right, out=torch.empty(m, rank))
            timed(3 * i + 1, torch.mm, grad.mT, left, out=torch.empty(n, rank))
            timed(3 * i + 2, torch.mm, left, right.mT, out=torch.ones(m, n))
        timed(-1, target.copy_, source)
    byte = best[-1] / (8 * source.numel())
    return sum(best[:-1]) + 18 * byte * sum(grad.numel() for grad in grads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rates",
        type=int,
        nargs="+",
        metavar="MBIT",
        help="only these, not the hooks alone; default: 50 200 1000 10000",
    )
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
    part, args.rates = args.rates is not None, args.rates or [50, 200, 1000, 10_000]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the namespaces go
    result = {
        "machine": machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "settings": {name: getattr(args, name) for name in ("width", "layers", "batch", "rank")},
        "steps": [] if args.compute else measure(args),
        "hooks_alone": [] if part else compute(args),
    }
    result = merged(result, args.output)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    args.output.with_suffix(".txt").write_text(describe(result))
    print(f"\n{describe(result)}\n{args.output}")


if __name__ == "__main__":
    main()
