"""Matrix products of compiled programs: dots, convolutions, and the libraries' calls for them."""

import dataclasses
import math
import re
from collections.abc import Mapping

from dit_jax.parallel.planning.hlo import ArrayType, Instruction

CUBLAS, ATTENTION, CONVOLUTION = "__cublas", "__cudnn$fmha", "__cudnn$conv"
_HALF = ("bf16", "f16")


@dataclasses.dataclass(frozen=True)
class Product:
    """What a matrix product, a convolution or an attention computes.

    Attributes:
        flops: operations, a multiply-add being two.
        precision: of the units that compute it: 'f8', 'bf16' (float16 too), 'tf32', 'f32', 's8' or
            'f64'.
    """

    flops: float
    precision: str


def find_product(instruction: Instruction, body: Mapping[str, Instruction]) -> Product | None:
    """The product that an instruction of `body` is by itself, None for anything else.

    What a fusion calls is not looked into.
    """
    target = instruction.target
    if instruction.opcode == "dot":
        return Product(_dot_flops(instruction, body), _precision(instruction, body))
    if instruction.opcode == "convolution":
        kernel = _operand(instruction, body, 1)
        flops = _convolution_flops(instruction, instruction.types[0], kernel)
        return Product(flops, _precision(instruction, body))
    if target.startswith(CUBLAS):
        return Product(_cublas_flops(instruction, body), _precision(instruction, body))
    if target.startswith(ATTENTION):
        return Product(_attention_flops(instruction, body), _precision(instruction, body))
    if target.startswith(CONVOLUTION):
        return Product(_cudnn_convolution_flops(instruction, body), _precision(instruction, body))
    return None


def _operand(instruction: Instruction, body: Mapping[str, Instruction], number: int) -> ArrayType:
    return body[instruction.operands[number]].types[0]


def _precision(instruction: Instruction, body: Mapping[str, Instruction]) -> str:
    dtype = _operand(instruction, body, 0).dtype
    if dtype.startswith("f8"):
        return "f8"
    if dtype in _HALF:
        return "bf16"
    if dtype != "f32":
        return dtype
    # XLA gives float32 products of default precision to the units of TF32, where there are any.
    asked = re.findall(r'operand_precision"?[=:][\[{]([^\]}]*)', instruction.text)
    exact = any(word in "".join(asked).lower() for word in ("high", "f32"))
    return "f32" if exact else "tf32"


def _dot_flops(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """2 x results x contracted."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
    shape = _operand(instruction, body, 0).shape
    axes = [int(axis) for axis in contracted.group(1).split(",") if axis] if contracted else []
    return 2.0 * instruction.types[0].size * math.prod(shape[axis] for axis in axes)


def _convolution_flops(instruction: Instruction, results: ArrayType, kernel: ArrayType) -> float:
    """2 x results x window, of the convolution forwards."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.text).group(1)
    return 2.0 * results.size * kernel.size / kernel.shape[labels.index("o")]


def _cudnn_convolution_flops(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """As many for both gradients as for the convolution, of which labels and shapes tell."""
    first, second = (_operand(instruction, body, number) for number in (0, 1))
    if "BackwardInput" in instruction.target:
        return _convolution_flops(instruction, first, second)
    if "BackwardFilter" in instruction.target:
        return _convolution_flops(instruction, second, instruction.types[0])
    return _convolution_flops(instruction, instruction.types[0], second)


def _cublas_flops(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    numbers = instruction.config["gemm_backend_config"]["dot_dimension_numbers"]
    left, right = (_operand(instruction, body, number).shape for number in (0, 1))

    def axes(name: str) -> set[int]:
        return {int(axis) for axis in numbers.get(name, ())}

    shared = axes("rhs_contracting_dimensions") | axes("rhs_batch_dimensions")
    own = math.prod(size for axis, size in enumerate(right) if axis not in shared)
    return 2.0 * math.prod(left) * own


def _attention_flops(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """Two products of scores by head size forwards; five backwards, the scores' own among them."""
    config = instruction.config["cudnn_fmha_backend_config"]
    scores = math.prod(int(size) for size in config["intermediate_tensor_shape"]["dimensions"])
    head = _operand(instruction, body, 0).shape[-1]
    return 2.0 * scores * head * (5 if "Backward" in instruction.target else 2)
