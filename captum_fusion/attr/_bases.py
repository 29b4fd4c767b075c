"""Base classes of the methods. A method implements its formula in :meth:`CAM._map`; its base class does the rest.

Which base class a method needs:

=========================  ===========================================================  ============================
base class                 for methods that                                             ``_map(tensor)`` uses
=========================  ===========================================================  ============================
:class:`ActivationCAM`     need one forward pass                                        ``activations``, ``output``
:class:`GradientCAM`       need one forward and one backward pass                       ``activations``, ``gradients``
:class:`SampledCAM`        compute gradients at perturbed copies of the input           (implement ``_maps``)
:class:`MaskedCAM`         score masked inputs                                          ``masked_scores(...)``
:class:`DetailedCAM`       score masked inputs and can return how the map was found     ``masked_scores(...)``
:class:`BackgroundCAM`     score masked inputs on a blurred background                  ``masked_scores(...)``
:class:`ChannelScoresCAM`  weight channels by the score of one mask each, or search     (implement ``_evaluator``)
:class:`RepeatedMasksCAM`  weight channels by the mean score of several masked inputs   (implement ``_changes``)
:class:`ReplacedCAM`       score replaced activations of the layer                      ``replaced_scores(...)``
=========================  ===========================================================  ============================

A method that combines several layers or passes overrides :meth:`CAM._maps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, overload

import torch
from captum.attr import Attribution, GradientAttribution, LayerAttribution, PerturbationAttribution
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion._arguments import choice
from captum_fusion._captum import format_result, log_usage, progress_bar
from captum_fusion._passes.call import Call
from captum_fusion._passes.layer_pass import LayerEvaluation, layer_pass, warn_if_one_position
from captum_fusion._passes.masking import Compose, MaskingOptions, Masks
from captum_fusion._passes.modes import own_arithmetic, warn_if_training
from captum_fusion._passes.passes import Passes
from captum_fusion._passes.sharing import shared_work
from captum_fusion._types import Attributions, Baselines, Layer, Reshape, Target, TensorOrTupleOfTensors
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo
from captum_fusion.attr._search import SearchDetails, SearchOptions, channel_weights, search_channels
from captum_fusion.functional import ScoreFn

Result = TypeVar("Result")

#: The return type of :class:`DetailedCAM` with ``return_details=True``; details are NamedTuples of tensors.
_WithDetails = tuple[TensorOrTupleOfTensors, Any]
AttributionsWithDetails = _WithDetails | list[_WithDetails]

#: Values of removed activations: as for inputs, or ``"mean"``, each channel's mean over space.
LayerBaselines = Baselines | Literal["mean"]

#: Names of the masking options of ``attribute``.
MASKING_OPTIONS = frozenset(MaskingOptions._fields)


class LayerTensor:
    """One tensor of a layer in one call, with access to further passes.

    Args:
        passes (Passes): The passes of the call.
        layer (Module): The layer.
        evaluation (LayerEvaluation): Values of the layer in the clean pass.
        index (int): Index of this tensor among the layer's tensors.
        masks (optional): Key of everything that the method's masks depend on besides this tensor, if calls may share
            masked samples.
        absent (Tensor, optional): Values of removed activations, of the activations' shape.
        device_ids (list of int, optional): Order of the devices.
    """

    def __init__(
        self,
        passes: Passes,
        layer: nn.Module,
        evaluation: LayerEvaluation,
        index: int,
        *,
        masks: Any = None,
        absent: Tensor | None = None,
        device_ids: list[int] | None = None,
    ) -> None:
        self.passes = passes
        self._layer, self._evaluation, self._index = layer, evaluation, index
        self._masks, self._absent, self._device_ids = masks, absent, device_ids

    @property
    def activations(self) -> Tensor:
        """Activations, of shape (N, K, *spatial)."""
        return self._evaluation.activations[self._index]

    @property
    def gradients(self) -> Tensor:
        """Gradients, of shape (N, K, *spatial). Available if the method sets ``uses_gradients``."""
        assert self._evaluation.gradients is not None, "the method's uses_gradients is False"
        return self._evaluation.gradients[self._index]

    @property
    def absent(self) -> Tensor:
        """Values of removed activations, of shape (N, K, *spatial)."""
        assert self._absent is not None, "only ReplacedCAM sets it"
        return self._absent

    @property
    def output(self) -> Tensor:
        """Raw output of the network for the original inputs."""
        return self.passes.output

    def clean_scores(self, score_fn: ScoreFn) -> Tensor:
        """Scores of the original inputs, (N,)."""
        return self.passes.clean_scores(score_fn).to(self.activations.device)

    def baseline_scores(self, score_fn: ScoreFn) -> Tensor:
        """Scores of the baselines, (N,)."""
        return self.passes.baseline_scores(score_fn).to(self.activations.device)

    def masked_scores(
        self, masks: Masks, owners: Tensor, score_fn: ScoreFn, compose: Compose | None = None, share: bool = True
    ) -> Tensor:
        """Scores of masked inputs, (S,); see :meth:`captum_fusion._passes.passes.Passes.masked_scores`."""
        shared_as = None
        if share and self._masks is not None:
            shared_as = self._layer, self._index, self.passes.call.reshape, self._masks
        return self.passes.masked_scores(masks, owners, score_fn, compose, shared_as)

    def replaced_scores(self, replace: Callable[[slice], Tensor], owners: Tensor, score_fn: ScoreFn) -> Tensor:
        """Scores of replaced activations, (S,); see :func:`captum_fusion._passes.replacing.replaced_scores`."""
        return self.passes.replaced_scores(
            self._layer, self._evaluation, self._index, replace, owners, score_fn, self._device_ids
        )


class SeveralTargets(Attribution):
    """Mixin with a method that explains a batch for several targets and shares work between them."""

    def attribute_targets(
        self, inputs: Tensor | tuple[Tensor, ...], targets: Sequence[Target], **kwargs: Any
    ) -> list[Attributions]:
        """Explain a batch for several targets at a lower cost than separate calls.

        One masked sample scores every class. The masked samples of Score-CAM, SS-CAM, IS-CAM and cell regression, on
        their own and inside fusions, therefore run once for all targets. Passes that depend on the target run once per
        target: the layer pass of methods that need gradients, and masked samples whose masks depend on the target.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs to explain, as in :meth:`attribute`.
            targets (sequence): Targets, each in the format of :meth:`attribute`: an int for all examples, a list with
                one int per example, ...
            kwargs (Any, optional): Further arguments of :meth:`attribute`.

        Returns:
            list: The result of :meth:`attribute` for each target, equal to separate calls up to rounding.

        Raises:
            TypeError: If ``targets`` is not a list or tuple.

        Examples::

            >>> from captum_fusion import LayerFusionCAM
            >>> from captum_fusion.demo import digits
            >>> model, scene = digits.load_model(), digits.load_scenes()[0]
            >>> fusion = LayerFusionCAM(model, model.stage4)
            >>> four, six = fusion.attribute_targets(digits.preprocess(scene.image), targets=[4, 6])
        """
        if not isinstance(targets, (list, tuple)):
            raise TypeError(f"targets must be a list of targets, not {type(targets).__name__}")
        with shared_work():
            return [self.attribute(inputs, target, **kwargs) for target in targets]


class CAM(LayerAttribution, SeveralTargets):
    """Base class of all layer methods: checks the arguments, runs the layer pass and calls :meth:`_map` per tensor.

    A method implements ``_map(tensor)``, or ``_maps(passes, evaluations)`` if it combines layers or passes. Its
    ``attribute`` declares the options and calls :meth:`_explain`. A fusion calls ``_maps`` of its components with its
    own passes, so that they share them.
    """

    #: Metadata for the catalogue and the documentation.
    info: ClassVar[MethodInfo]
    #: Keyword arguments of ``attribute`` that also apply when a fusion calls ``_maps``.
    call_options: frozenset[str] = frozenset()
    #: Whether the method needs a target; False if its map is the same for all targets.
    needs_target = True
    #: Whether ``_map`` reads the layer's gradients.
    uses_gradients = False

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        {reshape_arg}
        """
        if not callable(forward_func):
            raise TypeError(f"forward_func must be callable, not {type(forward_func).__name__}")
        modules = layer if isinstance(layer, list) else [layer]
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            raise TypeError(f"layer must be a torch.nn.Module or a list of them, not {layer!r:.80}")
        if device_ids is not None and not isinstance(device_ids, (list, tuple)):
            raise TypeError(
                f"device_ids must be a list of device numbers, not {type(device_ids).__name__}; "
                "pass other arguments by keyword"
            )
        if reshape is not None and (isinstance(reshape, type) or not callable(reshape)):
            raise TypeError(f"reshape must be a callable such as layers.TokenGrid(), not {reshape!r:.80}")
        LayerAttribution.__init__(self, forward_func, layer, device_ids)
        self.reshape = reshape

    @classmethod
    def get_name(cls) -> str:
        """The class's name."""
        return cls.__name__

    @property
    def layers(self) -> list[nn.Module]:
        """The layers as a list."""
        return self.layer if isinstance(self.layer, list) else [self.layer]

    def _map(self, tensor: LayerTensor) -> Tensor:
        """The map of one tensor of the layer, (N, 1, *spatial)."""
        raise NotImplementedError

    def _maps(self, passes: Passes, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        """The maps of each layer: a tuple with one map per tensor."""
        return self._map_each(self._tensors(passes, evaluations))

    def _map_each(self, layers: list[list[LayerTensor]]) -> list[tuple[Tensor, ...]]:
        return [tuple(self._map(tensor).to(tensor.activations.dtype) for tensor in tensors) for tensors in layers]

    def _tensors(
        self, passes: Passes, evaluations: list[LayerEvaluation], baselines: LayerBaselines | None = None
    ) -> list[list[LayerTensor]]:
        """The tensors of each layer. ``baselines`` are the values of removed activations."""
        return [
            [
                LayerTensor(
                    passes,
                    layer,
                    evaluation,
                    index,
                    masks=self._masks_key(),
                    absent=None if baselines is None else _absent(baselines, index, evaluation.activations),
                    device_ids=self.device_ids,
                )
                for index in range(len(evaluation.activations))
            ]
            for layer, evaluation in zip(self.layers, evaluations, strict=True)
        ]

    def _masks_key(self) -> Any:
        return None

    def _explain(
        self,
        compute: Callable[[Passes, list[LayerEvaluation]], Result],
        inputs: Tensor | tuple[Tensor, ...],
        target: Target,
        additional_forward_args: Any,
        attribute_to_layer_input: bool,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        gradients: bool | None = None,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Result:
        """Check the arguments, run the layer pass and return ``compute(passes, evaluations)``.

        ``gradients`` overrides :attr:`uses_gradients` for this call.
        """
        training = warn_if_training(self.forward_func, self.layer)
        with progress_bar(show_progress, self.get_name()) as bar, own_arithmetic():
            call = Call.checked(
                self.forward_func,
                inputs,
                target,
                additional_forward_args,
                attribute_to_layer_input,
                reshape=self.reshape,
                needs_target=self.needs_target,
                training=training,
                bar=bar,
            )
            options = MaskingOptions(baselines, mask_inputs, perturbations_per_eval).check(call.inputs)
            wanted = self.uses_gradients if gradients is None else gradients
            evaluations, output = layer_pass(call, self.layers, self.device_ids, wanted, grad_kwargs)
            warn_if_one_position(call, self.layers, evaluations)
            rank = evaluations[0].activations[0].dim()
            return compute(Passes(call, output, options, rank), evaluations)

    def _per_layer(self, results: list[Any]) -> Any:
        """The list if ``layer`` is a list, its only entry otherwise."""
        return results if isinstance(self.layer, list) else results[0]

    def _result(self, maps: list[tuple[Tensor, ...]]) -> Attributions:
        """The return value of ``attribute``, given the maps of each layer."""
        result: Attributions = self._per_layer([format_result(tensors) for tensors in maps])
        return result


class ActivationCAM(CAM):
    """Base class of methods that need one forward pass and no gradients."""

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Attributions:
        """Explain a batch.

        Args:
            {shared_args}

        Returns:
            {layer_returns}

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> from captum_fusion import LayerEigenCAM
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> LayerEigenCAM(net, net[0]).attribute(torch.rand(2, 3, 8, 8)).shape
            torch.Size([2, 1, 6, 6])
        """
        maps = self._explain(self._maps, inputs, target, additional_forward_args, attribute_to_layer_input)
        return self._result(maps)


class GradientCAM(CAM, GradientAttribution):
    """Base class of methods that need one forward and one backward pass."""

    uses_gradients = True

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Attributions:
        """Explain a batch.

        Args:
            {shared_args}
            {grad_kwargs}

        Returns:
            {layer_returns}

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> from captum_fusion import LayerHiResCAM
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> LayerHiResCAM(net, net[0]).attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
            torch.Size([2, 1, 6, 6])
        """
        maps = self._explain(
            self._maps, inputs, target, additional_forward_args, attribute_to_layer_input, grad_kwargs=grad_kwargs
        )
        return self._result(maps)


class SampledCAM(CAM, GradientAttribution):
    """Base class of methods that compute gradients at perturbed copies of the input."""

    call_options = frozenset({"mask_inputs", "perturbations_per_eval"})

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        mask_inputs: Sequence[int] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Attributions:
        """Explain a batch.

        Args:
            {shared_args}
            {sampled_args}
            {grad_kwargs}

        Returns:
            {layer_returns}

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> from captum_fusion import LayerSmoothGradCAMPlusPlus
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> LayerSmoothGradCAMPlusPlus(net, net[0]).attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
            torch.Size([2, 1, 6, 6])
        """
        maps = self._explain(
            lambda passes, evaluations: self._maps(passes, evaluations, grad_kwargs),
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            mask_inputs=mask_inputs,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        return self._result(maps)

    def _maps(
        self, passes: Passes, evaluations: list[LayerEvaluation], grad_kwargs: dict[str, Any] | None = None
    ) -> list[tuple[Tensor, ...]]:
        raise NotImplementedError


class MaskedCAM(CAM, PerturbationAttribution):
    """Base class of methods that weight channels by scores of masked inputs."""

    call_options = MASKING_OPTIONS
    #: Names of the options that the masks depend on, if the masks depend only on these, the layer and the inputs. Calls
    #: within :func:`captum_fusion.shared_work` then share the masked samples. Not inherited by subclasses.
    masks_depend_on: ClassVar[tuple[str, ...] | None] = None

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
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Attributions:
        """Explain a batch.

        Args:
            {shared_args}
            {masked_args}

        Returns:
            {layer_returns}

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> from captum_fusion import LayerScoreCAM
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> LayerScoreCAM(net, net[0]).attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
            torch.Size([2, 1, 6, 6])
        """
        self._check_baselines(baselines)
        maps = self._explain(
            self._maps,
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            baselines=baselines,
            mask_inputs=mask_inputs,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        return self._result(maps)

    def _masks_key(self) -> Any:
        # Not inherited: a subclass may create other masks and must declare what they depend on.
        options = vars(type(self)).get("masks_depend_on")
        return None if options is None else (type(self), [getattr(self, name) for name in options])

    def _check_baselines(self, baselines: Baselines) -> None:
        """Raise a ValueError if the baselines would not be used."""


class BackgroundCAM(MaskedCAM):
    """Base class of methods whose masked inputs show a blurred input (or the baseline) where a mask is 0."""

    background: str
    _blur: Callable[[Tensor], Tensor] = staticmethod(formulas.gaussian_blur)

    def _set_background(self, background: str) -> None:
        self.background = choice("background", background, ("blur", "baseline"))
        if background == "blur":
            self.call_options = MASKING_OPTIONS - {"baselines"}

    def _check_baselines(self, baselines: Baselines) -> None:
        values = baselines if isinstance(baselines, tuple) else (baselines,)
        default = all(value is None or (not isinstance(value, Tensor) and value == 0) for value in values)
        if self.background == "blur" and not default:
            raise ValueError('baselines are used only with background="baseline"; background="blur" blurs the input')

    def _maps(self, passes: Passes, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        if self.background == "blur":
            passes = passes.blurred(self._blur)
        return MaskedCAM._maps(self, passes, evaluations)


class Changes(NamedTuple):
    """How :class:`RepeatedMasksCAM` creates the versions of a masked input.

    Attributes:
        masks: ``masks(maps, copies, size)``: masks of the input's size from maps (S, 1, *spatial) and version numbers,
            int64 (S,).
        samples: ``samples(masked, copies)``: changed masked samples, or None to leave them unchanged.
    """

    masks: Callable[[Tensor, Tensor, Sequence[int]], Tensor]
    samples: Callable[[Tensor, Tensor], Tensor] | None = None


class DetailedCAM(MaskedCAM):
    """Base class of methods on masked inputs that can also return how the map was found.

    A subclass implements ``_map_and_details(tensor)``, which returns the map and a NamedTuple of per-example tensors.
    """

    def _map_and_details(self, tensor: LayerTensor) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _map(self, tensor: LayerTensor) -> Tensor:
        return self._map_and_details(tensor)[0]

    def _maps_and_details(self, passes: Passes, evaluations: list[LayerEvaluation]) -> list[list[tuple[Tensor, Any]]]:
        return [[self._map_and_details(tensor) for tensor in tensors] for tensors in self._tensors(passes, evaluations)]

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
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_details: Literal[False] = False,
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
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_details: Literal[True],
    ) -> AttributionsWithDetails: ...

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
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_details: bool = False,
    ) -> Attributions | AttributionsWithDetails:
        """Explain a batch.

        Args:
            {shared_args}
            {masked_args}
            return_details (bool, optional): Also return how the map was found.
                Default: False

        Returns:
            {layer_returns}
            - **details** (a NamedTuple of tensors or a tuple of them): With ``return_details=True``, second in a pair.
                :class:`SearchDetails` of methods with one score per channel, :class:`RegressionDetails` of
                :class:`LayerRegressionCAM`.

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> from captum_fusion import LayerScoreCAM
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> attribution, details = LayerScoreCAM(net, net[0]).attribute(
            ...     torch.rand(2, 3, 8, 8), target=[3, 7], return_details=True
            ... )
            >>> attribution.shape, details.evaluations
            (torch.Size([2, 1, 6, 6]), tensor([4, 4]))
        """
        layers: list[Any] = self._explain(
            self._maps_and_details if return_details else self._maps,
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            baselines=baselines,
            mask_inputs=mask_inputs,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        if not return_details:
            return self._result(layers)
        pairs = [tuple(map(format_result, zip(*tensors, strict=True))) for tensors in layers]
        result: AttributionsWithDetails = self._per_layer(pairs)
        return result


class ChannelScoresCAM(DetailedCAM):
    """Base class of methods with one score per channel. They can search for the scores instead of measuring all.

    A subclass implements ``_evaluator(tensor)``, which returns ``evaluate(examples, channels)``: scores (P,) of
    (example, channel) pairs.
    """

    score_fn: str | ScoreFn
    weighting = "probability"
    _search = SearchOptions()

    def _set_search(self, max_evaluations: int | None, tolerance: float | None) -> None:
        self._search = SearchOptions(max_evaluations, tolerance).check()
        self.uses_gradients = self._search.searches

    @property
    def max_evaluations(self) -> int | None:
        """The most channels to evaluate in each example, or None."""
        return self._search.max_evaluations

    @property
    def tolerance(self) -> float | None:
        """The expected error of the map at which the search may end, or None."""
        return self._search.tolerance

    def _evaluator(self, tensor: LayerTensor) -> Callable[[Tensor, Tensor], Tensor]:
        raise NotImplementedError

    def _channel_score_fn(self) -> ScoreFn:
        """The score function of the masked samples: softmax weights are of raw outputs."""
        return formulas.score_function("identity" if self.weighting == "softmax" else self.score_fn)

    def _map_and_details(self, tensor: LayerTensor) -> tuple[Tensor, SearchDetails]:
        live = formulas.live_channels(tensor.activations)
        evaluate, baseline = self._evaluator(tensor), None
        if self.weighting == "increase":
            baseline = tensor.baseline_scores(formulas.score_function(self.score_fn))
        if self._search.searches:
            scores, details = search_channels(
                tensor.activations,
                tensor.gradients,
                live,
                evaluate,
                self._search,
                weighting=self.weighting,
                is_probability=self.weighting != "softmax" and self.score_fn in ("softmax", "sigmoid"),
                baseline=baseline,
            )
            scores = scores.to(formulas.precise(tensor.activations[:0]))
        else:
            examples, channels = formulas.channel_pairs(live)
            scores = formulas.channel_table(live, examples, channels, evaluate(examples, channels))
            details = SearchDetails(live.sum(1).cpu(), torch.zeros(len(live), dtype=torch.double, device="cpu"))
        weights = channel_weights(scores, live, self.weighting, baseline)
        attribution = formulas.weighted_activations(tensor.activations, weights)
        return attribution.to(tensor.activations.dtype), details


class RepeatedMasksCAM(ChannelScoresCAM):
    """Base class of methods whose channel weights are mean scores of several versions of the masked input."""

    @property
    def copies(self) -> int:
        """Number of versions per channel."""
        raise NotImplementedError

    def _changes(self) -> Changes:
        raise NotImplementedError

    def _evaluator(self, tensor: LayerTensor) -> Callable[[Tensor, Tensor], Tensor]:
        activations, copies, changes = tensor.activations, self.copies, self._changes()
        score_fn = self._channel_score_fn()

        def evaluate(examples: Tensor, channels: Tensor) -> Tensor:
            owners, picked = examples.repeat_interleave(copies), channels.repeat_interleave(copies)
            numbers = torch.arange(copies, device=owners.device).repeat(len(examples))

            def masks(chunk: slice, size: Sequence[int]) -> Tensor:
                return changes.masks(activations[owners[chunk], picked[chunk]].unsqueeze(1), numbers[chunk], size)

            def compose(x: Tensor, base: float | Tensor, mask: Tensor, chunk: slice) -> Tensor:
                assert changes.samples is not None
                return changes.samples(base + mask * (x - base), numbers[chunk])

            composed = None if changes.samples is None else compose
            scores = tensor.masked_scores(masks, owners, score_fn, composed, share=not self._search.searches)
            scores = scores.reshape(-1, copies)
            known = scores.isfinite()
            return torch.where(known.any(1), torch.where(known, scores, 0.0).mean(1), torch.nan)

        return evaluate


class ReplacedCAM(CAM, PerturbationAttribution):
    """Base class of methods that replace activations of the layer and run the rest of the network.

    The part of the network below the layer runs once for many samples, if the network allows it.
    """

    call_options = frozenset({"perturbations_per_eval"})
    score_fn: str | ScoreFn

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: LayerBaselines = 0,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Attributions:
        """Explain a batch.

        Args:
            {shared_args}
            {replaced_args}

        Returns:
            {layer_returns}

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> from captum_fusion import LayerAblationCAM
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> LayerAblationCAM(net, net[0]).attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
            torch.Size([2, 1, 6, 6])
        """
        maps = self._explain(
            lambda passes, evaluations: self._maps(passes, evaluations, baselines),
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        return self._result(maps)

    def _maps(
        self, passes: Passes, evaluations: list[LayerEvaluation], baselines: LayerBaselines = 0
    ) -> list[tuple[Tensor, ...]]:
        return self._map_each(self._tensors(passes, evaluations, baselines))

    def _tensors(
        self, passes: Passes, evaluations: list[LayerEvaluation], baselines: LayerBaselines = 0
    ) -> list[list[LayerTensor]]:
        return CAM._tensors(self, passes, evaluations, 0 if baselines is None else baselines)


def checked_score_fn(score_fn: str | ScoreFn) -> str | ScoreFn:
    """Return ``score_fn`` if :func:`captum_fusion.functional.score_function` accepts it; raise its error otherwise."""
    formulas.score_function(score_fn)
    return score_fn


def _absent(baselines: LayerBaselines, index: int, activations: tuple[Tensor, ...]) -> Tensor:
    """The baseline of one tensor of the layer, expanded to its shape."""
    tensor = activations[index]
    if isinstance(baselines, tuple):
        if len(baselines) != len(activations):
            raise ValueError(
                f"baselines must have one entry for each of the layer's {len(activations)} tensors, not "
                f"{len(baselines)}"
            )
        baselines = baselines[index]
    if baselines is None:
        baselines = 0
    if isinstance(baselines, str):
        choice("baselines", baselines, ("mean",))
        mean = formulas.at_least_float32(tensor).flatten(2).mean(2).to(tensor.dtype)
        return mean.reshape(*mean.shape, *[1] * (tensor.dim() - 2)).expand_as(tensor)
    if isinstance(baselines, Tensor):
        try:
            return baselines.detach().to(tensor).expand_as(tensor)
        except RuntimeError as error:
            raise ValueError(
                f"baselines: shape {tuple(baselines.shape)} does not fit the layer's activations, {tuple(tensor.shape)}"
            ) from error
    if isinstance(baselines, bool) or not isinstance(baselines, (int, float)):
        raise TypeError(f"baselines must be a number or a tensor, not {type(baselines).__name__}")
    return tensor.new_full((1,), baselines).expand_as(tensor)
