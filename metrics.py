"""What the scores are: of images against images, and of features against features.

Those of features are the ADM evaluator's (OpenAI's guided-diffusion), with which LlamaGen, DiT and VAR report theirs.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common import to_uint8


def psnr(a, b):
    """Peak signal-to-noise ratio of images [B, C, H, W] in [0, 1], data range 1 -> dB per image [B], at most 120."""
    return -10 * torch.log10((a.double() - b.double()).square().mean(dim=(1, 2, 3)).clamp(min=1e-12))


def ssim(a, b, data_range=1.0):
    """Structural similarity of images [B, C, H, W], H and W from 7 on -> per image [B], float64.

    7 x 7 uniform window, sample covariance, mean over positions and channels (Wang et al. 2004, eq. 13, with the
    constants there). LlamaGen's published figures have data_range 2 on images in [0, 1], and come out 0.1 higher.
    """
    if min(a.shape[2:]) < 7:
        raise ValueError(f"SSIM needs images of 7 x 7 pixels or more, not {list(a.shape)}")
    a, b = a.double(), b.double()
    mean = lambda x: F.avg_pool2d(x, 7, stride=1)  # noqa: E731
    ma, mb = mean(a), mean(b)
    unbiased = 49 / 48
    va, vb, cov = ((mean(x) - m) * unbiased for x, m in ((a * a, ma * ma), (b * b, mb * mb), (a * b, ma * mb)))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    s = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return s.mean((1, 2, 3))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of means [F] and covariances [F, F], in float64 -> float.

    Heusel et al. (arXiv 1706.08500), eq. 6. The trace of the root is the sum of the roots of the eigenvalues of
    S1^1/2 S2 S1^1/2, which is symmetric; what rounding leaves of eigenvalues that are 0 is dropped.
    Raises ValueError where shapes differ or a number is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    n = len(mu1)
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (n, n):
        shapes = [list(x.shape) for x in (mu1, sigma1, mu2, sigma2)]
        raise ValueError(f"the statistics are of different features: means and covariances are {shapes}")
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold numbers that are not finite")

    def roots(values):
        return values.where(values > values.max() * n * torch.finfo(torch.float64).eps, 0.0).sqrt()

    values, vectors = torch.linalg.eigh(sigma1)
    half = vectors * roots(values) @ vectors.T
    product = half @ sigma2 @ half
    root = roots(torch.linalg.eigvalsh((product + product.T) / 2)).sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root)


def inception_score(probs, split_size=5000):
    """exp of the mean KL divergence between p(y|x) and p(y): probabilities [N, classes] -> mean over contiguous splits.

    Salimans et al. (arXiv 1606.03498). N that is no multiple of split_size leaves a shorter last split. Images have to
    be in random order of classes.
    """
    scores = []
    for part in torch.as_tensor(probs).double().split(split_size):
        marginal = part.mean(0, keepdim=True)
        scores.append(float((torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1).mean().exp()))
    return sum(scores) / len(scores)


def _distances(a, b):
    return torch.cdist(a.double(), b.double(), compute_mode="use_mm_for_euclid_dist")


def _radii(x, k, block):
    """Distance of each row to its k-th neighbour, itself left out."""
    return torch.cat([_distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)])


def precision_recall(ref, samples, k=3):
    """Share of samples within the manifold of the reference, and of the reference within that of the samples.

    ref [N, F], samples [M, F] -> (precision, recall). The manifold is the union of balls around every point, out to its
    k-th neighbour, borders included (Kynkaanniemi et al., arXiv 1904.06991, eq. 1 and 2). In blocks of 2,048 rows.
    Raises ValueError where a set has no k-th neighbour or the widths differ.
    """
    ref, samples = torch.as_tensor(ref), torch.as_tensor(samples)
    if min(len(ref), len(samples)) <= k or ref.shape[1] != samples.shape[1]:
        raise ValueError(f"precision and recall with {k} neighbours: features are {ref.shape} and {samples.shape}")
    block = 2048
    ref_radii, radii = _radii(ref, k, block), _radii(samples, k, block)
    inside, covered = 0, torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    for part, radius in zip(samples.split(block), radii.split(block), strict=True):
        distance = _distances(part, ref)  # block, N
        inside += int((distance <= ref_radii).any(1).sum())
        covered |= (distance <= radius[:, None]).any(0)
    return inside / len(samples), float(covered.double().mean())


def statistics(rows):
    """Mean [F] and unbiased covariance [F, F], float64, of features [N, F], read in blocks."""
    blocks = [slice(start, start + 4096) for start in range(0, len(rows), 4096)]
    read = lambda block: torch.from_numpy(np.asarray(rows[block], np.float64))  # noqa: E731
    mean = sum(read(block).sum(0) for block in blocks) / len(rows)
    sigma = sum((x := read(block) - mean).T @ x for block in blocks) / (len(rows) - 1)
    return mean, sigma


def reconstruct(vq, x):
    """[B, 3, H, W] in [-1, 1] -> the reconstruction as it is written, uint8 [B, 3, H, W], and codes [B, h, w]."""
    codes = vq.encode(x)
    return torch.from_numpy(to_uint8(vq.decode(codes))).permute(0, 3, 1, 2), codes


def reconstruction_psnr(images, reconstructions):
    """PSNR in dB per image [B], both [B, 3, H, W] in [-1, 1]: the reconstruction as it is written, 8 bits."""
    written = torch.from_numpy(to_uint8(reconstructions)).permute(0, 3, 1, 2).to(images.device) / 255
    return psnr(written, images / 2 + 0.5)
