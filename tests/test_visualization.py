from __future__ import annotations

import io
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from captum_fusion import LayerFusionCAM, LayerUnionCAM
from captum_fusion.visualization import (
    overlay,
    to_picture,
    visualize_comparison,
    visualize_fusion,
    visualize_grid,
    visualize_map,
    visualize_signal,
    visualize_volume,
)
from tests.networks import images, make


def pixels(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return plt.imread(buffer)


def test_to_picture_rescales_only_images_that_exceed_the_range() -> None:
    given = torch.tensor([0.25, 0.5]).reshape(1, 1, 2)
    assert to_picture(given)[0, :, 0].tolist() == [0.25, 0.5]
    assert to_picture(given * 8 - 3)[0, :, 0].tolist() == [0.0, 1.0]
    assert to_picture(torch.full((3, 2, 2), -1.0)).max() == 0
    for shape in ((2, 3, 4, 4), (2, 4, 4), (4, 4)):
        with pytest.raises(ValueError, match="image must be of shape"):
            to_picture(torch.zeros(shape))


@pytest.mark.parametrize("method", ["blended_heat_map", "heat_map", "masked_image", "alpha_scaling"])
def test_every_method_of_captum_draws(method: str) -> None:
    image = images(1, 3, 20, 30)
    figure, axis = visualize_map(torch.rand(1, 1, 5, 7), image, method=method, title="a title")
    assert axis.get_title() == "a title"
    assert pixels(figure).std() > 0.05


@pytest.mark.parametrize("method", ["blended_heat_map", "heat_map", "masked_image", "alpha_scaling"])
def test_small_values_are_drawn_like_large_ones(method: str) -> None:
    image, heat = images(1, 3, 20, 30), torch.rand(1, 1, 5, 7)
    small, large = (pixels(visualize_map(factor * heat, image, method=method)[0]) for factor in (1e-8, 1.0))
    assert np.abs(small.astype(int) - large).max() <= 1, "and captum does not warn"


def test_a_hot_spot_is_drawn_at_its_position() -> None:
    heat = torch.zeros(1, 1, 8, 16)
    heat[..., 1, 12] = 1
    _, axis = visualize_map(heat, torch.full((1, 8, 16), 0.5))
    drawn = axis.images[-1].get_array()
    assert np.unravel_index(np.asarray(drawn).argmax(), drawn.shape) == (1, 12)
    assert drawn.shape == (8, 16)


def test_outlines_are_drawn_around_objects_also_at_the_edge() -> None:
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)  # the third is empty
    masks[0, 5:15, 10:20] = masks[1, :8, 24:] = True
    heat, picture = torch.rand(1, 1, 5, 7), torch.full((3, 20, 30), 0.5)
    _, bare = visualize_map(heat, picture)
    _, axis = visualize_map(heat, picture, outlines=masks)
    assert (axis.get_xlim(), axis.get_ylim()) == (bare.get_xlim(), bare.get_ylim())
    lines = [path.vertices for line in axis.collections for path in line.get_paths()]
    ends = {tuple(np.concatenate([line.min(0), line.max(0)]).round(1).tolist()) for line in lines}
    assert ends == {(9.5, 4.5, 19.5, 14.5), (23.5, -0.1, 29.1, 7.5)}
    figure = visualize_grid([(picture, [(None, "picture"), (heat, "map")])], outlines=[masks])
    assert [len(axis.collections) for axis in figure.axes] == [4, 4], "a line and its rim for each object"
    with pytest.raises(ValueError, match=r"outlines must be masks of shape \(B, 20, 30\), not \(3, 30, 20\)"):
        visualize_map(heat, picture, outlines=masks.mT)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_map_without_positive_values_is_drawn_as_all_zero(value: float) -> None:
    figure, axis = visualize_map(torch.full((1, 1, 4, 4), value), torch.rand(3, 8, 8))
    assert [text.get_text() for text in axis.texts] == ["all zero"]
    assert pixels(figure).shape[2] == 4


