"""The scores against other implementations of them, on random weights, and the commands from end to end."""

import json
import multiprocessing
import os
import re
import shutil
import socket
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import files, small_gpt, small_vq  # noqa: F401 - a fixture

import evaluate
import losses
import sample
from codes import CodeWriter
from command_line import cli
from common import file_sha256, save_file, save_picture
from data import load_images
from distributed import processes
from inception import BLOCKS, FILES, Images, Inception, features, resize
from metrics import frechet_distance, inception_score, precision_recall, psnr, ssim, statistics

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """Random weights that keep the signal's size, in a file as it is published."""
    torch.manual_seed(0)
    model = Inception()
    for name, x in model.state_dict().items():
        if x.dim() == 4:
            torch.nn.init.normal_(x, std=(2 / x[0].numel()) ** 0.5)
        elif "running_var" in name or name.endswith("bn.weight"):
            torch.nn.init.uniform_(x, 0.7, 1.4)
        elif x.is_floating_point():
            torch.nn.init.normal_(x, std=0.02 if x.dim() == 2 else 0.2)
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """12 photographs' crops of 40 x 40 pixels, as an npz and as PNGs."""
    from sklearn.datasets import load_sample_images

    folder, crops = tmp_path_factory.mktemp("pictures"), []
    rng = np.random.default_rng(0)
    for photo in load_sample_images().images:
        for _ in range(6):
            y, x = (rng.integers(side - 160) for side in photo.shape[:2])
            crops.append(photo[y : y + 160 : 4, x : x + 160 : 4])
    np.savez(folder / "a.npz", np.stack(crops))
    (folder / "a").mkdir()
    for i, crop in enumerate(crops):
        Image.fromarray(crop).save(folder / "a" / f"{i:03}.png")
    return folder


@pytest.fixture(scope="session")
def rows(network, pictures, tmp_path_factory):
    model = Inception.from_pretrained(network).to(CPU)
    return np.array(features(Images(pictures / "a.npz"), model, CPU, tmp_path_factory.mktemp("rows"), 10))


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


# The network

def tensorflow_resize(image, size):
    """Pixel by pixel, in float32, as TensorFlow 1 computes it without half-pixel centres."""
    h, w, f = *image.shape[:2], np.float32
    out = np.empty((size, size, image.shape[2]), f)
    for i in range(size):
        for j in range(size):
            y, x = f(i) * (f(h) / f(size)), f(j) * (f(w) / f(size))
            top, left = int(y), int(x)
            dy, dx = f(y - f(top)), f(x - f(left))
            below, right = min(top + 1, h - 1), min(left + 1, w - 1)
            a = image[top, left] + (image[top, right] - image[top, left]) * dx
            b = image[below, left] + (image[below, right] - image[below, left]) * dx
            out[i, j] = a + (b - a) * dy
    return out


