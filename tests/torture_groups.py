# SPDX-License-Identifier: MIT
"""Runs of several processes: a rank is killed or told to stop, the others with it, and other numbers of ranks go on.

A group starts and ends as under torchrun: one port for all, and where one rank has died the others get SIGTERM, then
SIGKILL. The same command again must end as the undisturbed run of as many ranks, byte for byte.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch._dynamo  # before the forks: each rank imports it
import torch.distributed.fsdp  # noqa: F401
from test_train import configured, log_of
from torture_base import SAVE_EVERY, Base, Child, Whole, dying_at, train

from dalle_fast.models import store
from dalle_fast.parallel import pieces
from dalle_fast.train.dalle import DALLERecipe
from dalle_fast.train.loop import Loop

STEPS = 24
CHAIN = 12  # updates at changing numbers of ranks, whose sums round differently
PATIENCE = 120.0  # seconds; a run takes two to five


class Variant(NamedTuple):
    kind: str
    size: int
    """Ranks."""
    changes: dict
    """Of the loop."""


VARIANTS = {
    "copies, 2 ranks": Variant("dalle", 2, {"sample_every": 10}),
    "2 shards": Variant("dalle", 2, {"shard": 2}),  # draws its pictures token by token: once, at the end
    "PowerSGD, 2 ranks": Variant("dalle", 2, {"sample_every": 10, "powersgd_rank": 4}),
    "copies, 4 ranks": Variant("dalle", 4, {"sample_every": 10}),
    "dvae, 2 ranks": Variant("dvae", 2, {"sample_every": 10}),
    "2 replicas of 2 shards": Variant("dalle", 4, {"shard": 2}),
    "PowerSGD, 2 replicas of 2 shards": Variant("dalle", 4, {"shard": 2, "powersgd_rank": 4}),
    "clip, 2 ranks": Variant("clip", 2, {"sample_every": 10}),
}


class Group:
    """The ranks of one run on this machine."""

    def __init__(self, functions: list[Callable[[], object]], folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        size = len(functions)

        def ranked(rank: int) -> Callable[[], object]:
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}

            def start() -> None:
                os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1")
                functions[rank]()

            return start

        self.ranks = [Child(ranked(rank), folder / f"rank-{rank}.log") for rank in range(size)]

    def wait(self, seconds: float = PATIENCE, until: Callable[[list[bool]], bool] = all) -> list[int | None]:
        """Exit codes, when all have ended or `until` holds of whether each has; None of those that run still."""
        deadline = time.monotonic() + seconds
        while True:
            codes = [child.poll() for child in self.ranks]
            if until([code is not None for code in codes]) or time.monotonic() > deadline:
                return codes
            time.sleep(0.005)

    def end(self, grace: float) -> None:
        """As torchrun where a rank has failed: SIGTERM, and SIGKILL after a grace."""
        for child in self.ranks:
            child.kill(signal.SIGTERM)
        self.wait(grace)
        for child in self.ranks:
            child.kill(signal.SIGKILL)
            child.wait()

    def log(self, rank: int = 0) -> str:
        return self.ranks[rank].log.read_text()[-400:]


def failed(codes: list[int | None]) -> bool:
    return any(code != 0 for code in codes)


def losses(log: list[dict]) -> list[float]:
    return [line["loss"] for line in log if "loss" in line]


def farthest(found: list[float], expected: list[float]) -> float:
    """Largest relative difference; infinite where there are not as many."""
    if len(found) != len(expected):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def dying_in_fill(count: int) -> Callable[[Loop], None]:
    """Kills its process at the count-th file that it writes its parts into."""

    def change(_: Loop) -> None:
        fill, phase = pieces.fill, dying_at(count)

        def dying(path, parts):
            phase(path.name)
            fill(path, parts)

        pieces.fill = dying

    return change


def dying_before(step: int) -> Callable[[Loop], None]:
    """Kills its process when an update begins."""

    def change(loop: Loop) -> None:
        update = loop.update

        def dying():
            if loop.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return update()

        loop.update = dying

    return change


def without_pictures(function: Callable[[], object]) -> Callable[[], object]:
    """For many shards in a small run: they would draw most of the time, token by token."""

    def start() -> None:
        DALLERecipe.pictures = lambda _: None
        function()

    return start


class Groups(Base):
    def group_config(self, variant: Variant, **changes):
        values = {"save_every": SAVE_EVERY, **variant.changes, **changes}
        return configured(variant.kind, STEPS, self.dvae, **values)

    def start(self, config, size: int, run_dir: Path, odd: int = -1, **disturbed) -> Group:
        """A group of which one rank is disturbed."""
        functions = [train(config, run_dir, **(disturbed if rank == odd else {})) for rank in range(size)]
        if size > 2 and config.loop.shard > 1:
            functions = [without_pictures(function) for function in functions]
        return Group(functions, run_dir)

    def undisturbed_group(self, name: str) -> Whole:
        if name not in self.whole:
            variant = VARIANTS[name]
            run_dir = self.folder / f"whole-{name}"
            run_dir.mkdir()
            begin = time.monotonic()
            group = self.start(self.group_config(variant), variant.size, run_dir)
            if failed(group.wait()):
                group.end(0)
                raise RuntimeError(f"{name}: {group.log()}")
            self.whole[name] = Whole.of(run_dir, time.monotonic() - begin)
        return self.whole[name]

    def go_on(self, name: str, run_dir: Path) -> str:
        """The same command again: empty, or what went wrong."""
        variant = VARIANTS[name]
        group = self.start(self.group_config(variant), variant.size, run_dir)
        codes = group.wait()
        if failed(codes):
            group.end(0)
            return f"exits {codes} after resume: {group.log()}"
        return ""

    def group_kills(self, count: int) -> None:
        """kill -9 of one rank, at a random moment or inside a save; the others end as under torchrun."""
        good, problems = 0, []
        inside = landed = left = alone = 0
        for i in range(count):
            name = list(VARIANTS)[i % len(VARIANTS)]
            variant, whole = VARIANTS[name], self.undisturbed_group(name)
            victim = self.random.randrange(variant.size)
            with self.place() as run_dir:
                disturbed = {}
                if self.random.random() < 0.4:
                    inside += 1
                    victim, disturbed = self.inside_save(variant)
                group = self.start(self.group_config(variant), variant.size, run_dir, victim, **disturbed)
                if not disturbed:
                    group.wait(self.random.uniform(0, whole.seconds))
                    group.ranks[victim].kill(signal.SIGKILL)
                codes = group.wait(until=lambda ended, victim=victim: ended[victim])
                wrong = ""
                if codes[victim] == -signal.SIGKILL:
                    landed += 1
                    if self.random.random() < 0.5:
                        left += 1
                        alone += None not in group.wait(10)
                elif failed(codes := group.wait()):  # it came too late, and all end by themselves
                    wrong = f"exits {codes}: {group.log(victim)}"
                group.end(self.random.choice((0, 1)))
                wrong = wrong or self.go_on(name, run_dir) or whole.check(run_dir)
                good += not wrong
                if wrong:
                    problems.append(f"{name}, kill {i} of rank {victim}: {wrong}")
        detail = (
            f"one of 2 or 4 ranks, {inside} inside a save, {landed} before the run had ended; the others then ended "
            f"by themselves {alone} times of {left}; bit-equal after resume"
        )
        self.note("kill -9 of a rank", good, count, detail, problems)

    def inside_save(self, variant: Variant) -> tuple[int, dict]:
        """A rank that takes part in saves, and how it is killed in one."""
        if variant.changes.get("shard") and self.random.random() < 0.5:
            return 1, {"change": dying_in_fill(self.random.randrange(12))}
        return 0, {"on_phase": dying_at(self.random.randrange(36))}

    def group_terminations(self, count: int) -> None:
        """SIGTERM or SIGINT to one rank at a random moment: all save and stop with its number, then go on."""
        good, problems, cut = 0, [], 0
        for i in range(count):
            name = list(VARIANTS)[i % len(VARIANTS)]
            variant, whole = VARIANTS[name], self.undisturbed_group(name)
            victim = self.random.randrange(variant.size)
            number = self.random.choice((signal.SIGTERM, signal.SIGINT))
            with self.place() as run_dir:
                group = self.start(self.group_config(variant), variant.size, run_dir)
                log = run_dir / "metrics.jsonl"
                group.wait(until=lambda ended, log=log: any(ended) or log.exists())  # the loops own the signals now
                group.wait(self.random.uniform(0, 0.8 * whole.seconds))
                group.ranks[victim].kill(number)
                group.wait(until=any)
                saved = store.find_latest(run_dir)  # torchrun ends the others soon after the first
                codes = group.wait()
                cut += set(codes) == {128 + number}
                wrong = "" if set(codes) in ({0}, {128 + number}) else f"exits {codes}: {group.log(victim)}"
                group.end(0)
                if not wrong and saved != store.find_latest(run_dir):
                    wrong = f"a rank had ended before {store.find_latest(run_dir).name} was there"
                wrong = wrong or self.go_on(name, run_dir)
                if not wrong and "powersgd_rank" in variant.changes:
                    # a save replaces the ranks' error buffers by their mean: one more save is another run
                    far = farthest(losses(log_of(run_dir)), losses(whole.log))
                    wrong = "" if far < 0.01 else f"losses differ by {far:.1e}"
                elif not wrong:
                    wrong = whole.check(run_dir)
                good += not wrong
                if wrong:
                    problems.append(f"{name}, signal {number} to rank {victim} in run {i}: {wrong}")
        detail = f"{cut} cut, all ranks exit 143 or 130, saved; bit-equal after resume, losses within 1 % with PowerSGD"
        self.note("SIGTERM, SIGINT to one rank", good, count, detail, problems)

    def chains(self, count: int) -> None:
        """A run of 4 ranks is killed, 2 go on and are killed, 1 ends it: the losses are those of one process."""
        good, problems, worst = 0, [], 0.0

        def config_of(shard: int):
            return configured("dalle", CHAIN, self.dvae, log_every=1, save_every=2, shard=shard)

        config = config_of(1)
        with self.place() as run_dir:
            whole = Child(train(config, run_dir), run_dir / "log")
            if whole.wait():
                raise RuntimeError(whole.log.read_text())
            expected = losses(log_of(run_dir))
        for i in range(count):
            first = self.random.randrange(3, CHAIN // 2)
            second = self.random.randrange(first + 1, CHAIN)
            shards = ((1, 1), (2, 2), (4, 1), (1, 2))[i % 4]
            wrong = ""
            with self.place() as run_dir:
                for size, shard, step in zip((4, 2), shards, (first, second), strict=True):
                    victim = self.random.randrange(size)
                    group = self.start(config_of(shard), size, run_dir, victim, change=dying_before(step))
                    codes = group.wait(until=lambda ended, victim=victim: ended[victim])
                    group.end(0)
                    if codes[victim] != -signal.SIGKILL:
                        wrong = wrong or f"{size} ranks: exits {codes}: {group.log(victim)}"
                last = Child(train(config, run_dir), run_dir / "log")
                if not wrong and (code := last.wait()):
                    wrong = f"1 rank: exit {code}: {last.log.read_text()[-300:]}"
                if not wrong:
                    far = farthest(losses(log_of(run_dir)), expected)
                    worst = max(worst, far)
                    wrong = "" if far < 1e-6 else f"losses differ by {far:.1e}"
            good += not wrong
            if wrong:
                problems.append(f"chain {i}, killed at {first} and {second}, shards {shards}: {wrong}")
        detail = f"losses of one process within 1e-6 (found {worst:.1e})"
        self.note("killed at 4 ranks, then at 2, ended by 1", good, count, detail, problems)
