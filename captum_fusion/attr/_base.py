"""The calling protocol that every method here follows, so that a method's class holds its formula and little else."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

from captum.attr import GradientAttribution, LayerAttribution, PerturbationAttribution
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion._captum import (
    Baselines,
    Call,
    Layer,
    LayerEvaluation,
    Reshape,
    Target,
    format_result,
    log_usage,
    no_inference_mode,
    progress_bar,
    shared_work,
    warn_if_training,
)
from captum_fusion.functional import ScoreFn

F = TypeVar("F", bound=Callable[..., Any])

#: What a call of a method that masks inputs can be given, by name.
MASKING_OPTIONS = frozenset({"baselines", "mask_inputs", "perturbations_per_eval"})

#: The Args entries that every ``attribute`` shares, filled into ``{shared_args}`` of its docstring.
_SHARED_ARGS = """\
inputs (Tensor or tuple[Tensor, ...]): What to explain, with dimension 0 counting the N examples. A tuple
    where the network takes several tensors; its tensors are aligned along dimension 0.
target (int, tuple, Tensor or list, optional): Which output to explain, with captum's meaning. For an
    output of shape (N, classes): an int for all examples, or a list or 1-D tensor with one int for each.
    For an output of higher rank: a tuple of indices for all examples, or a list of such tuples. None only
    where the network returns one score for each example.
    Default: None
additional_forward_args (Any, optional): Further arguments of ``forward_func``, a tuple or a single one.
    Tensors whose first dimension is N belong to the examples and follow them into masked rows; anything
    else is passed on as it is.
    Default: None
attribute_to_layer_input (bool, optional): Explain at the layer's input instead of its output.
    Default: False"""

_MASKED_ARGS = """\
baselines (float, Tensor, tuple or None, optional): What shows where a mask is 0:
    ``baseline + mask * (input - baseline)``. A number, a tensor of an input's shape (or with first
    dimension 1), or a tuple with one of these for each input.
    Default: 0
mask_inputs (sequence of int, optional): Which of several inputs are masked.
    Default: None (the floating point inputs with as many spatial dimensions as the layer)
perturbations_per_eval (int, optional): At most this many masked rows per example in one call of the
    network, in the input's own memory layout. None times the first rows to find a fast chunk and layout.
    The result is the same up to rounding.
    Default: None
show_progress (bool, optional): Show a bar that counts masked rows.
    Default: False"""

_SAMPLED_ARGS = """\
mask_inputs (sequence of int, optional): Which of several inputs are changed.
    Default: None (the floating point inputs with as many spatial dimensions as the layer)
perturbations_per_eval (int, optional): At most this many changed copies of each example in one call of the
    network. None times the first rows to find a fast number. The result is the same up to rounding.
    Default: None
show_progress (bool, optional): Show a bar that counts the rows.
    Default: False"""

_REPLACED_ARGS = """\
baselines (float, Tensor, tuple or None, optional): What absent activations are replaced by: a number, or a tensor
    that broadcasts against the layer's activations ``(N, K, *spatial)``; a tuple with one of these for each tensor of a
    layer that returns several.
    Default: 0
perturbations_per_eval (int, optional): At most this many replaced rows per example in one call of the
    network. None times the first rows to find a fast chunk. The result is the same up to rounding.
    Default: None
show_progress (bool, optional): Show a bar that counts replaced rows.
    Default: False"""

_LAYER_RETURNS = """\
*Tensor* or *tuple[Tensor, ...]* of **attributions**:
- **attributions** (*Tensor* or *tuple[Tensor, ...]*): Of shape ``(N, 1, *spatial of the layer)``, not normalised,
    in the dtype of the layer's output, detached (unless ``grad_kwargs`` asks to create a graph). A tuple if the
    layer returns several tensors; a list of such results for a list of layers. Where the class says that its map is
    in the input's space, it is ``(N, 1, *input spatial)``, in [0, 1], in the dtype of the input."""

