# SPDX-License-Identifier: MIT
"""Processes that stay: tests send them functions to run as ranks of a gloo group."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Ranks:
    """`size` processes in one default group.

    `run(function, *args, world=2)` calls function(group, *args) in the first two and returns what each returned;
    functions belong to importable modules. Without `initialize` there are no groups, but the environment that torchrun
    gives to its ranks.
    """

    def __init__(self, size: int, initialize: bool = True) -> None:
        context = mp.get_context("forkserver")  # torch is imported once
        context.set_forkserver_preload(
            ["torch._dynamo", "torch.distributed.fsdp", "dalle_fast.models", "dalle_fast.parallel"]
        )
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, size, self.folder.name, initialize), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, world: int) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for pipe in self.pipes:
            pipe.send((function, args, world, port))
        answers = [pipe.recv() for pipe in self.pipes]
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        if errors:
            raise AssertionError("\n".join(errors))
        return [result for result, _ in answers[:world]]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def _serve(pipe, rank: int, size: int, folder: str, initialize: bool) -> None:
    torch.set_num_threads(1)
    groups = dict.fromkeys(range(1, size + 1))
    if initialize:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=120),  # a rank that failed is not waited for longer
        )
        groups = {n: dist.new_group(list(range(n))) for n in groups}
    while True:
        try:
            function, args, world, port = pipe.recv()
        except EOFError:
            break
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1")
        try:
            torch.manual_seed(0)
            pipe.send((function(groups[world], *args) if rank < world else None, ""))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    if initialize:
        dist.destroy_process_group()
