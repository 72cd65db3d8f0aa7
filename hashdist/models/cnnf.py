"""CNN-F, the network that DDH was trained with (its Table 1; Chatfield et al., "Return of the Devil in the Details",
BMVC 2014). torchvision has none and no weights of it; give random ones or a file with the names below.

| layer | specification | output |
|---|---|---|
| input | RGB in [0, 255], less the mean, bilinear straight to | 3 x 224 x 224 |
| conv1 | 64 filters 11 x 11, stride 4, no padding; ReLU, LRN, max pool 2 x 2 | 54, 27 |
| conv2 | 256 filters 5 x 5, padding 2; ReLU, LRN, max pool 2 x 2 | 27, 13 |
| conv3, conv4 | 256 filters 3 x 3, padding 1; ReLU | 13, 13 |
| conv5 | 256 filters 3 x 3, padding 1; ReLU, max pool 2 x 2 | 13, 6 |
| full6, full7 | 4096 units; ReLU | 4096 |

The table prints neither ReLU nor the stride of the pools (2, rounded down) nor LRN's constants: they are those of
Krizhevsky et al. 2012, k = 2, 5 channels, alpha = 1e-4 (torch divides alpha by the number of channels), beta = .75.
Pools are 2 x 2 as the table says; the weights released as VGG-F were trained with 3 x 3 windows, of the same output
sizes. DDH has no dropout.

Names in a file of weights: {conv1 ... conv5, full6, full7}.{weight, bias}, weights as torch has them, [filters,
channels, height, width] and [out, in] (MatConvNet's [height, width, in, out] transposed by (3, 2, 0, 1)).
"""

from torch import Tensor, nn
from torch.nn import functional

SIDE = 224
"""Pixels of an input's side."""


class CnnF(nn.Module):
    """Images [b, 3, 224, 224] to full7 behind its ReLU [b, 4096].

    Taps: `relu7`, `relu6`, and `pool` [b, 9216], what full6 takes. Weights start as He et al. 2015 have it, so that
    the scale of the signal survives seven layers; biases at 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, stride=4)
        self.conv2 = nn.Conv2d(64, 256, 5, padding=2)
        self.conv3 = nn.Conv2d(256, 256, 3, padding=1)
        self.conv4 = nn.Conv2d(256, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)
        self.norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
        self.flat = nn.Flatten()
        self.full6 = nn.Linear(9216, 4096)
        self.relu6 = nn.ReLU()
        self.full7 = nn.Linear(4096, 4096)
        self.relu7 = nn.ReLU()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Features [b, 4096]."""
        x = functional.max_pool2d(self.norm(functional.relu(self.conv1(x))), 2)
        x = functional.max_pool2d(self.norm(functional.relu(self.conv2(x))), 2)
        x = functional.relu(self.conv4(functional.relu(self.conv3(x))))
        x = self.flat(functional.max_pool2d(functional.relu(self.conv5(x)), 2))
        features: Tensor = self.relu7(self.full7(self.relu6(self.full6(x))))
        return features
