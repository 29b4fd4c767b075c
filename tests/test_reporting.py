"""Reports: means, intervals and differences are those of the rows, and all formats show them, whatever the names."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from captum_fusion.evaluation.labels import NOT_KNOWN
from captum_fusion.evaluation.report import Cell, Outline, figures, summarize, write
from captum_fusion.evaluation.report.statistics import Results

MODEL = "net"
HEADINGS = {
    "average_drop": ("AD %", "down"),
    "average_increase": ("AI %", "up"),
    "complexity": ("area", "down"),
    "insertion": ("insertion", "up"),
    "deletion": ("deletion", "down"),
}
METRICS = list(HEADINGS)
HOSTILE = "a_b|c<d>&%$#"


def outline(**options: Any) -> Outline:
    return Outline(
        **{
            "title": "A study",
            "models": [MODEL],
            "methods": ["grad-cam", "fusion-cam:theta=5"],
            "metrics": METRICS,
            "reference": "fusion-cam:theta=5",
            "images": 4,
            "headings": HEADINGS,
            **options,
        }
    )


def row(image: str, method: str, metric: str, value: float | None, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "image": image, "method": method, "metric": metric, "value": value, **more}


def rows_of(given: Outline, seed: int = 0) -> list[dict[str, Any]]:
    """A finished study with plausible numbers."""
    rng, rows = np.random.default_rng(seed), []
    for model, method, i in itertools.product(given.models, given.methods, range(given.images)):
        values = {"average_drop": 60 * rng.random(), "average_increase": 100.0 * rng.integers(2)}
        values |= {"forward_samples": 513, "backward_samples": 1, "seconds": 0.1 + rng.random()}
        for metric in (*given.metrics, "forward_samples", "backward_samples", "seconds"):
            one = row(f"{i}.png", method, metric, float(values.get(metric, rng.random())), model=model)
            if metric in ("insertion", "deletion"):
                shares = np.linspace(0, 1, 6)
                curve = np.sort(rng.random(6))[:: 1 if metric == "insertion" else -1]
                one |= {
                    "value": float((curve[1:] + curve[:-1]).mean() / 2),
                    "curve": curve.tolist(),
                    "shares": shares.tolist(),
                }
            rows.append(one)
    return rows


def cell(cells: list[Cell], method: str, metric: str) -> Cell:
    (found,) = [each for each in cells if (each.method, each.metric) == (method, metric)]
    return found


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """The text, links and open elements of a page."""

    EMPTY = ("meta", "img", "wbr", "br", "link")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.links, self.open, self.tags = "", [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# ------------------------------------------------------------------------------------------------------------- numbers


def test_equal_values_have_an_interval_without_width() -> None:
    rows = [row(f"{i}", "grad-cam", "complexity", 0.1) for i in range(7)]
    found = cell(summarize(rows, outline()), "grad-cam", "complexity")
    assert (found.mean, found.low, found.high, found.count) == (0.1, 0.1, 0.1, 7)


def test_the_interval_of_two_values_is_that_of_the_binomial_distribution() -> None:
    number, share = 400, 0.3
    rows = [row(f"{i:03}", "grad-cam", "average_increase", 100.0 * (i < number * share)) for i in range(number)]
    found = cell(summarize(rows, outline(), resamples=20000), "grad-cam", "average_increase")
    drawn = 100 * np.random.default_rng(0).binomial(number, share, 200000) / number
    assert found.mean == 30
    assert (found.low, found.high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.3)


def test_the_bootstrap_of_two_pictures_by_hand() -> None:
    rows = [row(i, "grad-cam", "insertion", v) for i, v in (("a", 0), ("b", 1))]
    found = cell(summarize(rows, outline()), "grad-cam", "insertion")
    assert (found.mean, found.low, found.high) == (0.5, 0, 1), "a quarter of the resamples is all 0, a quarter all 1"


def test_examples_of_one_picture_are_drawn_together() -> None:
    rows = [row(i, "grad-cam", "insertion", v) for i, v in (("a", 0), ("a#2", 0), ("a#3", 0), ("b", 1))]
    together = {"a#2": "a", "a#3": "a"}
    found = cell(summarize(rows, outline(pictures=together)), "grad-cam", "insertion")
    assert (found.mean, found.low, found.high, found.count) == (0.25, 0, 1, 4), "two pictures, half the draws are equal"
    alone = cell(summarize(rows[:3], outline(pictures=together)), "grad-cam", "insertion")
    assert (alone.mean, alone.low, alone.high) == (0, None, None), "one picture says nothing of others"

    rng, once, thrice, names = np.random.default_rng(0), [], [], {}
    for i in range(50):
        own, other = rng.random(2)
        for copy in range(3):
            name = f"{i:02}#{copy}"
            names[name] = f"{i:02}"
            for rows_ in (thrice, *([once] if not copy else [])):
                rows_.append(row(name, "grad-cam", "insertion", own))
                rows_.append(row(name, "fusion-cam:theta=5", "insertion", other))
    same = cell(summarize(once, outline()), "grad-cam", "insertion")
    repeated = cell(summarize(thrice, outline(pictures=names)), "grad-cam", "insertion")
    for field in ("mean", "low", "high", "difference", "difference_low", "difference_high"):
        assert getattr(repeated, field) == pytest.approx(getattr(same, field), abs=1e-12), "copies say nothing more"


def test_paired_differences_by_hand() -> None:
    own, other = {"a": 0.9, "b": 0.4, "c": 0.6}, {"b": 0.3, "c": 0.2, "d": 0.7}
    rows = [row(image, "grad-cam", "insertion", value) for image, value in own.items()]
    rows += [row(image, "fusion-cam:theta=5", "insertion", value) for image, value in other.items()]
    cells = summarize(rows, outline())
    found = cell(cells, "grad-cam", "insertion")
    assert found.difference == pytest.approx((0.1 + 0.4) / 2), "over b and c, which both have"
    assert (found.difference_low, found.difference_high) == pytest.approx((0.1, 0.4))
    assert found.mean == pytest.approx(1.9 / 3)
    assert cell(cells, "fusion-cam:theta=5", "insertion")[-3:] == (None, None, None)
    alone = cell(summarize(rows, outline(reference=None)), "grad-cam", "insertion")
    assert alone == found._replace(difference=None, difference_low=None, difference_high=None)


def test_a_paired_interval_is_narrower_than_that_of_either_mean() -> None:
    rng, rows = np.random.default_rng(0), []
    for i, difficulty in enumerate(rng.normal(0, 10, 100)):
        rows.append(row(f"{i}", "fusion-cam:theta=5", "average_drop", difficulty))
        rows.append(row(f"{i}", "grad-cam", "average_drop", difficulty + 1 + 0.1 * rng.normal()))
    found = cell(summarize(rows, outline()), "grad-cam", "average_drop")
    assert found.difference_low is not None
    assert found.difference_low > 0.9
    assert found.high - found.low > 10 * (found.difference_high - found.difference_low)


def test_missing_values_are_counted_and_left_out() -> None:
    rows = [row("a", "grad-cam", "insertion", 0.25), row("b", "grad-cam", "insertion", None, error="out of memory")]
    rows += [row("c", "grad-cam", "insertion", float("nan")), row("d", "grad-cam", "insertion", float("inf"))]
    rows += [row("a", "grad-cam", "deletion", None, error="why")]
    cells = summarize([*rows, row("a", "another", "insertion", 1.0), row("a", "grad-cam", "another", 1.0)], outline())
    assert len(cells) == 2 * (len(METRICS) + 3)
    assert cell(cells, "grad-cam", "insertion")[3:8] == (0.25, None, None, 1, 3)
    assert cell(cells, "grad-cam", "deletion")[3:] == (None, None, None, 0, 1, None, None, None)
    assert cell(cells, "fusion-cam:theta=5", "insertion")[3:] == (None, None, None, 0, 0, None, None, None)


def test_a_method_that_failed_is_one_line_of_the_page(tmp_path: Path) -> None:
    given = outline(methods=["a", "b"], metrics=["insertion", "deletion"], reference=None, images=2)
    every = ["insertion", "deletion", "forward_samples", "backward_samples", "seconds"]
    rows = [row(i, "a", metric, None, error="out of memory") for metric in every for i in "xy"]
    rows += [row(i, "b", metric, 1.0) for metric in every[1:] for i in "xy"]
    rows += [row("x", "b", "insertion", None, error="no curve"), row("y", "b", "insertion", 0.5)]
    write(tmp_path, rows, given)
    source = Page(tmp_path / "index.html").source
    lines = re.findall(r"<td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(\d)</td>", source)
    assert lines == [("a", "all", "out of memory", "2"), ("b", "insertion", "no curve", "1")]


def test_a_second_row_must_agree_unless_the_first_is_an_error() -> None:
    bad, good = row("a", "grad-cam", "insertion", None, error="why"), row("a", "grad-cam", "insertion", 0.5)
    for rows in itertools.permutations([bad, good, good]):
        assert cell(summarize(rows, outline()), "grad-cam", "insertion")[3:8] == (0.5, None, None, 1, 0)
    with pytest.raises(ValueError, match="a has two values of insertion by grad-cam on net"):
        summarize([good, row("a", "grad-cam", "insertion", 0.75)], outline())


def test_the_seed_and_the_names_make_the_digits() -> None:
    given = outline(images=30)
    rows = rows_of(given)
    cells = summarize(rows, given)
    assert summarize(rows[::-1], given) == cells
    other = summarize(rows, given, seed=1)
    assert [each.mean for each in other] == [each.mean for each in cells]
    assert cell(other, "grad-cam", "average_drop").low != cell(cells, "grad-cam", "average_drop").low
    fewer = outline(images=30, methods=["fusion-cam:theta=5"], metrics=["complexity"])
    of = "fusion-cam:theta=5", "complexity"
    assert cell(summarize(rows, fewer), *of) == cell(cells, *of), "what else is in the study does not matter"
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        summarize(rows, given, resamples=0)


def test_the_interval_of_many_pictures_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).random(50000)
    given = outline(methods=["grad-cam"], metrics=["insertion"], reference=None)
    found = cell(
        summarize((row(f"{i:05}", "grad-cam", "insertion", v) for i, v in enumerate(values)), given), "grad-cam",
        "insertion",
    )  # fmt: skip
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 50000**0.5, rel=0.1)


# --------------------------------------------------------------------------------------------------------------- files


def test_no_figure_of_an_earlier_study_is_left(tmp_path: Path) -> None:
    given = outline(methods=["grad-cam", "fusion-cam:theta=5", "fusion-cam:theta=10"])
    write(tmp_path, rows_of(given), given)
    assert len(list((tmp_path / "figures").glob("net_theta.*"))) == 2
    (tmp_path / "figures" / "other_theta.png").write_bytes(b"another network's")
    fewer = outline(methods=["grad-cam", "fusion-cam:theta=5"])
    files = write(tmp_path, rows_of(fewer), fewer)
    left = {path for path in (tmp_path / "figures").iterdir() if path.name != "other_theta.png"}
    assert left == {path for path in files if path.parent.name == "figures"}
    assert (tmp_path / "figures" / "other_theta.png").is_file()


def test_files_of_a_study(tmp_path: Path) -> None:
    given = outline(
        methods=["grad-cam", "fusion-cam:theta=5", "fusion-cam:theta=10", "fusion-cam:theta=5,weighting=raw"]
    )
    before = plt.get_fignums()
    files = write(tmp_path, rows_of(given), given)
    assert plt.get_fignums() == before, "pyplot knows nothing of it"
    names = [f"tables/net{cost}.{kind}" for cost in ("", "_cost") for kind in ("md", "csv", "tex")]
    names += [f"figures/net_{figure}.{kind}" for figure in ("metrics", "curves", "theta") for kind in ("png", "svg")]
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [*names, "index.html"]
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(everything) == sorted(files), "no temporary file is left"
    for file in files:
        assert file.stat().st_size > 100
        if file.suffix == ".png":
            assert matplotlib.image.imread(file).std() > 0.05


def test_the_same_rows_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    metrics = ["complexity", "deletion"]
    given = outline(
        models=[MODEL, "b"], methods=["a:theta=1", "a:theta=2", "b"], metrics=metrics, reference="b", images=9
    )
    rows = rows_of(given)
    rows[7] |= {"value": None, "error": "why"}
    first = write(tmp_path / "first", rows, given)
    random.Random(0).shuffle(rows)
    second = write(tmp_path / "second", rows, given, cells=summarize(rows, given))
    assert [file.name for file in first] == [file.name for file in second]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one


def test_tables_without_seconds_do_not_depend_on_them(tmp_path: Path) -> None:
    given = outline()
    rows = rows_of(given)
    slower = [{**each, "value": each["value"] * 2} if each["metric"] == "seconds" else each for each in rows]
    for folder, these in (("a", rows), ("b", slower)):
        write(tmp_path / folder, these, given)
    for file in (tmp_path / "a/tables").iterdir():
        same = file.read_bytes() == (tmp_path / "b/tables" / file.name).read_bytes()
        assert same == ("_cost" not in file.name), file


def test_a_drop_without_the_area_is_refused(tmp_path: Path) -> None:
    for metric in ("average_drop", "average_drop:normalize=False"):
        given = outline(metrics=[metric, "average_increase"])
        with pytest.raises(ValueError, match="average_drop needs complexity"):
            write(tmp_path, rows_of(given), given)
    assert not list(tmp_path.iterdir())


def test_a_csv_table_read_back_is_the_summary(tmp_path: Path) -> None:
    given = outline(images=20)
    rows = rows_of(given)
    rows[3] |= {"value": None, "error": "why"}
    cells = summarize(rows, given)
    write(tmp_path, rows, given)
    lines = table(tmp_path / "tables/net.csv")
    assert [line["method"] for line in lines] == list(given.methods)
    for line, metric in itertools.product(lines, METRICS):
        found = cell(cells, line["method"], metric)
        names = ("mean", "low", "high", "difference", "difference_low", "difference_high", "count", "errors")
        columns = ("", "_low", "_high", "_difference", "_difference_low", "_difference_high", "_images", "_errors")
        for name, column in zip(names, columns, strict=True):
            text, value = line[metric + column], getattr(found, name)
            assert text == "" if value is None else float(text) == value
    assert [(line["forward_samples"], line["images"]) for line in lines] == [("513.0", "20")] * 2
    assert [line["errors"] for line in lines] == ["1", "0"]
    assert "seconds" not in (tmp_path / "tables/net.csv").read_text()


def test_cost_is_relative_to_the_reference_over_common_pictures(tmp_path: Path) -> None:
    seconds = {"grad-cam": {"a": 1.0, "b": 2.0, "c": 30.0}, "fusion-cam:theta=5": {"a": 4.0, "b": 8.0}}
    rows = [row(i, method, "seconds", v) for method, each in seconds.items() for i, v in each.items()]
    rows += [row(i, "grad-cam", "forward_samples", v) for i, v in (("a", 1), ("b", 2))]
    given = outline()
    write(tmp_path, rows, given)
    first, second = table(tmp_path / "tables/net_cost.csv")
    assert (first["seconds_median"], first["seconds_mean"], first["seconds_relative"]) == ("2.0", "11.0", "0.25")
    assert (second["seconds_median"], second["seconds_relative"], second["forward_samples"]) == ("6.0", "1.0", "")
    assert first["forward_samples"] == "1.5"
    line = next(each for each in (tmp_path / "tables/net_cost.md").read_text().splitlines() if "| grad-cam" in each)
    assert [each.strip() for each in line.split("|")[2:-1]] == ["1.5", "–", "2.00", "11.0", "0.250 ×"]  # noqa: RUF001
    write(tmp_path / "b", rows, outline(reference=None))
    assert "relative" not in (tmp_path / "b/tables/net_cost.csv").read_text()


def test_the_best_is_bold_and_so_are_ties(tmp_path: Path) -> None:
    values = {"x": (30.0, 0.5, 0.2), "y": (20.0, 0.5004, 0.1), "z": (20.001, 0.4, 0.3)}
    metrics = ["average_drop", "insertion", "complexity"]
    rows = [row("a", method, m, v) for method, each in values.items() for m, v in zip(metrics, each, strict=True)]
    given = outline(
        methods=list(values), metrics=metrics, reference="x", headings={**HEADINGS, "complexity": ("area", "")}
    )
    write(tmp_path, rows, given)
    markdown, tex = ((tmp_path / f"tables/net.{kind}").read_text() for kind in ("md", "tex"))
    assert re.findall(r"\*\*(.*?)\*\*", markdown) == ["0.500", "20.00", "0.500", "20.00"]
    assert re.findall(r"\\textbf\{(.*?)\}", tex) == ["0.500", "20.00", "0.500", "20.00"]
    assert re.findall(r"<b>(.*?)</b>", (tmp_path / "index.html").read_text()) == ["0.500", "20.00", "0.500", "20.00"]
    assert "AD % ↓" in markdown
    assert "insertion ↑" in markdown
    assert "area |" in markdown, "no arrow where nothing is better"
    assert r"AD \% $\downarrow$ & insertion $\uparrow$ & area \\" in tex
    assert "-10.00 " in markdown
    assert not re.search(r"\[[-+\d]", markdown), "one picture has no interval"
    assert "$-$10.00" in tex


def test_nothing_is_bold_where_all_are_equal(tmp_path: Path) -> None:
    values = {"x": (0.0, 0.5, 0.2), "y": (0.0, 0.5004, 0.2), "z": (0.0, 0.4, 0.2)}
    metrics = ["average_increase", "insertion", "deletion"]
    rows = [row("a", method, m, v) for method, each in values.items() for m, v in zip(metrics, each, strict=True)]
    write(tmp_path, rows, outline(methods=list(values), metrics=metrics, reference="x"))
    markdown, tex = ((tmp_path / f"tables/net.{kind}").read_text() for kind in ("md", "tex"))
    assert re.findall(r"\*\*(.*?)\*\*", markdown) == ["0.500", "0.500"]
    assert re.findall(r"\\textbf\{(.*?)\}", tex) == ["0.500", "0.500"]
    assert re.findall(r"<b>(.*?)</b>", (tmp_path / "index.html").read_text()) == ["0.500", "0.500"]


@pytest.mark.parametrize("width", [1e-9, 0.01])
def test_a_difference_of_rounding_is_muted(tmp_path: Path, width: float) -> None:
    rows = [
        row(f"{i}", method, "insertion", 0.5 + i / 10 + (method == "y") * width * (1 + i / 10))
        for i in range(5)
        for method in ("x", "y")
    ]
    write(tmp_path, rows, outline(methods=["x", "y"], metrics=["insertion"], reference="x"))
    (entry,) = re.findall(r"<td([^>]*)>(?:\+0\.0\d+|0\.000)<small>", (tmp_path / "index.html").read_text())
    assert ("faint" in entry) == (width < 1e-3)


def test_a_metric_without_any_value_is_a_sentence_and_no_column(tmp_path: Path) -> None:
    metrics = ["insertion", "pointing_game", "energy_pointing_game", "road"]
    given = outline(metrics=metrics, headings={**HEADINGS, "pointing_game": ("pointing %", "up")}, images=3)
    found = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.6])
    rows = [row(i, method, "insertion", next(found)) for method in given.methods for i in "abc"]
    why = {"pointing_game": NOT_KNOWN, "energy_pointing_game": NOT_KNOWN, "road": "RuntimeError: out of memory"}
    rows += [row(i, method, m, None, error=why[m]) for method in given.methods for i in "abc" for m in metrics[1:]]
    write(tmp_path, rows, given)
    page = Page(tmp_path / "index.html")
    known = "No values of pointing % and energy_pointing_game: the object's location is not known (localization metrics"
    for text in (" ".join(page.text.split()), (tmp_path / "tables/net.md").read_text().replace("\\", "")):
        assert known in text
        assert "No values of road: RuntimeError: out of memory." in text
    headings = re.findall(r'<th scope="col"[^>]*>([^<&]*)', page.source)
    assert headings.count("insertion") == 2, "means and differences"
    assert not {"pointing %", "pointing\xa0%", "energy_pointing_game", "energy_", "road"} & set(headings)
    assert (tmp_path / "tables/net.tex").read_text().count("\n% No values of") == 2
    assert "pointing_game_errors" in (tmp_path / "tables/net.csv").read_text(), "a program finds every metric"
    assert re.findall(r"<td>(.*?)</td><td>(?:.*?)</td><td>(.*?)</td><td>(\d)</td>", page.source) == [
        ("all", "the object&#39;s location is not known", "3"),
        ("all", "the object&#39;s location is not known", "3"),
        ("all", "RuntimeError: out of memory", "3"),
    ]


def test_nothing_shows_as_minus_zero(tmp_path: Path) -> None:
    rows = [row(i, method, "insertion", value) for method, value in (("x", 0.5), ("y", 0.49999)) for i in "ab"]
    write(tmp_path, rows, outline(methods=["x", "y"], metrics=["insertion"], reference="x"))
    assert "0.000 [0.000, 0.000]" in (tmp_path / "tables/net.md").read_text()
    assert "-0.000" not in (tmp_path / "tables/net.md").read_text()


# ------------------------------------------------------------------------------------------------------------- figures


def drawn(rows: list[dict[str, Any]], given: Outline, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[str]]:
    """The axes of the figures in each of the two formats, and what the page says below their headings."""
    axes: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, format: axes.extend(figure.axes) or b"")
    notes = [drawing.note for drawing in figures.draw(Results(rows, given), MODEL).values()]
    return axes, notes


@pytest.mark.parametrize("nothing", [0.0, 1e-17])
def test_a_metric_that_is_0_everywhere_has_no_axis(nothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given = outline(metrics=["average_increase", "complexity"])
    rows = [row(f"{i}", m, "average_increase", nothing) for i in range(3) for m in given.methods]
    rows += [row(f"{i}", m, "complexity", 0.2) for i in range(3) for m in given.methods]
    axes, notes = drawn(rows, given, monkeypatch)
    assert {axis.get_title("left").strip() for axis in axes} == {"area ↓"}
    assert notes == ["Not drawn, since 0 for every method: AI %."]
    assert all(axis.get_xlim()[0] == 0 and axis.get_xlim()[1] > 0.2 for axis in axes), "equal bars start at 0"
    assert drawn([each for each in rows if each["metric"] != "complexity"], given, monkeypatch) == ([], [])


def test_a_metric_that_does_not_depend_on_theta_has_no_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [f"fusion-cam:theta={theta}" for theta in (5, 10, 20)]
    given = outline(methods=methods, metrics=["average_increase", "complexity"], reference=None)
    rows = [row(f"{i}", m, "average_increase", 50.0 + 1e-7 * n) for i in range(3) for n, m in enumerate(methods)]
    rows += [row(f"{i}", m, "complexity", 0.2 + n / 10) for i in range(3) for n, m in enumerate(methods)]
    axes, notes = drawn(rows, given, monkeypatch)
    assert notes == ["", "Not drawn, since equal for every theta: AI %."]
    assert [axis.get_title("left").strip() for axis in axes if axis.get_xlabel() == "theta"] == ["area ↓"] * 2


def test_curves_without_any_score_have_no_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    given = outline(methods=["a", "b"], metrics=["insertion", "deletion"], reference=None)
    rows = [row("x", m, "insertion", 0.0, curve=[0.0, 0.0], shares=[0.0, 1.0]) for m in "ab"]
    rows += [row("x", m, "deletion", 0.5, curve=[1.0, 0.0], shares=[0.0, 1.0]) for m in "ab"]
    axes, notes = drawn(rows, given, monkeypatch)
    assert [axis.get_title("left").strip() for axis in axes if axis.get_ylabel() == "score"] == ["deletion ↓"] * 2
    assert notes == ["Not drawn, since 0 for every method: insertion."] * 2


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", [HOSTILE, "[x]*\\y^~{z}", "_under $a$ `b` \"c\" 'd' --", "<script>x</script>\n日本"])
def test_every_format_takes_any_name(tmp_path: Path, name: str) -> None:
    given = outline(
        title=name,
        models=[name],
        methods=[name, f"{name}:theta=1", f"{name}:theta=2"],
        metrics=[*METRICS, name],
        reference=name,
        skipped=[(name, name)],
        settings={name: name, "command": name},
        headings={**HEADINGS, name: (name, "up")},
        published={name: {name: {name: 0.5}, "other": {"average_drop": 12.0}}},
    )
    rows = rows_of(given)
    rows[0] |= {"value": None, "error": name}
    files = write(tmp_path, rows, given)
    for file in files:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", file.name)
        assert file.parent in (tmp_path, tmp_path / "tables", tmp_path / "figures")
    shown = " ".join(name.split())
    for file in (each for each in files if each.suffix == ".tex"):
        text = re.sub(r"(?<!\\)((?:\\\\)*)%.*", r"\1", file.read_text(encoding="utf-8"))
        assert "\n" not in name or "日本" in text
        depth = 0
        for brace in re.findall(r"(?<!\\)[{}]", text.replace("\\\\", "")):
            depth += 1 if brace == "{" else -1
            assert depth >= 0
        assert depth == 0
        assert not re.search(r"(?<!\\)[#_<>|^~]", text)
        assert text.replace("\\$", "").count("$") % 2 == 0
        assert not re.search(r"\\\\\s*[\[*]", text), "what follows a line's end is no argument of it"
        widths = {
            len(re.split(r"(?<!\\)&", line))
            for line in text.split("\\par")[0].splitlines()
            if line.rstrip().endswith("\\\\")
        }
        assert len(widths) == 1, "every line has as many cells"
    markdown = next(each for each in files if each.suffix == ".md").read_text(encoding="utf-8")
    blocks = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("| method")]
    assert len(blocks) == 3
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in block}) == 1
    lines = table(next(each for each in files if each.suffix == ".csv"))
    assert [line["method"] for line in lines] == list(given.methods)
    page = Page(tmp_path / "index.html")
    assert "script" not in page.tags
    assert shown in " ".join(page.text.split())


def test_names_of_files_are_safe_and_distinct(tmp_path: Path) -> None:
    models = ["a/b", "a:b", "a_b", "Net", "net", "net_cost", "../up", "/etc/x.pt", "", "." * 3, "x" * 300]
    given = outline(models=models, metrics=["insertion"], images=1)
    files = write(tmp_path, [], given)
    assert len({str(file).lower() for file in files}) == len(files) == 6 * len(models) + 1
    assert all(file.resolve().is_relative_to(tmp_path.resolve()) and len(file.name) < 120 for file in files)
    assert (tmp_path / "tables/a_b.md").read_text().startswith("# a\\_b\n"), "a name that is safe stays as it is"


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    picture = tmp_path / "example.png"
    matplotlib.image.imsave(picture, np.zeros((4, 4, 3)))
    given = outline(
        examples={MODEL: [picture, tmp_path / "gone.png"]},
        settings={"command": "captum-fusion evaluate x --limit 4"},
        skipped=[("broken.png", "cannot identify image file")],
        published={"A paper (https://arxiv.org/abs/2603.05386).": {"grad-cam": {"average_drop": 30.15}}},
    )
    write(tmp_path / "out", rows_of(given), given)
    page = Page(tmp_path / "out/index.html")
    assert len([link for link in page.links if link.startswith("data:image/")]) == page.tags.count("img") == 3
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert "url(" not in page.source
    assert "@import" not in page.source
    text = " ".join(page.text.split())
    for part in ("captum-fusion evaluate x --limit 4", "broken.png", "cannot identify", "arxiv.org/abs/2603", "30.15",
                 "Average drop falls as masks grow", "Lower is better.", "Higher is better.", "n = 4;"):  # fmt: skip
        assert part in text
    markdown = (tmp_path / "out/tables/net.md").read_text()
    assert "30.15" in markdown
    assert "Average drop falls as masks grow" in markdown


def test_what_is_cut_off_on_a_narrow_window_says_so(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (chromium := Path("/usr/bin/chromium")).exists():
        pytest.skip(f"there is no browser at {chromium}")
    given = outline(skipped=[("a.png", "broken")])
    rows = rows_of(given)
    rows[0] |= {"value": None, "error": "a reason"}
    write(tmp_path, rows, given)
    measure = """() => [...document.querySelectorAll(".scroll")].map(box => [
        box.scrollWidth > box.clientWidth + 1, box.parentElement.querySelector(".hint").offsetHeight > 10])"""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        for width, some_cut in ((1400, False), (420, True)):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto((tmp_path / "index.html").as_uri())
            boxes = page.evaluate(measure)
            assert len(boxes) == 6
            assert any(is_cut for is_cut, _ in boxes) == some_cut
            assert all(is_cut == has_hint for is_cut, has_hint in boxes), (width, boxes)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself stays"
        browser.close()


def test_an_interrupted_study_says_how_many_pictures_it_has(tmp_path: Path) -> None:
    given = outline(images=200, metrics=["complexity", "insertion"])
    rows = [row(f"{i}", "grad-cam", "complexity", 0.5) for i in range(37)]
    rows += [row(f"{i}", "grad-cam", "insertion", 0.5 if i < 9 else None, error="no memory") for i in range(37)]
    write(tmp_path, rows, given)
    page = Page(tmp_path / "index.html")
    text = " ".join(page.text.split())
    for part in ("n = 37 of 200", "n = 0 of 200", "n = 9", "no memory"):
        assert part in text
    markdown = (tmp_path / "tables/net.md").read_text()
    assert "37 of 200" in markdown
    assert "(n = 9)" in markdown
    assert not re.search(r"\bnan\b", (markdown + page.text).lower())


@pytest.mark.parametrize("images", [0, 1])
def test_one_method_on_at_most_one_picture(tmp_path: Path, images: int) -> None:
    given = outline(methods=["grad-cam"], reference="grad-cam", images=images)
    files = write(tmp_path, rows_of(given), given)
    assert len(files) == 7 + 4 * images
    page = Page(tmp_path / "index.html")
    assert "Differences" not in page.text
    assert "<b>" not in page.source, "nothing is best of one"
    (line,) = table(tmp_path / "tables/net.csv")
    assert line["insertion_low"] == line["insertion_high"] == "", "one picture says nothing of others"
    assert bool(line["insertion"]) == bool(images)


def test_curves_with_different_steps_are_averaged_on_common_ones(tmp_path: Path) -> None:
    given = outline(methods=["a"], metrics=["insertion"], reference=None, images=2)
    steps = {"1": [0.0, 0.5, 1.0], "2": [0.0, 1.0]}
    rows = [row(i, "a", "insertion", 0.5, curve=shares, shares=shares) for i, shares in steps.items()]
    files = write(tmp_path, rows, given)
    assert tmp_path / "figures/net_curves.svg" in files


def test_many_methods_with_long_names_are_drawn(tmp_path: Path) -> None:
    names = [f"fusion-cam:theta={i},weighting=softmax,denoising=per_channel_percentile" for i in range(24)]
    given = outline(methods=names, reference=None, images=2, metrics=["complexity", "insertion"])
    files = write(tmp_path, rows_of(given), given)
    for file in files:
        if file.suffix == ".png":
            height, width, _ = matplotlib.image.imread(file).shape
            assert 300 < width < 2500
            assert 300 < height < 5000


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = outline(metrics=["insertion"])
    write(tmp_path, rows_of(given), given)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, rows_of(given, seed=1), given)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_equal_values_have_equal_intervals_whatever_the_method_is_called() -> None:
    rows = [
        {"model": "net", "image": f"{i}.png", "method": method, "metric": "complexity", "value": (i * 7 % 10) / 10}
        for i in range(30)
        for method in ("a", "b")
    ]
    first, second = (
        cell
        for cell in summarize(rows, Outline("t", ["net"], ["a", "b"], ["complexity"], None, 30))
        if cell.metric == "complexity"
    )
    assert first.low is not None
    assert first.low < first.high
    assert (first.low, first.high) == (second.low, second.high)


# ------------------------------------------------------------------------------------------ against a plain computation


def expected(rows: list[dict[str, Any]], given: Outline, resamples: int, seed: int) -> list[Cell]:
    """What :func:`summarize` finds, row by row and draw by draw."""

    def values(model: str, method: str | None, metric: str) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for each in rows:
            if (each["model"], each["method"], each["metric"]) == (model, method, metric):
                value = each["value"] if each["value"] is not None and math.isfinite(each["value"]) else None
                found[each["image"]] = found.get(each["image"]) if value is None else value
        return found

    def estimate(of: dict[str, float], model: str, metric: str) -> tuple[float | None, float | None, float | None]:
        if not of:
            return None, None, None
        mean = math.fsum(of.values()) / len(of)
        pictures = list(dict.fromkeys(given.pictures.get(image, image) for image in sorted(of)))
        if len(pictures) == 1:
            return mean, None, None
        digest = hashlib.sha256(json.dumps([seed, model, metric]).encode()).digest()
        generator, means = np.random.default_rng(int.from_bytes(digest[:16], "big")), []
        for _ in range(resamples):
            drawn = [pictures[i] for i in generator.integers(0, len(pictures), len(pictures))]
            sample = [v for p in drawn for image, v in of.items() if given.pictures.get(image, image) == p]
            means.append(math.fsum(sample) / len(sample))
        low, high = np.percentile(means, [2.5, 97.5])
        return mean, float(low), float(high)

    cells = []
    for model, method, metric in itertools.product(
        given.models, given.methods, [*given.metrics, "forward_samples", "backward_samples", "seconds"]
    ):
        own = values(model, method, metric)
        known = {image: value for image, value in own.items() if value is not None}
        rival = values(model, given.reference, metric) if method != given.reference else {}
        both = {image: v - other for image, v in known.items() if (other := rival.get(image)) is not None}
        cells.append(
            Cell(model, method, metric, *estimate(known, model, metric), len(known), len(own) - len(known),
                 *estimate(both, model, metric))
        )  # fmt: skip
    return cells


@pytest.mark.parametrize("reference", ["b", "gone", None])
@pytest.mark.parametrize("shared", [False, True])
def test_cells_are_those_of_a_plain_computation(reference: str | None, shared: bool) -> None:
    draw, rows = random.Random(1), []
    images = [f"{i}.png{label}" for i in range(6) for label in ("", "#2", "#3")[: 1 + i % 3]]
    metrics, methods = ["average_drop", "complexity", "win_rate"], ["a", "b", "c"]
    for model, method, image in itertools.product(["net", "Net", "empty"], methods, images):
        drop = float(draw.randrange(4))  # with ties
        values = {
            "average_drop": drop,
            "complexity": draw.random(),
            "seconds": draw.random(),
            "forward_samples": 9,
            "other": 1.0,
        }
        for metric, value in values.items():
            if model == "empty" or draw.random() < 0.15:
                continue  # a missing cell
            one = row(image, method, metric, value, model=model, target=draw.randrange(3))
            failure = {**one, "value": draw.choice([None, math.nan, math.inf]), "error": draw.choice(["x", "y"])}
            rows += draw.choice([[one], [one], [one], [failure], [failure, one], [one, failure, one]])
    drops = {(r["model"], r["method"], r["image"]): r["value"] for r in rows
             if r["metric"] == "average_drop" and "error" not in r}  # fmt: skip
    wins = {}
    for (model, method, image), drop in drops.items():
        if (rival := drops.get((model, "b", image))) is not None:
            wins[model, method, image] = 100.0 * (drop < rival)
            rows.append(row(image, method, "win_rate", wins[model, method, image], model=model, reference="b"))
    draw.shuffle(rows)
    given = outline(
        models=["Net", "net", "empty"], methods=["c", "a", "b"], metrics=metrics, reference=reference, images=6,
        pictures={image: image.partition("#")[0] for image in images} if shared else {},
    )  # fmt: skip
    cells = summarize(rows, given, resamples=200, seed=3)
    plain = expected(rows, given, 200, 3)
    assert len(cells) == len(plain) == 3 * 3 * 6
    for one, other in zip(cells, plain, strict=True):
        assert one[:3] == other[:3]
        for name in Cell._fields[3:]:
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-12), (one[:3], name)
    won = [value for (model, method, _), value in wins.items() if (model, method) == ("net", "a")]
    assert 0 < sum(won) < 100 * len(won)
    (share,) = [each for each in cells if each[:3] == ("net", "a", "win_rate")]
    assert share.mean == sum(won) / len(won)


def test_mean_curves_are_those_of_a_plain_computation() -> None:
    rng, rows, sums = np.random.default_rng(0), [], np.zeros(5)
    for i in range(40):
        scores = rng.random(5)
        one = row(f"{i:02}", "grad-cam", "insertion", 0.5, shares=[0, 0.25, 0.5, 0.75, 1], curve=scores.tolist())
        if i % 7 == 0:
            one |= {"value": None, "error": "why"}  # its curve does not count
        elif i % 5 == 0:
            del one["curve"], one["shares"]
        else:
            sums += scores
        rows.append(one)
    counted = sum("curve" in each and "error" not in each for each in rows)
    curves = Results(rows, outline()).mean_curves(MODEL, "insertion")
    assert list(curves) == ["grad-cam"]
    shares, means = curves["grad-cam"]
    assert shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert means == pytest.approx(sums / counted, abs=1e-15)
    ends = row("x", "grad-cam", "insertion", 0.5, shares=[0.0, 1.0], curve=[0.0, 1.0])
    shares, mixed = Results([*rows, ends], outline()).mean_curves(MODEL, "insertion")["grad-cam"]
    assert len(shares) == 201
    straight = np.interp(shares, [0, 0.25, 0.5, 0.75, 1], means)
    assert mixed == pytest.approx((counted * straight + shares) / (counted + 1), abs=1e-12)


def test_errors_are_listed_by_reason() -> None:
    given = outline(models=["net", "b"], methods=["grad-cam"], metrics=["insertion", "deletion"], reference=None)
    rows = [row(image, "grad-cam", "insertion", None, error=why) for image, why in zip("dcba", "xyxz", strict=True)]
    rows += [row("e", "grad-cam", "insertion", None), row("f", "grad-cam", "insertion", 1.0)]
    rows += [row("a", "grad-cam", metric, None, error="a\n b", model="b") for metric in
             ("insertion", "deletion", "forward_samples", "backward_samples", "seconds")]  # fmt: skip
    assert Results(rows, given).errors() == [
        ("net", "grad-cam", "insertion", "z", 1),
        ("net", "grad-cam", "insertion", "x", 2),
        ("net", "grad-cam", "insertion", "y", 1),
        ("net", "grad-cam", "insertion", "no value", 1),
        ("b", "grad-cam", "all", "a b", 1),
    ]
