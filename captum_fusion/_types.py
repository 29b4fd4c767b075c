"""Types of arguments and results, as captum has them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

#: One tensor, or a tuple where there are several.
TensorOrTupleOfTensors = Tensor | tuple[Tensor, ...]
#: What a layer method returns: a list of results for a list of layers.
Attributions = TensorOrTupleOfTensors | list[TensorOrTupleOfTensors]
Layer = nn.Module | list[nn.Module]
Target = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
Baselines = float | Tensor | tuple[float | Tensor, ...] | None
#: Turns what a layer returns, tokens for example, into (N, channels, *spatial).
Reshape = Callable[[Tensor], Tensor]