@pytest.mark.parametrize("h, w, size", [(32, 32, 299), (40, 27, 61), (300, 310, 50), (17, 17, 17)])
def test_resize(h, w, size):
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype(np.float32)
    ours = resize(torch.from_numpy(image).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(ours, tensorflow_resize(image, size))


def test_features_equal_torch_fidelity(network, pictures, rows):
    losses.import_torchvision()  # which both packages ask for
    pytest.importorskip("torch_fidelity", reason="the reference network needs the package torch-fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = network.with_name("fidelity.pth")
    model = Inception()
    model.load_state_dict(torch.load(network), strict=False)  # all but the counters of batches, which theirs wants
    torch.save(model.state_dict(), path)
    theirs = FeatureExtractorInceptionV3("it", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    images = torch.from_numpy(np.load(pictures / "a.npz")["arr_0"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        pool, logits = theirs(images[:6])
    assert relative(rows[:6, :2048], pool.numpy()) < 1e-4 and rows[:, :2048].std() > 1e-3
    probs = Inception.from_pretrained(network).probabilities(torch.from_numpy(rows[:6, :2048]))
    assert relative(probs.detach(), logits.softmax(1).numpy()) < 1e-4


def test_spatial_features_are_positions_before_channels(network, pictures, rows):
    model, images = Inception.from_pretrained(network), np.load(pictures / "a.npz")["arr_0"][:2]
    seen = []
    model.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
    with torch.no_grad():
        model(torch.from_numpy(images).permute(0, 3, 1, 2))
    hwc = seen[-1][:, :7].permute(0, 2, 3, 1).reshape(2, -1).numpy()
    chw = seen[-1][:, :7].reshape(2, -1).numpy()
    assert hwc.shape == (2, 2023) and relative(rows[:2, 2048:], hwc) < 1e-6 < 0.1 < relative(rows[:2, 2048:], chw)


def test_names_of_the_published_file(network):
    names = set(torch.load(network))
    for name in ("Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch5x5_2.bn.running_var", "Mixed_5d.branch_pool.conv.weight",
                 "Mixed_6a.branch3x3dbl_3.conv.weight", "Mixed_6e.branch7x7dbl_5.bn.bias", "fc.weight", "fc.bias",
                 "Mixed_7a.branch7x7x3_4.conv.weight", "Mixed_7c.branch3x3dbl_3b.conv.weight",
                 "Mixed_7b.branch3x3_2a.bn.weight"):
        assert name in names
    assert len([n for n in names if n.endswith("conv.weight")]) == 94 and len(BLOCKS) == 11
    sizes = sum(x.numel() for n, x in torch.load(network).items() if "running" not in n)
    assert sizes == 23_834_568 + 8 * 2049  # torchvision's without its auxiliary head, and 8 more classes


# The arithmetic

@pytest.mark.parametrize("n", [30, 400])
def test_frechet_distance_against_scipy(n):
    """More features than images, and fewer: singular covariances."""
    linalg = pytest.importorskip("scipy.linalg", reason="the matrix root to compare with needs scipy")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, 64)) @ rng.normal(size=(64, 64)), rng.normal(size=(n, 64)) * 2 + 0.3
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that a matrix is singular
        root = linalg.sqrtm(s1 @ s2)
    expected = ((m1 - m2) ** 2).sum() + s1.trace() + s2.trace() - 2 * root.trace().real
    assert abs(frechet_distance(m1, s1, m2, s2) / expected - 1) < 1e-6
    assert abs(frechet_distance(m1, s1, m1, s1)) < 1e-8 * s1.trace()
    shifted = frechet_distance(m1, s1, m1 + 1, s1)
    assert abs(shifted - 64) < 1e-6


def test_frechet_distance_refuses():
    m, s = torch.zeros(4), torch.eye(4)
    with pytest.raises(ValueError, match="different features"):
        frechet_distance(m, s, torch.zeros(5), torch.eye(5))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(m, s, m * torch.nan, s)


def test_statistics_in_blocks(monkeypatch):
    x = (np.random.default_rng(0).normal(size=(9000, 5)) * 0.01 + 1000).astype(np.float32)
    mean, sigma = statistics(x)
    assert np.allclose(mean, x.mean(0, dtype=np.float64), rtol=1e-12)
    assert np.allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=0)


@pytest.mark.parametrize("n, m, k", [(50, 70, 3), (2100, 90, 3), (40, 2500, 5)])
def test_precision_and_recall_against_brute_force(n, m, k):
    rng = np.random.default_rng(1)
    ref, samples = rng.normal(size=(n, 6)), rng.normal(size=(m, 6)) * 1.2 + 0.4
    d = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))  # noqa: E731
    ref_radii, radii = np.sort(d(ref, ref), 1)[:, k], np.sort(d(samples, samples), 1)[:, k]
    cross = d(samples, ref)
    expected = (cross <= ref_radii).any(1).mean(), (cross <= radii[:, None]).any(0).mean()
    ours = precision_recall(torch.from_numpy(ref), torch.from_numpy(samples), k)
    assert ours == pytest.approx(expected, abs=1e-12) and 0.3 < ours[0] < 1 and 0.3 < ours[1] <= 1
    if n * m < 10_000:
        prdc = pytest.importorskip("prdc", reason="the second opinion on precision and recall needs prdc")
        theirs = prdc.compute_prdc(ref, samples, k)
        assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-12)