def test_invalid_maps_are_rejected() -> None:
    with pytest.raises(ValueError, match="attribution must be one two-dimensional map"):
        visualize_map(torch.rand(2, 1, 4, 4), torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match="rows must contain"):
        visualize_grid([])


@pytest.mark.parametrize("cls", [LayerFusionCAM, LayerUnionCAM])
def test_the_parts_of_a_fusion_are_shown_with_their_weights(cls: type) -> None:
    model, x = make(), images(2, 3, 8, 8)
    maps, details = cls(model, model.relu2).attribute(x, [0, 1], return_details=True)
    open_before = plt.get_fignums()
    figure = visualize_fusion(x, maps, details, titles=["first", "second"], name="the result")
    assert plt.get_fignums() == open_before, "no pyplot figure is opened"
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 10
    labels = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert labels == ["first", "second"]
    assert f"weight {details.union_weights[1, 0]:.2f}" in titles[6]
    kept = (details.region_contribution[1] + details.baseline_score[1]) / details.score[1]
    wanted = f"keeps {100 * kept:.0f} %" if kept < 1 else f"raises the score to {kept * details.score[1]:.2f}"
    assert wanted in titles[7]
    assert titles[9].startswith("the result")


def test_transparent_pixels_are_white_and_integers_are_bytes() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    for given in (clear, np.asarray(clear)):
        picture = to_picture(given)
        assert picture[0, 0].tolist() == [1, 0, 0]
        assert picture[1, 1].tolist() == [1, 1, 1]
    assert to_picture(np.full((2, 3), 255, np.uint8)).shape == (2, 3, 3)
    with pytest.raises(ValueError, match="image must be finite"):
        to_picture(torch.full((3, 2, 2), torch.nan))
    with pytest.raises(ValueError, match="image must be an array of shape"):
        to_picture(np.zeros((2, 2, 5)))


def test_an_overlay_has_the_resolution_of_the_picture_and_the_colours_of_the_map() -> None:
    picture = Image.new("RGB", (60, 40), (200, 100, 0))
    heat = torch.zeros(1, 1, 4, 6)
    heat[..., 1, 4] = 2
    drawn = overlay(picture, heat, alpha_overlay=1, cmap="gray")
    assert drawn.shape == (40, 60, 3)
    assert np.unravel_index(drawn[..., 0].argmax(), drawn.shape[:2]) in [(y, x) for y in (14, 15) for x in (44, 45)]
    assert drawn.max() >= 220
    assert drawn[-1, 0].tolist() == [0, 0, 0]
    assert (overlay(picture, heat, alpha_overlay=0) == 100).all(), "the mean of the channels"
    assert (overlay(picture, heat, alpha_overlay=0, grey=False) == (200, 100, 0)).all()
    half = overlay(picture, heat, alpha_overlay=1, cmap="gray", scale=4)
    assert 100 <= half.max() <= 128
    faint = overlay(picture, heat, alpha_overlay=1, threshold=0.5, cmap="gray")
    assert faint[-1, 0].tolist() == [100, 100, 100], "below the threshold is the picture"


def test_an_overlay_of_a_signed_map_is_centred_on_zero() -> None:
    drawn = overlay(
        Image.new("RGB", (3, 1)), torch.tensor([[-1.0, 0.0, 0.5]]), sign="all", alpha_overlay=1, cmap="gray"
    )
    np.testing.assert_allclose(drawn[0, :, 0], [0, 128, 191], atol=1)
    drawn = overlay(Image.new("RGB", (3, 1)), torch.tensor([[-1.0, 0.0, 0.5]]), sign="all", alpha_overlay=1)
    assert drawn[0, 0, 2] > drawn[0, 0, 0], "blue"
    assert drawn[0, 2, 0] > drawn[0, 2, 2], "red"


def test_a_mask_shows_only_what_exceeds_the_threshold() -> None:
    picture = Image.new("RGB", (4, 1), (10, 20, 30))
    heat = torch.tensor([[0.0, 0.4, 0.6, 1.0]])
    for threshold, shown in ((None, [False, False, True, True]), (0.3, [False, True, True, True])):
        drawn = overlay(picture, heat, "mask", threshold=threshold)
        assert (drawn[0] == (10, 20, 30)).all(1).tolist() == shown
        assert {tuple(pixel) for pixel in drawn[0][~np.array(shown)].tolist()} == {(128, 128, 128)}


