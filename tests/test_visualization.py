from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from captum_fusion import LayerFusionCAM, LayerUnionCAM
from captum_fusion.visualization import to_picture, visualize_fusion, visualize_grid, visualize_map
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


def test_a_hot_spot_is_drawn_at_its_position() -> None:
    heat = torch.zeros(1, 1, 8, 16)
    heat[..., 1, 12] = 1
    _, axis = visualize_map(heat, torch.full((1, 8, 16), 0.5))
    drawn = axis.images[-1].get_array()
    assert np.unravel_index(np.asarray(drawn).argmax(), drawn.shape) == (1, 12)
    assert drawn.shape == (8, 16)


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