def test_precision_and_recall_at_their_ends():
    x = torch.randn(20, 4)
    assert precision_recall(x, x) == (1, 1) and precision_recall(x, x + 100) == (0, 0)
    # one sample in the middle of the reference, the others far off: precision 1/4; balls of the samples cover nothing
    ref = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    samples = torch.tensor([[2.5], [100.0], [200.0], [400.0]])
    assert precision_recall(ref, samples, k=1)[0] == 0.25
    assert precision_recall(ref, torch.tensor([[5.0], [7.0], [9.0]]), k=1) == (1 / 3, 2 / 5)  # on the border counts
    with pytest.raises(ValueError, match="3 neighbours"):
        precision_recall(x[:3], x)
    with pytest.raises(ValueError, match="features are"):
        precision_recall(x, x[:, :3])


def test_inception_score():
    probs = torch.randn(25, 7).mul(2).softmax(1)
    direct = []
    for part in (probs[:10], probs[10:20], probs[20:]):
        p = part.double().numpy()
        direct.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    assert inception_score(probs, 10) == pytest.approx(np.mean(direct), rel=1e-12)
    assert inception_score(torch.eye(6)) == pytest.approx(6) and inception_score(torch.ones(9, 4) / 4) == 1


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 1, 7, 19)])
def test_psnr_and_ssim_against_scikit_image(shape):
    metrics = pytest.importorskip("skimage.metrics", reason="the reference needs scikit-image")
    a = torch.rand(shape)
    b = (a + 0.2 * torch.randn(shape)).clamp(0, 1)
    for i in range(shape[0]):
        x, y = (t[i].permute(1, 2, 0).double().numpy() for t in (a, b))
        assert psnr(a, b)[i].item() == pytest.approx(metrics.peak_signal_noise_ratio(x, y, data_range=1), rel=1e-6)
        for data_range in (1.0, 2.0):
            theirs = metrics.structural_similarity(x, y, data_range=data_range, channel_axis=2)
            assert ssim(a, b, data_range)[i].item() == pytest.approx(theirs, rel=1e-6)
    assert ssim(a, a).eq(1).all() and psnr(a, a).eq(120).all()
    with pytest.raises(ValueError, match="7 x 7"):
        ssim(a[..., :6], b[..., :6])


# Images

def test_folders_and_npz_are_read_alike(pictures, rows, network, tmp_path):
    model = Inception.from_pretrained(network).to(CPU)
    images = Images(pictures / "a")
    again = features(images, model, CPU, tmp_path, 7)
    assert relative(again, rows) < 1e-6 and images.n == 12 and images.shape == (40, 40, 3)
    model.forward = None  # what is kept is not computed again
    assert np.array_equal(features(images, model, CPU, tmp_path), again)
    with pytest.raises(TypeError):
        features(Images(pictures / "a.npz"), model, CPU, tmp_path)


def test_what_is_kept_is_of_the_files_as_they_were(pictures, network, tmp_path):
    model, folder = Inception.from_pretrained(network).to(CPU), tmp_path / "a"
    folder.mkdir()
    for i in range(3):
        shutil.copy(pictures / "a" / f"{i:03}.png", folder)
    before = features(Images(folder), model, CPU, tmp_path)
    shutil.copy(folder / "001.png", folder / "000.png")  # the folder itself looks as before
    after = features(Images(folder), model, CPU, tmp_path)
    assert relative(after[0], before[1]) < 1e-6 < relative(after[0], before[0])


def gen(monkeypatch, network, samples, ref, out, *more):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "gen", "--samples", str(samples), "--ref", str(ref), "--inception",
                                      str(network), "--out", str(out), "--device", "cpu", *map(str, more)])
    evaluate.main()
    return json.loads(out.read_text())


