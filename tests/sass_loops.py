"""Which instructions of a kernel are in loops: strongly connected parts of its graph of jumps."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    address: int
    is_predicated: bool
    opcode: str
    operands: str


def in_loops(instructions: list[Instruction], *, with_any_of: tuple[str, ...] | None = None) -> list[Instruction]:
    """Instructions of all loops, or of those that hold one of these opcodes.

    A loop is what can be reached from itself, so a persistent kernel's loop over tiles counts with all that is in it.
    Addresses alone would not do: compilers move unlikely blocks, from which one jumps back, behind the code.
    """
    places = {instruction.address: index for index, instruction in enumerate(instructions)}
    nexts = [
        [places[address] for address in _next_addresses(instruction, after) if address in places]
        for instruction, after in zip(instructions, [*(one.address for one in instructions[1:]), -1], strict=True)
    ]
    found: list[int] = []
    for loop in _strongly_connected(nexts):
        is_loop = len(loop) > 1 or loop[0] in nexts[loop[0]]
        opcodes = {instructions[index].opcode.split(".")[0] for index in loop}
        if is_loop and (with_any_of is None or opcodes & set(with_any_of)):
            found += loop
    return [instructions[index] for index in sorted(found)]


def _next_addresses(instruction: Instruction, after: int) -> list[int]:
    kind = instruction.opcode.split(".")[0]
    target = re.search(r"0x([0-9a-f]+)$", instruction.operands)
    if kind in ("BRA", "CALL", "JMP") and target is not None:
        is_certain = instruction.opcode in ("BRA", "JMP") and not instruction.is_predicated
        if is_certain and instruction.operands == target[0]:
            return [int(target[1], 16)]
        return [int(target[1], 16), after]
    if kind in ("EXIT", "RET", "BRX") and not instruction.is_predicated:
        return []
    return [after]


def _strongly_connected(nexts: list[list[int]]) -> list[list[int]]:
    """Tarjan's algorithm, without recursion: kernels have tens of thousands of instructions."""
    order: dict[int, int] = {}
    lowest: dict[int, int] = {}
    waiting: list[int] = []
    is_waiting: set[int] = set()
    parts = []
    for root in range(len(nexts)):
        path = [(root, iter(nexts[root]))] if root not in order else []
        while path:
            node, rest = path[-1]
            if node not in order:
                order[node] = lowest[node] = len(order)
                waiting.append(node)
                is_waiting.add(node)
            following = next(rest, None)
            if following is None:
                path.pop()
                if path:
                    lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[node])
                if lowest[node] == order[node]:
                    part = []
                    while not part or part[-1] != node:
                        part.append(waiting.pop())
                    is_waiting -= set(part)
                    parts.append(part)
            elif following not in order:
                path.append((following, iter(nexts[following])))
            elif following in is_waiting:
                lowest[node] = min(lowest[node], order[following])
    return parts
