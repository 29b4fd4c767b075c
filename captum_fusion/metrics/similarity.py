"""How similar two maps of each example are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import choice
from captum_fusion.metrics._maps import nan_where_undefined, varies

#: From two maps of each example, (N, 1, *spatial), to a value for each, (N,).
Similarity = Callable[[Tensor, Tensor], Tensor]


def correlation(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson's correlation of flattened maps (N, P), in [-1, 1], and where it is defined.

    It is 0 where it is not defined, for a map that is constant up to rounding errors, and NaN for one that is not
    finite.
    """
    maps = [formulas.precise(formulas.normalize(values)) for values in (first, second)]  # zeros where it is undefined
    defined = torch.stack([values.amax(1) > 0 for values in maps]).all(0)
    centered = [values - values.mean(1, keepdim=True) for values in maps]
    scale = torch.stack([values.norm(dim=1) for values in centered]).prod(0)
    coefficients = (centered[0] * centered[1]).sum(1) / torch.where(defined, scale, 1.0)
    return nan_where_undefined(torch.where(defined, coefficients, 0.0).clamp(-1, 1), first, second), defined


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of two maps of each example, 0 where one of them is constant."""
    return correlation(first.flatten(1), second.flatten(1))[0]


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of two maps of each example: Pearson's of the ranks, where ties share their mean rank."""
    from scipy.stats import rankdata

    ranks = [
        torch.from_numpy(rankdata(torch.where(varies(maps)[:, None], maps.flatten(1), 0.0).cpu().numpy(), axis=1))
        for maps in (first, second)
    ]
    coefficients = correlation(*ranks)[0].to(formulas.precise(first.new_zeros(0)))
    return nan_where_undefined(coefficients, first, second)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of two maps of each example, each stretched to [0, 1].

    The mean over all windows of at most 7 x 7 pixels, with equal weights and the sample covariance, and the constants
    0.01 and 0.03. From the paper: Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image Quality Assessment",
    IEEE TIP 2004.

    Raises:
        ValueError: If the maps do not have two spatial dimensions.
    """
    if first.dim() != 4:
        raise ValueError(f'similarity="ssim" needs maps with two spatial dimensions, not of shape {tuple(first.shape)}')
    side = min(7, *(edge - 1 + edge % 2 for edge in first.shape[2:]))
    x, y = (formulas.precise(formulas.normalize(maps)) for maps in (first, second))

    def mean(values: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(values, side, stride=1)

    sample = side**2 / max(side**2 - 1, 1)
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = sample * (mean(x * x) - mean_x**2), sample * (mean(y * y) - mean_y**2)
    covariance = sample * (mean(x * y) - mean_x * mean_y)
    small, large = 0.01**2, 0.03**2
    windows = ((2 * mean_x * mean_y + small) * (2 * covariance + large)) / (
        (mean_x**2 + mean_y**2 + small) * (var_x + var_y + large)
    )
    return nan_where_undefined(
        torch.where(varies(first) & varies(second), windows.flatten(1).mean(1), 0.0), first, second
    )


_SIMILARITIES: dict[str, Similarity] = {"spearman": spearman, "pearson": pearson, "ssim": ssim}


def similarity_function(similarity: str | Similarity) -> Similarity:
    """The function of a name, or the user's own, whose result is checked, 0 for constant maps and NaN for maps of NaN.

    Raises:
        TypeError: If it is neither a name nor callable.
        ValueError: If there is no such name; when called, if it does not give a value for each example.
    """
    if isinstance(similarity, str):
        return _SIMILARITIES[choice("similarity", similarity, tuple(_SIMILARITIES))]
    if not callable(similarity):
        raise TypeError(f"similarity must be a name or a callable, not {type(similarity).__name__}")
    function: Similarity = similarity

    def checked(first: Tensor, second: Tensor) -> Tensor:
        values = function(first, second)
        if not isinstance(values, Tensor) or values.shape != first.shape[:1]:
            raise ValueError(f"similarity must give a tensor with a value for each of the {len(first)} examples")
        defined = (varies(first) & varies(second)).to(values.device)
        return nan_where_undefined(torch.where(defined, values, 0.0), first, second)

    return checked
