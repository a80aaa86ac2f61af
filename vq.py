"""The image tokenizer: a VQGAN whose code vectors have length 1 (LlamaGen, arXiv 2406.06525, section 2.1).

A code is a number below K: the row of a vector of D channels in the codebook.
Shapes: B, 3, H, W pixels in [-1, 1]; B, h, w codes with h = H / factor; K, D the codebook; C channels.
Parameter names are those of LlamaGen's published files, which `VQModel.from_pretrained` reads.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import kernels
from common import check_kind, load_weights, make_config, read_weights

PRESETS = {
    "tiny": dict(channels=(64, 96), patch=4, blocks=1, z_channels=64, codebook_size=256),
    "vq8": dict(channels=(128, 256, 256, 512)),
    "vq16": dict(channels=(128, 128, 256, 256, 512)),
}


@dataclass
class VQConfig:
    channels: tuple = (128, 128, 256, 256, 512)  # one level each, a stride of 2 between levels
    patch: int = 1  # pixel-unshuffle before the first convolution (1: none, as published)
    blocks: int = 2  # residual blocks per encoder level; the decoder has one more
    z_channels: int = 256
    codebook_size: int = 16384  # K
    code_dim: int = 8  # D
    l2_norm: bool = True  # encoder outputs and codes are unit vectors
    dropout: float = 0.0
    beta: float = 0.25  # weight of the commitment loss
    entropy_weight: float = 0.0  # of `entropy_loss` (0: not computed)
    usage_window: int = 65536  # positions over which usage and perplexity are counted, per process

    def __post_init__(self):
        self.channels = tuple(self.channels)
        for name in ("codebook_size", "code_dim", "usage_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} has to be above 0, not {getattr(self, name)}")
        self.factor = self.patch * 2 ** (len(self.channels) - 1)  # pixels per code along each side


def norm(channels):
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)  # 32 groups at the published widths


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head attention over all positions, with a residual."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        # B, 1, H*W, C, contiguous: otherwise a GPU has no fused attention for them
        q, k, v = (f(h).flatten(2).mT.contiguous().unsqueeze(1) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # scale C^-1/2
        return x + self.proj_out(h.squeeze(1).mT.unflatten(2, x.shape[2:]))  # B, C, H, W


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros right and below only: B, C, H/2, W/2


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # B, C, 2H, 2W


class Level(nn.Module):
    """Residual blocks, an attention after each where asked for, and a change of resolution at the end."""

    def __init__(self, c_in, c_out, blocks, attention, dropout, downsample=False, upsample=False):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, dropout) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(c_out) if downsample else None
        self.upsample = Upsample(c_out) if upsample else None

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        resample = self.downsample or self.upsample
        return resample(x) if resample else x


def middle(c, dropout):
    return nn.Sequential(ResBlock(c, c, dropout), AttnBlock(c), ResBlock(c, c, dropout))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, last = config.channels, len(config.channels) - 1
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], c, config.blocks, i == last, config.dropout, downsample=i < last)
            for i, c in enumerate(widths)
        )
        self.mid = middle(widths[-1], config.dropout)
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(F.pixel_unshuffle(x, self.patch))  # B, C, H/patch, W/patch
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  # B, z_channels, h, w


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, last = config.channels[::-1], len(config.channels) - 1  # from the deepest level on
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], config.dropout)
        self.conv_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], c, config.blocks + 1, i == 0, config.dropout, upsample=i < last)
            for i, c in enumerate(widths)
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))  # B, C, h, w
        for level in self.conv_blocks:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)  # B, 3, H, W


class Quantizer(nn.Module):
    """Nearest code in float32 whatever autocast says; losses and gradient of van den Oord et al. 2017, section 3.2."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        # The codes last seen in training, -1 where there are none yet; the name is that of the published files.
        self.register_buffer("codebook_used", torch.full((config.usage_window,), -1, dtype=torch.int32))

    def unit(self, x):
        return F.normalize(x.float(), dim=-1) if self.config.l2_norm else x.float()

    def codebook(self):
        """Codes as the decoder reads them: float32 [K, D], unit vectors if the config says so."""
        return self.unit(self.embedding.weight)

    def search(self, z):
        """z [N, D] (unit vectors if l2_norm) -> int64 [N]."""
        return kernels.nearest_code(z, self.codebook(), l2=self.config.l2_norm)

    def forward(self, z):
        """z [B, D, h, w] -> quantized z [B, D, h, w], weighted losses {name: scalar}, codes int64 [B, h, w]."""
        with torch.autocast(z.device.type, enabled=False):
            z = self.unit(z.permute(0, 2, 3, 1))  # B, h, w, D
            codes = self.search(z.flatten(0, 2)).view(z.shape[:3])
            z_q = F.embedding(codes, self.codebook())
            losses = {
                "codebook": F.mse_loss(z_q, z.detach()),  # moves codes to what they stand for
                "commitment": self.config.beta * F.mse_loss(z, z_q.detach()),  # and the encoder to its codes
            }
            if self.config.entropy_weight:
                losses["entropy"] = self.config.entropy_weight * entropy_loss(z.flatten(0, 2), self.codebook())
            z_q = z + (z_q - z).detach()  # straight through: the value of z_q, but the decoder's gradient goes to z
        if self.training:
            self.remember(codes)
        return z_q.permute(0, 3, 1, 2), losses, codes

    @torch.no_grad()
    def remember(self, codes):
        """Append codes to the sliding window; without a write index, so nothing is read back from the GPU."""
        window = self.codebook_used
        window.copy_(torch.cat([window, codes.flatten().int()])[-len(window) :])

    @torch.no_grad()
    def window_counts(self):
        """How often each code occurs in the window, over all processes: int64 [K], left on the device."""
        seen = self.codebook_used.long() + 1  # 0 stands for "none yet"
        counts = kernels.code_usage(seen, self.config.codebook_size + 1)[1:]
        if dist.is_initialized():
            dist.all_reduce(counts)
        return counts

    @torch.no_grad()
    def init_kmeans(self, z, iterations=10):
        """Set the codes to the centres of Lloyd's algorithm on encoder outputs z [N, D]; empty ones are redrawn."""
        k = self.config.codebook_size
        if len(z) < k:
            raise ValueError(f"k-means needs as many encoder outputs as there are codes: {len(z)} for {k}")
        centres = sample_rows(z, k)
        for _ in range(iterations):
            codes = kernels.nearest_code(z, centres, l2=self.config.l2_norm)
            counts = kernels.code_usage(codes, k).unsqueeze(1)
            sums = torch.zeros_like(centres).index_add_(0, codes, z)
            centres = self.unit(torch.where(counts > 0, sums / counts.clamp(min=1), sample_rows(z, k)))
        self.set_codebook(centres)

    @torch.no_grad()
    def restart_dead_codes(self, z):
        """Move codes that the window does not hold onto random encoder outputs out of z [N, D], at most N of them."""
        dead = self.window_counts() == 0
        place = dead.cumsum(0) - 1  # each takes a vector of its own
        move = (dead & (place < len(z))).unsqueeze(1)
        fresh = sample_rows(z, len(z))[place.clamp(0, len(z) - 1)]
        self.set_codebook(torch.where(move, fresh, self.embedding.weight))

    @torch.no_grad()
    def set_codebook(self, vectors):
        self.embedding.weight.copy_(vectors)
        if dist.is_initialized():  # every process drew other vectors
            dist.broadcast(self.embedding.weight.data, src=0)


