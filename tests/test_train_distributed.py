# SPDX-License-Identifier: MIT
"""The trainer in 1, 2 and 4 processes: the same losses, one checkpoint for all, and no rank left behind."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from test_train import configured, final_state, log_of
from tiny import dvae_config

from dalle_fast.data import sample_indices
from dalle_fast.errors import CheckpointError, ConfigError, DataError, UserError
from dalle_fast.models import store
from dalle_fast.train import Interrupted, run
from dalle_fast.train.dalle import DALLERecipe
from dalle_fast.train.loop import Loop
from dalle_fast.train.run import build, join, save_config

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    pool = Ranks(4, initialize=False)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def dvae(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    run(dvae_config(3), root / "dvae", quiet=True)
    return root / "dvae"


def train(_, config, run_dir: Path) -> str:
    """As one rank; what stopped it."""
    try:
        run(config, run_dir, quiet=True)
    except (UserError, Interrupted) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in log_of(run_dir) if "loss" in line]


def assert_same_losses(run_dir: Path, whole: Path) -> None:
    found, expected = losses(run_dir), losses(whole)
    assert len(found) == len(expected)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)


LAYOUTS = {  # kind, ranks, what changes
    "dvae": ("dvae", 4, {}),
    "dvae in parts": ("dvae", 2, {"accumulate": 2}),
    "clip": ("clip", 4, {}),
    "dalle": ("dalle", 2, {}),
    "dalle in parts": ("dalle", 4, {"accumulate": 2}),
    "2 replicas of 2 shards": ("dalle", 4, {"shard": 2}),
    "4 shards, recomputed": ("dalle", 4, {"shard": 4, "checkpointing": True, "accumulate": 2}),
    "AdamW, 2 shards": ("dalle_adamw", 2, {"shard": 2}),
    "taught codes": ("dvae_taught", 2, {}),
    "Dion": ("dalle_dion", 2, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_ranks_has_the_losses_of_one(tmp_path, pool, dvae, layout):
    kind, world, changes = LAYOUTS[layout]
    every = 0 if layout == "4 shards, recomputed" else 4  # shards draw pictures together, token by token
    config = configured(kind, 8, dvae, log_every=1, sample_every=every)
    run(config, tmp_path / "one", quiet=True)
    changed = dataclasses.replace(config, loop=dataclasses.replace(config.loop, **changes))
    assert pool.run(train, changed, tmp_path / "many", world=world) == [""] * world
    assert_same_losses(tmp_path / "many", tmp_path / "one")
    for line, expected in zip(log_of(tmp_path / "many"), log_of(tmp_path / "one"), strict=True):
        assert line.keys() == expected.keys()
        assert line == pytest.approx(expected, rel=2e-5)
    assert {p.name for p in (tmp_path / "many" / "samples").glob("*")} == {
        p.name for p in (tmp_path / "one" / "samples").glob("*")
    }
    assert final_state(tmp_path / "many").keys() == final_state(tmp_path / "one").keys()


def test_scales_of_gradients_are_the_same_at_any_number_of_ranks(tmp_path, pool, dvae):
    config = configured("dalle_fp16", 8, dvae, log_every=1)
    run(config, tmp_path / "one", quiet=True)
    for name, shard in (("copies", 1), ("shards", 2)):
        changed = dataclasses.replace(config, loop=dataclasses.replace(config.loop, shard=shard))
        pool.run(train, changed, tmp_path / name, world=4)
        torch.testing.assert_close(  # branches are float16
            torch.tensor(losses(tmp_path / name)), torch.tensor(losses(tmp_path / "one")), rtol=1e-4, atol=0
        )
        histograms = [line["histograms"] for line in log_of(tmp_path / name) if "histograms" in line]
        expected = [line["histograms"] for line in log_of(tmp_path / "one") if "histograms" in line]
        for found, one in zip(histograms, expected, strict=True):
            assert [sum(row) for row in found["parameters"]["counts"]] == pytest.approx(
                [sum(row) for row in one["parameters"]["counts"]], abs=5
            )


def batches(_, config, run_dir: Path) -> list[list[str]]:
    recipe = build(config, run_dir)
    try:
        return [recipe.batch(step).keys for step in range(3)]
    finally:
        recipe.world.leave()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_samples_come_in_the_same_order(tmp_path, pool, world):
    config = dvae_config(3)
    ranks = pool.run(batches, config, tmp_path, world=world)
    recipe = build(config, tmp_path)
    for step in range(3):
        keys = [key for rank in ranks for key in rank[step]]
        indices = sample_indices(config.loop.seed, step * 8, 8, len(recipe.dataset))
        assert keys == [recipe.dataset.keys[i] for i in indices]


# ---- checkpoints


@pytest.mark.parametrize("shards", [(1, 1, 1, 1), (2, 2, 1, 4)], ids=["copies", "shards"])
def test_4_ranks_then_2_then_1_then_4(tmp_path, pool, dvae, shards):
    config = configured("dalle", 12, dvae, log_every=1, save_every=3)
    run(config, tmp_path / "one", quiet=True)
    for world, shard, steps in zip((4, 2, 1, 4), shards, (3, 6, 9, 12), strict=True):
        loop = dataclasses.replace(config.loop, steps=steps, shard=shard)
        assert pool.run(train, dataclasses.replace(config, loop=loop), tmp_path / "many", world=world) == [""] * world
    assert_same_losses(tmp_path / "many", tmp_path / "one")
    found, expected = (store.find_latest(tmp_path / name) for name in ("many", "one"))
    for name in ("model", "ema"):
        many, one = (store.read_tensors(folder / f"{name}.safetensors") for folder in (found, expected))
        torch.testing.assert_close(many, one, rtol=0, atol=2e-4)
    many, one = (store.read_tensors(folder / "optimizer.safetensors") for folder in (found, expected))
    assert {name: (t.shape, t.dtype) for name, t in many.items()} == {n: (t.shape, t.dtype) for n, t in one.items()}


def train_until(_, config, run_dir: Path, step: int, rank: int, number: int) -> str:
    """As `train`, but one rank is given a signal before an update."""
    world = join(config)
    loop = Loop(build(config, run_dir, world), run_dir, quiet=True)
    if world.is_first:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.toml", "dalle")
    update = loop.update

    def signalled():
        if loop.step == step and world.rank == rank:
            os.kill(os.getpid(), number)
        return update()

    loop.update = signalled
    try:
        loop.run()
    except Interrupted as error:
        return f"{error.signal_number} at {loop.step}"
    finally:
        world.leave()
    return ""


VARIANTS = {
    "copies": {},
    "shards": {"shard": 2},
    "powersgd": {"powersgd_rank": 8},
    "both": {"powersgd_rank": 8, "shard": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, pool, dvae, variant):
    config = configured("dalle", 8, dvae, log_every=1, save_every=4, sample_every=4, **VARIANTS[variant])
    pool.run(train, config, tmp_path / "whole", world=4)
    half = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=4))
    pool.run(train, half, tmp_path / "cut", world=4)
    pool.run(train, config, tmp_path / "cut", world=4)
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert ("error.safetensors" in final_state(tmp_path / "cut")) == ("powersgd_rank" in VARIANTS[variant])


@pytest.mark.parametrize("rank", [0, 3])
def test_a_signal_to_one_rank_stops_all_and_saves(tmp_path, pool, dvae, rank):
    config = configured("dalle", 8, dvae, log_every=1, shard=2)
    stopped = pool.run(train_until, config, tmp_path / "cut", 4, rank, signal.SIGTERM, world=4)
    assert stopped == ["15 at 5"] * 4
    assert store.find_latest(tmp_path / "cut").name == "step-00000005"
    pool.run(train, config, tmp_path / "cut", world=4)
    pool.run(train, config, tmp_path / "whole", world=4)
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")


def train_slowly_written(_, config, run_dir: Path, poisoned: int) -> tuple[str, list[str]]:
    """As `train`, where a save takes its time and rank 1 is stopped before update 4, or its loss is NaN from one on;
    also, the checkpoints that are there when this rank ends."""
    update, loss = Loop.update, DALLERecipe.loss

    def signalled(loop):
        if loop.step == 4 and not poisoned and loop.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(loop)

    def spoiled(recipe, inputs, rows, step):
        value, metrics = loss(recipe, inputs, rows, step)
        return (value * float("nan") if poisoned and step >= poisoned else value), metrics

    Loop.update, DALLERecipe.loss = signalled, spoiled
    try:
        run(config, run_dir, quiet=True, on_phase=lambda phase: time.sleep(0.5) if phase == "manifest" else None)
        found = ""
    except (UserError, Interrupted) as error:
        found = type(error).__name__
    finally:
        Loop.update, DALLERecipe.loss = update, loss
    return found, sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("shard", [1, 2])
def test_no_rank_ends_before_its_checkpoint_is_there(tmp_path, pool, dvae, shard):
    config = configured("dalle", 8, dvae, shard=shard, save_every=3, max_skipped=0)
    stopped = pool.run(train_slowly_written, config, tmp_path / "stopped", 0, world=2)
    assert stopped == [("Interrupted", ["latest", "step-00000003", "step-00000005"])] * 2
    # the update after a save stops the run
    failed = pool.run(train_slowly_written, config, tmp_path / "failed", 3, world=2)
    assert [error for error, _ in failed] == ["TrainingError"] * 2
    assert failed[0][1] == ["latest", "step-00000003"]


def test_the_mean_of_error_buffers_is_stored_once_and_spreads(tmp_path, pool, dvae):
    config = configured("dalle", 4, dvae, log_every=1, powersgd_rank=4)
    pool.run(train, config, tmp_path, world=4)
    folder = store.find_latest(tmp_path)
    model, error = (store.read_tensors(folder / f"{name}.safetensors") for name in ("model", "error"))
    assert {name: t.shape for name, t in error.items()} == {name: model[name].shape for name in error}
    assert {t.dtype for t in error.values()} == {torch.uint16}
    assert any(bool((t.view(torch.int16) != 0).any()) for t in error.values())
    for world, shard, steps in ((2, 2, 6), (1, 1, 8), (4, 1, 10)):
        loop = dataclasses.replace(config.loop, steps=steps, shard=shard)
        assert pool.run(train, dataclasses.replace(config, loop=loop), tmp_path, world=world) == [""] * world
    assert len(losses(tmp_path)) == 10
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def failing_save(_, config, run_dir: Path, phase: str) -> tuple[str, list[str]]:
    def full(name: str) -> None:
        if name == phase and os.environ["RANK"] == "0":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    found = ""
    try:
        run(config, run_dir, quiet=True, on_phase=full)
    except CheckpointError as error:
        found = str(error)
    return found, sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("phase", ["write optimizer.safetensors", "manifest", "rename"])
def test_a_full_disk_stops_all_ranks_with_one_message(tmp_path, pool, dvae, phase):
    config = configured("dalle", 3, dvae, shard=2)
    pool.run(train, config, tmp_path, world=2)
    longer = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=6))
    (first, left), (second, _) = pool.run(failing_save, longer, tmp_path, phase, world=2)
    assert "could not be written (No space left on device)" in first
    assert left == ["latest", "step-00000003"]
    if phase.startswith("write"):
        assert "could not be written" in second
    assert pool.run(train, longer, tmp_path, world=2) == ["", ""]


# ---- what may go wrong


def poisoned(_, config, run_dir: Path, rank: int) -> list[bool]:
    """Whether each update was applied; the loss of one rank is NaN in the third."""
    world = join(config)
    loop = Loop(build(config, run_dir, world), run_dir, quiet=True)
    loss = loop.recipe.loss

    def spoiled(inputs, rows, step):
        value, metrics = loss(inputs, rows, step)
        return (value * float("nan") if step == 2 and world.rank == rank else value), metrics

    loop.recipe.loss = spoiled
    applied = []
    try:
        for _ in range(5):
            applied.append("grad_norm" in loop.update())
        assert all(torch.isfinite(p).all() for p in loop.parameters)
    finally:
        world.leave()
    return applied


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_in_one_rank_skips_the_update_of_all(tmp_path, pool, dvae, variant):
    config = configured("dalle", 5, dvae, **VARIANTS[variant])
    assert pool.run(poisoned, config, tmp_path, 1, world=4) == [[True, True, False, True, True]] * 4


def test_powersgd_trains_as_well_as_whole_gradients(tmp_path, pool, dvae):
    config = configured("dalle", 30, dvae, log_every=30)
    pool.run(train, config, tmp_path / "whole", world=2)
    for name, changes in (("copies", {}), ("shards", {"shard": 2}), ("scaled", {"precision": "fp16-resblock"})):
        loop = dataclasses.replace(config.loop, powersgd_rank=8, **changes)
        assert pool.run(train, dataclasses.replace(config, loop=loop), tmp_path / name, world=2) == ["", ""]
        assert losses(tmp_path / name)[-1] == pytest.approx(losses(tmp_path / "whole")[-1], rel=0.02)


def train_without_data(_, config, run_dir: Path) -> str:
    """As `train`; the data cannot be opened where rank 1 runs."""
    from dalle_fast.train import recipe

    before = recipe.open_dataset

    def broken(*arguments):
        raise DataError("the disk is gone")

    recipe.open_dataset = broken if os.environ["RANK"] == "1" else before
    try:
        return train(_, config, run_dir)
    finally:
        recipe.open_dataset = before


def test_an_error_of_one_rank_is_told_to_all(tmp_path, pool):
    found = pool.run(train_without_data, dvae_config(4), tmp_path / "run", world=2)
    assert found == ["DataError: rank 1: the disk is gone"] * 2


def test_what_does_not_come_out_even_is_refused(tmp_path, pool, dvae):
    config = dvae_config(2, batch_size=6)
    for error in pool.run(train, config, tmp_path / "a", world=4):
        assert "loop.batch_size: expected a multiple of 4 ranks x 1 parts (loop.accumulate), got 6" in error
    config = configured("dalle", 2, dvae, shard=3)
    for error in pool.run(train, config, tmp_path / "b", world=4):
        assert "loop.shard: expected a divisor of the 4 ranks of a machine (torchrun --nproc-per-node), got 3" in error
    with pytest.raises(ConfigError, match="powersgd_rank: expected a multiple of shard 2, got 5"):
        configured("dalle", 2, dvae, shard=2, powersgd_rank=5)
    with pytest.raises(ConfigError, match="loop.shard: is for dalle; expected 1 for dvae"):
        dvae_config(2, shard=2)


def test_two_groups_of_ranks_cannot_share_a_folder(tmp_path, pool):
    import fcntl

    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for error in pool.run(train, dvae_config(2), tmp_path, world=2):
            assert "is training here already" in error


# ---- torchrun itself


def test_torchrun_a_rank_is_terminated_and_the_same_command_goes_on(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "--", "dalle_fast", "train", "dvae", "--config", str(tmp_path / "dvae.toml"),
        "--run", str(tmp_path / "run"),
    ]  # fmt: skip
    save_config(dvae_config(150, save_every=100), tmp_path / "dvae.toml", "dvae")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses(tmp_path / "run")) < 2:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGTERM)
    output, _ = child.communicate(timeout=120)
    assert child.returncode != 0
    assert "The same command goes on from there" in output
    stopped = int(store.find_latest(tmp_path / "run").name[5:])
    assert 0 < stopped < 150
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"dvae: goes on at step {stopped} of 150" in done.stderr
    assert done.stdout.count("dvae: 150 updates in") == 1