def test_contours_are_where_the_map_has_their_value() -> None:
    picture = Image.new("RGB", (200, 100), (100, 100, 100))
    heat = torch.linspace(0, 1, 200).expand(100, 200)
    changed = (overlay(picture, heat, "contour", threshold=0.5) != 100).any(2)
    assert changed[:, 97:103].any(1).all()
    assert not changed[:, :90].any()
    assert not changed[:, 110:].any()
    three = (overlay(picture, heat, "contour") != 100).any(2)
    assert three[50, 50]
    assert three[50, 150]
    both = (overlay(picture, heat - 0.5, "contour", threshold=0.5, sign="all") != 100).any(2)
    assert both[50, 50]
    assert both[50, 150]


def test_the_map_lies_in_its_box() -> None:
    picture = Image.new("RGB", (40, 20), (100, 100, 100))
    drawn = overlay(picture, torch.ones(1, 1, 2, 2), box=(10, 0, 30, 20), alpha_overlay=1, cmap="gray")
    assert (drawn[:, 10:30] == 255).all()
    assert (drawn[:, :10] == 45).all(), "darkened: not seen"
    assert (overlay(picture, torch.ones(2, 2), "mask", box=(10, 0, 30, 20))[:, 30:] == 128).all()
    for box in ((10, 0, 50, 20), (10, 0, 10, 20)):
        with pytest.raises(ValueError, match="box must be"):
            overlay(picture, torch.ones(2, 2), box=box)
    _, axis = visualize_map(torch.ones(2, 2), picture, box=(10, 0, 30, 20))
    drawn_map = axis.images[-1].get_array()
    assert drawn_map.mask.sum() == 20 * 20
    assert axis.patches[0].get_bbox().x0 == 9.5


def test_side_by_side() -> None:
    picture = Image.new("RGB", (100, 50), (100, 100, 100))
    drawn = overlay(picture, torch.rand(5, 5), "side_by_side")
    assert drawn.shape == (50, 202, 3)
    assert (drawn[:, :100] == 100).all()


