"""Whether a compiled program computes the products of 8-bit operands with 8-bit kernels.

XLA turns a product of float8 operands into an 8-bit kernel where it recognises it, and silently
converts the operands to 16 bits where it does not. Which it was, stands in the compiled program:
all that comes from such products carries the name `PRODUCT_SCOPE`, or is a call of Transformer
Engine's.
"""

import dataclasses
import re
from typing import Any

import jax

from dit_jax.target import target_platform

PRODUCT_SCOPE = "fp8_product"
"""The name scope in which products of 8-bit floats are traced."""

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?([a-z]\w*)\[[^ ]* .*?\b([a-z][\w\-]*)\("
)
_LIBRARY_PRODUCT = re.compile(r'custom_call_target="((?:__cublas\$|te_gemm)[^"]*)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Fp8Products:
    """The products of a compiled program that were written as products of 8-bit floats.

    An instruction counts once, however often a loop runs it.

    Attributes:
        narrow: what became 8-bit kernels, cuBLASLt's or Triton's: where each comes from.
        wide: what did not: dtype and shape of the result, and where it comes from.
    """

    narrow: tuple[str, ...]
    wide: tuple[str, ...]


class WideProductError(ValueError):
    """Products that were to be computed in 8 bits, and were not compiled so."""


def fp8_products(text: str) -> Fp8Products:
    """Finds them in the text of a program compiled for a GPU, `Compiled.as_text()`."""
    dtypes, products = {}, []
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        dtypes[found[1]], opcode = found[2], found[3]
        if opcode not in ("dot", "custom-call"):
            continue
        source, library = _SOURCE.search(line), _LIBRARY_PRODUCT.search(line)
        # Transformer Engine's, whose backward pass is traced outside of the scope, are all meant.
        own = library is not None and library[1].startswith("te_gemm")
        if own or (source and PRODUCT_SCOPE in source[1] and (opcode == "dot" or library)):
            operands = line[found.end() :].partition(")")[0]
            result = line.partition(" = ")[2].lstrip("(").partition("{")[0]
            where = source[1] if source else library[1]
            products.append((result, where, library and library[1], operands))
    narrow, wide = [], []
    for result, source, library, operands in products:
        read = [dtypes.get(name, "") for name in re.findall(r"%([\w.\-]+)", operands)]
        if library and library.startswith("__cublas"):
            is_narrow = library.endswith("$f8")
        else:  # Transformer Engine's take each factor with its scale
            factors = read[0:3:2] if library else read[:2]
            is_narrow = all(dtype.startswith("f8") for dtype in factors)
        if is_narrow:
            narrow.append(source)
        else:
            wide.append(f"{result} of {source}")
    return Fp8Products(tuple(narrow), tuple(wide))


def require_fp8_kernels(text: str) -> None:
    """Refuses a compiled program whose fp8 products are not all 8-bit kernels.

    Args:
        text: of a program compiled for a GPU, that was asked for them.

    Raises:
        WideProductError: naming those that are not.
    """
    found = fp8_products(text)
    remedy = (
        "it would be no faster than without. Set model.quantization='none', or use the jax and "
        "CUDA libraries that the project is tested with"
    )
    if found.wide:
        listed = "\n".join(f"  {source}" for source in sorted(set(found.wide)))
        raise WideProductError(
            f"fp8 was asked for, and XLA (jax {jax.__version__}) compiled {len(found.wide)} of "
            f"{len(found.wide) + len(found.narrow)} products in 16 or 32 bits; {remedy}:\n{listed}"
        )
    if not found.narrow:
        raise WideProductError(
            f"fp8 was asked for, and XLA (jax {jax.__version__}) compiled a program without a "
            f"single product of 8 bits; {remedy}"
        )


def check_compiled(lowered: Any, compiled: Any) -> None:
    """`require_fp8_kernels`, if the program is for a GPU and was written with fp8 products.

    Args:
        lowered: `jax.stages.Lowered`.
        compiled: `jax.stages.Compiled` of it.

    Raises:
        WideProductError: XLA has widened some.
    """
    if target_platform() == "gpu" and "f8E4M3FN" in lowered.as_text():
        require_fp8_kernels(compiled.as_text())
