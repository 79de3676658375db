# SPDX-License-Identifier: MIT
"""The commands of "Train on a cluster" in the README, as written there, on two network namespaces."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_train import log_of

from dalle_fast.cli import main
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


SHORT = " --loop.sample-every 0 --loop.batch-size 8 --loop.save-every 3 --loop.log-every 1 --loop.steps "


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """The working folder of each machine."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.fixture
def options(tmp_path) -> str:
    return f" --data.source {few_pairs(tmp_path / 'pairs')}{SHORT}"


def run_here(folder: Path, command: str, options: str, monkeypatch) -> None:
    """A command of the README in this process alone."""
    monkeypatch.chdir(folder)
    main([*shlex.split(command.split("dalle_fast ")[1].replace("--loop.shard 2", "")), *shlex.split(options)])


def test_the_readme_trains_a_dvae_on_two_machines(folders, machines, options):
    run_everywhere(machines, folders, commands()[0] + options + "2")
    assert [line["step"] for line in log_of(folders[0] / "runs/mine/dvae") if "loss" in line] == [1, 2]
    assert not (folders[1] / "runs").exists()  # one machine writes


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_readme_trains_a_transformer_on_two_machines(goes_on, folders, machines, options, monkeypatch):
    """From nothing, and from the checkpoint of one process, which only the first machine has."""
    dvae, dalle = commands()
    run_here(folders[0], dvae, options + "2", monkeypatch)
    shutil.copytree(folders[0] / "runs/mine/dvae", folders[1] / "runs/mine/dvae")
    if goes_on:
        run_here(folders[0], dalle, options + "3", monkeypatch)
    run_everywhere(machines, folders, dalle + options + "4")
    run_dir = folders[0] / "runs/mine/dalle"
    assert [line["step"] for line in log_of(run_dir) if "loss" in line] == [1, 2, 3, 4]
    assert (store.find_latest(run_dir) / "error.safetensors").exists()
    assert not (folders[1] / "runs/mine/dalle").exists()
