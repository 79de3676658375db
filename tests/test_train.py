# SPDX-License-Identifier: MIT
"""The loop: bit-exact resume after kill -9, accumulation, skipping, signals, locks."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import clip_config, dalle_config, dvae_config

from dalle_fast.errors import CheckpointError, ConfigError, TrainingError
from dalle_fast.models import store
from dalle_fast.train import DataConfig, Interrupted, run
from dalle_fast.train.loop import Loop
from dalle_fast.train.run import build

TESTS = Path(__file__).parent

CONFIGS = {
    "dvae": lambda steps, **changes: dvae_config(steps, **changes),
    "clip": lambda steps, **changes: clip_config(steps, **changes),
    "dalle": lambda steps, **changes: dalle_config(steps, **changes),
    "dalle_fp16": lambda steps, **changes: dalle_config(steps, precision="fp16-resblock", log_histograms=8, **changes),
    "dvae_taught": lambda steps, **changes: dataclasses.replace(
        dvae_config(steps, **changes), teacher_weight=0.2, initial_tau=0.5
    ),
    "dalle_dion": lambda steps, **changes: dataclasses.replace(
        dalle_config(steps, optimizer="dion", schedule="cosine", **changes),
        data=DataConfig("emoji", emphasis="skin tone$"),
        dion_rank=8,
    ),
    "dalle_adamw": lambda steps, **changes: dalle_config(steps, optimizer="adamw", schedule="cosine", **changes),
}


@pytest.fixture(scope="module")
def dvae(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    run(dvae_config(3), root / "dvae", quiet=True)
    return root / "dvae"


def configured(kind: str, steps: int, dvae: Path, **changes):
    config = CONFIGS[kind](steps, **changes)
    if not kind.startswith("dalle"):
        return config
    # dropout draws from torch's generator: it has to resume as well
    model = dataclasses.replace(config.model, dropout=0.1)
    return dataclasses.replace(config, dvae=str(dvae), model=model)


def final_state(run_dir: Path) -> dict[str, bytes]:
    folder = store.find_latest(run_dir)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def log_of(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "images_per_second")} for line in lines]


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_train import configured
from pathlib import Path
from dalle_fast.train.loop import Loop
from dalle_fast.train.run import build, save_config
config = configured({kind!r}, 20, Path({dvae!r}), save_every=5)
run_dir = Path({run_dir!r})
loop = Loop(build(config, run_dir), run_dir, quiet=True)
run_dir.mkdir(parents=True, exist_ok=True)
save_config(config, run_dir / "config.toml", {kind!r})
update = loop.update
def dying_update():
    if loop.step == 7:
        loop.writer.wait()  # step 5 is on the disk
        os.kill(os.getpid(), signal.SIGKILL)
    return update()
loop.update = dying_update
loop.run()
"""


@pytest.mark.parametrize("kind", CONFIGS)
def test_kill_9_after_7_steps_and_13_more_equal_20(tmp_path, dvae, kind):
    torch.set_num_threads(1)
    code = CHILD.format(tests=str(TESTS), kind=kind, dvae=str(dvae), run_dir=str(tmp_path / "killed"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert store.find_latest(tmp_path / "killed").name == "step-00000005"
    config = configured(kind, 20, dvae, save_every=5)
    run(config, tmp_path / "killed", quiet=True)
    run(config, tmp_path / "whole", quiet=True)
    assert final_state(tmp_path / "killed") == final_state(tmp_path / "whole")
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_a_finished_run_is_left_alone(tmp_path):
    config = dvae_config(4)
    first = run(config, tmp_path, quiet=True)
    before = final_state(tmp_path)
    second = run(config, tmp_path, quiet=True)
    assert (first.step, second.step) == (4, 4)
    assert second.metrics == first.metrics
    assert final_state(tmp_path) == before
    longer = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=6))
    assert run(longer, tmp_path, quiet=True).step == 6


