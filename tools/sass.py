"""What the CUDA kernels come to in machine code, for docs/kernels.md: registers, spills, blocks per multiprocessor, and the instructions
of the loops that move 16 bytes at a time.

    nvcc -cubin -arch=sm_90a -O3 -std=c++20 --expt-relaxed-constexpr -I csrc -o layers.cubin csrc/cuda/layers.cu
    python tools/sass.py [--only PATTERN] layers.cubin …

Needs cuobjdump, nvdisasm and c++filt on the PATH (nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm have the first two). No GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from typing import NamedTuple

# Of a multiprocessor of sm_90.
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 228 << 10
RESERVED = 1024  # bytes of shared memory that the driver takes of every block
# Kernels, the threads of a block, and the dynamic shared memory of a typical launch.
SHAPES = (
    ("layer_rows", 128, 1024),
    ("rows_on_chip", 256, 65024),  # a share of 128256 columns of bfloat16
    ("rows_of_topk.*true", 256, 34056),
    ("rows_of_topk|rows_in_two_reads", 384, 17000),
    ("rows_in_registers", 128, 0),
    ("part_rows", 128, 0),
    ("scale_kernel|refer_rows", 256, 0),
    ("sum_", 1024, 8192),
)


class Loop(NamedTuple):
    instructions: int
    loads: int  # of 16 bytes, global
    shared_loads: int
    stores: int
    powers: int  # and logarithms, reciprocals
    bytes: int  # loads and stores of single bytes and numbers

    def __str__(self) -> str:
        parts = [f"{self.instructions}"]
        for count, name in zip(self[1:], ("LDG", "LDS", "STG", "MUFU", "narrow"), strict=True):
            if count:
                parts.append(f"{count} {name}")
        return ", ".join(parts)


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    instructions: int
    loops: list[Loop]

    @property
    def blocks(self) -> int:
        """Per multiprocessor."""
        threads, shared = next((t, s) for pattern, t, s in SHAPES if re.search(pattern, self.name))
        of_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        return min(of_registers, THREADS // threads, BLOCKS, SHARED // (shared + RESERVED))


def output(*command: str, given: str | None = None) -> str:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def loops_of(code: list[tuple[int, str]]) -> list[Loop]:
    """Those without another inside that move 16 bytes: from the target of a backward branch to it."""
    back = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
    spans = {(int(m[1], 16), at) for at, text in code if (m := back.search(text)) and int(m[1], 16) < at}
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    loops = []
    for first, last in sorted(inner):
        body = [text for at, text in code if first <= at <= last]
        count = lambda pattern: sum(bool(re.search(pattern, text)) for text in body)  # noqa: B023, E731
        wide = [count(rf"\b{name}\S*\.128") for name in ("LDG", "LDS", "STG")]
        if any(wide):
            loops.append(Loop(len(body), *wide, count(r"\bMUFU"), count(r"\b(LDG|STG)") - wide[0] - wide[2]))
    return loops


def short(name: str) -> str:
    for part in ("kdfast::cuda::(anonymous namespace)::", "kdfast::cuda::", "kdfast::", "void "):
        name = name.replace(part, "")
    return re.sub(r"\(.*", "", name)


def kernels_of(path: str) -> list[Kernel]:
    usage = output("cuobjdump", "-res-usage", path)
    sizes = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)}
    kernels = []
    for part in re.split(r"Function : ", output("cuobjdump", "-sass", path))[1:]:
        symbol = part.split(None, 1)[0]
        code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", part)]
        name = short(output("c++filt", given=symbol))
        kernels.append(Kernel(name.strip(), *sizes[symbol], len(code), loops_of(code)))
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose names match")
    parser.add_argument("files", nargs="+", help="cubins, objects or the library")
    args = parser.parse_args()
    print("| kernel | registers | stack | blocks | instructions | loops of 16 bytes |\n|---|---:|---:|---:|---:|---|")
    for path in args.files:
        for k in sorted(kernels_of(path)):
            if re.search(args.only, k.name):
                loops = "; ".join(map(str, k.loops))
                print(f"| `{k.name}` | {k.registers} | {k.stack} | {k.blocks} | {k.instructions} | {loops} |")


if __name__ == "__main__":
    main()
