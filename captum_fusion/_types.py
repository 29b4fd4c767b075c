"""Types of arguments and results, following captum."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

#: One tensor, or a tuple of several.
TensorOrTupleOfTensors = Tensor | tuple[Tensor, ...]
#: The result of a layer method; a list of results for a list of layers.
Attributions = TensorOrTupleOfTensors | list[TensorOrTupleOfTensors]
Layer = nn.Module | list[nn.Module]
Target = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
Baselines = float | Tensor | tuple[float | Tensor, ...] | None
#: Converts the output of a layer, for example tokens, to (N, channels, *spatial).
Reshape = Callable[[Tensor], Tensor]