@pytest.mark.parametrize("kind", ["dvae", "dalle"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, dvae, kind):
    grads = []
    for accumulate in (1, 4):
        config = configured(kind, 1, dvae, accumulate=accumulate)
        if kind == "dalle":
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
        recipe = build(config, tmp_path)
        loop = Loop(recipe, tmp_path, quiet=True)
        collected = {}
        loop.optimizer.step = lambda loop=loop, collected=collected: collected.update(
            {i: p.grad.clone() for i, p in enumerate(loop.parameters) if p.grad is not None}
        )
        config_free = dataclasses.replace(config.loop, clip_norm=0.0)
        loop.config = config_free
        loop.update()
        grads.append(collected)
    assert grads[0].keys() == grads[1].keys()
    for i in grads[0]:
        torch.testing.assert_close(grads[0][i], grads[1][i], rtol=2e-4, atol=2e-6)


def test_training_lowers_the_loss(tmp_path):
    config = dvae_config(60, log_every=10)
    run(config, tmp_path, quiet=True)
    losses = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0] - 0.2


def test_updates_without_finite_gradients_are_skipped_then_stop_the_run(tmp_path):
    config = dvae_config(30, save_every=5, max_skipped=3, log_every=1)
    recipe = build(config, tmp_path)
    loop = Loop(recipe, tmp_path, quiet=True)
    loss = recipe.loss

    def poisoned(inputs, rows, step):
        value, metrics = loss(inputs, rows, step)
        return (value * float("nan") if step in (3, 8) or step >= 12 else value), metrics

    recipe.loss = poisoned
    with pytest.raises(TrainingError, match=r"step 15: 4 updates in a row had gradients that are not finite \(samples"):
        loop.run()
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines if line.get("skipped")] == [4, 9, 13, 14, 15]
    assert all(("grad_norm" in line) != ("skipped" in line) for line in lines if "loss" in line)
    tensors = store.read_tensors(store.find_latest(tmp_path) / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_scales_train_to_the_loss_of_float32(tmp_path, dvae):
    results = []
    for precision in ("fp32", "fp16-resblock"):
        config = dataclasses.replace(dalle_config(40, precision=precision), dvae=str(dvae), learning_rate=3e-3)
        results.append(run(config, tmp_path / precision, quiet=True).metrics)
    assert results[0]["loss"] < 1.5
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-3)
    assert results[1]["eval/heldout_image_loss"] == pytest.approx(results[0]["eval/heldout_image_loss"], rel=1e-3)


def test_an_overflow_skips_the_update_and_lowers_a_scale(tmp_path, dvae):
    config = configured("dalle_fp16", 4, dvae, max_skipped=3)
    loop = Loop(build(config, tmp_path), tmp_path, quiet=True)
    state = loop.scaler.state_dict()
    loop.scaler.load_state_dict({**state, "exponents": [13000, 24000] + state["exponents"][2:]})
    before = [p.detach().clone() for p in loop.parameters]
    recipe_loss = loop.recipe.loss
    loop.recipe.loss = lambda *arguments: (recipe_loss(*arguments)[0] * 2**4, {})
    loop.update()
    assert loop.scaler.state_dict()["exponents"] == [13001, 23500] + [13001] * 4
    assert all(torch.equal(p, q) for p, q in zip(before, loop.parameters, strict=True))
    assert (loop.window.skipped, loop.skipped_in_a_row) == (1, 1)
    loop.update()  # within the window: skipped, not lowered
    assert loop.scaler.state_dict()["exponents"][1] == 23500
    assert loop.skipped_in_a_row == 2
    for _ in range(3 + 125 - 2):
        loop._skip()
    loop.scaler.lowered.fill_(True)  # there is hope
    loop._skip()
    assert loop.skipped_in_a_row == 1
    loop.scaler.lowered.fill_(False)
    with pytest.raises(TrainingError, match="129 updates in a row had gradients that are not finite"):
        for _ in range(200):
            loop._skip()


