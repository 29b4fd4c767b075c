"""Sentences and tables of the page, as HTML in which every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from torch import Tensor

from captum_fusion.evaluation.cost import Cost, duration
from captum_fusion.evaluation.methods import FAINT
from captum_fusion.explore.session import Explanation
from captum_fusion.models import BUNDLED

CSS = """
.cf-note { font-size: 0.9rem; line-height: 1.4; margin: 0; }
.cf-error { color: #b3261e; font-weight: 600; }
.dark .cf-error { color: #ff897d; }
.cf-caption { font-size: 0.85rem; line-height: 1.35; margin: 0; overflow-wrap: anywhere; }
.cf-muted { opacity: 0.75; }
.cf-run { align-items: center; }
.cf-maps .image-frame img { max-height: 420px; object-fit: contain; }
#examples .grid-wrap { min-height: 0; max-height: 200px; }
#examples .grid-container {
    grid-template-columns: repeat(auto-fill, minmax(44px, 1fr)); grid-template-rows: none; grid-auto-rows: auto;
}
.cf-scroll { overflow-x: auto; }
.cf-scroll table.cf-table {
    width: 100%; border-collapse: collapse; border: 0 !important; font-size: 0.85rem; margin: 0;
}
.cf-scroll .cf-table th, .cf-scroll .cf-table td {
    padding: 0.25rem 0.4rem; text-align: left; font-weight: 400;
    border: 0 !important; border-bottom: 1px solid #8884 !important;
}
.cf-scroll .cf-table thead, .cf-scroll .cf-table tbody, .cf-scroll .cf-table tr { border: 0 !important; }
.cf-scroll .cf-table thead th { font-weight: 600; vertical-align: bottom; }
.cf-scroll .cf-table td { min-width: 3.5rem; font-variant-numeric: tabular-nums; }
.cf-table td > i { display: block; height: 0.3rem; background: #3b6ea5; border-radius: 2px; min-width: 1px; }
.cf-classes .wrap { flex-direction: column; gap: 0.25rem; }
.cf-classes label { width: 100%; }
@media (max-width: 700px) {
    .cf-maps { order: -1; }
    .cf-run { flex-wrap: wrap; }
    .cf-run > #status { flex-basis: 100%; }
    .cf-scroll .cf-table th, .cf-scroll .cf-table td { padding: 0.25rem 0.2rem; }
}
"""


def title(name: str) -> str:
    """The name of a network for the page."""
    return "SqueezeNet 1.1 (bundled)" if name == BUNDLED else name


def note(text: str, error: bool = False) -> str:
    """A line of the page."""
    return f'<p class="cf-note{" cf-error" if error else ""}" role="status">{escape(text)}</p>' if text else ""


def percent(score: float) -> str:
    """A score as a percentage.

    Examples::

        >>> percent(0.634), percent(0.004), percent(1.0)
        ('63 %', '0.4 %', '100 %')
    """
    return f"{score:.1%}".replace("%", " %") if 0 < score < 0.0095 else f"{score:.0%}".replace("%", " %")


def amount(score: float, is_probability: bool = True) -> str:
    """A score in words.

    Examples::

        >>> amount(0.634), amount(12.345, is_probability=False)
        ('63 %', '12.3')
    """
    return percent(score) if is_probability else f"{score:.3g}"


def price(known: tuple[Cost, float] | None) -> str:
    """What a map costs, in words."""
    if known is None:
        return ""
    cost, seconds = known
    parts = [f"{cost.forward_samples:.0f} sample{'' if cost.forward_samples == 1 else 's'}"]
    if cost.layer_samples:
        parts.append(f"{cost.layer_samples:.0f} from the layer")
    return f"{' + '.join(parts)}, {duration(seconds)}"


def spent(explanations: Sequence[Explanation]) -> str:
    """What maps took."""
    samples, seconds = sum(one.forward_samples for one in explanations), sum(one.seconds for one in explanations)
    return f"It took {samples} forward sample{'' if samples == 1 else 's'} and {seconds:.1f} s"


def caption(one: Explanation, names: Sequence[str], is_probability: bool = True) -> str:
    """What a map shows."""
    target, rival, _ = one.question
    what = f"<b>{escape(one.recipe.label)}</b>: {escape(names[target])}"
    whole, kept = amount(one.score, is_probability), amount(one.kept, is_probability)
    among = ""
    if rival is not None:
        what += f" rather than {escape(names[rival])}"
        among = ", among these two" if is_probability else ", the difference"
    if is_probability and one.score < FAINT:
        rest = f"The network gives it {whole}{among}, so the map means little."
    else:
        rest = f"Seen through the map{among}: {kept} (whole picture: {whole})."
    return _captioned(what, rest)


def steps(one: Explanation, is_probability: bool = True) -> list[str]:
    """Captions of the gradient map, the region map, their union and the result of a fusion."""
    details = one.details
    assert details is not None
    gradient, region = details.union_weights[0].tolist()
    union, rival = details.fusion_weights[0].tolist()
    last = f"weights: {union:.2f} union, {rival:.2f} region map"
    if details.selected is not None:
        last = f"selected: {'the union' if bool(details.selected[0]) else 'the region map'}"
    base = details.baseline_score[0].float()

    def alone(contribution: Tensor) -> str:
        score = contribution[0].float() + base
        if is_probability and one.question.rival is not None:
            score = score.sigmoid()  # of a difference of outputs: the probability among these two
        return f"seen through it: {amount(max(0.0, float(score)) if is_probability else float(score), is_probability)}"

    lines = [
        ("Gradient map", f"{alone(details.gradient_contribution)}; weight {gradient:.2f}"),
        ("Region map", f"{alone(details.region_contribution)}; weight {region:.2f}"),
        ("Union", alone(details.union_contribution)),
        ("Result", last),
    ]
    return [_captioned(f"<b>{title}</b>", rest) for title, rest in lines]


def _captioned(title: str, rest: str) -> str:
    """A title in HTML and a text below it, in which a number and its sign stay together."""
    muted = escape(rest).replace(" %", "&nbsp;%")
    return f'<p class="cf-caption">{title}<br><span class="cf-muted">{muted}</span></p>'


def table(
    names: Sequence[str], classes: Sequence[int], columns: Mapping[str, Tensor], is_probability: bool = True
) -> str:
    """Scores of classes under several conditions, probabilities with bars.

    Args:
        names (sequence of str): The names of all classes.
        classes (sequence of int): The indices of the classes to show.
        columns (mapping): For each title the scores of all classes, (classes,).
        is_probability (bool, optional): Whether scores are from 0 to 1.
            Default: True
    """
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in ("Class", *columns))
    lines = []
    for index in classes:
        cells = "".join(_cell(float(scores[index]), is_probability) for scores in columns.values())
        lines.append(f'<tr><th scope="row">{escape(names[index])}</th>{cells}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="cf-scroll"><table class="cf-table">{body}</table></div>'


def _cell(score: float, is_probability: bool) -> str:
    width = 100 * min(1.0, max(0.0, score))
    bar = f'<i style="width:{width:.1f}%"></i>' if is_probability else ""
    return f"<td>{amount(score, is_probability)}{bar}</td>"