_GRAD_KWARGS = """\
grad_kwargs (dict, optional): Further arguments of ``torch.autograd.grad``.
    Default: None"""

_RAISES = """\
AssertionError: If the target does not select one output for each example (IndexError or RuntimeError from
    torch for an index out of range).
ValueError: If an argument has a bad value, the forward pass does not use the layer, or the layer has no
    spatial dimensions; the message names the argument.
TypeError: If an argument has a bad type, or ``forward_func`` does not return a tensor."""

_CONSTRUCTOR_ARGS = """\
forward_func (callable): The model, or any function of the inputs that calls it.
layer (Module or list of Modules): Where to explain, usually the last convolutional stage. A list gives a
    list of results, from one pass.
device_ids (list of int, optional): The order of devices; needed only if ``forward_func`` is a function
    around a DataParallel model.
    Default: None"""

_RESHAPE_ARG = """\
reshape (callable, optional): Turns what the layer returns into ``(N, channels, *spatial)``, for example
    :class:`captum_fusion.layers.TokenGrid` for a vision transformer.
    Default: None"""

_SCORE_FN = """\
score_fn (str or callable, optional): What is called a score: ``"softmax"``, ``"sigmoid"``, ``"identity"`` or a
    function of the raw output, along dimension 1, before the target is selected. An output of shape (N,) is
    the score itself."""


def documented(function: F) -> F:
    """Fill the paragraphs that all methods share into a docstring."""
    parts = {
        "constructor_args": _CONSTRUCTOR_ARGS,
        "shared_args": _SHARED_ARGS,
        "masked_args": _MASKED_ARGS,
        "sampled_args": _SAMPLED_ARGS,
        "replaced_args": _REPLACED_ARGS,
        "grad_kwargs": _GRAD_KWARGS,
        "layer_returns": _LAYER_RETURNS,
        "reshape_arg": _RESHAPE_ARG,
        "score_fn": _SCORE_FN,
        "raises": _RAISES,
    }
    return fill_docstring(function, parts)


def fill_docstring(function: F, parts: Mapping[str, str]) -> F:
    """Put paragraphs in the place of lines that hold their name in braces, at the indentation of these."""
    lines = []
    for line in inspect.cleandoc(function.__doc__ or "").splitlines():
        name = line.strip().strip("{}")
        if line.strip() == "{" + name + "}" and name in parts:
            indent = line[: len(line) - len(line.lstrip())]
            lines += [indent + part for part in parts[name].splitlines()]
        else:
            lines.append(line)
    function.__doc__ = "\n".join(lines)
    return function


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """``value`` if it is one of the allowed words, else a ValueError that names the argument."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    return str(value)


def percentage(name: str, value: Any) -> float:
    """``value`` if it is a number from 0 to 100, else a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise ValueError(f"{name} must be a percentile from 0 to 100, not {value!r}")
    return float(value)


def scoring(score_fn: str | ScoreFn) -> str | ScoreFn:
    """``score_fn`` if :func:`captum_fusion.functional.score_function` takes it, else its error."""
    formulas.score_function(score_fn)
    return score_fn