def test_checkpoints_from_before_there_were_scales_load(tmp_path, dvae):
    config = configured("dalle", 4, dvae)
    run(config, tmp_path, quiet=True)
    folder = store.find_latest(tmp_path)
    files = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"}
    state = json.loads(files["state.json"].read_text())
    assert state.pop("gradient_scales") is None
    old = {name: store.read_tensors(path) for name, path in files.items() if path.suffix == ".safetensors"}
    old |= {name: json.loads(path.read_text()) for name, path in files.items() if path.suffix == ".json"}
    store.save_snapshot(tmp_path / "checkpoints", "step-00000005", {**old, "state.json": {**state, "step": 5}})
    longer = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=6))
    assert run(longer, tmp_path, quiet=True).step == 6


def test_sigterm_saves_and_the_run_goes_on(tmp_path):
    config = dvae_config(12, save_every=100)
    recipe = build(config, tmp_path / "cut")
    loop = Loop(recipe, tmp_path / "cut", quiet=True)
    update = loop.update

    def signalled():
        if loop.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update()

    loop.update = signalled
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step 5; saved in") as caught:
        loop.run()
    assert caught.value.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    run(config, tmp_path / "cut", quiet=True)
    run(config, tmp_path / "whole", quiet=True)
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")


def test_two_runs_cannot_share_a_folder(tmp_path):
    config = dvae_config(4)
    outer = Loop(build(config, tmp_path), tmp_path, quiet=True)
    inner = Loop(build(config, tmp_path), tmp_path, quiet=True)
    update = outer.update
    refused = []

    def update_with_rival():
        if outer.step == 1:
            with pytest.raises(TrainingError, match=f"process {os.getpid()} is training here already"):
                inner.run()
            refused.append(True)
        return update()

    outer.update = update_with_rival
    outer.run()
    assert refused == [True]


def test_another_config_in_the_same_folder_is_refused_by_key(tmp_path):
    run(dvae_config(2), tmp_path, quiet=True)
    other = dataclasses.replace(dvae_config(2), beta=1.0)
    with pytest.raises(ConfigError, match=r"beta: this folder's run has 6.6, now 1.0 is asked for"):
        run(other, tmp_path, quiet=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        run(dvae_config(2), tmp_path, resume=False, quiet=True)


def test_a_damaged_checkpoint_falls_back_and_ends_the_same(tmp_path, capsys):
    config = dvae_config(9, save_every=3)
    run(config, tmp_path, quiet=True)
    whole = final_state(tmp_path)
    newest = store.find_latest(tmp_path) / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    run(config, tmp_path)
    assert "passed over" in capsys.readouterr().out
    assert final_state(tmp_path) == whole
    for path in (tmp_path / "checkpoints").glob("step-*/state.json"):
        path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(.*state.json"):
        run(config, tmp_path, quiet=True)


def test_a_transformer_does_not_go_on_with_another_dvae(tmp_path, dvae):
    config = dataclasses.replace(dalle_config(2), dvae=str(dvae))
    run(config, tmp_path / "dalle", quiet=True)
    run(dvae_config(4), tmp_path / "other", quiet=True)
    longer = dataclasses.replace(config, dvae=str(tmp_path / "other"), loop=dataclasses.replace(config.loop, steps=3))
    with pytest.raises(CheckpointError, match="tokens of another dVAE"):
        run(longer, tmp_path / "dalle", quiet=True)


def test_a_transformer_that_does_not_fit_its_dvae_is_refused(tmp_path, dvae):
    config = dataclasses.replace(dalle_config(2), dvae=str(dvae))
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, image_vocab_size=32))
    with pytest.raises(ConfigError, match="model: 32 codes on grid"):
        run(wrong, tmp_path / "dalle", quiet=True)
    missing = dataclasses.replace(config, dvae=str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="nothing: no checkpoint here"):
        run(missing, tmp_path / "dalle", quiet=True)


