"""What train_vq.py adds to the squared error and the codebook's losses (vq.py): LPIPS, the PatchGAN discriminator,
adversarial losses and VQGAN's adaptive weight.

B, C, H, W: pixels in [-1, 1].
"""

import importlib
import os
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

VGG_FILE = "vgg16-397923af.pth"
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
_torchvision_operators = None  # torch.library.Library, which unregisters its operators when it is collected


def import_torchvision(package="torchvision"):
    """torchvision, or a package that imports it, also beside a torch build that its compiled extension does not fit.

    It then fails on describing two operators that nothing here calls; declaring them lets the import pass.
    """
    global _torchvision_operators
    try:
        return importlib.import_module(package)
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _torchvision_operators is not None:
            raise
    _torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _torchvision_operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(package)


class LPIPS(nn.Module):
    """Perceptual distance of Zhang et al. 2018 (arXiv 1801.03924), by the lpips package; frozen, always in eval mode.

    random_weights does without VGG's weights (tests). Raises FileNotFoundError where they cannot be had.
    """

    def __init__(self, random_weights=False):
        super().__init__()
        lpips = import_torchvision("lpips")
        try:
            with warnings.catch_warnings():  # lpips calls torchvision the old way
                warnings.simplefilter("ignore", UserWarning)
                self.lpips = lpips.LPIPS(net="vgg", pnet_rand=random_weights, verbose=False)
        except (OSError, RuntimeError) as error:  # no network, or a broken download
            folder = os.path.join(torch.hub.get_dir(), "checkpoints")
            raise FileNotFoundError(
                f"LPIPS needs VGG's weights: put {VGG_FILE} (528 MiB) from {VGG_URL} into {folder}, or train without "
                f"them, --perceptual-weight 0 ({error})") from error
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode=True):
        return super().train(False)  # the package's dropout must never come back

    def forward(self, x, y):
        """x, y [B, 3, H, W] in [-1, 1] -> scalar, the batch's mean."""
        return self.lpips(x, y).mean()


class PatchGAN(nn.Module):
    """pix2pix's discriminator (arXiv 1611.07004): images [B, C, H, W] -> one logit per patch [B, 1, h, w].

    4x4 convolutions, `layers` of stride 2, then two of stride 1; with 3 layers h = H // 8 - 2 and a logit sees 70x70.
    Raises ValueError for images below 3 * 2**layers pixels.
    """

    def __init__(self, filters=64, layers=3):
        super().__init__()
        self.min_size = 3 * 2 ** layers
        widths = [filters * min(2 ** i, 8) for i in range(layers + 1)]
        blocks = [nn.Conv2d(3, filters, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            blocks += [nn.Conv2d(widths[i - 1], widths[i], 4, stride=2 if i < layers else 1, padding=1, bias=False),
                       nn.BatchNorm2d(widths[i]), nn.LeakyReLU(0.2)]
        blocks.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.net = nn.Sequential(*blocks)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module):
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)  # DCGAN, pix2pix
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)

    def check_size(self, height, width):
        """ValueError for images that leave no logit."""
        if min(height, width) < self.min_size:
            raise ValueError(f"the discriminator needs images of at least {self.min_size} pixels a side, "
                             f"these are {height}x{width}")

    def forward(self, x):
        self.check_size(*x.shape[-2:])
        return self.net(x)


def hinge_d_loss(real_logits, fake_logits):
    """1/2 (mean max(0, 1 - real) + mean max(0, 1 + fake)), Lim and Ye 2017 (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def hinge_g_loss(fake_logits):
    """-mean fake."""
    return -fake_logits.float().mean()


def non_saturating_d_loss(real_logits, fake_logits):
    """1/2 (mean -log sigmoid(real) + mean -log(1 - sigmoid(fake))), Goodfellow et al. 2014 (arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean())


def non_saturating_g_loss(fake_logits):
    """mean -log sigmoid(fake)."""
    return F.softplus(-fake_logits.float()).mean()


def adaptive_weight(rec_loss, g_loss, last_layer_weight, maximum=1e4):
    """|d rec / d w| / (|d g / d w| + 1e-4), detached, at most `maximum`: VQGAN eq. 7 (Esser et al. 2021).

    w is the weight of the decoder's last layer. Both graphs are kept for the backward pass that follows.
    """
    rec_grad, = torch.autograd.grad(rec_loss, last_layer_weight, retain_graph=True)
    g_grad, = torch.autograd.grad(g_loss, last_layer_weight, retain_graph=True)
    return (rec_grad.float().norm() / (g_grad.float().norm() + 1e-4)).clamp(0, maximum).detach()