def count(name: str, value: Any, least: int = 1) -> int:
    """``value`` if it is an int of at least ``least``, else a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, not {value!r}")
    return int(value)


def positive(name: str, value: Any, or_zero: bool = False) -> float:
    """``value`` if it is a finite number above 0, else a ValueError that names the argument."""
    good = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not or_zero):
        raise ValueError(f"{name} must be a number {'of at least' if or_zero else 'above'} 0, not {value!r}")
    return float(value)


class CAM(LayerAttribution):
    """Base of the methods: checks the arguments, runs the layer pass, and hands its result to :meth:`_maps`.

    A method implements ``_maps(call, evaluations)``, which gives for each layer a tuple of maps, one for each
    tensor of that layer, and an ``attribute`` that names its options and calls :meth:`_explain`. A fusion calls
    ``_maps`` of its components with its own call, which is how they share one pass.
    """

    #: The keyword arguments of ``attribute`` that a fusion, which calls ``_maps``, can set for it.
    call_options: frozenset[str] = frozenset()
    #: Whether the method explains one output; False where its map is the same for all.
    needs_target = True

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        reshape: Reshape | None = None,
    ) -> None:
        """Name the network and the layer.

        Args:
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
                f"device_ids must be a list of device numbers, not {type(device_ids).__name__}; name other arguments"
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
    def uses_gradients(self) -> bool:
        """Whether :meth:`_maps` needs the layer's gradients."""
        return False

    def _maps(self, call: Call, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        raise NotImplementedError

    def _explain(
        self,
        compute: Callable[[Call, list[LayerEvaluation]], list[Any]],
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
    ) -> list[Any]:
        """Run one call: the layer pass, then ``compute``, which gives a list with an entry for each layer.

        ``gradients`` says whether the pass differentiates, where a call's arguments overrule :attr:`uses_gradients`.
        """
        training = warn_if_training(self.forward_func, self.layer)
        with progress_bar(show_progress, self.get_name()) as bar, no_inference_mode():
            call = Call(
                self.forward_func,
                inputs,
                target,
                additional_forward_args,
                attribute_to_layer_input,
                baselines=baselines,
                mask_inputs=mask_inputs,
                perturbations_per_eval=perturbations_per_eval,
                reshape=self.reshape,
                needs_target=self.needs_target,
                training=training,
                bar=bar,
            )
            wanted = self.uses_gradients if gradients is None else gradients
            return compute(call, call.layer_pass(self.layer, self.device_ids, wanted, grad_kwargs))

    def attribute_targets(
        self, inputs: Tensor | tuple[Tensor, ...], targets: Sequence[Target], **kwargs: Any
    ) -> list[Any]:
        """Explain a batch for several targets, at less than the price of as many calls.

        A masked row scores every class, so that the masked rows of Score-CAM, SS-CAM and IS-CAM, on their own and
        inside of fusions, are run once for all targets. The rest costs what it must: a layer pass for each target where
        the method needs gradients, and the masked rows of maps that depend on the target.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): What to explain, as in :meth:`attribute`.
            targets (sequence): Targets, each as :meth:`attribute` takes it: an int for all examples, a list with one
                for each, ...
            kwargs (Any, optional): Further arguments of :meth:`attribute`.

        Returns:
            list: What :meth:`attribute` returns for each target, equal to separate calls up to rounding.

        Raises:
            TypeError: If ``targets`` is not a list or tuple.

        Examples::

            >>> from captum_fusion import LayerFusionCAM, demo
            >>> model, scene = demo.load_model(), demo.load_scenes()[0]
            >>> fusion = LayerFusionCAM(model, model.stage4)
            >>> four, six = fusion.attribute_targets(demo.preprocess(scene.image), targets=[4, 6])
        """
        if not isinstance(targets, (list, tuple)):
            raise TypeError(f"targets must be a list of targets, not {type(targets).__name__}")
        with shared_work():
            return [self.attribute(inputs, target, **kwargs) for target in targets]

    def _per_layer(self, results: list[Any]) -> Any:
        """The list for a list of layers, the only entry for a single layer."""
        return results if isinstance(self.layer, list) else results[0]

    def _result(self, maps: list[tuple[Tensor, ...]]) -> Any:
        """What ``attribute`` returns for the maps of each layer."""
        return self._per_layer([format_result(each) for each in maps])

    @property
    def _layers(self) -> list[nn.Module]:
        return self.layer if isinstance(self.layer, list) else [self.layer]


class GradientCAM(CAM, GradientAttribution):
    """Base of the methods that need one forward and one backward pass: a subclass writes :meth:`_map`."""

    @property
    def uses_gradients(self) -> bool:
        """True: the formula is one of activations and gradients."""
        return True

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
    ) -> Any:
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

    def _maps(self, call: Call, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        return [
            tuple(self._map(a, g).to(a.dtype) for a, g in zip(activations, gradients or (), strict=True))
            for activations, gradients, _ in evaluations
        ]

    def _map(self, activations: Tensor, gradients: Tensor) -> Tensor:
        raise NotImplementedError


class MaskedCAM(CAM, PerturbationAttribution):
    """Base of the methods that weight channels by scores of masked inputs: a subclass writes :meth:`_map`."""

    call_options = MASKING_OPTIONS

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
    ) -> Any:
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

    def _maps(self, call: Call, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        return [
            tuple(
                self._map(call.at(layer, i, self._masks_are), tensor, gradients[i] if gradients else None).to(
                    tensor.dtype
                )
                for i, tensor in enumerate(activations)
            )
            for layer, (activations, gradients, _) in zip(self._layers, evaluations, strict=True)
        ]

    @property
    def _masks_are(self) -> tuple[Any, ...] | None:
        """What the masks depend on besides the layer, if nothing else (the target, say); None if something else."""
        return None

    def _map(self, call: Call, activations: Tensor, gradients: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _check_baselines(self, baselines: Baselines) -> None:
        """Refuse baselines that would not be used."""


class Replacing(NamedTuple):
    """One tensor of a layer, and the network from there on.

    Attributes:
        activations: Of shape ``(N, K, *spatial)``.
        gradients: Of the same shape, or None.
        absent: What stands for absent activations, of the same shape.
        scores: ``scores(replace, rows)``: of rows with the layer's tensor replaced, (R,).
        score: Scores of the network as it is, (N,).
    """

    activations: Tensor
    gradients: Tensor | None
    absent: Tensor
    scores: Callable[[Callable[[slice], Tensor], Tensor], Tensor]
    score: Tensor


class ReplacedCAM(CAM, PerturbationAttribution):
    """Base of the methods that change the layer's activations and run the rest: a subclass writes :meth:`_map`.

    The network below the layer is not run again for every row, where the network allows that.
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
        baselines: Baselines = 0,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Any:
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
            lambda call, evaluations: self._maps(call, evaluations, baselines),
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        return self._result(maps)

    def _maps(
        self, call: Call, evaluations: list[LayerEvaluation], baselines: Baselines = 0
    ) -> list[tuple[Tensor, ...]]:
        return [
            tuple(
                self._map(part).to(part.activations.dtype) for part in self._parts(call, layer, evaluation, baselines)
            )
            for layer, evaluation in zip(self._layers, evaluations, strict=True)
        ]

    def _parts(
        self, call: Call, layer: nn.Module, evaluation: LayerEvaluation, baselines: Baselines
    ) -> Iterator[Replacing]:
        score_fn = formulas.score_function(self.score_fn)
        for index, tensor in enumerate(evaluation.activations):
            yield Replacing(
                tensor,
                evaluation.gradients[index] if evaluation.gradients else None,
                _absent(baselines, index, evaluation.activations),
                partial(self._scores, call, layer, evaluation, index, score_fn),
                call.clean_scores(score_fn).to(tensor.device),
            )

    def _scores(
        self,
        call: Call,
        layer: nn.Module,
        evaluation: LayerEvaluation,
        index: int,
        score_fn: ScoreFn,
        replace: Callable[[slice], Tensor],
        rows: Tensor,
    ) -> Tensor:
        return call.replaced_scores(layer, evaluation, index, replace, rows, score_fn, self.device_ids)

    def _map(self, part: Replacing) -> Tensor:
        raise NotImplementedError


def _absent(baselines: Baselines, index: int, activations: tuple[Tensor, ...]) -> Tensor:
    """The layer's baseline for one of its tensors, broadcast to it."""
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
