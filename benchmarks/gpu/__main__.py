# SPDX-License-Identifier: MIT
"""make gpu: builds in place, tests, sanitizers, the benchmark table; a short table last, everything as JSON.

Needs torch, pybind11, cmake, ninja, pytest with xdist and timeout, nvcc and compute-sanitizer; no network.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# seconds for each step; the sum, with some 90 for the build, stays below ten minutes
TEST_SECONDS, SANITIZER_SECONDS, TABLE_SECONDS = 150, 100, 210


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument("--steps", default="build,tests,sanitizers,table", help="which, in this order")
    parser.add_argument("--only", default="", help="rows of the table whose name matches this pattern")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the table alone, to try it")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    steps = options.steps.split(",") if options.device == "cuda" else ["table"]
    known = {"build": build, "tests": tests, "sanitizers": sanitizers}
    if unknown := set(steps) - {*known, "table"}:
        parser.error(f"--steps: expected some of build, tests, sanitizers, table, got {', '.join(sorted(unknown))}")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.exit(2, f"make gpu: torch {torch.__version__} sees no CUDA device; `nvidia-smi` says why\n")
    report: dict = {}
    failed = []
    started = time.monotonic()
    for step in steps:
        if step == "table":
            continue
        begin = time.monotonic()
        print(f"== {step}", flush=True)
        report[step] = known[step]()
        report[step]["seconds"] = round(time.monotonic() - begin, 1)
        if not report[step]["ok"]:
            failed.append(step)
            if step == "build":
                return 1
    from dalle_fast import bench  # after the build

    facts, table = machine(options.device), {"peaks": {}, "rows": []}
    if "table" in steps:
        print("== table", flush=True)
        from .rows import all_rows

        timer = bench.Timer(options.device, budget=1.0 if options.small else 3.0)
        rows = all_rows(options.device, options.small)
        table = bench.run(rows, timer, only=options.only, seconds=TABLE_SECONDS, fresh=True)
        if bench.failures(table):
            failed.append("table")
    report["seconds"] = round(time.monotonic() - started, 1)
    path = bench.save(table, options.out, facts, **report)
    print(f"\n{facts['device']}, {report['seconds']} s, written to {path}")
    for step in steps:
        if step != "table":
            print(f"{step}: {'ok' if report[step]['ok'] else 'FAILED'}; {report[step]['summary']}")
    if "table" in steps:
        print(bench.show(table))
    return 1 if failed else 0


def command(arguments: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit code (124: out of time) and the output of both streams."""
    try:
        done = subprocess.run(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
            env={**os.environ, **environment}, errors="replace",
        )  # fmt: skip
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
        return 124, output.decode(errors="replace") if isinstance(output, bytes) else output
    except FileNotFoundError as missing:
        return 127, str(missing)


def build() -> dict:
    """The extension for this GPU alone, in place."""
    import pybind11
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}{'a' if major >= 9 else ''}"
    configure = [
        "cmake", "-S", ".", "-B", "build/gpu", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DDF_CUDA=ON", f"-DDF_CUDA_ARCHS={arch}",
    ]  # fmt: skip
    for arguments in (configure, ["cmake", "--build", "build/gpu"]):
        code, output = command(arguments, 400)
        if code:
            print(output[-4000:])
            return {"ok": False, "summary": f"{' '.join(arguments[:2])} ended with {code}"}
    code, output = command([sys.executable, "-m", "dalle_fast", "doctor"], 60)
    spills = command(
        [sys.executable, ".ci/check_spills", *map(str, sorted(Path("build/gpu/cuda").glob("*.ptxas")))], 60
    )
    return {"ok": True, "summary": f"{arch}; {spills[1].strip()}", "doctor": output if code == 0 else ""}


def tests() -> dict:
    """Everything marked cuda: the rooms' cases and what only a GPU shows. Large tensors alone, at the end."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests/test_ops.py",
              "tests/test_cuda.py"]  # fmt: skip
    small = command([*pytest, "-n", "8", "--dist", "worksteal", "-k", "not past_2_31"], TEST_SECONDS)
    large = command([*pytest, "-k", "past_2_31"], TEST_SECONDS)
    for code, output in (small, large):
        if code:
            print(output[-6000:])
    last = [output.strip().splitlines()[-1] if output.strip() else f"exit {code}" for code, output in (small, large)]
    return {"ok": small[0] == large[0] == 0, "summary": f"{last[0]}; past 2^31: {last[1]}"}


def sanitizers() -> dict:
    """compute-sanitizer on every room's smallest cases, each tool beside the others, and a planted bug for each."""
    controls = ROOT / "build" / "gpu" / "controls"
    code, output = command(["nvcc", "-arch=native", "-lineinfo", "-o", str(controls), "tests/cuda_controls.cu"], 100)
    if code:
        return {"ok": False, "summary": f"nvcc of tests/cuda_controls.cu ended with {code}: {output[-300:]}"}
    base = ["compute-sanitizer", "--error-exitcode", "9", "--launch-timeout", "60"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {
        tool: subprocess.Popen(
            [*base, "--tool", tool, sys.executable, "-m", "benchmarks.gpu.smoke"], text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        )
        for tool in TOOLS
    }  # fmt: skip
    verdicts, ok, deadline = {}, True, time.monotonic() + SANITIZER_SECONDS
    for tool in TOOLS:
        clean, _ = command([*base, "--tool", tool, str(controls), tool, "0"], 60)
        planted, _ = command([*base, "--tool", tool, str(controls), tool, "1"], 60)
        try:
            output, _ = running[tool].communicate(timeout=max(1.0, deadline - time.monotonic()))
            code = running[tool].returncode
        except subprocess.TimeoutExpired:
            running[tool].kill()
            output, code = running[tool].communicate()[0], 124
        summary = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", output)
        good = code == 0 and clean == 0 and planted == 9
        verdicts[tool] = f"exit {code}, {summary[-1] if summary else 'no summary'}, control {clean} / {planted}"
        if not good:
            print(output[-3000:])
        ok = ok and good
    return {"ok": ok, "summary": "; ".join(f"{tool}: {verdict}" for tool, verdict in verdicts.items())}


def machine(device: str) -> dict:
    """What a figure has to be read with."""
    import torch

    from dalle_fast import bench

    facts = bench.machine()
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["gpu"] = gpu_state()
        try:
            import triton

            facts["triton"] = triton.__version__
        except ImportError:
            facts["triton"] = None
    return facts


def gpu_state() -> dict:
    """Driver, clocks, temperature, power and other users of the GPU, by nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return {"error": "nvidia-ml-py is not installed"}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "processes": len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
    except pynvml.NVMLError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    sys.exit(main())
