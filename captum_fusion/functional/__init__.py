"""The formulas: pure tensor functions of maps, activations and gradients.

The functions do not depend on a model or on captum. They treat each example (dimension 0) independently, compute in at
least float32, return finite numbers for finite inputs and NaN for NaN, and never divide by zero.

References:
    [1] H. Dekdegue, M. Garouani, J. Mothe, J. Bernigaud, "Fusion-CAM", arXiv:2603.05386, 2026.
    [2] H. Hu, R. Wang, H. Lin, H. Yu, "UnionCAM", Frontiers in Neurorobotics 18:1490198, 2024.
    [3] H. Wang et al., "Score-CAM", CVPR Workshops 2020, arXiv:1910.01279.
    [4] R. R. Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391.
    [5] R. L. Draelos, L. Carin, "HiResCAM", 2020, arXiv:2011.08891.
    [6] A. Chattopadhay et al., "Grad-CAM++", WACV 2018, arXiv:1710.11063.
    [7] R. Fu et al., "Axiom-based Grad-CAM" (XGrad-CAM), BMVC 2020, arXiv:2008.02312.
    [8] P.-T. Jiang et al., "LayerCAM", IEEE TIP 2021, doi:10.1109/TIP.2021.3089943.
    [9] Q. Zhang, L. Rao, Y. Yang, "Group-CAM", 2021, arXiv:2103.13859.
    [10] M. B. Muhammad, M. Yeasin, "Eigen-CAM", IJCNN 2020, arXiv:2008.00299.
    [11] V. Petsiuk, A. Das, K. Saenko, "RISE", BMVC 2018, arXiv:1806.07421.
    [12] P. Morbidelli et al., "Augmented Grad-CAM", ICASSP 2020.
    [13] L. Domeniconi et al., "How to Evaluate and Refine your CAM" (RefineCAM), 2026, arXiv:2605.14641.
"""

from captum_fusion.functional.channel_search import ChannelSearch
from captum_fusion.functional.channels import (
    GROUPINGS,
    channel_pairs,
    channel_table,
    chunk_channels,
    cluster_channels,
    group_maps,
    increase_weights,
    live_channels,
    members,
    principal_component,
    principal_components,
    similar_channels,
    softmax_weights,
    weighted_activations,
)
from captum_fusion.functional.fusion import (
    WEIGHT_FLOOR,
    contribution_weights,
    denoise,
    denoise_gradients,
    mean_map,
    product_map,
    similarity_fusion,
    union_gradient_map,
    weigh,
)
from captum_fusion.functional.gradient import (
    SMOOTH_FUNCTIONS,
    distinct_maps,
    fuse_layer_cams,
    grad_cam,
    grad_cam_plus_plus_weights,
    hires_cam,
    layer_cam,
    layer_weights,
    pixel_alphas,
    shares,
    smooth_derivatives,
    softmax_derivatives,
    sum_of_alphas,
    xgrad_cam_weights,
)
from captum_fusion.functional.maps import (
    FLOOR,
    at_least_float32,
    gaussian_blur,
    normalize,
    percentile,
    precise,
    rise_blur,
    rise_masks,
    smooth_neighbours,
    upsample,
    with_area,
)
from captum_fusion.functional.regression import antithetic_cells, cell_covariance, cell_regression, grid_means
from captum_fusion.functional.scores import SCORE_FLOOR, ScoreFn, contribution, drop, gain, increase, score_function
from captum_fusion.functional.super_resolution import affine_grids, coarsening, super_resolve

__all__ = [
    "FLOOR",
    "GROUPINGS",
    "SCORE_FLOOR",
    "SMOOTH_FUNCTIONS",
    "WEIGHT_FLOOR",
    "ChannelSearch",
    "ScoreFn",
    "affine_grids",
    "antithetic_cells",
    "at_least_float32",
    "cell_covariance",
    "cell_regression",
    "channel_pairs",
    "channel_table",
    "chunk_channels",
    "cluster_channels",
    "coarsening",
    "contribution",
    "contribution_weights",
    "denoise",
    "denoise_gradients",
    "distinct_maps",
    "drop",
    "fuse_layer_cams",
    "gain",
    "gaussian_blur",
    "grad_cam",
    "grad_cam_plus_plus_weights",
    "grid_means",
    "group_maps",
    "hires_cam",
    "increase",
    "increase_weights",
    "layer_cam",
    "layer_weights",
    "live_channels",
    "mean_map",
    "members",
    "normalize",
    "percentile",
    "pixel_alphas",
    "precise",
    "principal_component",
    "principal_components",
    "product_map",
    "rise_blur",
    "rise_masks",
    "score_function",
    "shares",
    "similar_channels",
    "similarity_fusion",
    "smooth_derivatives",
    "smooth_neighbours",
    "softmax_derivatives",
    "softmax_weights",
    "sum_of_alphas",
    "super_resolve",
    "union_gradient_map",
    "upsample",
    "weigh",
    "weighted_activations",
    "with_area",
    "xgrad_cam_weights",
]
