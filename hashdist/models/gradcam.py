"""Grad-CAM: the places of an image that a hash code rests on.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017, Eqs 1
and 2, with the agreement of the hash outputs with a code in the place of a class score:

    S = sum_l c_l z_l,   a_k = mean over places of dS / dA_k,   heat = ReLU(sum_k a_k A_k),

c in {-1, +1}^L being the code that is asked about (the image's own: which places make it what it is; a query's: which
places of a found image speak for the match), A_k the maps of the network's last convolutional activation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hashdist.ground.errors import InvalidInput
from hashdist.models.networks import Network


def grad_cam(
    network: Network, head: nn.Module, images_bSS3: NDArray[np.uint8], code_L: NDArray[np.floating] | None = None
) -> NDArray[np.float32]:
    """Heat float32 [b, S, S] in [0, 1] of prepared images uint8 [b, S, S, 3]; the hottest place of an image is 1.

    Args:
        network: images to features, on the CPU, in evaluation mode.
        head: features to a mapping with `z` [b, L], in evaluation mode.
        images_bSS3: as `network.preprocess` makes them.
        code_L: signs of the code that is asked about; None = each image's own.

    Raises:
        InvalidInput: a network whose features do not come from maps [b, K, h, w].
    """
    with torch.enable_grad():
        inputs = network.inputs(torch.from_numpy(images_bSS3))
        if not inputs.is_floating_point():
            raise InvalidInput("Grad-CAM needs a network of convolutions, found one that reads raw pixels")
        with _LastMaps() as seen:
            found = network.body(inputs.requires_grad_())
        maps_bKhw = seen.maps
        if maps_bKhw is None or _tokens(found):
            raise InvalidInput("Grad-CAM needs features that come from convolutional maps [b, K, h, w], found none")
        z_bL = head(network.pool(found))["z"]
        c_bL = torch.where(z_bL >= 0, 1.0, -1.0) if code_L is None else torch.from_numpy(code_L).to(z_bL)
        (slopes_bKhw,) = torch.autograd.grad((c_bL * z_bL).sum(), maps_bKhw)
    weights_bK11 = slopes_bKhw.mean((2, 3), keepdim=True)
    heat_b1hw = (weights_bK11 * maps_bKhw.detach()).sum(1, keepdim=True).relu()
    side = images_bSS3.shape[1:3]
    heat_bSS: Tensor = functional.interpolate(heat_b1hw, size=side, mode="bilinear", align_corners=False)[:, 0]
    highest = heat_bSS.amax((1, 2), keepdim=True)
    heat: NDArray[np.float32] = (heat_bSS / highest.where(highest > 0, 1.0)).float().numpy()
    return heat


class _LastMaps(TorchFunctionMode):
    """Watches every torch call, inside traced and plain modules alike, for the last maps that no pooling made."""

    maps: Tensor | None = None

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] * out.shape[3] > 1 and out.requires_grad:
            name = getattr(func, "__name__", "")
            if "pool" not in name and "dropout" not in name:
                self.maps = out
        return out


def _tokens(found: Tensor | Mapping[str, Tensor]) -> bool:
    """Whether the body gives tokens [b, T, D]: four-dimensional tensors inside it are then heads, not maps."""
    out = found if isinstance(found, Tensor) else found["out"]
    return out.ndim == 3