def test_pictures_and_held_out_losses_are_written(tmp_path, dvae):
    config = configured("dalle", 4, dvae, sample_every=2)
    result = run(config, tmp_path, quiet=True)
    assert {"eval/seen_image_loss", "eval/heldout_image_loss"} <= set(result.metrics)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_augmented_and_bfloat16_and_checkpointed_runs(tmp_path, dvae):
    config = configured("dalle", 3, dvae, precision="bf16", checkpointing=True)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, augment="jitter"))
    result = run(config, tmp_path / "a", quiet=True)
    assert result.metrics["loss"] > 0
    assert run(dvae_config(3, precision="bf16"), tmp_path / "b", quiet=True).step == 3


def test_minutes_choose_the_number_of_updates_once(tmp_path):
    config = dvae_config(1000)
    result = run(config, tmp_path, minutes=0.02, quiet=True)
    assert 10 <= result.step < 1000
    again = run(config, tmp_path, minutes=5.0, quiet=True)  # the folder's run is finished: its length stays
    assert again.step == result.step
    with pytest.raises(ConfigError, match="minutes: expected more than 0"):
        run(config, tmp_path / "x", minutes=0.0, quiet=True)


def test_progress_is_plain_lines_without_a_terminal(tmp_path, capsys):
    run(dvae_config(4), tmp_path)
    assert "dvae 4/4  loss" in capsys.readouterr().err


def test_clip_needs_the_whole_batch():
    with pytest.raises(ConfigError, match=r"loop.accumulate: a contrastive loss needs the whole batch"):
        clip_config(2, accumulate=2)


def test_cuda_is_refused_where_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="device: cuda is not available here"):
        run(dvae_config(2, device="cuda"), tmp_path, quiet=True)


def test_time_is_not_part_of_what_is_learned(tmp_path):
    """Two runs at different speeds give the same weights."""
    config = dvae_config(4)
    run(config, tmp_path / "a", quiet=True)
    recipe = build(config, tmp_path / "b")
    loop = Loop(recipe, tmp_path / "b", quiet=True)
    update = loop.update
    loop.update = lambda: (time.sleep(0.05), update())[1]
    loop.run()
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


def broken_pictures(folder: Path, count: int, bad: set[int]) -> str:
    """A folder of captioned pictures, some of which are not pictures."""
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        path = folder / f"{i:03}.png"
        if i in bad:
            path.write_bytes(b"not a picture")
        else:
            Image.new("RGB", (24, 24), (i % 256, 3 * i % 256, 7 * i % 256)).save(path)
        path.with_suffix(".txt").write_text(f"picture {i}")
    return str(folder)


@pytest.mark.parametrize("kind", ["dvae", "dalle"])
def test_what_cannot_be_read_is_replaced_and_listed_once(tmp_path, dvae, kind):
    config = configured(kind, 12, dvae, save_every=5)
    source = broken_pictures(tmp_path / "data", 48, {5, 29})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    run(config, tmp_path / "whole", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "replaced.jsonl").read_text().splitlines()]
    assert all("not a picture" in line["error"] for line in lines)
    assert {line["error"].split(".png")[0][-3:] for line in lines} == {"005", "029"}
    recipe = build(config, tmp_path / "cut")
    loop = Loop(recipe, tmp_path / "cut", quiet=True)
    update = loop.update

    def signalled():
        if loop.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return update()

    loop.update = signalled
    with pytest.raises(Interrupted):
        loop.run()
    run(config, tmp_path / "cut", quiet=True)
    assert (tmp_path / "cut" / "replaced.jsonl").read_text() == (tmp_path / "whole" / "replaced.jsonl").read_text()
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")


def test_too_much_that_cannot_be_read_stops_the_run(tmp_path):
    config = dvae_config(12)
    source = broken_pictures(tmp_path / "data", 40, set(range(0, 40, 3)))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    with pytest.raises(TrainingError, match=r"samples cannot be read \(.*replaced.jsonl lists them; the last: .*png"):
        run(config, tmp_path / "run", quiet=True)
    allowed = dataclasses.replace(config, loop=dataclasses.replace(config.loop, max_replaced=1.0))
    assert run(allowed, tmp_path / "run2", quiet=True).step == 12
