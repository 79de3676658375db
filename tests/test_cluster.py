# SPDX-License-Identifier: MIT
"""The commands of "Train on a cluster" in the README, as written there, on two network namespaces."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_train import log_of

from dalle_fast.models import store

README = Path(__file__).parent.parent / "README.md"
HEAD = "192.0.2.1"  # TEST-NET-1: nobody's


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two namespaces with a link between them."""
    names = [f"df-test-{os.getpid()}-{i}" for i in range(2)]
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
            for name, address in zip(names, (HEAD, "192.0.2.2"), strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def commands() -> list[str]:
    """Those of the section, each in one line."""
    section = README.read_text().split("## Train on a cluster")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.S)
    return [line for line in block.replace("\\\n", "").splitlines() if line and not line.startswith("#")]


def run_everywhere(machines: list[str], folders: list[Path], command: str) -> None:
    bin_folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(README.parent),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HEAD": HEAD,
    }
    children = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, "bash", "-c", command],
            cwd=folder,
            env={**environment, "NODE": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, (name, folder) in enumerate(zip(machines, folders, strict=True))
    ]
    try:
        outputs = [child.communicate(timeout=240)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)


def few_pairs(folder: Path) -> Path:
    """Pictures with captions: fewer than the emoji, which every process would read and encode."""
    folder.mkdir()
    for i in range(24):
        pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"noise number {i}")
    return folder


def test_the_readme_trains_on_two_machines_and_goes_on(tmp_path, machines):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    dvae, dalle = commands()
    data = f" --data.source {few_pairs(tmp_path / 'pairs')}"
    short = data + " --loop.sample-every 0 --loop.batch-size 8 --loop.save-every 3 --loop.log-every 1 --loop.steps "
    run_everywhere(machines, folders, dvae + short + "2")
    assert not (folders[1] / "runs").exists()  # one machine writes
    shutil.copytree(folders[0] / "runs/mine/dvae", folders[1] / "runs/mine/dvae")
    for steps in (3, 5):  # the second machine has no checkpoint to go on from
        run_everywhere(machines, folders, dalle + short + str(steps))
    run_dir = folders[0] / "runs/mine/dalle"
    assert [line["step"] for line in log_of(run_dir) if "loss" in line] == [1, 2, 3, 4, 5]
    assert (store.find_latest(run_dir) / "error.safetensors").exists()
    assert not (folders[1] / "runs/mine/dalle").exists()
