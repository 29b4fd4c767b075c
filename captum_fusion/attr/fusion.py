"""Fusions: a gradient map and a region map, each weighted by the score of the part of the input that it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from captum.attr import (
    Attribution,
    GradientAttribution,
    LayerGradCam,
    PerturbationAttribution,
)
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import choice, percentage
from captum_fusion._captum import format_result, log_usage
from captum_fusion._passes.layer_pass import LayerEvaluation
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Attributions, Baselines, Layer, Reshape, Target, TensorOrTupleOfTensors
from captum_fusion.attr._bases import CAM, MASKING_OPTIONS, checked_score_fn
from captum_fusion.attr._components import Component, checked_component, in_input_space
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo
from captum_fusion.attr.region import LayerScoreCAM
from captum_fusion.attr.regression import LayerRegressionCAM
from captum_fusion.functional import ScoreFn

__all__ = ["FusionDetails", "LayerFusionCAM", "LayerUnionCAM"]

_WEIGHTINGS = ("normalized", "raw")

#: Channels that ``LayerFusionCAM.fast`` evaluates.
_FAST_EVALUATIONS = 56


class FusionDetails(NamedTuple):
    """Intermediate results of a fusion. Maps are of shape ``(N, 1, *input spatial)``, in [0, 1].

    Attributes:
        gradient_map: The gradient component, normalised. For :class:`LayerUnionCAM` the same as ``denoised_map``.
        denoised_map: The gradient component after denoising.
        region_map: The region component, normalised.
        union_map: The union of the two, weighted by their contributions, normalised.
        score: Score of the original input, (N,).
        baseline_score: Score of the baseline, (N,).
        gradient_contribution: Score of the input under ``denoised_map`` minus ``baseline_score``, (N,).
        region_contribution: The same for ``region_map``.
        union_contribution: The same for ``union_map``.
        union_weights: Weights of the gradient map and the region map in the union, (N, 2).
        fusion_weights: Weights of the union map and the region map in the last stage, (N, 2). One-hot for
            :class:`LayerUnionCAM`, which selects one of them.
        similarity_map: 1 minus the absolute difference of the weighted union map and the weighted region map; 1 where
            they agree. None for :class:`LayerUnionCAM`.
        selected: Whether the union map was selected over the region map, bool, (N,). None for :class:`LayerFusionCAM`.
    """

    gradient_map: Tensor
    denoised_map: Tensor
    region_map: Tensor
    union_map: Tensor
    score: Tensor
    baseline_score: Tensor
    gradient_contribution: Tensor
    region_contribution: Tensor
    union_contribution: Tensor
    union_weights: Tensor
    fusion_weights: Tensor
    similarity_map: Tensor | None = None
    selected: Tensor | None = None

    def __repr__(self) -> str:
        """Shapes, scores, contributions and weights, without the maps."""
        scores = {
            name: values
            for name, values in self._asdict().items()
            if values is not None and not name.endswith("_map") and values.dim() == 1
        }
        shown = {**scores, "union_weights": self.union_weights, "fusion_weights": self.fusion_weights}
        texts = [f"{name}={values.cpu().double().round(decimals=3).tolist()}" for name, values in shown.items()]
        return f"FusionDetails(maps of shape {tuple(self.region_map.shape)}, {', '.join(texts)})"


#: The result of ``attribute`` with ``return_details=True``: a pair, or a list of pairs for a list of layers.
_Detailed = tuple[TensorOrTupleOfTensors, FusionDetails | tuple[FusionDetails, ...]]
DetailedAttributions = _Detailed | list[_Detailed]


def single(result: DetailedAttributions) -> tuple[Tensor, FusionDetails]:
    """What ``attribute`` returned with ``return_details=True`` for one layer that returns one tensor.

    Raises:
        ValueError: If there are several layers or tensors.

    Examples::

        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> fusion = LayerFusionCAM(model, model.stage4)
        >>> result = fusion.attribute(digits.preprocess(scene.image), scene.labels[0], return_details=True)
        >>> attribution, details = single(result)
    """
    if isinstance(result, tuple):
        attribution, details = result
        if isinstance(attribution, Tensor) and isinstance(details, FusionDetails):
            return attribution, details
    raise ValueError("the layer must return one tensor, not several; name a part of it")


#: The fused map and the details of each tensor of a layer.
_Fused = list[tuple[Tensor, FusionDetails]]


class _Fusion(CAM, GradientAttribution, PerturbationAttribution):
    """Base class of Fusion-CAM and UnionCAM: components, contributions and the weighted union."""

    call_options = MASKING_OPTIONS
    theta: float
    weighting: str
    authors_code: bool
    score_fn: str | ScoreFn

    def _set_options(self, theta: float, weighting: str, authors_code: bool, score_fn: str | ScoreFn) -> None:
        self.theta = percentage("theta", theta)
        self.weighting = choice("weighting", weighting, _WEIGHTINGS)
        if authors_code and weighting != "normalized":
            raise ValueError(
                f"weighting={weighting!r} cannot be combined with authors_code=True, which defines its own weights"
            )
        self.authors_code = authors_code
        self.score_fn = checked_score_fn(score_fn)

    @property
    def multiplies_by_inputs(self) -> bool:
        """True, as for captum's perturbation methods."""
        return True

    @staticmethod
    def _finish(fused: Tensor, details: FusionDetails, passes: Passes) -> tuple[Tensor, FusionDetails]:
        """The map in the input's dtype, and the details with all floating point tensors in the dtype of their maps."""
        dtype = details.region_map.dtype
        fields: list[Any] = [d.to(dtype) if isinstance(d, Tensor) and d.is_floating_point() else d for d in details]
        return fused.to(passes.dtype).contiguous(), FusionDetails(*fields)

    def _scores_under(self, maps: list[Tensor], passes: Passes) -> list[Tensor]:
        """Scores of the inputs masked by each map, (N,) per map, in as few calls of the network as possible."""
        stacked = torch.cat([m.detach() for m in maps])
        owners = torch.arange(passes.examples, device=stacked.device).repeat(len(maps))
        scores = passes.masked_scores(
            lambda chunk, size: formulas.upsample(stacked[chunk], size), owners, formulas.score_function(self.score_fn)
        )
        return list(scores.chunk(len(maps)))

    def _contribution(self, score: Tensor, baseline: Tensor) -> Tensor:
        normalized = self.weighting == "normalized" and not self.authors_code
        return formulas.contribution(score, baseline) if normalized else score - baseline

    def _stage_weights(self, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        """Weights of two maps, (N, 2), from differences of scores of the magnitude ``scale``, (N,) each."""
        pair = torch.stack([first, second], 1)
        if self.authors_code:
            total = pair.sum(1, keepdim=True) + 1e-8
            return torch.where(total != 0, pair / torch.where(total != 0, total, 1.0), 0.0)
        return pair if self.weighting == "raw" else formulas.contribution_weights(first, second, scale)

    def _union(
        self, gradient: Tensor, denoised: Tensor, region: Tensor, passes: Passes
    ) -> tuple[FusionDetails, tuple[Tensor, Tensor]]:
        """Everything up to the union, and the scores under the union and region maps. Subclasses add the last stage."""
        score_fn = formulas.score_function(self.score_fn)
        baseline = passes.baseline_scores(score_fn).to(denoised.device)
        gradient_score, region_score = self._scores_under([denoised, region], passes)
        contributions = [self._contribution(score, baseline) for score in (gradient_score, region_score)]
        weights = self._stage_weights(
            gradient_score - baseline, region_score - baseline, _magnitude(gradient_score, region_score, baseline)
        )
        union = formulas.normalize(torch.add(*formulas.weigh((denoised, region), weights)))
        (union_score,) = self._scores_under([union], passes)
        details = FusionDetails(
            gradient_map=gradient,
            denoised_map=denoised,
            region_map=region,
            union_map=union,
            score=passes.clean_scores(score_fn).to(denoised.device),
            baseline_score=baseline,
            gradient_contribution=contributions[0],
            region_contribution=contributions[1],
            union_contribution=self._contribution(union_score, baseline),
            union_weights=weights,
            fusion_weights=torch.empty_like(weights),
        )
        return details, (union_score, region_score)

    def _fuse(self, passes: Passes, evaluations: list[LayerEvaluation]) -> list[_Fused]:
        raise NotImplementedError

    def _maps(self, passes: Passes, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        return [tuple(attribution for attribution, _ in fused) for fused in self._fuse(passes, evaluations)]

    def _with_details(self, fused: list[_Fused], return_details: bool) -> Attributions | DetailedAttributions:
        results = []
        for tensors in fused:
            attribution = format_result(tuple(m for m, _ in tensors))
            details = format_result(tuple(d for _, d in tensors))
            results.append((attribution, details) if return_details else attribution)
        result: Attributions | DetailedAttributions = self._per_layer(results)
        return result


class LayerFusionCAM(_Fusion):
    """Fusion-CAM: a denoised gradient map and a region map, fused by their contributions and their similarity.

    With ``N`` the min-max normalisation of an upsampled map, ``p`` the target's score and ``X_b`` the baseline:

    1. gradient map ``G = N(Grad-CAM)``, denoised: ``L_d = G`` where ``G`` reaches its ``theta`` percentile, else 0;
    2. region map ``L_r = N(Score-CAM)``;
    3. contributions ``B_m = p(masked by L_m) - p(X_b)``, for both;
    4. union ``L_u = N(w_d L_d + w_r L_r)`` with weights from ``B_d, B_r``, and its contribution ``B_u``;
    5. with ``P = v_u L_u``, ``Q = v_r L_r``, weights from ``B_u, B_r``, and the similarity ``s = 1 - |P - Q|``, the
       result is ``N(s max(P, Q) + (1 - s) (P + Q) / 2)``.

    With ``weighting="normalized"``, negative contributions are set to 0 and the weights of each stage sum to 1. If both
    contributions are 0 or within rounding noise of it, the weights are equal, with a smooth transition
    (:func:`captum_fusion.functional.contribution_weights`). With ``"raw"``, the contributions themselves are the
    weights.
    ``authors_code=True`` reproduces the weights of the authors' published code, which normalises signed contributions
    and, in the second stage, the union's contribution together with the region map's weight of the first stage. With
    ``"raw"`` or ``authors_code=True``, a negative contribution can invert the map. Components, threshold and
    normalisation are always as above.

    Any captum attribution can be used as either component. Components of this package on the same layer and function,
    and captum's ``LayerGradCam``, share one layer pass.
    Cost per example with the default components: one forward and one backward sample, one masked sample per live
    channel, and 4 further masked samples. The cost of the variants that :meth:`fast` and :meth:`best` create does not
    depend on the number of channels.

    More details in the paper: H. Dekdegue, M. Garouani, J. Mothe, J. Bernigaud, "Fusion-CAM: Integrating Gradient and
    Region-Based Class Activation Maps for Robust Visual Explanations", 2026, https://arxiv.org/abs/2603.05386

    Examples::

        >>> from captum_fusion import LayerFusionCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> images = digits.preprocess(scene.image)
        >>> attribution = LayerFusionCAM(model, model.stage4).attribute(images, target=scene.labels[0])
        >>> attribution.shape, float(attribution.min()), float(attribution.max())
        (torch.Size([1, 1, 96, 96]), 0.0, 1.0)
    """

    info = MethodInfo(
        "fusion-cam",
        "fusion",
        "K + 5, 1 b",
        "Dekdegue et al., 2026",
        "https://arxiv.org/abs/2603.05386",
        space="input",
        presets={"fast": {"max_evaluations": _FAST_EVALUATIONS}, "best": {"region_method": "regression-cam"}},
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        gradient_method: Attribution | None = None,
        region_method: Attribution | None = None,
        *,
        theta: float = 10.0,
        weighting: str = "normalized",
        authors_code: bool = False,
        max_evaluations: int | None = None,
        score_fn: str | ScoreFn = "softmax",
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        gradient_method (Attribution, optional): Gradient component: any captum attribution.
            Default: None (``LayerGradCam`` on the same layer)
        region_method (Attribution, optional): Region component: any captum attribution.
            Default: None (:class:`LayerScoreCAM` on the same layer)
        theta (float, optional): Percentile of the gradient map below which values are set to 0.
            Default: 10.0
        weighting (str, optional): Weights of the maps, ``"normalized"`` or ``"raw"``.
            Default: ``"normalized"``
        {authors_code}
        max_evaluations (int, optional): Most channels that the default region component evaluates in each example (see
            :class:`LayerScoreCAM`).
            Default: None (all live channels)
        {score_fn}
            Contributions are differences of these scores. Gradients always use the raw output.
            Default: ``"softmax"``
        {reshape_arg}
        """
        _Fusion.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self._set_options(theta, weighting, authors_code, score_fn)
        if gradient_method is None:
            gradient_method = LayerGradCam(forward_func, layer, device_ids)
        self.gradient_method = checked_component("gradient_method", gradient_method)
        self.region_method = _region_component(region_method, max_evaluations, self)

    @classmethod
    @documented
    def fast(
        cls, forward_func: Callable[..., Any], layer: Layer, device_ids: list[int] | None = None, **options: Any
    ) -> LayerFusionCAM:
        """Fusion-CAM with at most 61 forward samples per example, whatever the number of channels.

        Score-CAM's channel scores are searched for with 56 evaluations; ``docs/faithfulness.md`` compares the maps with
        those of all channels.
        Cost per example: 61 forward samples and one backward sample.

        Args:
            {preset_args}

        Returns:
            LayerFusionCAM: Called as any other.

        Raises:
            {preset_raises}

        Examples::

            >>> from captum_fusion.demo import digits
            >>> model, scene = digits.load_model(), digits.load_scenes()[0]
            >>> fusion = LayerFusionCAM.fast(model, model.stage4)
            >>> fusion.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
            torch.Size([1, 1, 96, 96])
        """
        _check_free("fast", options)
        return cls(forward_func, layer, device_ids, max_evaluations=_FAST_EVALUATIONS, **options)

    @classmethod
    @documented
    def best(
        cls, forward_func: Callable[..., Any], layer: Layer, device_ids: list[int] | None = None, **options: Any
    ) -> LayerFusionCAM:
        """Fusion-CAM with :class:`LayerRegressionCAM` instead of Score-CAM as the region component.

        ``docs/faithfulness.md`` compares the maps with the published Fusion-CAM and other methods. ``score_fn`` also
        applies to the region component.
        Cost per example: 517 forward samples and one backward sample, whatever the number of channels.

        Args:
            {preset_args}

        Returns:
            LayerFusionCAM: Called as any other.

        Raises:
            {preset_raises}

        Examples::

            >>> from captum_fusion.demo import digits
            >>> model, scene = digits.load_model(), digits.load_scenes()[0]
            >>> fusion = LayerFusionCAM.best(model, model.stage4)
            >>> fusion.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
            torch.Size([1, 1, 96, 96])
        """
        _check_free("best", options)
        shared = {name: options[name] for name in ("score_fn", "reshape") if name in options}
        region_method = LayerRegressionCAM(forward_func, layer, device_ids, **shared)
        return cls(forward_func, layer, device_ids, region_method=region_method, **options)

    @classmethod
    @documented
    def consensus(
        cls,
        forward_func: Callable[..., Any],
        layer: Layer,
        methods: Sequence[Attribution],
        device_ids: list[int] | None = None,
        *,
        theta: float = 10.0,
        **options: Any,
    ) -> LayerFusionCAM:
        """Fusion of two or more methods, one after the other.

        The first two methods are fused as the gradient and the region component. Each further method is fused with the
        result so far, in the same way and without denoising. With two methods this is ``LayerFusionCAM`` of the two.
        The order matters: a method is compared with the fusion of those before it.
        Cost per example: that of the methods, and three masked samples for each method after the first.

        Args:
            forward_func (callable): As of the constructor.
            layer (Module or list of Modules): As of the constructor.
            methods (sequence of Attribution): Components: any captum attributions, at least two.
            device_ids (list of int, optional): As of the constructor.
                Default: None
            theta (float, optional): Percentile of the first map below which values are set to 0.
                Default: 10.0
            options (Any): ``weighting``, ``authors_code``, ``score_fn`` and ``reshape`` of the constructor.

        Returns:
            LayerFusionCAM: Called as any other. ``return_details`` gives the details of the last fusion, whose
            gradient map is the fusion of all methods but the last.

        Raises:
            ValueError: If there are fewer than two methods, or ``max_evaluations`` is given.
            TypeError: If a method has no ``attribute``, or if ``options`` contains another option.

        Examples::

            >>> from captum_fusion import LayerGroupCAM, LayerHiResCAM, LayerRegressionCAM
            >>> from captum_fusion.demo import digits
            >>> model, scene = digits.load_model(), digits.load_scenes()[0]
            >>> methods = [kind(model, model.stage4) for kind in (LayerHiResCAM, LayerGroupCAM, LayerRegressionCAM)]
            >>> fusion = LayerFusionCAM.consensus(model, model.stage4, methods)
            >>> fusion.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
            torch.Size([1, 1, 96, 96])
        """
        if len(methods) < 2:
            raise ValueError(f"methods must have at least two attributions, not {len(methods)}")
        first, second, *others = (checked_component(f"methods[{i}]", method) for i, method in enumerate(methods))

        def fuse(so_far: Attribution, method: Attribution, theta: float) -> LayerFusionCAM:
            components = {"gradient_method": so_far, "region_method": method}
            return cls(forward_func, layer, device_ids, **components, theta=theta, **options)

        fusion = fuse(first, second, theta)
        for method in others:
            fusion = fuse(fusion, method, 0.0)
        return fusion

    @property
    def uses_gradients(self) -> bool:  # type: ignore[override]
        """Whether a component that shares the layer pass needs gradients."""
        return any(component.shares_gradients for component in self._components())

    def _components(
        self, gradient_kwargs: dict[str, Any] | None = None, region_kwargs: dict[str, Any] | None = None
    ) -> tuple[Component, Component]:
        return (
            Component("gradient_method", self.gradient_method, gradient_kwargs, self),
            Component("region_method", self.region_method, region_kwargs, self),
        )

    @overload
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        gradient_kwargs: dict[str, Any] | None = None,
        region_kwargs: dict[str, Any] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_details: Literal[False] = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Attributions: ...

    @overload
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        gradient_kwargs: dict[str, Any] | None = None,
        region_kwargs: dict[str, Any] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_details: Literal[True],
        grad_kwargs: dict[str, Any] | None = None,
    ) -> DetailedAttributions: ...

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        gradient_kwargs: dict[str, Any] | None = None,
        region_kwargs: dict[str, Any] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_details: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Attributions | DetailedAttributions:
        """Explain a batch.

        Args:
            {shared_args}
            {masked_args}
            gradient_kwargs (dict, optional): Further arguments of the gradient component's ``attribute``. Components
                of this package use the fusion's baselines; captum's methods take their baselines here.
                Default: None
            {fusion_args}
            {grad_kwargs}

        Returns:
            {fusion_returns}

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> from captum.attr import Saliency
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> images = torch.rand(2, 3, 8, 8)
            >>> LayerFusionCAM(net, net[0]).attribute(images, target=[3, 7]).shape
            torch.Size([2, 1, 8, 8])
            >>> fusion = LayerFusionCAM(net, net[0], gradient_method=Saliency(net))
            >>> attribution, details = fusion.attribute(images, target=3, return_details=True)
            >>> details.union_weights.sum(1)
            tensor([1., 1.])
        """
        components = self._components(gradient_kwargs, region_kwargs)
        fused = self._explain(
            lambda passes, evaluations: self._fuse_components(components, passes, evaluations),
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            baselines=baselines,
            mask_inputs=mask_inputs,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            gradients=any(component.shares_gradients for component in components),
            grad_kwargs=grad_kwargs,
        )
        return self._with_details(fused, return_details)

    def _fuse(self, passes: Passes, evaluations: list[LayerEvaluation]) -> list[_Fused]:
        return self._fuse_components(self._components(), passes, evaluations)

    def _fuse_components(
        self, components: tuple[Component, Component], passes: Passes, evaluations: list[LayerEvaluation]
    ) -> list[_Fused]:
        gradients, regions = (component.maps(passes, evaluations) for component in components)
        return [
            [self._fuse_pair(gradient, region, passes) for gradient, region in zip(*pair, strict=True)]
            for pair in zip(gradients, regions, strict=True)
        ]

    def _fuse_pair(self, gradient: Tensor, region: Tensor, passes: Passes) -> tuple[Tensor, FusionDetails]:
        details, (union, rival) = self._union(gradient, formulas.denoise(gradient, self.theta), region, passes)
        base = details.baseline_score
        # The published code normalises the union's contribution together with the region map's first-stage weight.
        second = details.union_weights[:, 1] if self.authors_code else rival - base
        weights = self._stage_weights(union - base, second, _magnitude(union, rival, base))
        fused, similarity = formulas.similarity_fusion(*formulas.weigh((details.union_map, region), weights))
        details = details._replace(fusion_weights=weights, similarity_map=similarity)
        return self._finish(formulas.normalize(fused), details, passes)


class LayerUnionCAM(_Fusion):
    """UnionCAM: the union of a denoised gradient map and a region map, or the region map if it contributes more.

    With ``N`` the min-max normalisation of an upsampled map, ``p`` the target's score and ``X_b`` the baseline:

    1. ``L_Den``: activations weighted pixel by pixel by the positive part of their gradients, after setting each
       channel's gradients below their ``theta`` percentile to 0
       (:func:`captum_fusion.functional.union_gradient_map`; eqs. 1 to 3);
    2. region map ``L_Reg``, by default Score-CAM;
    3. contributions ``b_m = p(masked by N(L_m)) - p(X_b)``, for both (eqs. 4 and 5);
    4. ``L_DR = N(w_Den L_Den + w_Reg L_Reg)`` with weights from the contributions, and its contribution ``b_DR``
       (eqs. 6 and 7);
    5. the result is ``L_DR`` where ``b_DR > b_Reg``, else ``L_Reg`` (eq. 8), for each example separately.

    With ``weighting="normalized"``, negative contributions are set to 0, and the weights are equal if both
    contributions are 0. ``"raw"`` follows eq. 6 literally. The authors of UnionCAM published no code;
    ``authors_code=True`` reproduces the weights of the Fusion-CAM authors' implementation. It also multiplies the
    selected map by its contribution, so that a negative contribution inverts the map.

    If the network ends in global pooling, the gradient of a channel is constant over space, and the denoising has no
    effect. Use ``alpha="count"`` for such networks: the default, which is the reading of eq. 3 in all known code, then
    gives every channel with a positive gradient the same total weight.

    Cost per example with the default component: one forward and one backward sample, one masked sample per live
    channel, and 4 further masked samples.

    More details in the paper: H. Hu, R. Wang, H. Lin, H. Yu, "UnionCAM: enhancing CNN interpretability through
    denoising, weighted fusion, and selective high-quality class activation mapping", Frontiers in Neurorobotics
    18:1490198, 2024, https://doi.org/10.3389/fnbot.2024.1490198. The equations on its web page are images; this
    implementation follows the text and the published codes.

    Examples::

        >>> from captum_fusion import LayerUnionCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> images = digits.preprocess(scene.image)
        >>> union = LayerUnionCAM(model, model.stage4, alpha="count")
        >>> attribution, details = union.attribute(images, target=scene.labels[0], return_details=True)
        >>> attribution.shape, details.selected.shape
        (torch.Size([1, 1, 96, 96]), torch.Size([1]))
    """

    info = MethodInfo(
        "union-cam",
        "fusion",
        "K + 5, 1 b",
        "Hu et al., Front. Neurorobot. 2024",
        "https://doi.org/10.3389/fnbot.2024.1490198",
        space="input",
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        region_method: Attribution | None = None,
        *,
        theta: float = 10.0,
        alpha: str = "sum",
        weighting: str = "normalized",
        authors_code: bool = False,
        max_evaluations: int | None = None,
        score_fn: str | ScoreFn = "softmax",
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        region_method (Attribution, optional): Region component: any captum attribution. The gradient component is
            fixed.
            Default: None (:class:`LayerScoreCAM` on the same layer)
        theta (float, optional): Percentile of each channel's gradients below which values are set to 0.
            Default: 10.0
        alpha (str, optional): Reading of eq. 3, ``"sum"`` or ``"count"``.
            Default: ``"sum"``
        weighting (str, optional): Weights of the maps, ``"normalized"`` or ``"raw"``.
            Default: ``"normalized"``
        {authors_code}
        max_evaluations (int, optional): Most channels that the default region component evaluates in each example (see
            :class:`LayerScoreCAM`).
            Default: None (all live channels)
        {score_fn}
            Contributions are differences of these scores. Gradients always use the raw output.
            Default: ``"softmax"``
        {reshape_arg}
        """
        _Fusion.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self._set_options(theta, weighting, authors_code, score_fn)
        self.alpha = choice("alpha", alpha, ("sum", "count"))
        self.region_method = _region_component(region_method, max_evaluations, self)

    uses_gradients = True

    @overload
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        region_kwargs: dict[str, Any] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_details: Literal[False] = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Attributions: ...

    @overload
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        region_kwargs: dict[str, Any] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_details: Literal[True],
        grad_kwargs: dict[str, Any] | None = None,
    ) -> DetailedAttributions: ...

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        region_kwargs: dict[str, Any] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_details: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Attributions | DetailedAttributions:
        """Explain a batch.

        Args:
            {shared_args}
            {masked_args}
            {fusion_args}
            {grad_kwargs}

        Returns:
            {fusion_returns}

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> LayerUnionCAM(net, net[0]).attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
            torch.Size([2, 1, 8, 8])
        """
        fused = self._explain(
            lambda passes, evaluations: self._fuse(passes, evaluations, region_kwargs),
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            baselines=baselines,
            mask_inputs=mask_inputs,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            grad_kwargs=grad_kwargs,
        )
        return self._with_details(fused, return_details)

    def _stage_weights(self, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        # Eq. 6 and the published code use the contributions themselves as weights.
        if self.authors_code:
            return torch.stack([first, second], 1)
        return super()._stage_weights(first, second, scale)

    def _fuse(
        self, passes: Passes, evaluations: list[LayerEvaluation], region_kwargs: dict[str, Any] | None = None
    ) -> list[_Fused]:
        regions = Component("region_method", self.region_method, region_kwargs, self).maps(passes, evaluations)
        return [
            [
                self._select(formulas.union_gradient_map(tensor, gradient, self.theta, self.alpha), region, passes)
                for tensor, gradient, region in zip(layer.activations, layer.gradients or (), maps, strict=True)
            ]
            for layer, maps in zip(evaluations, regions, strict=True)
        ]

    def _select(self, gradient: Tensor, region: Tensor, passes: Passes) -> tuple[Tensor, FusionDetails]:
        gradient = in_input_space("layer", gradient, passes)
        details, scores = self._union(gradient, gradient, region, passes)
        gained = self._contribution(*scores)
        selected = gained > 0
        details = details._replace(selected=selected, fusion_weights=torch.stack([selected, ~selected], 1).to(region))
        shape = (-1, *[1] * (region.dim() - 1))
        result = torch.where(selected.reshape(shape), details.union_map, region)
        result = result.masked_fill(gained.isnan().reshape(shape), torch.nan)
        if self.authors_code:
            winner = torch.where(selected, details.union_contribution, details.region_contribution)
            result = formulas.normalize(winner.to(result).reshape(shape) * result)
        return self._finish(result, details, passes)


def _magnitude(*scores: Tensor) -> Tensor:
    """The largest magnitude of several scores, (N,)."""
    return torch.stack(scores).abs().amax(0)


def _region_component(given: Attribution | None, max_evaluations: int | None, fusion: CAM) -> Attribution:
    if given is None:
        return LayerScoreCAM(
            fusion.forward_func,
            fusion.layer,
            fusion.device_ids,
            max_evaluations=max_evaluations,
            reshape=fusion.reshape,
        )
    if max_evaluations is not None:
        raise ValueError("max_evaluations is an option of the default region_method; give it to yours instead")
    return checked_component("region_method", given)


def _check_free(preset: str, options: dict[str, Any]) -> None:
    """Raise a TypeError if the options contain one that a preset sets."""
    for name in ("region_method", "max_evaluations"):
        if name in options:
            raise TypeError(f"{name} is set by LayerFusionCAM.{preset}; use LayerFusionCAM(...) to choose it")
