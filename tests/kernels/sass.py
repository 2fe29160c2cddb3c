"""Reads the machine code of compiled kernels: instructions of the main loop, widths of its loads, spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)(.*?);")


@dataclass(frozen=True)
class Loop:
    """The body of a loop: its instructions in order, each as (mnemonic, operands)."""

    body: tuple[tuple[str, str], ...]

    def count(self, *prefixes: str) -> int:
        """The number of instructions whose mnemonic starts with one of ``prefixes``."""
        return sum(name.startswith(prefixes) for name, _ in self.body)

    @property
    def histogram(self) -> Counter[str]:
        """How often each mnemonic occurs, without its modifiers."""
        return Counter(name.split(".")[0] for name, _ in self.body)


def disassemble(cubin: bytes) -> list[str]:
    """The lines of ``nvdisasm``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "nvdisasm", "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def loops(lines: list[str]) -> list[Loop]:
    """The loops of a kernel: what lies between a label and a later branch back to it."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    found: list[Loop] = []
    for line in lines:
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append((instruction[1], instruction[2]))
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1].startswith("BRA") and target and target[0] in labels:
                found.append(Loop(tuple(instructions[labels[target[0]] :])))
    return found


def main_loop(kernel: Any, stores: bool = True) -> Loop:
    """The loop over full tiles, the only one that loads and, but for first passes, stores 16 bytes at a time."""
    wide = [
        loop
        for loop in loops(disassemble(kernel.asm["cubin"]))
        if loop.count("LDG.E.128") and bool(loop.count("STG.E")) == stores
    ]
    # Where several end at one branch or one holds another, the smallest is the loop over tiles itself.
    return min(wide, key=lambda loop: len(loop.body))


def uses_stack(kernel: Any) -> bool:
    """Whether anything in the kernel is kept in local memory."""
    return any(re.search(r"\b(LDL|STL)\b", line) for line in disassemble(kernel.asm["cubin"]))


def resources(kernel: Any) -> dict[str, int]:
    """Registers, stack and local memory in bytes, as the assembler reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
