"""Runs CMake (the only list of sources and flags) and packages what it built."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.version_info < (3, 10):  # noqa: UP036  (pip learns the requirement only from what this file makes)
    sys.exit("kdfast: needs Python 3.10 or later, this is Python " + sys.version.split()[0])

ROOT = Path(__file__).parent.resolve()
BUILD_TOOLS = 'pip install "setuptools>=77" "cmake>=3.31" ninja pybind11'


def torch_folder() -> Path:
    """The installed torch's folder. torch is no build requirement: pip would download gigabytes into isolation."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    folder = Path(sysconfig.get_path("platlib")) / "torch"
    if folder.is_dir():
        return folder
    sys.exit("kdfast: building needs torch >= 2.10 in this environment; install it first: pip install torch")


class CMakeBuild(build_ext):
    """Configures and builds into a fixed folder, so that an editable reinstall compiles only what changed."""

    def run(self) -> None:
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # This environment's cmake and ninja, activated or not: a distribution's own cmake may be too old.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if cmake is None or ninja is None or importlib.util.find_spec("pybind11") is None:
            sys.exit(f"kdfast: building needs cmake, ninja and pybind11; install them first: {BUILD_TOOLS}")
        import pybind11

        built = os.environ.get("KDFAST_LIBRARY", "")  # make gpu-library's, for instance
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DKDFAST_TORCH={torch_folder()}",
            f"-DKDFAST_VERSION={self.distribution.get_version()}",
            f"-DKDFAST_CUDA={os.environ.get('KDFAST_CUDA', 'AUTO')}",
            f"-DKDFAST_LIBRARY={built}",
        ]
        if architectures := os.environ.get("KDFAST_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        for command in (configure, [cmake, "--build", str(build)]):
            if subprocess.run(command).returncode:
                sys.exit("kdfast: the build failed; the reason stands above")
        package = ROOT / "kdfast" if self.inplace else Path(self.build_lib) / "kdfast"
        package.mkdir(parents=True, exist_ok=True)
        for library in [*(build / "kdfast").glob("*.so"), *([Path(built)] if built else [])]:
            target = package / library.name
            # A new file, never new bytes in a library that a running process has mapped.
            target.unlink(missing_ok=True)
            shutil.copy2(library, target)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "kdfast").glob("*.so")]


setup(ext_modules=[Extension("kdfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