def sample_rows(z, n):
    """n <= N random rows of z [N, D], all different."""
    return z[torch.randperm(len(z), device=z.device)[:n]]


def entropy_loss(z, codebook, temperature=0.01):
    """Mean entropy of the soft assignments minus the entropy of their mean (Yu et al. 2023, MAGVIT-v2, eq. 4).

    z [N, D], codebook [K, D] -> scalar. Builds an N x K matrix: only called where its weight is not zero.
    """
    log_p = F.log_softmax(-torch.cdist(z, codebook).square() / temperature, dim=-1)  # N, K
    p_mean = log_p.exp().mean(0)
    return -(log_p.exp() * log_p).sum(-1).mean() + (p_mean * p_mean.clamp(min=1e-8).log()).sum()


def usage_and_perplexity(counts):
    """counts [K] -> share of codes that occur, and exp(entropy) of their frequencies; scalar tensors."""
    p = counts.double() / counts.sum().clamp(min=1)
    return (counts > 0).double().mean(), torch.exp(-torch.xlogy(p, p).sum())


class VQModel(nn.Module):
    """Encoder, 1x1 convolution to D channels, quantizer, 1x1 convolution back, decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
        self.init_weights()

    def init_weights(self):
        k = self.config.codebook_size  # convolutions keep PyTorch's default
        nn.init.uniform_(self.quantize.embedding.weight, -1 / k, 1 / k)
        if self.config.l2_norm:  # as published: Adam's first step would turn so short a vector anywhere
            self.quantize.embedding.weight.data = self.quantize.codebook().detach()

    def _encode(self, images):
        if images.dim() != 4 or images.shape[1] != 3 or any(s % self.config.factor or s == 0 for s in images.shape[2:]):
            shape, factor = list(images.shape), self.config.factor
            raise ValueError(f"images have to be [B, 3, H, W] with sides that are multiples of {factor}, not {shape}")
        if images.device.type == "cpu":  # a sixth faster there; on a GPU, where GroupNorm would copy, not measured
            images = images.contiguous(memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(images))  # B, D, h, w

    def _decode(self, z):
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))  # B, 3, H, W

    def forward(self, images):
        """images [B, 3, H, W] -> reconstruction [B, 3, H, W], losses {name: weighted scalar}, codes [B, h, w]."""
        z, losses, codes = self.quantize(self._encode(images))
        return self._decode(z), losses, codes

    @torch.no_grad()
    def features(self, images):
        """Encoder outputs as the search sees them: [B, 3, H, W] -> float32 [B*h*w, D]."""
        return self.quantize.unit(self._encode(images).permute(0, 2, 3, 1)).flatten(0, 2)

    @torch.no_grad()
    def encode(self, images):
        """images [B, 3, H, W] in [-1, 1] -> codes int64 [B, h, w]; ValueError where the sides do not divide."""
        h, w = (s // self.config.factor for s in images.shape[-2:])
        return self.quantize.search(self.features(images)).view(-1, h, w)

    @torch.no_grad()
    def decode(self, codes):
        """codes int64 [B, h, w] -> images [B, 3, H, W], about [-1, 1], not clamped."""
        if codes.dim() != 3:
            raise ValueError(f"codes have to be [B, h, w], not {list(codes.shape)}")
        z = F.embedding(codes, self.quantize.codebook()).permute(0, 3, 1, 2)  # B, D, h, w
        return self._decode(z)

    @classmethod
    def from_pretrained(cls, path, **changes):
        """Read LlamaGen's files or ours, float32, in eval mode; sizes are found in the file.

        `changes` replaces fields of the config that no shape depends on (dropout, beta, ...), for fine-tuning.
        Raises FileNotFoundError, or ValueError naming tensors that are missing, unexpected or misshapen.
        """
        weights, config = read_weights(path)
        check_kind(weights, path, "an image tokenizer")
        config = replace(make_config(VQConfig, config, path) if config else infer_config(weights, path), **changes)
        with torch.device("meta"):
            model = cls(config)
        # A window of past codes means nothing to a new run: published files hold zeros.
        weights["quantize.codebook_used"] = torch.full((config.usage_window,), -1, dtype=torch.int32)
        load_weights(model, weights, path)
        return model.float().to(memory_format=torch.contiguous_format).eval()  # training left its channels last

    def checkpoint(self):
        """What from_pretrained reads: {"model": weights under the published names, "config": sizes}."""
        return {"model": self.state_dict(), "config": asdict(self.config)}


def infer_config(weights, path):
    """The sizes of a published tokenizer from the shapes of its tensors."""
    name = "encoder.conv_blocks.{}.res.{}.conv1.weight".format
    levels = sum(name(i, 0) in weights for i in range(16))
    try:
        return VQConfig(
            channels=tuple(weights[name(i, 0)].shape[0] for i in range(levels)),
            patch=math.isqrt(weights["encoder.conv_in.weight"].shape[1] // 3),
            blocks=sum(name(0, j) in weights for j in range(16)),
            z_channels=weights["quant_conv.weight"].shape[1],
            codebook_size=weights["quantize.embedding.weight"].shape[0],
            code_dim=weights["quantize.embedding.weight"].shape[1],
        )
    except KeyError as error:
        raise ValueError(f"{path}: not a published tokenizer (it holds no {error.args[0]})") from None


if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    columns = "parameters", "codebook", "codes at 256", "at 384", "TFLOP", "GiB to train"
    print("preset" + "".join(f"{name:>14}" for name in columns))
    for preset, sizes in PRESETS.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = VQModel(VQConfig(**sizes))
            model._decode(model._encode(torch.empty(1, 3, 256, 256)))
        c, n = model.config, sum(p.numel() for p in model.parameters())
        row = [f"{n / 1e6:.1f}M", c.codebook_size, *((size // c.factor) ** 2 for size in (256, 384))]
        row += [f"{counter.get_total_flops() / 1e12:.2f}", f"{16 * n / 2**30:.1f}"]
        print(f"{preset:6}" + "".join(f"{cell:>14}" for cell in row))
    print("""
TFLOP: encoding and decoding one image of 256 pixels, 2 per multiply-add, without the search for codes; training takes
three times that. GiB to train: weights, gradients and AdamW's two moments in float32, without activations, LPIPS and
the discriminator.""")
