# SPDX-License-Identifier: MIT
"""A thin driver: CMake is the build. Honours CUDA_HOME, TORCH_CUDA_ARCH_LIST, DF_CUDA, DF_CPU_LEVELS, MAX_JOBS,
CXX, CXXFLAGS.

Without a C++ compiler the package installs without its extension and runs on the PyTorch references.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_compiler() -> str | None:
    """The C++ compiler CMake would take, or None."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name.split()[0]))), None)


def num_jobs() -> int:
    """MAX_JOBS, or as many as cores and memory (about 1 GB a compiler) allow."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        memory_gb = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        memory_gb = float(cores)
    return max(1, min(cores, int(memory_gb)))


class CMakeBuild(build_ext):
    """Builds dalle_fast._C with CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("DF_BUILD_DIR", self.build_temp)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        sites = [*site.getsitepackages(), site.getusersitepackages()]
        extra = next((path for path in sites if any(Path(path).glob("nvidia/*/bin/nvcc"))), "")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDF_OUTPUT_DIR={output}",
            f"-DDF_EXTRA_SITE={extra}",
            f"-DDF_CUDA={os.environ.get('DF_CUDA', 'AUTO')}",
            f"-DDF_CPU_LEVELS={os.environ.get('DF_CPU_LEVELS', 'all')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(num_jobs())], check=True)


def extensions() -> list[Extension]:
    """_C, unless the Makefile builds it in place (DF_SKIP_BUILD) or there is no compiler."""
    if os.environ.get("DF_SKIP_BUILD"):
        return []
    if find_compiler() is None:
        print(
            "dalle_fast: no C++ compiler found (c++, g++, clang++ or $CXX): installing without the extension. "
            "Every op will run on its PyTorch reference; install a compiler and reinstall for the fast path.",
            file=sys.stderr,
        )
        return []
    return [Extension("dalle_fast._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
