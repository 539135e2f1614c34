"""What compiled kernels take: registers and spills, and the instructions of their main loops, read from machine code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import triton


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of shared memory a block, bytes of spills and stack a thread."""

    registers: int
    shared: int
    spills: int


@dataclass(frozen=True)
class Loop:
    """A main loop: one that loads logits and exponentiates, and holds no other loop."""

    instructions: int
    load_bytes: tuple[int, ...]
    """Bytes a thread that each load from global memory brings."""
    barriers: int


def resources(cubin: bytes) -> Resources:
    """What a cubin of one kernel takes."""
    (took,) = resources_by_function(cubin).values()
    return took


def resources_by_function(binary: bytes) -> dict[str, Resources]:
    """What every kernel of a cubin or library takes; STACK and LOCAL are where spilled registers live."""
    took = {}
    for function, line in re.findall(r"Function (\S+):\s+(REG:.*)", _cuobjdump("--dump-resource-usage", binary)):
        numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        took[function] = Resources(numbers["REG"], numbers["SHARED"], numbers["STACK"] + numbers["LOCAL"])
    return took


def main_loops(cubin: bytes) -> list[Loop]:
    """The main loops of a cubin of one kernel, in the order of its code."""
    return list(_main_loops(_cuobjdump("--dump-sass", cubin)))


def cuda_instructions(cubin: bytes) -> dict[str, float]:
    """Instructions an element of every kernel of csrc/cuda/rows.cu, with a bfloat16 gradient and rows that lie at 16 bytes.

    That is all its passes over the row in shared memory. An iteration of any of their loops serves four columns.
    """
    counted = {}
    for part in re.split(r"\n\s*Function : ", _cuobjdump("--dump-sass", cubin))[1:]:
        name, _, listing = part.partition("\n")
        total = 0
        for names in _innermost_loops(listing):
            text = " ".join(names)
            is_pass = "LDS.128" in text and "LDG" not in text and "STS" not in text and ("EX2" in text or "FMNMX" in text)
            if is_pass and ("STG" not in text or ("STG.E.64" in text and "BF16" in text)):
                total += len(names)
        counted[name.strip()] = total / 4
    return counted


def _main_loops(listing: str) -> Iterator[Loop]:
    for names in _innermost_loops(listing):
        loads = tuple(_bytes(name) for name in names if name.startswith("LDG"))
        if loads and any(name.startswith("MUFU.EX2") for name in names):
            yield Loop(len(names), loads, sum(name.startswith("BAR") for name in names))


def _innermost_loops(listing: str) -> Iterator[list[str]]:
    """The instructions' names of every loop that holds no other."""
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;", listing)
    place = {int(address, 16): index for index, (address, _) in enumerate(instructions)}
    ends: dict[int, int] = {}  # of loops, by their beginning: jumps backward, but for the one on the spot that ends every kernel
    for index, (_, instruction) in enumerate(instructions):
        target = re.match(r"BRA\b.*?0x([0-9a-f]+)", instruction)
        if target is not None and place.get(int(target[1], 16), index) < index:
            begin = place[int(target[1], 16)]
            ends[begin] = max(index, ends.get(begin, 0))
    for begin, end in sorted(ends.items()):
        if not any(begin < other <= end for other in ends):
            yield [instruction.split()[0] for _, instruction in instructions[begin : end + 1]]


def _bytes(load: str) -> int:
    """What a thread gets of a load, by the instruction's suffixes."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((width for suffix, width in widths.items() if suffix in load.split(".")), 4)


def _cuobjdump(option: str, binary: bytes) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernels"
        path.write_bytes(binary)
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
