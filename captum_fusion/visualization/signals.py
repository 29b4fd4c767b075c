"""Figures of one-dimensional maps: traces in the colours of their map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from torch import Tensor

from captum_fusion.functional import at_least_float32, upsample
from captum_fusion.visualization import text
from captum_fusion.visualization.colours import colour_map, end_of_scale, with_sign

#: Default colour map of traces: the highest values are darkest, which is legible on white.
CMAP = "plasma_r"

_RIM = "0.6"  # grey, so that a line in a light colour is visible on white


def visualize_signal(
    attribution: Tensor | NDArray[Any],
    signal: Tensor | NDArray[Any],
    *,
    times: Sequence[float] | NDArray[Any] | None = None,
    channels: Sequence[str] | None = None,
    title: str | None = None,
    fig_axis: tuple[Figure | SubFigure, Axes] | None = None,
    sign: str = "positive",
    cmap: str | None = None,
    scale: float | None = None,
    linewidth: float = 2.0,
    show_colorbar: bool = True,
) -> tuple[Figure, Axes]:
    """Draw a signal as a line in the colours of its map. Several channels are drawn below each other.

    This is captum's ``visualize_timeseries_attr(method="colored_graph")`` with one map for all channels. Captum's
    function uses pyplot's state, and fails with matplotlib 3.9 and later.

    Args:
        attribution (Tensor or ndarray): Map of shape (1, C, l), (C, l) or (l,). Channels are summed, and the sum is
            interpolated to the signal's length.
        signal (Tensor or ndarray): Signal of shape (1, C, L), (C, L) or (L,).
        times (sequence of float, optional): Position of each sample of the signal. Default: None (0 to L - 1)
        channels (sequence of str, optional): Names of the signal's channels. Default: None
        title (str, optional): Title of the axes. Default: None
        fig_axis (tuple[Figure, Axes], optional): Figure and axes to draw on. Default: None (a new figure)
        sign (str, optional): As in :func:`visualize_map`. Default: ``"positive"``
        cmap (str, optional): Matplotlib colour map. Default: None (``"plasma_r"``, dark where the map is highest;
            ``"RdBu_r"`` for ``sign="all"``)
        scale (float, optional): Value at the end of the colour map, see :func:`shared_scale`. Default: None (the map's
            largest absolute value)
        linewidth (float, optional): Width of the line, in points. Default: 2.0
        show_colorbar (bool, optional): Whether to draw a colour bar with the map's values. Default: True

    Returns:
        tuple[Figure, Axes]: The figure and its axes.

    Raises:
        ValueError: If an argument does not fit. The message names it.

    Examples::

        >>> import torch
        >>> figure, axis = visualize_signal(torch.rand(1, 1, 8), torch.rand(1, 2, 64), title="two leads")
        >>> [float(limit) for limit in axis.get_xlim()]
        [0.0, 63.0]
    """
    traces = _traces(signal)
    length = traces.shape[1]
    x = np.arange(length) if times is None else np.asarray(times, float)
    names = [""] * len(traces) if channels is None else list(channels)
    if x.shape != (length,):
        raise ValueError(f"times must have one value for each of the {length} samples of the signal, not {x.shape}")
    if len(names) != len(traces):
        raise ValueError(f"channels must have one name for each of the {len(traces)} channels, not {len(names)}")
    heat = upsample(with_sign(attribution, sign, 1), (length,))[0, 0].numpy()
    end, name = end_of_scale(heat, scale), colour_map(cmap or (None if sign == "all" else CMAP), sign)
    limits = (-end if sign == "all" else 0.0, end)
    if fig_axis is None:
        new = Figure(figsize=(7, 1.2 + 1.2 * len(traces)), layout="constrained")
        fig_axis = new, new.add_subplot()
    figure, axis = fig_axis
    span = float(np.ptp(traces, axis=1).max()) or 1.0
    offsets = -1.15 * span * np.arange(len(traces))
    for trace, offset in zip(traces, offsets, strict=True):
        points = np.stack([x, trace + offset], 1)
        axis.plot(x, trace + offset, color=_RIM, linewidth=linewidth + 1.2, zorder=1)
        lines = LineCollection(
            list(np.stack([points[:-1], points[1:]], 1)), cmap=name, linewidths=linewidth, capstyle="round", zorder=2
        )
        lines.set_array((heat[:-1] + heat[1:]) / 2)
        lines.set_clim(*limits)
        axis.add_collection(lines)
    if len(x) > 1:
        axis.set_xlim(float(x[0]), float(x[-1]))
    if len(traces) > 1 or channels is not None:
        axis.set_yticks(offsets + traces.mean(1), labels=names)
        axis.tick_params("y", length=0)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.set_title(title or "", parse_math=False)
    if show_colorbar:
        text.colour_bar(figure, [axis], name, limits, "attribution")
    return figure.figure, axis


def _traces(signal: Tensor | NDArray[Any]) -> NDArray[np.float32]:
    """A signal as an array of shape (C, L)."""
    values = torch.as_tensor(signal).detach().cpu()
    values = values[0] if values.dim() == 3 and values.shape[0] == 1 else values
    values = values[None] if values.dim() == 1 else values
    if values.dim() != 2 or values.shape[1] < 2:
        raise ValueError(
            f"signal must be of shape (C, L) or (L,) with two samples or more, not {tuple(np.shape(signal))}"
        )
    traces: NDArray[np.float32] = at_least_float32(values).float().numpy()
    if not np.isfinite(traces).all():
        raise ValueError("signal must be finite, but it has NaN or infinite values")
    return traces
