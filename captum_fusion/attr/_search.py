"""The search for channel scores in a batch: one call of the network in each round, for all examples together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from captum_fusion._arguments import count, share
from captum_fusion.functional import ChannelSearch, increase_weights, softmax_weights

#: The most channels that a search with a tolerance alone evaluates.
_CAP = 128


class SearchDetails(NamedTuple):
    """How the channel scores of each example were found.

    Attributes:
        evaluations: Number of channels whose masks were evaluated, int64, (N,).
        expected_error: Expected ``1 - correlation`` of the map with the map of all scores, float64, (N,). 0 where all
            channels were evaluated, infinity where fewer than two have a finite score.
    """

    evaluations: Tensor
    expected_error: Tensor


class SearchOptions(NamedTuple):
    """When a search ends.

    Attributes:
        max_evaluations: The most channels to evaluate in each example, or None.
        tolerance: The expected error of the map at which the search may end, or None.
    """

    max_evaluations: int | None = None
    tolerance: float | None = None

    @property
    def searches(self) -> bool:
        """Whether not all channels need to be evaluated."""
        return self.max_evaluations is not None or self.tolerance is not None

    @property
    def budget(self) -> int:
        """The most channels to evaluate in each example."""
        return _CAP if self.max_evaluations is None else self.max_evaluations

    def check(self) -> SearchOptions:
        """These options.

        Raises:
            ValueError: If one has a bad value. The message names it.
        """
        if self.max_evaluations is not None:
            count("max_evaluations", self.max_evaluations)
        if self.tolerance is not None:
            share("tolerance", self.tolerance, or_zero=False)
        return self


def channel_weights(scores: Tensor, live: Tensor, weighting: str, baseline: Tensor | None = None) -> Tensor:
    """Weights of the channels, (N, K), from their scores (N, K); the arguments are those of :func:`search_channels`."""
    if weighting == "softmax":
        return softmax_weights(scores, live)
    if weighting == "increase":
        assert baseline is not None, "the increase is over the baseline's score"
        return increase_weights(scores, baseline.to(scores.device), live)
    return scores


def search_channels(
    activations: Tensor,
    gradients: Tensor,
    live: Tensor,
    evaluate: Callable[[Tensor, Tensor], Tensor],
    options: SearchOptions,
    *,
    weighting: str,
    is_probability: bool,
    baseline: Tensor | None = None,
) -> tuple[Tensor, SearchDetails]:
    """Scores of all live channels, measured or predicted.

    Args:
        activations (Tensor): Of shape (N, K, *spatial).
        gradients (Tensor): Of the same shape.
        live (Tensor): bool, (N, K): the channels that have a score.
        evaluate (callable): ``evaluate(examples, channels)``: scores (P,) of (example, channel) pairs, int64 (P,) each.
        options (SearchOptions): When the search ends.
        weighting (str): As of :class:`captum_fusion.functional.ChannelSearch`.
        is_probability (bool): As there.
        baseline (Tensor, optional): Scores of the baselines, (N,), for ``weighting="increase"``.

    Returns:
        tuple[Tensor, SearchDetails]: Scores (N, K), float64, 0 for channels that are not live; and the details.
    """
    channels_of = [row.nonzero()[:, 0] for row in live.cpu()]
    searches = [
        ChannelSearch(
            activations[i][live[i]],
            gradients[i][live[i]],
            options.budget,
            weighting=weighting,
            is_probability=is_probability,
            baseline=0.0 if baseline is None else float(baseline[i]),
            tolerance=options.tolerance,
        )
        for i in range(len(live))
    ]
    while any(asked := [search.ask() for search in searches]):
        # Perturbation-major: the first question of each example, then the second, and so on.
        pairs = [
            (example, rank)
            for rank in range(max(map(len, asked)))
            for example in range(len(asked))
            if rank < len(asked[example])
        ]
        examples = torch.tensor([example for example, _ in pairs], device="cpu")
        channels = torch.stack([channels_of[example][asked[example][rank]] for example, rank in pairs])
        scores = evaluate(examples.to(live.device), channels.to(live.device)).cpu()
        for example, search in enumerate(searches):
            if asked[example]:
                search.tell(asked[example], scores[examples == example])
    table = torch.zeros(live.shape, dtype=torch.double, device="cpu")
    for example, search in enumerate(searches):
        table[example, channels_of[example]] = search.scores()
    details = SearchDetails(
        torch.tensor([search.evaluations for search in searches], device="cpu"),
        torch.tensor([search.expected_error for search in searches], dtype=torch.double, device="cpu"),
    )
    return table, details
