import urllib.error

import pytest
import torch

import losses


@pytest.fixture(scope="module")
def lpips():
    torch.manual_seed(0)
    return losses.LPIPS(random_weights=True)


def test_lpips_is_frozen_and_stays_in_eval(lpips):
    wrapper = torch.nn.ModuleList([lpips]).train()
    dropouts = [m for m in wrapper.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and not any(m.training for m in lpips.modules())
    assert not any(p.requires_grad for p in lpips.parameters())


def test_lpips_against_its_definition(lpips):
    x, y = (torch.rand(2, 3, 32, 48) * 2 - 1 for _ in range(2))
    x.requires_grad_()
    unit = lambda f: f / f.pow(2).sum(1, keepdim=True).sqrt()  # noqa: E731
    layers = zip(*(lpips.lpips.net(lpips.lpips.scaling_layer(image)) for image in (x, y)), strict=True)
    heads = [head.model[-1].weight.view(1, -1, 1, 1) for head in lpips.lpips.lins]
    expected = sum((head * (unit(fx) - unit(fy)) ** 2).sum(1).mean()
                   for (fx, fy), head in zip(layers, heads, strict=True))
    distance = lpips(x, y)
    assert distance.shape == () and distance > 0.01
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-6)
    assert lpips(x, x).item() == 0
    distance.backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_lpips_gradient_is_finite_where_features_are_zero(lpips):
    grey = lpips.lpips.scaling_layer.shift.expand(1, 3, 32, 32).clone().requires_grad_()  # all features zero
    lpips(grey, torch.rand(1, 3, 32, 32)).backward()
    assert grey.grad.isfinite().all()


def test_lpips_names_the_missing_weights(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(FileNotFoundError) as error:
        losses.LPIPS()
    for part in (losses.VGG_FILE, "528 MiB", losses.VGG_URL, str(tmp_path), "--perceptual-weight 0"):
        assert part in str(error.value)


@pytest.mark.parametrize("layers, field", [(2, 34), (3, 70), (4, 142)])
def test_patchgan_receptive_field(layers, field):
    net = losses.PatchGAN(filters=4, layers=layers).double().eval()
    torch.nn.init.constant_(net.net[-1].weight, 0.1)
    x = torch.randn(1, 3, 256, 256, dtype=torch.double, requires_grad=True)
    logits = net(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = x.grad.abs().sum((0, 1)) > 0
    for axis in (0, 1):
        lines = seen.any(axis).nonzero()
        assert lines.max() - lines.min() + 1 == field


@pytest.mark.parametrize("size, out", [((256, 256), (30, 30)), ((32, 32), (2, 2)), ((24, 24), (1, 1)),
                                       ((32, 64), (2, 6)), ((47, 101), (3, 10))], ids=str)
def test_patchgan_shapes(size, out):
    assert losses.PatchGAN(filters=8)(torch.randn(2, 3, *size)).shape == (2, 1, *out)


def test_patchgan_layers_and_init():
    torch.manual_seed(0)
    net = losses.PatchGAN()
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [m.out_channels for m in convs] == [64, 128, 256, 512, 1]
    assert [m.stride[0] for m in convs] == [2, 2, 2, 1, 1] and [m.num_features for m in norms] == [128, 256, 512]
    assert all(m.negative_slope == 0.2 for m in net.modules() if isinstance(m, torch.nn.LeakyReLU))
    assert abs(convs[3].weight.std() - 0.02) < 1e-3 and abs(norms[2].weight.std() - 0.02) < 5e-3
    assert abs(norms[2].weight.mean() - 1) < 0.01 and norms[2].bias.abs().max() == 0


def test_patchgan_refuses_small_images():
    with pytest.raises(ValueError, match="at least 24 pixels"):
        losses.PatchGAN()(torch.zeros(1, 3, 23, 64))


def test_adversarial_losses_against_float64():
    torch.manual_seed(0)
    real, fake = torch.randn(4, 1, 5, 3) * 3 + 1, torch.randn(4, 1, 5, 3) * 3
    r, f = real.double(), fake.double()
    sigmoid = lambda x: 1 / (1 + torch.exp(-x))  # noqa: E731
    expected = {
        "hinge_d_loss": ((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean()) / 2,
        "hinge_g_loss": -f.mean(),
        "non_saturating_d_loss": -(sigmoid(r).log().mean() + (1 - sigmoid(f)).log().mean()) / 2,
        "non_saturating_g_loss": -sigmoid(f).log().mean(),
    }
    for name, value in expected.items():
        loss = getattr(losses, name)(*((real, fake) if "_d_" in name else (fake,)))
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=1e-6)
    assert losses.non_saturating_d_loss(torch.tensor(-1e4), torch.tensor(1e4)) == 1e4  # no overflow


@pytest.mark.parametrize("name", ["hinge", "non_saturating"])
def test_discriminator_learns_from_both_sides(name):
    """It separates stripes from their transposes, gets a gradient from either alone, and the generator pulls back."""
    torch.manual_seed(0)
    d_loss, g_loss = getattr(losses, f"{name}_d_loss"), getattr(losses, f"{name}_g_loss")
    real_logits, fake_logits = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    d_loss(real_logits, fake_logits).backward()
    assert (real_logits.grad < 0).all() and (fake_logits.grad > 0).all()
    fake_logits.grad = None
    g_loss(fake_logits).backward()
    assert (fake_logits.grad < 0).all()

    net = losses.PatchGAN(filters=8, layers=2)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.9))
    stripes = torch.arange(16).div(4, rounding_mode="floor").remainder(2) * 2.0 - 1
    for _ in range(60):
        real = stripes.expand(4, 3, 16, 16) + 0.3 * torch.randn(4, 3, 16, 16)
        fake = stripes[:, None].expand(4, 3, 16, 16) + 0.3 * torch.randn(4, 3, 16, 16)
        logits_real, logits_fake = net(real), net(fake)
        optimizer.zero_grad()
        d_loss(logits_real, logits_fake).backward()
        optimizer.step()
    assert (logits_real > 0).float().mean() > 0.95 and (logits_fake < 0).float().mean() > 0.95


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    torch.manual_seed(0)
    w, x = torch.randn(5, requires_grad=True), torch.randn(5)
    rec, g = ((w - x) ** 2).sum(), 3 * w.sum()
    expected = (2 * (w - x)).norm() / (3 * torch.ones(5).norm() + 1e-4)
    weight = losses.adaptive_weight(rec, g, w)
    torch.testing.assert_close(weight, expected.detach())
    assert not weight.requires_grad
    assert losses.adaptive_weight(rec, 1e-9 * w.sum(), w, maximum=7.0) == 7
    (rec + weight * g).backward()  # both graphs are still there
    torch.testing.assert_close(w.grad, (2 * (w - x) + weight * 3).detach())