def test_wrong_arguments_of_an_overlay_are_named() -> None:
    picture, heat = Image.new("RGB", (4, 4)), torch.rand(4, 4)
    for arguments, message in (
        ({"mode": "blend"}, "mode must be one of 'overlay'"),
        ({"cmap": "infern"}, "no colour map 'infern'; did you mean inferno"),
        ({"cmap": "zzzzzz"}, "did you mean inferno, viridis"),
        ({"threshold": 2}, "threshold must be a number from 0 to 1"),
        ({"alpha_overlay": -1}, "alpha_overlay must be"),
        ({"scale": 0}, "scale must be a number above 0"),
        ({"sign": "both"}, "sign must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            overlay(picture, heat, **arguments)
    with pytest.raises(ValueError, match="attribution must be finite"):
        overlay(picture, torch.full((4, 4), torch.nan))


def test_the_default_colour_map_keeps_the_order_of_values_in_greyscale() -> None:
    ramp = overlay(Image.new("RGB", (256, 1)), torch.linspace(0, 1, 256).reshape(1, 256), alpha_overlay=1)
    grey = np.asarray(Image.fromarray(ramp).convert("L"), int)[0]
    assert (np.diff(grey) >= -1).all()
    assert grey[-1] - grey[0] > 200


def test_a_colour_bar_gives_the_values_of_the_scale() -> None:
    heat, picture = torch.linspace(0, 4, 64).reshape(8, 8), torch.rand(3, 8, 8)
    figure, _ = visualize_map(heat, picture, show_colorbar=True, outlier_perc=0)
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == ["0", "2", "4"]
    figure, axis = visualize_map(heat - 2, picture, sign="all", scale=8.0, show_colorbar=True)
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == ["-8", "0", "8"]
    assert figure.axes[1].get_xlabel() == "attribution, on a shared scale"
    assert axis.images[-1].get_clim() == (-8, 8)
    assert float(axis.images[-1].get_array().max()) == 2, "in the units of the map"
    with pytest.raises(ValueError, match="scale: captum's 'masked_image' has no colour map"):
        visualize_map(heat, picture, method="masked_image", scale=8.0)


def test_contours_and_thresholds_on_axes() -> None:
    heat, picture = torch.linspace(0, 1, 64).reshape(8, 8), torch.rand(3, 8, 8)
    _, axis = visualize_map(heat, picture, method="contour")
    assert len(axis.images) == 1
    assert len(axis.collections) >= 2
    figure, axis = visualize_map(heat - 0.5, picture, method="contour", threshold=0.5, sign="all")
    assert pixels(figure).std() > 0.05
    _, axis = visualize_map(heat, picture, method="contour", threshold=1.0, outlier_perc=0)
    assert not axis.collections, "no line, and no warning"
    _, axis = visualize_map(heat, picture, threshold=0.5, outlier_perc=0)
    assert axis.images[-1].get_array().mask.sum() == (heat < 0.5).sum()
    _, axis = visualize_map(-heat, picture, sign="negative", outlier_perc=0)
    assert float(axis.images[-1].get_array().max()) == 1


def test_maps_of_a_comparison_share_a_scale_if_wanted() -> None:
    pictures, weak = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 4)
    maps = {"weak": weak, "strong": 10 * weak}
    figure = visualize_comparison(
        pictures, maps, is_shared=True, show_colorbar=True, titles=["a", "b"], legend="Below."
    )
    *panels, bar = figure.axes
    ends = {axis.images[-1].get_clim()[1] for axis in panels if len(axis.images) > 1}
    assert ends == {float(10 * weak.max())}
    assert bar.get_xlabel() == "attribution, on one scale for all maps"
    assert [text.get_text() for axis in panels for text in axis.texts] == ["a", "b"]
    assert "Below." in [text.get_text() for text in figure.texts]
    figure = visualize_comparison(list(pictures), maps, show_image=False, show_colorbar=True)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["weak", "strong", "", ""]
    assert len({axis.images[-1].get_clim()[1] for axis in figure.axes[:4]}) == 4
    assert "as a fraction of each map's maximum" in figure.axes[-1].get_xlabel()
    for arguments, message in (
        ((pictures, {}), "maps must contain"),
        ((pictures, {"one": weak[:1]}), "maps must have one map of one for each of the 2 pictures, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            visualize_comparison(*arguments)
    with pytest.raises(ValueError, match="labels must have one entry for each of the 2 rows"):
        visualize_comparison(pictures, maps, titles=["a"])


def test_figures_are_drawn_into_a_given_figure() -> None:
    whole = Figure(figsize=(8, 4), layout="constrained")
    left, right = whole.subfigures(1, 2)
    assert visualize_comparison(torch.rand(1, 3, 8, 8), {"one": torch.rand(1, 1, 8, 8)}, figure=left) is whole
    assert visualize_volume(torch.rand(4, 4, 4), torch.rand(4, 4, 4), figure=right) is whole
    assert pixels(whole).std() > 0.05


def test_long_titles_are_wrapped_and_shrunk() -> None:
    name = "soft-coated wheaten terrier that belongs to my grandmother's neighbour: p = 0.93, and more words"
    figure = visualize_grid([(torch.rand(3, 8, 8), [(None, name), (torch.rand(8, 8), "map")])], panel=1.2)
    figure.draw_without_rendering()
    title, other = (axis.title for axis in figure.axes)
    assert "\n" in title.get_text()
    assert title.get_fontsize() < other.get_fontsize()
    assert title.get_window_extent().width <= 1.25 * figure.axes[0].bbox.width


def test_a_volume_is_cut_through_its_maximum() -> None:
    heat = torch.zeros(1, 1, 6, 8, 10)
    heat[..., 2, 3, 4] = 5
    figure = visualize_volume(heat, torch.rand(1, 2, 6, 8, 10))
    *panels, bar = figure.axes
    assert [axis.get_title() for axis in panels] == ["depth 3 of 6", "height 4 of 8", "width 5 of 10"]
    shapes = [axis.images[-1].get_array().shape for axis in panels]
    assert shapes == [(8, 10), (6, 10), (6, 8)]
    assert all(float(axis.images[-1].get_array().max()) == 5 for axis in panels)
    assert [text.get_text() for text in bar.get_xticklabels()] == ["0", "2.5", "5"]
    figure = visualize_volume(heat, torch.ones(6, 8, 10), position=[0, 0, 0], sign="all", titles=["a", "b", "c"])
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["all zero"] * 3
    for volume, position in ((torch.rand(6, 8), None), (torch.rand(6, 8, 10), [0, 8, 0])):
        with pytest.raises(ValueError, match=r"volume must be|position must be"):
            visualize_volume(heat, volume, position=position)


def test_a_signal_has_the_colours_of_its_map() -> None:
    open_before = plt.get_fignums()
    figure, axis = visualize_signal(torch.tensor([[0.0, 0.0, 3.0, 3.0, 0.0]]), torch.rand(2, 64), channels=["I", "II"])
    assert plt.get_fignums() == open_before
    lines = axis.collections[0]
    assert lines.get_clim() == (0, 3)
    assert 30 <= int(lines.get_array().argmax()) <= 46
    assert [text.get_text() for text in axis.get_yticklabels()] == ["I", "II"]
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == ["0", "1.5", "3"]
    figure, axis = visualize_signal(
        torch.linspace(-1, 1, 8), torch.rand(8), times=np.arange(8) / 4, sign="all", scale=2, fig_axis=(figure, axis)
    )
    assert axis.collections[-1].get_clim() == (-2, 2)
    assert axis.get_xlim() == (0, 1.75)
    for arguments in (
        {"times": [1, 2]},
        {"channels": ["a", "b"]},
        {"signal": torch.rand(1, 1, 1, 8)},
        {"signal": torch.full((8,), torch.nan)},
    ):
        with pytest.raises(ValueError, match=r"times must|channels must|signal must"):
            visualize_signal(**{"attribution": torch.rand(8), "signal": torch.rand(8), **arguments})


def test_a_tall_picture_does_not_make_an_endless_figure() -> None:
    figure = visualize_grid([(torch.rand(3, 200, 4), [(torch.rand(50, 1), "map")])])
    assert figure.get_size_inches()[1] < 6


def test_tensors_of_bytes_are_not_rescaled() -> None:
    image = torch.tensor([[[100, 150]]], dtype=torch.uint8).expand(3, 1, 2)
    np.testing.assert_array_equal(to_picture(image), to_picture(image.permute(1, 2, 0).numpy()))
    assert to_picture(image).max() == np.float32(150 / 255)


def test_a_path_is_no_picture() -> None:
    with pytest.raises(TypeError, match="image must be a tensor, a PIL picture or an array, not str"):
        to_picture("cat.jpg")


def test_the_share_of_outliers_is_checked() -> None:
    with pytest.raises(ValueError, match="outlier_perc must be a percentile from 0 to 100, not -1"):
        visualize_map(torch.rand(1, 1, 4, 4), torch.rand(3, 8, 8), outlier_perc=-1)


@pytest.mark.parametrize("wrong", ["images", "attributions", "alone"])
def test_a_fusion_is_drawn_of_as_many_examples_as_its_details(wrong: str) -> None:
    model, x = make(), images(2, 3, 8, 8)
    maps, details = LayerFusionCAM(model, model.conv2).attribute(x, 1, return_details=True)
    given: dict[str, Any] = {"images": x, "attributions": maps, "alone": [0.5, 0.5]}
    with pytest.raises(ValueError, match=f"{wrong} must be of the 2 examples of details, not 1"):
        visualize_fusion(**{**given, wrong: given[wrong][:1]}, details=details)
