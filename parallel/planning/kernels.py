"""The kernels of a compiled program: what each is, computes and moves, and how long it takes."""

import dataclasses
from collections.abc import Iterator

from dit_jax.parallel.planning.accelerators import Accelerator
from dit_jax.parallel.planning.hlo import Instruction
from dit_jax.parallel.planning.products import ATTENTION, CONVOLUTION, CUBLAS, Product, find_product
from dit_jax.parallel.planning.program import Program
from dit_jax.parallel.planning.traffic import bytes_moved

# Opcodes that run nothing on the device, or nothing of their own.
_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "domain", "opt-barrier", "add-dependency"),
    *("while", "call", "conditional"),
}
# What a fusion is called, by an opcode inside; the first that is there.
_BY_OPCODE = (
    ("scatter", "scatter"),
    ("sort", "sort"),
    ("reduce", "reduction"),
    ("reduce-window", "reduction"),
    ("transpose", "transpose"),
)
_VIEWS = {"parameter", "constant", "bitcast", "reshape", "tuple", "get-tuple-element"}
_PLACING = _VIEWS | {"slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "copy"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel; of one device, each time it runs.

    Attributes:
        name: of its instruction.
        kind: as 'cuBLASLt bf16', 'cuDNN attention', 'loop fusion'.
        result: type of its (first) result, as 'bf16[256,1152]'.
        source: functions it comes from, see `Instruction.source`.
        flops: of its matrix products.
        precision: of them, '' if it has none.
        nbytes: read and written, see `traffic.bytes_moved`.
        seconds: the longer of both at the accelerator's peaks.
        bound: which that is, 'arithmetic' or 'memory'.
        count: how often it runs in a run of the program; a mean where that is not whole.
    """

    name: str
    kind: str
    result: str
    source: str
    flops: float
    precision: str
    nbytes: float
    seconds: float
    bound: str
    count: float = 1

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product, a convolution or an attention."""
        return self.flops > 0


def find_kernel(program: Program, instruction: Instruction, device: Accelerator) -> Kernel | None:
    """What runs for an instruction; None for collectives, control flow, and what runs nothing."""
    if instruction.opcode in _NOTHING or instruction.collective:
        return None
    if instruction.opcode.endswith(("-done", "-update")):  # of something asynchronous
        return None
    products = list(_products(program, instruction))
    flops = sum(product.flops for product in products)
    nbytes = bytes_moved(program, instruction)
    arithmetic = sum(product.flops / device.peak(product.precision) for product in products)
    memory = nbytes / device.memory_bandwidth
    precision = max(products, key=lambda product: product.flops).precision if products else ""
    return Kernel(
        name=instruction.name,
        kind=_kind(program, instruction, precision),
        result=str(instruction.types[0]) if instruction.types else "",
        source=instruction.source,
        flops=flops,
        precision=precision,
        nbytes=nbytes,
        seconds=max(arithmetic, memory),
        bound="arithmetic" if arithmetic > memory else "memory",
    )


def _inside(program: Program, instruction: Instruction) -> Iterator[tuple[Instruction, dict]]:
    """Instructions of the computations that a fusion calls, each with its computation."""
    for name in instruction.called:
        body = program.computations[name]
        for found in body.values():
            yield found, body
            if found.opcode == "fusion":
                yield from _inside(program, found)


def _products(program: Program, instruction: Instruction) -> Iterator[Product]:
    body = program.computations[program.parent(instruction)]
    if product := find_product(instruction, body):
        yield product
    elif instruction.opcode == "fusion":
        for found, inside in _inside(program, instruction):
            if product := find_product(found, inside):
                yield product


def _kind(program: Program, instruction: Instruction, precision: str) -> str:
    target = instruction.target
    if target.startswith(CUBLAS):
        return f"cuBLASLt {precision}" if "$lt$" in target else f"cuBLAS {precision}"
    if target.startswith(ATTENTION):
        return "cuDNN attention" + (" backward" if "Backward" in target else "")
    if target.startswith(CONVOLUTION):
        return f"cuDNN convolution {precision}"
    if target:
        return target.lstrip("_")
    if instruction.opcode != "fusion":
        by_opcode = dict(_BY_OPCODE)
        product = f"product {precision}" if precision else ""
        return product or by_opcode.get(instruction.opcode, instruction.opcode)
    return _fusion_kind(program, instruction, precision)


def _fusion_kind(program: Program, fusion: Instruction, precision: str) -> str:
    kind = fusion.config.get("fusion_backend_config", {}).get("kind", "")
    if kind.startswith("__triton"):
        return f"Triton product {precision}" if precision else "Triton fusion"
    calls = [found for found, _ in _inside(program, fusion)]
    if libraries := [found for found in calls if found.target]:
        return f"{_kind(program, libraries[0], precision)}, sliced in place"
    if precision:
        return f"product fusion {precision}"
    opcodes = {found.opcode for found in calls}
    for opcode, name in _BY_OPCODE:
        if opcode in opcodes:
            return name
    if opcodes <= _VIEWS | {"broadcast", "iota"}:
        return "fill"
    if opcodes <= _PLACING:
        return "copy"
    if opcodes <= _PLACING | {"convert"}:
        return "convert"
    return "loop fusion"
