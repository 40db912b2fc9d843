"""What the configurations of transformers over patches have in common."""

import dataclasses
from typing import ClassVar

from dit_jax.models.linear import Precision, precision_of
from dit_jax.models.network_options import NetworkOptions


@dataclasses.dataclass(frozen=True)
class TransformerConfig(NetworkOptions):
    """A transformer over patches of the input, of any height and width that are multiples of them.

    What is one has a patch_size, hidden_size, depth and num_heads, be they options or the same in
    all, and declares its `conditions`.
    """

    feature_kind: ClassVar[str] = "tokens"  # feature maps are grids of tokens

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the input."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def side_multiple(self) -> int:
        """What both sides of an input are multiples of."""
        return self.patch_size

    def at_size(self, size: tuple[int, int]) -> "TransformerConfig":
        """The same network for inputs of another (height, width).

        Raises:
            ValueError: the patch size does not divide both.
        """
        return dataclasses.replace(self, image_size=size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return tuple(side // self.patch_size for side in self.input_size)

    @property
    def precision(self) -> Precision:
        """What is computed and stored in what."""
        return precision_of(self.dtype, self.param_dtype, self.quantization)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def feature_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(rows, columns, width) of the tokens after each block."""
        return ((*self.grid, self.hidden_size),) * self.depth
