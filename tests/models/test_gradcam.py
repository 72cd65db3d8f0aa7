"""Grad-CAM against cases that can be worked out by hand, on traced and plain networks."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import FeatureSettings, PreprocessSettings
from hashdist.models.gradcam import grad_cam
from hashdist.models.networks import Network, Preprocess, open_network

SIDE = 6
PREPROCESS = Preprocess(SIDE, 0, [0.0] * 3, [1.0] * 3, False, "bilinear")


class Linear(nn.Module):
    """z = W x."""

    def __init__(self, weight_LK: NDArray[np.floating]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight_LK).float())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"z": x @ self.weight.T}


class Plain(nn.Module):
    """A 1 x 1 convolution with a ReLU in place, as no tracing sees it."""

    def __init__(self, weight_K3: NDArray[np.floating], pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, len(weight_K3), 1, bias=False)
        self.conv.weight.data = torch.from_numpy(weight_K3).float()[:, :, None, None]
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        maps = functional.relu(self.conv(x), inplace=True)
        return (
            functional.adaptive_avg_pool2d(functional.dropout(maps, 0.5, self.training), 1).flatten(1)
            if self.pool
            else maps
        )


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_maps_weighed_by_the_head_where_pooling_is_the_mean(pool: bool, own: bool) -> None:
    """z_l = mean over places of sum_k W_lk A_k, so dS / dA_k = sum_l c_l W_lk / hw everywhere."""
    rng = np.random.default_rng(0)
    weight_K3, weight_LK = rng.normal(size=(4, 3)), rng.normal(size=(8, 4))
    images = rng.integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    code = np.sign(rng.normal(size=8))
    network, head = Network(Plain(weight_K3, pool), PREPROCESS).eval(), Linear(weight_LK).eval()
    got = grad_cam(network, head, images, None if own else code)
    assert (got.shape, got.dtype) == ((5, SIDE, SIDE), np.float32)
    for image, heat in zip(images, got, strict=True):
        maps = np.maximum(np.einsum("kc,yxc->kyx", weight_K3, image / 255), 0)
        z = weight_LK @ maps.mean((1, 2))
        signs = np.where(z >= 0, 1, -1) if own else code
        expected = np.maximum(np.einsum("k,kyx->yx", signs @ weight_LK / SIDE**2, maps), 0)
        np.testing.assert_allclose(heat, expected / max(expected.max(), 1e-30), atol=1e-5)
    assert (got.max((1, 2)) == 1).any()


def test_smaller_maps_are_scaled_to_the_image_and_other_images_do_not_matter() -> None:
    """A bright corner speaks for the code where the only map is the brightness; the other corner is cold."""
    body = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 1, 1, bias=False), nn.ReLU(inplace=True))
    body[1].weight.data.fill_(1.0)  # type: ignore[operator, union-attr]
    network, head = Network(body, PREPROCESS).eval(), Linear(np.ones((2, 1))).eval()
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    images[0, :2, :2], images[1, -2:, -2:] = 200, 90
    heat = grad_cam(network, head, images)
    assert (heat[0, 0, 0], heat[0, -1, -1], heat[1, 0, 0], heat[1, -1, -1]) == (1, 0, 0, 1)
    np.testing.assert_array_equal(grad_cam(network, head, images[1:]), heat[1:])
    assert not grad_cam(network, head, images, -np.ones(2)).any()  # nothing speaks for the opposite code


@pytest.mark.parametrize("backbone", ["squeezenet1_1", "resnet18", "mobilenet_v3_small"])
def test_networks_of_torchvision(backbone: str) -> None:
    """The heat is the closed form on the maps before the average, which hooks find in their own way."""
    settings = FeatureSettings(backbone, weights="random", preprocess=PreprocessSettings(size=96))
    network = open_network(settings).eval()
    rng = np.random.default_rng(0)
    weight_LK = rng.normal(size=(8, network.width))
    images = rng.integers(0, 256, (2, 96, 96, 3), np.uint8)
    kept: list[Tensor] = []
    if backbone == "squeezenet1_1":
        hook = network.body.register_forward_hook(lambda _module, _inputs, found: kept.append(found["out"]))
    else:
        pooling = network.body.get_submodule("avgpool")
        hook = pooling.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        network(torch.from_numpy(images))
    hook.remove()
    (maps,) = kept
    z = torch.from_numpy(weight_LK).float() @ maps.mean((2, 3)).T
    signs = torch.where(z >= 0, 1.0, -1.0).T
    weights = signs @ torch.from_numpy(weight_LK).float()
    heat = (weights[:, :, None, None] * maps).sum(1, keepdim=True).relu()
    heat = functional.interpolate(heat, size=(96, 96), mode="bilinear")[:, 0]
    heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-30)
    np.testing.assert_allclose(grad_cam(network, Linear(weight_LK), images), heat.numpy(), atol=1e-4)


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, torch.ones(4, 3, 2, 2)).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("network", [open_network(FeatureSettings("pixels")), Network(Tokens(), PREPROCESS)])
def test_networks_without_maps_are_refused(network: Network) -> None:
    with pytest.raises(InvalidInput, match="Grad-CAM needs"):
        grad_cam(network, Linear(np.ones((2, 4))), np.zeros((1, 8, 8, 3), np.uint8))