def distance_of_few(a, b):
    """The Frechet distance of rows [N, F] and [M, F], far fewer than F: the root's trace is a nuclear norm [N, M]."""
    a, b = (torch.from_numpy(np.array(x)).double() for x in (a, b))
    x, y = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    root = torch.linalg.matrix_norm(x @ y.T, "nuc")
    return float((a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * root)


def test_gen(monkeypatch, network, pictures, rows, tmp_path, capsys):
    """Against itself, against stored statistics, and against statistics with images for precision and recall alone."""
    result = gen(monkeypatch, network, pictures / "a.npz", pictures / "a", tmp_path / "a.json", "--cache", tmp_path)
    assert abs(result["fid"]) < 1e-3 and result["precision"] == result["recall"] == 1 and result["images"] == 12
    assert "sha256 " in result["network"] and str(pictures / "a") == result["reference"]
    assert "pt_inception" in capsys.readouterr().out
    (mu, sigma), (mu_s, sigma_s) = statistics(rows[:5, :2048]), statistics(rows[:5, 2048:])
    stored = dict(mu=mu.numpy(), sigma=sigma.numpy(), mu_s=mu_s.numpy(), sigma_s=sigma_s.numpy())
    np.savez(tmp_path / "both.npz", **stored, arr_0=np.load(pictures / "a.npz")["arr_0"][5:10])
    where = tmp_path / "both.npz", tmp_path / "b.json", "--cache", tmp_path
    both = gen(monkeypatch, network, pictures / "a.npz", *where)
    assert both["fid"] == pytest.approx(distance_of_few(rows[:, :2048], rows[:5, :2048]), rel=1e-6)
    assert both["sfid"] == pytest.approx(distance_of_few(rows[:, 2048:], rows[:5, 2048:]), rel=1e-6)
    assert both["reference_images"] == 5 and both["recall"] == 1 and both["fid"] > 0.1 and both["sfid"] > 0.1
    expected = precision_recall(torch.from_numpy(rows[5:10, :2048]), torch.from_numpy(rows[:, :2048]))
    assert (both["precision"], both["recall"]) == expected
    np.savez(tmp_path / "stored.npz", mu=stored["mu"], sigma=stored["sigma"])
    where = tmp_path / "stored.npz", tmp_path / "c.json", "--cache", tmp_path
    alone = gen(monkeypatch, network, pictures / "a.npz", *where)
    assert alone["fid"] == both["fid"] and alone["sfid"] is None and "precision" not in alone
    probs = Inception.from_pretrained(network).probabilities(torch.from_numpy(rows[:, :2048]))
    assert alone["inception_score"] == pytest.approx(inception_score(probs.detach()), rel=1e-6)


def test_scores_of_a_folder_are_of_all_its_classes(monkeypatch, network, pictures, rows, tmp_path):
    """Splits are of neighbours: an npz keeps its order, a folder's names may say one class after another."""
    seen = []
    monkeypatch.setattr(evaluate, "features", lambda *_: rows)
    monkeypatch.setattr(evaluate, "frechet_distance", lambda *_: 0.0)
    monkeypatch.setattr(evaluate, "inception_score", lambda probs: seen.append(probs) or 1.0)
    for kind in ("a.npz", "a", "a"):
        gen(monkeypatch, network, pictures / kind, pictures / "a.npz", tmp_path / "a.json")
    in_order, *shuffled = (probs[:, 0].tolist() for probs in seen)
    assert shuffled[0] == shuffled[1] != in_order and sorted(shuffled[0]) == sorted(in_order)


def test_self_check(monkeypatch, tmp_path, capsys):
    published = {name: value for name, (value, _) in evaluate.SELF_CHECK.items()}
    command = ["evaluate.py", "self-check", "--val", "v", "--ref", "r", "--out", str(tmp_path / "s.json")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(evaluate, "compare", lambda val, ref, _args: dict(published, samples=str(val), sfid=3.72))
    evaluate.main()
    assert capsys.readouterr().out.count("pass (within") == 5
    for wrong in (dict(fid=1.72), dict(sfid=None), dict(recall=0.66)):
        monkeypatch.setattr(evaluate, "compare", lambda *_, wrong=wrong: published | wrong)
        with pytest.raises(ValueError, match="not the published ones"):
            evaluate.main()
        assert capsys.readouterr().out.count("FAIL (within") == 1
    assert json.loads((tmp_path / "s.json").read_text())["recall is 0.671"] == "FAIL (within 0.005)"


def as_processes(count, target, codes=0):
    """target() in `count` processes, as torchrun starts them; all end with this exit code."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def one(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost",
                          MASTER_PORT=port)
        target()

    started = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in range(count)]
    for p in started:
        p.start()
    for p in started:
        p.join(300)
    found = [p.exitcode for p in started]
    for p in started:
        p.kill()
    assert found == [codes] * count


@pytest.mark.parametrize("kind", ["a.npz", "a"])
def test_two_processes_fill_one_table(network, pictures, rows, tmp_path, kind):
    """12 images in batches of 5: one process has two of the batches, the other one."""
    def process():
        with processes("cpu", gradients=False) as (device, *_):
            features(Images(pictures / kind), Inception.from_pretrained(network).to(CPU), device, tmp_path, 5)

    as_processes(2, process)
    (path,) = tmp_path.iterdir()
    assert relative(np.load(path), rows) < 1e-6


# Reconstructions, codes, likelihoods

@pytest.fixture
def run_dir(tmp_path):
    torch.manual_seed(0)
    vq, gpt = small_vq(), small_gpt(num_classes=10)
    save_file(tmp_path / "vq.pt", vq.checkpoint())
    meta = dict(tokenizer=str(tmp_path / "vq.pt"), tokenizer_sha256=file_sha256(tmp_path / "vq.pt"), notice="",
                class_names=[f"c{i}" for i in range(10)], augmentations=["center", "other"],
                image_size=[4, 8], data="none", split="val")
    save_file(tmp_path / "gpt.pt", dict(gpt.checkpoint(), codes=meta))
    rng = np.random.default_rng(0)
    with CodeWriter(tmp_path / "codes", (2, 4), 16, meta) as writer:
        writer.write(torch.from_numpy(rng.integers(0, 16, (45, 2, 8))), torch.from_numpy(rng.integers(0, 4, 45)))
    return tmp_path


def call(monkeypatch, command, *options):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", command, "--device", "cpu", *map(str, options)])
    evaluate.main()


def test_likelihood(monkeypatch, run_dir):
    call(monkeypatch, "likelihood", "--gpt", run_dir / "gpt.pt", "--codes", run_dir / "codes", "--batch-size", 7)
    result = json.loads((run_dir / "gpt.pt.likelihood.json").read_text())
    model, codes = small_gpt(num_classes=10), evaluate.CodeFile(run_dir / "codes")
    tokens, labels = torch.from_numpy(codes.codes[:, 0].astype(np.int64)), torch.from_numpy(codes.labels)
    with torch.no_grad():
        logits, loss = model(tokens[:, :-1], labels)[0], model(tokens[:, :-1], labels, targets=tokens)[1]
        third = model(tokens[labels == 2][:, :-1], labels[labels == 2], targets=tokens[labels == 2])[1]
    assert result["nats_per_token"] == pytest.approx(float(loss), rel=1e-5) and result["images"] == 45
    assert result["bits_per_token"] == pytest.approx(float(loss) / np.log(2), rel=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(float(loss)), rel=1e-5)
    assert result["top_1"] == pytest.approx(float((logits.argmax(-1) == tokens).float().mean()), rel=1e-5)
    assert set(result["nats_per_class"]) == {"c0", "c1", "c2", "c3"}
    assert result["nats_per_class"]["c2"] == pytest.approx(float(third), rel=1e-5)
    one = dict(result)
    as_processes(2, lambda: call(monkeypatch, "likelihood", "--gpt", run_dir / "gpt.pt", "--codes", run_dir / "codes",
                                 "--batch-size", 4))
    two = json.loads((run_dir / "gpt.pt.likelihood.json").read_text())
    assert two["images"] == 45 and two["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-9)


def test_codes(monkeypatch, run_dir, capsys):
    """The page is of stored codes as they stand, one crop of each image, now the one and now the other."""
    shown = []
    monkeypatch.setattr(evaluate, "decode", lambda vq, tokens: shown.append(tokens) or sample.decode(vq, tokens))
    call(monkeypatch, "codes", "--codes", run_dir / "codes", "--out", run_dir / "out")
    result = json.loads((run_dir / "out" / "codes.json").read_text())
    codes = evaluate.CodeFile(run_dir / "codes")
    assert result["counts"] == np.bincount(codes.codes.flatten(), minlength=16).tolist()
    assert "counts" not in capsys.readouterr().out and (run_dir / "out" / "codes.png").exists()
    same = (shown[0].flatten(1).numpy()[:, None] == codes.codes).all(-1)  # 45 images, 2 crops
    assert (same.sum(1) == 1).all() and 0 < same[:, 0].sum() < 45


def test_recon(monkeypatch, run_dir, network):
    """On the held-out digits, without and with the network, in one process and in two."""
    def missing():
        raise FileNotFoundError("no VGG here")

    monkeypatch.setattr(evaluate, "LPIPS", missing)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(run_dir))
    common = ("--vq", run_dir / "vq.pt", "--data", "digits", "--size", 8)
    call(monkeypatch, "recon", *common, "--out", run_dir / "one")
    result = json.loads((run_dir / "one" / "recon.json").read_text())
    assert "no VGG here" in result["lpips"] and f"fetch {FILES[0]} (91 MiB) from https" in result["rfid"]
    with pytest.raises(FileNotFoundError, match="typo.pth is not there: fetch"):  # which was asked for
        call(monkeypatch, "recon", *common, "--out", run_dir / "one", "--inception", run_dir / "typo.pth")
    images = load_images("digits", 8)[1]
    x = torch.cat([batch for batch, *_ in evaluate.eval_batches(images, 8, 64)])
    with torch.no_grad():
        y, codes = evaluate.reconstruct(small_vq(), x)
    assert result["images"] == len(x) == 180
    assert result["psnr"] == pytest.approx(float(psnr(x / 2 + 0.5, y / 255).mean()), rel=1e-5)
    assert result["ssim"] == pytest.approx(float(ssim(x / 2 + 0.5, y / 255).mean()), rel=1e-4)
    assert result["ssim_as_llamagen"] == pytest.approx(float(ssim(x / 2 + 0.5, y / 255, 2.0).mean()), rel=1e-4)
    assert result["codes_used"] == len(codes.unique()) / 16 == result["codes_used_of_last_65536"]
    as_processes(2, lambda: call(monkeypatch, "recon", *common, "--out", run_dir / "two", "--batch-size", 7))
    two = json.loads((run_dir / "two" / "recon.json").read_text())
    for name in ("psnr", "ssim", "ssim_as_llamagen", "codes_used", "perplexity", "images"):
        assert two[name] == pytest.approx(result[name], rel=1e-5, abs=1e-6)  # SSIM is near 0 here
    assert (run_dir / "two" / "recon.png").read_bytes() == (run_dir / "one" / "recon.png").read_bytes()

    for folder, n in (("d", 4), ("v", 3)):
        (run_dir / folder).mkdir()
        for i in range(n):
            Image.new("RGB", (9, 9), (50 * i, 0, 0)).save(run_dir / folder / f"{i}.png")
    (run_dir / "v" / "broken.png").write_text("no picture")
    own = "--vq", run_dir / "vq.pt", "--data", run_dir / "d", "--val-data", run_dir / "v", "--size", 8, "--out", run_dir
    with pytest.raises(ValueError, match=r"1 of 4 .25.0%. have no usable"):
        call(monkeypatch, "recon", *own)
    call(monkeypatch, "recon", *own, "--bad-share", 0.3)
    result = json.loads((run_dir / "recon.json").read_text())
    assert result["data"] == str(run_dir / "v") and result["images"] == 3

    full = evaluate.load_images("digits", 32)
    monkeypatch.setattr(evaluate, "load_images", lambda *_, **__: [part.subset(range(6)) for part in full])
    monkeypatch.setattr(evaluate, "LPIPS", lambda: losses.LPIPS(random_weights=True))
    call(monkeypatch, "recon", *common[:4], "--size", 32, "--out", run_dir / "all", "--inception", network)
    result = json.loads((run_dir / "all" / "recon.json").read_text())
    assert result["rfid"] > 0 and result["lpips"] > 0 and "sha256" in result["network"]
    with Image.open(run_dir / "all" / "recon.png") as sheet:
        assert sheet.size == (6 * 100 + 4, 6 * 116 + 4)


@pytest.mark.parametrize("broken", "01")
def test_an_error_in_one_process_ends_the_other(monkeypatch, run_dir, broken):
    """Which would wait for it for a day."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(run_dir))  # no network's weights

    def process():
        if os.environ["RANK"] == broken:
            monkeypatch.setattr(evaluate, "psnr", lambda *_: 1 / 0)
        call(monkeypatch, "recon", "--vq", run_dir / "vq.pt", "--data", "digits", "--size", 8, "--out", run_dir / "out")

    as_processes(2, process, codes=1)
    assert not list((run_dir / "out").iterdir())


def test_unreadable_images_of_all_processes_count(monkeypatch, run_dir, tmp_path):
    """Three of 200 are more than 1%, if two and one of two processes."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(run_dir))
    for split, n in (("train", 1), ("val", 200)):
        (tmp_path / split).mkdir()
        for i in range(n):
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / split / f"{i:03}.png")
    options = "recon", "--vq", run_dir / "vq.pt", "--data", tmp_path, "--size", 8, "--out", tmp_path / "out"
    for bad, code in ((2, 0), (3, 1)):
        (tmp_path / "val" / f"{bad - 1:03}.png").write_text("no picture")
        (tmp_path / "val" / "000.png").write_text("no picture")
        as_processes(2, lambda: call(monkeypatch, *options), codes=code)
    assert json.loads((tmp_path / "out" / "recon.json").read_text())["images"] == 198


# Bad input

def fails(monkeypatch, capsys, command, *options):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", command, "--device", "cpu", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        cli(evaluate.main)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("evaluate.py: error: "), error
    return error


def test_no_room_for_features(monkeypatch, capsys, network, pictures, tmp_path):
    """Asked for before they are computed: a memory map that finds no room kills the process."""
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    error = fails(monkeypatch, capsys, "gen", "--samples", pictures / "a.npz", "--ref", pictures / "a.npz",
                  "--inception", network, "--cache", tmp_path)
    assert re.search(f"error: {tmp_path}/.*: no room for .* MB of features: TMPDIR or --cache say where", error)


def test_a_damaged_picture_is_named(pictures, tmp_path):
    for i, image in enumerate(np.load(pictures / "a.npz")["arr_0"][:3]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:99])
    with pytest.raises(ValueError, match=f"{tmp_path}/1.png cannot be read .*trunc"):
        list(Images(tmp_path).batches(3))
    (tmp_path / "0.png").write_text("no picture")
    with pytest.raises(ValueError, match=f"{tmp_path}/0.png cannot be read"):
        Images(tmp_path)


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path, image = tmp_path / "a.png", Image.new("RGB", (3, 3), "red")
    save_picture(path, image)
    before = path.read_bytes()

    def full(self, file, *_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=f"{path} could not be written: .*No space left"):
        save_picture(path, image)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_bad_samples(monkeypatch, capsys, network, pictures, tmp_path):
    good = np.load(pictures / "a.npz")["arr_0"][:4]
    np.savez(tmp_path / "float.npz", good / 255)
    np.savez(tmp_path / "grey.npz", good[..., :1])
    np.savez(tmp_path / "small.npz", good[:, :20])
    np.savez(tmp_path / "names.npz", images=good)
    np.savez(tmp_path / "one.npz", good[:1])
    np.savez(tmp_path / "black.npz", np.zeros_like(good))
    (tmp_path / "text.npz").write_text("no npz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    for i, image in enumerate((good[0], good[1][:20])):
        Image.fromarray(image).save(tmp_path / "sizes" / f"{i}.png")
    for name, message in (
        ("float.npz", "arr_0 is float64 .*, not uint8 images"), ("grey.npz", "not uint8 images"),
        ("names.npz", "holds no arr_0"), ("one.npz", "holds 1 image: statistics need two"),
        ("black.npz", r"same features \(all black\?\)"), ("text.npz", "not a readable npz"), ("none.npz", "no such"),
        ("empty", "holds no images"), ("sizes", "1.png is 40 x 20 pixels, 0.png 40 x"),
        ("small.npz", "the samples are 40 x 20 pixels, those of .*a.npz 40 x 40: they have to be alike"),
    ):
        where = "--inception", network, "--out", tmp_path / "out.json", "--cache", tmp_path / "cache"
        error = fails(monkeypatch, capsys, "gen", "--samples", tmp_path / name, "--ref", pictures / "a.npz", *where)
        assert re.search(message, error), error
    assert not (tmp_path / "out.json").exists() and not list((tmp_path / "cache").glob("sizes-*.npy"))


def test_bad_references_and_networks(monkeypatch, capsys, network, pictures, tmp_path):
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(768), sigma=np.eye(768))
    np.savez(tmp_path / "neither.npz", mean=np.zeros(768))
    np.savez(tmp_path / "half.npz", mu=np.zeros(2048))  # without its sigma
    broken = torch.load(network)
    broken["Mixed_7c.branch1x1.bn.bias"] = broken["Mixed_7c.branch1x1.bn.bias"] * torch.nan
    torch.save(broken, tmp_path / "nan.pth")
    del broken["fc.weight"]
    torch.save(broken, tmp_path / "short.pth")
    for ref, weights, message in (
        ("narrow.npz", network, "different features"), ("neither.npz", network, "neither statistics .* nor images"),
        ("half.npz", network, "neither statistics .* nor images"),
        (pictures / "a.npz", tmp_path / "nan.pth", "a.npz: features are not finite"),
        (pictures / "a.npz", tmp_path / "short.pth", "missing fc.weight"),
        (pictures / "a.npz", tmp_path / "none.pth", r"none.pth is not there: fetch .*pth \(91 MiB\) from https"),
    ):
        error = fails(monkeypatch, capsys, "gen", "--samples", pictures / "a.npz", "--ref", tmp_path / ref,
                      "--inception", weights, "--out", tmp_path / "out.json", "--cache", tmp_path)
        assert re.search(message, error), error
    assert not (tmp_path / "out.json").exists()


def test_bad_codes(monkeypatch, capsys, run_dir):
    save_file(run_dir / "other.pt", small_gpt(vocab_size=17).checkpoint())
    save_file(run_dir / "few.pt", small_gpt().checkpoint())
    for gpt, message in (("other.pt", "has 17 codes and reads class; .* has 16"), ("few.pt", "has 3 classes, .* 10")):
        error = fails(monkeypatch, capsys, "likelihood", "--gpt", run_dir / gpt, "--codes", run_dir / "codes")
        assert re.search(message, error), error
    codes = torch.load(run_dir / "gpt.pt")["codes"]
    for name, other in (("class_names", [f"c{i}" for i in range(1, 11)]), ("grid", [4, 2])):
        save_file(run_dir / "other.pt", dict(small_gpt(num_classes=10).checkpoint(), codes=codes | {name: other}))
        error = fails(monkeypatch, capsys, "likelihood", "--gpt", run_dir / "other.pt", "--codes", run_dir / "codes")
        assert f"has the {name} " in error, error
    save_file(run_dir / "vq2.pt", dict(small_vq().checkpoint(), more=1))
    for vq, message in (("vq2.pt", "tokenizer_sha256"), ("no.pt", "give it with --vq")):
        where = "--codes", run_dir / "codes", "--vq", run_dir / vq, "--out", run_dir
        assert message in fails(monkeypatch, capsys, "codes", *where)
