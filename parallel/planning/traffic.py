"""What a kernel of a compiled program reads from and writes to the device's memory at least."""

import math
from collections.abc import Mapping

from dit_jax.parallel.planning.hlo import Instruction
from dit_jax.parallel.planning.products import ATTENTION, CONVOLUTION, CUBLAS
from dit_jax.parallel.planning.program import Program

_SAME = ("bitcast", "reshape", "get-tuple-element")  # another view of the same memory
_PARTS = ("dynamic-slice", "slice", "gather")  # read what they return, not what they are given
_UPDATES = ("dynamic-update-slice", "scatter")  # write a part, in place
_LIBRARIES = (CUBLAS, ATTENTION, CONVOLUTION)


def bytes_moved(program: Program, instruction: Instruction) -> float:
    """Bytes read and written by an instruction that is a kernel.

    Every operand is read once and every result written once, whatever the caches do; of an operand
    that is only sliced the slices are read, and of a result that is an operand updated in place the
    update is written. A library's workspace counts nothing.
    """
    body = program.computations[program.parent(instruction)]
    if instruction.opcode == "fusion":
        return _of_fusion(program, instruction, body)
    if instruction.opcode in _PARTS:
        return 2 * _written(instruction)
    if instruction.opcode in _UPDATES:
        return 2 * _size(body, _update(instruction))
    read = sum(_size(body, name) for name in instruction.operands)
    return read + _written(instruction)


def _size(body: Mapping[str, Instruction], name: str) -> float:
    return math.fsum(array.nbytes for array in body[name].types) if name in body else 0.0


def _written(instruction: Instruction) -> float:
    types = instruction.types
    if instruction.target.startswith(_LIBRARIES):
        # Behind the results stands the workspace, in bytes.
        types = [t for t in types if not (t.dtype in ("s8", "u8") and len(t.shape) == 1)]
    return math.fsum(array.nbytes for array in types)


def _of_fusion(program: Program, fusion: Instruction, body: Mapping[str, Instruction]) -> float:
    inside = program.computations[fusion.called[0]]
    shares = _shares_read(program, inside)
    read = math.fsum(
        shares[parameter.name] * _size(body, operand)
        for operand, parameter in zip(fusion.operands, _parameters(inside), strict=False)
    )
    return read + math.fsum(_result_bytes(inside, name) for name in _results(inside))


def _parameters(inside: Mapping[str, Instruction]) -> list[Instruction]:
    """Those of a computation, in order."""
    found = [i for i in inside.values() if i.opcode == "parameter"]
    return sorted(found, key=lambda i: int(i.text.partition("parameter(")[2].partition(")")[0]))


def _shares_read(program: Program, inside: Mapping[str, Instruction]) -> dict[str, float]:
    """What part of each value of a fused computation is needed for its results.

    Fusions compute what is asked for: where a weight is converted and one layer of it sliced, one
    layer is read. From the results backwards, as users stand behind what they use.
    """
    needed = dict.fromkeys(inside, 0.0)  # elements
    in_place = set()
    for name in _results(inside):
        source = _behind_views(inside, name)
        if _is_in_place(inside, source):
            in_place.add(source.name)
        needed[source.name] = _elements(source)
    for instruction in reversed(inside.values()):
        if not needed[instruction.name]:
            continue
        share = min(1.0, needed[instruction.name] / max(1, _elements(instruction)))
        nested = None
        if instruction.opcode == "fusion":
            called = program.computations[instruction.called[0]]
            nested = [_shares_read(program, called)[p.name] for p in _parameters(called)]
        for position, name in enumerate(instruction.operands):
            if name not in inside:
                continue
            whole = _elements(inside[name])
            if instruction.name in in_place and position == 0:
                continue
            wanted = share * whole
            if instruction.opcode in _PARTS and position == 0:
                wanted = needed[instruction.name]
            elif instruction.opcode == "broadcast":
                wanted = whole
            elif nested is not None:
                wanted = nested[position] * whole
            needed[name] = min(whole, needed[name] + wanted)
    return {name: needed[name] / max(1, _elements(inside[name])) for name in inside}


def _elements(instruction: Instruction) -> int:
    return sum(array.size for array in instruction.types)


def _results(inside: Mapping[str, Instruction]) -> list[str]:
    root = next(i for i in inside.values() if i.is_root)
    return list(root.operands) if root.opcode == "tuple" else [root.name]


def _behind_views(inside: Mapping[str, Instruction], name: str) -> Instruction:
    source = inside[name]
    while source.opcode in _SAME and source.operands[0] in inside:
        source = inside[source.operands[0]]
    return source


def _is_in_place(inside: Mapping[str, Instruction], source: Instruction) -> bool:
    """Whether it writes a part of an operand of the fusion, which XLA then lets it overwrite."""
    return (
        source.opcode in _UPDATES
        and _behind_views(inside, source.operands[0]).opcode == "parameter"
    )


def _result_bytes(inside: Mapping[str, Instruction], name: str) -> float:
    source = _behind_views(inside, name)
    if _is_in_place(inside, source):
        return _size(inside, _update(source))
    return _size(inside, name)


def _update(instruction: Instruction) -> str:
    """The operand of an update in place that is written: the second, or a scatter's last."""
    return instruction.operands[-1 if instruction.opcode == "scatter" else 1]
