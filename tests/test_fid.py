"""fid.py against closed forms, brute force and plain numpy versions of ADM's evaluator."""

import io
import itertools
import json
import math
import re
import tracemalloc
import urllib.error
import zipfile
from pathlib import Path
from typing import Dict, Optional, Tuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, cli, process
from PIL import Image
from scipy import linalg
from torch import nn

import fid
from fid import InceptionV3, frechet_distance, inception_score, precision_recall, resize_bilinear

METRICS = ["FID", "sFID", "IS", "Precision", "Recall"]

# ---- Inception: names and shapes of the released weights' convolutions, as torchvision spells them
CONVOLUTIONS = """
Conv2d_1a_3x3: 32x3x3x3
Conv2d_2a_3x3: 32x32x3x3
Conv2d_2b_3x3: 64x32x3x3
Conv2d_3b_1x1: 80x64x1x1
Conv2d_4a_3x3: 192x80x3x3
Mixed_5b: branch1x1 64x192x1x1, branch5x5_1 48x192x1x1, branch5x5_2 64x48x5x5, branch3x3dbl_1 64x192x1x1,
    branch3x3dbl_2 96x64x3x3, branch3x3dbl_3 96x96x3x3, branch_pool 32x192x1x1
Mixed_5c: branch1x1 64x256x1x1, branch5x5_1 48x256x1x1, branch5x5_2 64x48x5x5, branch3x3dbl_1 64x256x1x1,
    branch3x3dbl_2 96x64x3x3, branch3x3dbl_3 96x96x3x3, branch_pool 64x256x1x1
Mixed_5d: branch1x1 64x288x1x1, branch5x5_1 48x288x1x1, branch5x5_2 64x48x5x5, branch3x3dbl_1 64x288x1x1,
    branch3x3dbl_2 96x64x3x3, branch3x3dbl_3 96x96x3x3, branch_pool 64x288x1x1
Mixed_6a: branch3x3 384x288x3x3, branch3x3dbl_1 64x288x1x1, branch3x3dbl_2 96x64x3x3, branch3x3dbl_3 96x96x3x3
Mixed_6b: branch1x1 192x768x1x1, branch7x7_1 128x768x1x1, branch7x7_2 128x128x1x7, branch7x7_3 192x128x7x1,
    branch7x7dbl_1 128x768x1x1, branch7x7dbl_2 128x128x7x1, branch7x7dbl_3 128x128x1x7, branch7x7dbl_4 128x128x7x1,
    branch7x7dbl_5 192x128x1x7, branch_pool 192x768x1x1
Mixed_6c: branch1x1 192x768x1x1, branch7x7_1 160x768x1x1, branch7x7_2 160x160x1x7, branch7x7_3 192x160x7x1,
    branch7x7dbl_1 160x768x1x1, branch7x7dbl_2 160x160x7x1, branch7x7dbl_3 160x160x1x7, branch7x7dbl_4 160x160x7x1,
    branch7x7dbl_5 192x160x1x7, branch_pool 192x768x1x1
Mixed_6d: branch1x1 192x768x1x1, branch7x7_1 160x768x1x1, branch7x7_2 160x160x1x7, branch7x7_3 192x160x7x1,
    branch7x7dbl_1 160x768x1x1, branch7x7dbl_2 160x160x7x1, branch7x7dbl_3 160x160x1x7, branch7x7dbl_4 160x160x7x1,
    branch7x7dbl_5 192x160x1x7, branch_pool 192x768x1x1
Mixed_6e: branch1x1 192x768x1x1, branch7x7_1 192x768x1x1, branch7x7_2 192x192x1x7, branch7x7_3 192x192x7x1,
    branch7x7dbl_1 192x768x1x1, branch7x7dbl_2 192x192x7x1, branch7x7dbl_3 192x192x1x7, branch7x7dbl_4 192x192x7x1,
    branch7x7dbl_5 192x192x1x7, branch_pool 192x768x1x1
Mixed_7a: branch3x3_1 192x768x1x1, branch3x3_2 320x192x3x3, branch7x7x3_1 192x768x1x1, branch7x7x3_2 192x192x1x7,
    branch7x7x3_3 192x192x7x1, branch7x7x3_4 192x192x3x3
Mixed_7b: branch1x1 320x1280x1x1, branch3x3_1 384x1280x1x1, branch3x3_2a 384x384x1x3, branch3x3_2b 384x384x3x1,
    branch3x3dbl_1 448x1280x1x1, branch3x3dbl_2 384x448x3x3, branch3x3dbl_3a 384x384x1x3, branch3x3dbl_3b 384x384x3x1,
    branch_pool 192x1280x1x1
Mixed_7c: branch1x1 320x2048x1x1, branch3x3_1 384x2048x1x1, branch3x3_2a 384x384x1x3, branch3x3_2b 384x384x3x1,
    branch3x3dbl_1 448x2048x1x1, branch3x3dbl_2 384x448x3x3, branch3x3dbl_3a 384x384x1x3, branch3x3dbl_3b 384x384x3x1,
    branch_pool 192x2048x1x1
"""


def released_shapes():
    """Name -> shape of the 472 tensors of the released file."""
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for block, convs in re.findall(r"^(\w+): ((?:.|\n    )*)$", CONVOLUTIONS, re.M):
        for conv in convs.replace("\n", "").split(","):
            *name, shape = conv.split()
            path, shape = ".".join([block, *name]), tuple(map(int, shape.split("x")))
            shapes[f"{path}.conv.weight"] = shape
            shapes.update({f"{path}.bn.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")})
    return shapes


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Random weights in the released file's format: an OrderedDict's legacy pickle, without num_batches_tracked."""
    state = {}
    for i, (name, shape) in enumerate(sorted(released_shapes().items())):
        random = np.random.RandomState(i)  # its streams are frozen for good
        if name.endswith("conv.weight"):
            value = random.standard_normal(shape) * math.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            value = random.uniform(0.5, 1.5, shape)
        else:
            value = random.standard_normal(shape) * (0.002 if name == "fc.weight" else 0.1)
        state[name] = torch.from_numpy(value.astype(np.float32))
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="session")
def inception(weights):
    network = InceptionV3().eval().requires_grad_(False)
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network


def test_state_dict_has_the_released_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in InceptionV3().state_dict().items()}
    assert len(shapes) == 472
    assert shapes == released_shapes()


def test_state_dict_may_hold_num_batches_tracked_but_nothing_else(inception):
    state = inception.state_dict()
    inception.load_state_dict({**state, "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)})
    for wrong in ({**state, "AuxLogits.fc.bias": torch.zeros(1008)}, dict(list(state.items())[1:])):
        with pytest.raises(RuntimeError):
            inception.load_state_dict(wrong)


def test_inception_gives_the_reference_networks_numbers(inception):
    """Expected: torchvision's Inception3 with pytorch-fid's patches, in float64, of these weights and a resize written as loops."""
    x = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 64, 64)))
    pool, spatial, probabilities = inception(x.to(torch.uint8))
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023) and probabilities.shape == (2, 1008)
    assert pool[1, [0, 1, 2047]].tolist() == pytest.approx([0.360482, 0.0869078, 0.543508], rel=2e-4)
    assert [pool.mean().item(), pool.std().item()] == pytest.approx([9.04595, 12.65094], rel=1e-4)
    assert spatial[1, [0, 1, 700, 2022]].tolist() == pytest.approx([0, 0, 7.91232, 2.91032], rel=2e-4)
    assert [spatial.mean().item(), spatial.std().item()] == pytest.approx([3.69254, 4.81730], rel=1e-4)
    assert probabilities[1, [0, 1, 700, 1007]].tolist() == pytest.approx([1.341658e-4, 7.193221e-4, 1.043184e-4, 1.105524e-3], rel=1e-3)
    assert probabilities.sum(1).tolist() == pytest.approx([1, 1])
    for from_bytes, from_floats in zip((pool, spatial, probabilities), inception(x.float())):
        assert torch.equal(from_bytes, from_floats)


def test_pooling_branches_differ_from_torchvisions(inception):
    """Averages leave the padding out, in every block that has one; Mixed_7c takes the maximum."""
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        block = getattr(inception, f"Mixed_{name}")
        width = block.branch_pool.conv.in_channels
        branch, block.branch_pool = block.branch_pool, nn.Identity()
        x = torch.rand(1, width, 5, 4)
        pooled = block(x)[:, -width:]
        block.branch_pool = branch
        for i, j in itertools.product(range(5), range(4)):
            window = x[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            expected = window.amax((2, 3)) if name == "7c" else window.mean((2, 3))
            torch.testing.assert_close(pooled[:, :, i, j], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_inception_on_cuda_equals_cpu(inception, weights):
    """Within what float32 allows: TF32 would be off by a hundred times more."""
    x = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    network, _ = fid.load_network(weights, None, torch.device("cuda"))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        for there, here in zip(network(x.cuda()), inception(x)):
            torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_precision_recall_on_cuda_equals_cpu():
    x, y = torch.rand(500, 64), torch.rand(400, 64) * 1.05
    assert precision_recall(x.cuda(), y.cuda(), block=150) == pytest.approx(precision_recall(x, y), abs=0.01)


# ---- resize
def test_resize_by_hand():
    x = torch.tensor([[[[0.0, 10.0], [20.0, 30.0]]]])
    assert resize_bilinear(x, 4).tolist() == [[[[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]]]]
    assert resize_bilinear(torch.arange(12.0).reshape(1, 1, 2, 6), 2).tolist() == [[[[0, 3], [6, 9]]]]  # down: no antialias
    assert resize_bilinear(torch.tensor([[[[0.0, 10.0, 40.0]]]]), 2).tolist() == [[[[0, 25], [0, 25]]]]  # source 1.5 lies between


@pytest.mark.parametrize("height, width", [(299, 299), (256, 256), (512, 300), (1, 7)])
def test_resize_to_299(height, width):
    x = np.random.RandomState(0).randint(0, 256, (2, 3, height, width))
    expected = np.empty((2, 3, 299, 299))
    rows, columns = ([np.float32(i) * (np.float32(n) / np.float32(299)) for i in range(299)] for n in (height, width))
    for (i, r), (j, c) in itertools.product(enumerate(rows), enumerate(columns)):
        a, b = min(int(r), height - 1), min(int(c), width - 1)
        a_next, b_next = min(a + 1, height - 1), min(b + 1, width - 1)
        top = x[:, :, a, b] + (x[:, :, a, b_next] - x[:, :, a, b]) * (float(c) - b)
        bottom = x[:, :, a_next, b] + (x[:, :, a_next, b_next] - x[:, :, a_next, b]) * (float(c) - b)
        expected[:, :, i, j] = top + (bottom - top) * (float(r) - a)
    out = resize_bilinear(torch.from_numpy(x).float())
    np.testing.assert_allclose(out, expected, atol=1e-3)
    assert (height, width) != (299, 299) or np.array_equal(out, x)


# ---- Frechet distance
def test_frechet_distance_in_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 16.0])
    rotation = linalg.qr(np.random.RandomState(0).standard_normal((3, 3)))[0]
    turn = lambda variances: rotation @ np.diag(variances) @ rotation.T  # noqa: E731  commuting covariances
    assert frechet_distance([0.0], [[4.0]], [3.0], [[25.0]]) == pytest.approx(9 + (5 - 2) ** 2)
    assert frechet_distance([1, 2, 3], turn(a), [1, 0, 3], turn(b)) == pytest.approx(4 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())
    assert frechet_distance([1, 2, 3], turn(a), [1, 2, 3], turn(a)) == pytest.approx(0, abs=1e-12)
    assert isinstance(frechet_distance([0.0], [[1.0]], [0.0], [[1.0]]), float)


def adm_frechet(x, y):
    """ADM's and TTUR's formula, from features."""
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(s1 @ s2)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real


def statistics(x):
    return x.mean(0), np.cov(x, rowvar=False)


def test_frechet_distance_equals_sqrtm():
    random = np.random.RandomState(0)
    x, y = random.standard_normal((500, 60)) @ random.standard_normal((60, 60)), random.standard_normal((400, 60)) + 0.3
    assert frechet_distance(*statistics(x), *statistics(y)) == pytest.approx(adm_frechet(x, y), rel=1e-9)


def test_frechet_distance_of_rank_deficient_sets():
    """With fewer points than dimensions; exact where one set is the other, scaled, turned out of its subspace or a single point."""
    x = np.random.RandomState(0).standard_normal((20, 80))
    mu, sigma = statistics(x)
    assert frechet_distance(mu, sigma, mu, 9 * sigma) == pytest.approx((3 - 1) ** 2 * np.trace(sigma), rel=1e-6)
    assert frechet_distance(mu, sigma, mu + 1, 0 * sigma) == pytest.approx(80 + np.trace(sigma), rel=1e-9)
    first, last = np.diag(np.r_[np.ones(3), np.zeros(5)]), np.diag(np.r_[np.zeros(5), np.ones(3)])
    assert frechet_distance(np.zeros(8), first, np.zeros(8), last) == pytest.approx(6, rel=1e-6)
    y = np.random.RandomState(1).standard_normal((30, 80)) * 1.5
    assert frechet_distance(mu, sigma, *statistics(y)) == pytest.approx(adm_frechet(x, y), rel=1e-4)


# ---- Inception Score
def test_inception_score_of_known_distributions():
    assert inception_score(np.full((100, 7), 1 / 7, np.float32)) == pytest.approx(1)
    one_hot = np.eye(4, dtype=np.float32)[np.arange(100) % 4]  # 0 log 0 = 0
    assert inception_score(one_hot) == pytest.approx(4)
    p = np.array([[0.5, 0.5, 0], [0, 0.25, 0.75]])
    marginal = p.mean(0)
    kl = [sum(q * math.log(q / m) for q, m in zip(row, marginal) if q) for row in p]
    assert inception_score(torch.tensor(p)) == pytest.approx(math.exp(sum(kl) / 2))


def test_inception_score_takes_chunks_in_file_order():
    classes = np.r_[np.arange(5000) % 4, np.zeros(10, int)]
    p = np.eye(4, dtype=np.float32)[classes]
    assert inception_score(p) == pytest.approx((4 + 1) / 2)  # the short chunk counts as much as the long one
    assert inception_score(np.eye(4, dtype=np.float32)[np.sort(np.arange(400) % 4)], split_size=100) == pytest.approx(1)  # never shuffled


# ---- precision and recall
def brute_precision_recall(reference, samples, k=3):
    """The definition in loops; exact for small whole numbers, whose distances float16 holds exactly."""
    distance = lambda u, v: ((u.astype(np.float64) - v) ** 2).sum()  # noqa: E731
    reference_radii, sample_radii = ([sorted(distance(u, v) for v in x)[k] for u in x] for x in (reference, samples))
    precise = [any(distance(u, v) <= r for v, r in zip(reference, reference_radii)) for u in samples]
    covered = [any(distance(u, v) <= r for v, r in zip(samples, sample_radii)) for u in reference]
    return np.mean(precise), np.mean(covered)


@pytest.mark.parametrize("block", [7, 16, 10_000])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_by_brute_force_with_ties(block, k):
    random = np.random.RandomState(k)
    reference, samples = random.randint(0, 6, (40, 3)), random.randint(2, 10, (33, 3))  # a small grid: many equal distances
    expected = brute_precision_recall(reference, samples, k)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1 and expected[0] != expected[1]
    assert precision_recall(reference, samples, k, block=block) == pytest.approx(expected, abs=1e-12)


def test_precision_recall_by_hand():
    line = np.arange(5.0)[:, None]  # 0 … 4: the third neighbours lie 3, 2, 2, 2, 3 away
    assert precision_recall(line, line) == (1, 1)
    assert precision_recall(line, np.array([[-3.0], [7.0], [7.1], [100.0]])) == (2 / 4, 1)  # on the ball's rim counts
    assert precision_recall(line, line + 1000) == (0, 0)
    with pytest.raises(ValueError):
        precision_recall(line[:3], line)


def test_precision_recall_rounds_as_adm_does():
    """ADM's distances in float16, in numpy; then numbers that float16 cannot hold, where ADM turns to float32."""
    random = np.random.RandomState(0)
    reference, samples = (np.abs(random.standard_normal((n, 200))).astype(np.float32) * scale for n, scale in ((300, 1), (350, 1.03)))

    def half_distances(u, v):
        u, v = u.astype(np.float16), v.astype(np.float16)
        norm_u, norm_v = ((x * x).astype(np.float32).sum(1).astype(np.float16) for x in (u, v))
        dot = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
        return np.maximum(norm_u[:, None] - 2 * dot + norm_v, 0).astype(np.float32)

    reference_radii, sample_radii = (np.partition(half_distances(x, x), 3, axis=1)[:, 3] for x in (reference, samples))
    distances = half_distances(reference, samples)
    expected = (distances <= reference_radii[:, None]).any(0).mean(), (distances <= sample_radii).any(1).mean()
    assert expected != pytest.approx(brute_precision_recall(reference[:80], samples[:80]), abs=1e-3)
    assert precision_recall(reference, samples) == pytest.approx(expected, abs=1e-12)

    grid, other = random.randint(0, 20, (40, 3)) * 100, random.randint(2, 25, (33, 3)) * 100  # squares up to 10^7, exact in float32
    assert precision_recall(grid, other) == pytest.approx(brute_precision_recall(grid, other), abs=1e-12)


# ---- the script, with a detector small enough to be computed again in numpy
class Tiny(nn.Module):
    """Means over a 4x4 grid of cells; images of sides divisible by 4."""

    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        n, c, h, w = images.shape
        cells = images.float().reshape(n, c, 4, h // 4, 4, w // 4).mean([3, 5])
        features = cells.flatten(1)
        return {"features": features, "spatial": cells[:, 0].flatten(1), "logits": features[:, :10] / 20}


class FeaturesOnly(nn.Module):
    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        return F.adaptive_avg_pool2d(images.float(), 4).flatten(1), None


class FeaturesAndLogits(nn.Module):
    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor]:
        features = F.adaptive_avg_pool2d(images.float(), 4).flatten(1)
        return features, None, features[:, :10] / 20


class Plain(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images.float(), 4).flatten(1)


class Broken(nn.Module):
    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        return {"features": images.float().flatten(1) / 0 * 0}


class Maps(nn.Module):
    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        return {"features": images.float()}


class Nameless(nn.Module):
    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        return {"pool": images.float().flatten(1)}


@pytest.fixture(scope="session")
def detectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    for kind in (Tiny, FeaturesOnly, FeaturesAndLogits, Plain, Broken, Maps, Nameless):
        torch.jit.script(kind()).save(folder / f"{kind.__name__}.pt")
    return folder


def tiny_in_numpy(images):
    """Tiny's features, spatial features and probabilities of images (N, H, W, 3)."""
    n, h, w, _ = images.shape
    cells = images.astype(np.float64).reshape(n, 4, h // 4, 4, w // 4, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    features = cells.reshape(n, 48)
    exponents = np.exp(features[:, :10] / 20)
    return features, cells[:, 0].reshape(n, 16), exponents / exponents.sum(1, keepdims=True)


def expected_metrics(reference, samples):
    (r, r_spatial, _), (s, s_spatial, p) = tiny_in_numpy(reference), tiny_in_numpy(samples)
    score = math.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    return {"FID": adm_frechet(r, s), "sFID": adm_frechet(r_spatial, s_spatial), "IS": score}


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """60 references and 50 samples, 24 x 24 x 3, and the samples in every form that fid.py reads."""
    root, random = tmp_path_factory.mktemp("sets"), np.random.RandomState(0)
    patterns = np.kron(random.uniform(-1, 1, (2, 3, 3, 3)), np.ones((1, 8, 8, 1)))  # two directions, so that neighbours exist
    latents = random.standard_normal((60, 2)) * 20, random.standard_normal((50, 2)) * 25 + 30
    reference, samples = ((128 + np.tensordot(x, patterns, 1) + random.standard_normal((len(x), 24, 24, 3)) * 20).clip(0, 255).astype(np.uint8)
                          for x in latents)
    np.savez(root / "reference.npz", arr_0=reference)
    np.savez(root / "samples.npz", arr_0=samples)
    np.savez_compressed(root / "compressed.npz", arr_0=samples)
    np.save(root / "samples.npy", samples)
    np.save(root / "floats.npy", samples.astype(np.float32))
    np.save(root / "ints.npy", samples.astype(">i8"))
    for name, images in (("samples", samples), ("reference", reference)):
        for i, image in enumerate(images):
            (root / name / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / name / f"class{i % 3}" / f"{i:03d}.png")
    return root, reference, samples


def evaluate(capsys, *args):
    """Run fid.py with --json: (metrics, everything that it wrote there, stdout, stderr)."""
    out = Path(args[0]).parent / "out.json"
    status, stdout, stderr = cli(capsys, "fid", *args, "--json", out, "--num-workers", 0)
    assert status == 0, stderr
    written = json.loads(out.read_text())
    return {name: written[name] for name in METRICS if name in written}, written, stdout, stderr


def test_script_equals_numpy(capsys, sets, detectors):
    root, reference, samples = sets
    metrics, written, stdout, stderr = evaluate(capsys, root / "samples.npz", "--ref", root / "reference.npz",
                                                "--detector", detectors / "Tiny.pt", "--batch-size", 7)
    expected = expected_metrics(reference, samples)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    features = [tiny_in_numpy(x)[0].astype(np.float32) for x in (reference, samples)]
    assert (metrics["Precision"], metrics["Recall"]) == pytest.approx(precision_recall(*features), abs=0.04)
    assert 0.1 < metrics["Precision"] < 0.9 and 0.1 < metrics["Recall"] < 0.9
    assert [name for name in METRICS if f"{name:<10} {metrics[name]:.4f}" in stdout] == METRICS
    assert "not ImageNet FID" in stdout and "Tiny.pt" in stdout  # nobody takes it for one
    assert written["samples"]["count"] == 50 and written["reference"]["count"] == 60 and written["feature_space"] != fid.ADM_INCEPTION
    assert "never with a paper's" in stderr and "never with a paper's" in " ".join(written["warnings"])


@pytest.mark.parametrize("form", ["samples", "samples.npy", "compressed.npz", "floats.npy", "ints.npy"])
def test_every_form_of_the_same_images_is_equal(capsys, sets, detectors, form):
    root, _, _ = sets
    options = ("--detector", detectors / "Tiny.pt", "--batch-size", 8)
    expected, *_ = evaluate(capsys, root / "samples.npz", "--ref", root / "reference.npz", *options)
    metrics, *_ = evaluate(capsys, root / form, "--ref", root / "reference.npz", *options)
    assert metrics == pytest.approx(expected, rel=1e-7)  # singular covariances: the last digits depend on the order of the sum
    metrics, *_ = evaluate(capsys, root / form, "--ref", root / "reference", *options)  # a folder as reference too
    assert metrics == pytest.approx(expected, rel=1e-7)


def test_a_folder_is_read_in_a_fixed_shuffled_order(sets):
    """So that chunks of the Inception Score do not hold one class folder each."""
    first, again = (fid.Images(sets[0] / "reference").files for _ in range(2))
    assert first == again and sorted(first) == sorted((sets[0] / "reference").glob("*/*.png"))
    assert len({file.parent.name for file in first[:15]}) == 3  # of 20 per folder


def test_two_processes_equal_one(capsys, sets, detectors, tmp_path):
    root, _, _ = sets
    options = ("--ref", root / "reference", "--detector", detectors / "Tiny.pt", "--batch-size", 8)
    expected, *_ = evaluate(capsys, root / "compressed.npz", *options)
    run = process("fid", root / "compressed.npz", *options, "--json", tmp_path / "two.json", "--cache", tmp_path, processes=2)
    two = json.loads((tmp_path / "two.json").read_text())
    assert {name: two[name] for name in expected} == pytest.approx(expected, rel=1e-7)
    assert len(list(tmp_path.glob("*.npz"))) == 2 and run.stdout.count("FID ") == 2  # FID and sFID: one table
    process("fid", "--save-stats", tmp_path / "two.npz", root / "samples", "--detector", detectors / "Tiny.pt", "--batch-size", 8, processes=2)
    with np.load(tmp_path / "two.npz") as stats:
        images = fid.Images(root / "samples")
        np.testing.assert_array_equal(stats["arr_0"], np.stack([images.read(i) for i in range(50)]))
        np.testing.assert_allclose(stats["sigma"], np.cov(tiny_in_numpy(stats["arr_0"])[0], rowvar=False), rtol=1e-5, atol=1e-2)


def test_inception_end_to_end(capsys, sets, weights, inception, tmp_path):
    """The script with Inception on 6 images, against its features put into plain numpy; and the reference it makes of them."""
    root, reference, samples = sets
    np.save(tmp_path / "reference.npy", reference[:5])
    np.save(tmp_path / "samples.npy", samples[:6])
    metrics, written, stdout, stderr = evaluate(capsys, tmp_path / "samples.npy", "--ref", tmp_path / "reference.npy", "--weights", weights)
    (r, r_spatial, _), (s, s_spatial, p) = (inception(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (reference[:5], samples[:6]))
    p, (precision, recall) = p.double().numpy(), precision_recall(r, s)
    for name, a, b in (("FID", r, s), ("sFID", r_spatial, s_spatial)):
        a, b = a.double().numpy(), b.double().numpy()
        mean_a, mean_b, spread = a.mean(0), b.mean(0), a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
        root = np.linalg.svd((a - mean_a) @ (b - mean_b).T / math.sqrt(4 * 5), compute_uv=False).sum()  # tr (S_a S_b)^1/2, from 5 x 6 numbers
        assert metrics[name] == pytest.approx(((mean_a - mean_b) ** 2).sum() + spread - 2 * root, rel=1e-5)
    assert metrics["IS"] == pytest.approx(math.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-6)
    assert (metrics["Precision"], metrics["Recall"]) == (precision, recall)
    assert "6 samples are too few for 2048 features" in stderr and "5 references are too few" in stderr
    assert written["feature_space"] != fid.ADM_INCEPTION and "not ADM's network" in stderr  # random weights

    status, _, stderr = cli(capsys, "fid", "--save-stats", tmp_path / "ref.npz", tmp_path / "reference.npy", "--weights", weights)
    assert status == 0, stderr
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as stats:  # as ADM's evaluator reads it
        assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} <= set(stats.files)
        assert stats["arr_0"].dtype == np.uint8 and np.array_equal(stats["arr_0"], reference[:5])
        np.testing.assert_allclose(stats["mu"], r.double().mean(0), atol=1e-4)
        np.testing.assert_allclose(stats["sigma_s"], np.cov(r_spatial.double(), rowvar=False), rtol=1e-3, atol=1e-3)
        assert stats["sigma"].shape == (2048, 2048) and stats["sigma"].dtype == np.float64


def test_saved_reference_stands_for_its_folder(capsys, sets, detectors, tmp_path, monkeypatch):
    """Also where it holds a part of the images only: statistics are of all, precision and recall of those drawn."""
    root, reference, _ = sets
    monkeypatch.setattr(fid, "DRAWN", 20)
    detector = ("--detector", detectors / "Tiny.pt")
    status, stdout, stderr = cli(capsys, "fid", "--save-stats", tmp_path / "ref.npz", root / "reference", *detector, "--num-workers", 0)
    assert status == 0 and "20 images, statistics of 60" in stdout, stderr
    with np.load(tmp_path / "ref.npz") as stats:
        drawn = {image.tobytes() for image in stats["arr_0"]}
        assert len(drawn) == 20 and drawn < {image.tobytes() for image in reference}
        np.testing.assert_allclose(stats["mu"], tiny_in_numpy(reference)[0].mean(0), rtol=1e-6)
    cli(capsys, "fid", "--save-stats", tmp_path / "of_array.npz", root / "reference.npz", *detector)
    with np.load(tmp_path / "of_array.npz") as stats:
        assert len(stats["arr_0"]) == 20 and not np.array_equal(stats["arr_0"], reference[:20])
    of_folder, *_ = evaluate(capsys, root / "samples.npz", "--ref", root / "reference", *detector)
    of_all, *_ = evaluate(capsys, root / "samples.npz", "--ref", root / "reference.npz", *detector)
    assert of_folder["FID"] == pytest.approx(of_all["FID"]) and of_folder["Precision"] != of_all["Precision"]
    of_file, written, stdout, stderr = evaluate(capsys, root / "samples.npz", "--ref", tmp_path / "ref.npz", *detector)
    assert of_file == pytest.approx(of_folder, rel=1e-7)
    assert written["reference"]["stored_statistics"] and "stored statistics" in stdout and "does not say" not in stderr

    status, _, stderr = cli(capsys, "fid", root / "samples.npz", "--ref", tmp_path / "ref.npz", "--detector", detectors / "Plain.pt")
    assert status == 2 and "not of detector" in stderr  # statistics of another network


def test_stored_statistics_are_used(capsys, sets, detectors, tmp_path):
    root, reference, samples = sets
    (r, _, _), (s, s_spatial, _) = tiny_in_numpy(reference), tiny_in_numpy(samples)
    mu, sigma = statistics(s)
    mu_s, sigma_s = statistics(s_spatial)
    stored = {"arr_0": reference, "mu": mu + 2, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s * 4}
    np.savez(tmp_path / "adm.npz", **stored)
    options = ("--detector", detectors / "Tiny.pt")
    plain, *_ = evaluate(capsys, root / "samples.npz", "--ref", root / "reference.npz", *options)
    metrics, _, _, stderr = evaluate(capsys, root / "samples.npz", "--ref", tmp_path / "adm.npz", *options)
    assert metrics["FID"] == pytest.approx(48 * 2**2, rel=1e-5)  # the samples' own Gaussian, moved by 2 in 48 directions
    assert metrics["sFID"] == pytest.approx(np.trace(sigma_s), rel=1e-5)  # (2 - 1)^2 tr
    assert (metrics["Precision"], metrics["Recall"]) == (plain["Precision"], plain["Recall"])  # these are of arr_0
    assert "does not say which network" in stderr

    np.savez(tmp_path / "no_spatial.npz", arr_0=reference, mu=mu, sigma=sigma)
    metrics, _, _, stderr = evaluate(capsys, root / "samples.npz", "--ref", tmp_path / "no_spatial.npz", *options)
    assert list(metrics) == ["FID", "IS", "Precision", "Recall"] and "sFID is left out" in stderr
    metrics, _, _, stderr = evaluate(capsys, tmp_path / "adm.npz", "--ref", root / "reference.npz", *options)  # of samples too, as ADM
    assert metrics["FID"] == pytest.approx(frechet_distance(mu + 2, sigma, *statistics(r)), rel=1e-6) and "replace those of its images" in stderr


@pytest.mark.parametrize("kind, metrics", [("FeaturesOnly", ["FID", "Precision", "Recall"]), ("Plain", ["FID", "Precision", "Recall"]),
                                           ("FeaturesAndLogits", ["FID", "IS", "Precision", "Recall"])])
def test_metrics_that_a_detector_cannot_serve_are_left_out(capsys, sets, detectors, kind, metrics):
    root, reference, samples = sets
    found, _, stdout, _ = evaluate(capsys, root / "samples.npz", "--ref", root / "reference.npz", "--detector", detectors / f"{kind}.pt")
    assert list(found) == metrics and [name for name in METRICS if f"  {name} " in stdout] == metrics
    assert found["FID"] == pytest.approx(expected_metrics(reference, samples)["FID"], rel=1e-6)


def test_cache_is_used_and_follows_its_files(capsys, sets, detectors, tmp_path, monkeypatch):
    root, reference, samples = sets
    np.save(tmp_path / "samples.npy", samples)
    args = (tmp_path / "samples.npy", "--ref", root / "reference", "--detector", detectors / "Tiny.pt", "--cache", tmp_path / "cache")
    first, *_ = evaluate(capsys, *args)
    used = []
    apply = fid.apply
    monkeypatch.setattr(fid, "apply", lambda *args: used.append(1) or apply(*args))
    again, *_ = evaluate(capsys, *args)
    assert again == first and not used
    np.save(tmp_path / "samples.npy", samples // 2)  # of the same size
    changed, *_ = evaluate(capsys, *args)
    assert used and changed["FID"] == pytest.approx(expected_metrics(reference, samples // 2)["FID"], rel=1e-6)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    status, _, stderr = cli(capsys, "fid", *args)
    assert status == 2 and "remove it" in stderr


def test_reference_folder_is_cropped_and_samples_are_not(capsys, detectors, tmp_path):
    """40 x 36 references, cropped as ADM crops to the samples' 24 or to --image-size."""
    from extract_latents import load_image

    random = np.random.RandomState(0)
    (tmp_path / "reference").mkdir()
    for i in range(10):
        Image.fromarray(random.randint(0, 256, (36, 40, 3)).astype(np.uint8)).save(tmp_path / "reference" / f"{i}.png")
    samples = random.randint(0, 256, (12, 24, 24, 3)).astype(np.uint8)
    np.save(tmp_path / "samples.npy", samples)
    files = sorted((tmp_path / "reference").iterdir())
    for size, options in ((24, ()), (32, ("--image-size", 32))):
        metrics, written, _, stderr = evaluate(capsys, tmp_path / "samples.npy", "--ref", tmp_path / "reference",
                                               "--detector", detectors / "Tiny.pt", *options)
        cropped = np.stack([load_image(file, size) for file in files])
        assert metrics["FID"] == pytest.approx(expected_metrics(cropped, samples)["FID"], rel=1e-6)
        assert written["samples"]["size"] == [24, 24] and written["reference"]["size"] == [size, size]
        assert ("their sharpness differs" in stderr) == (size != 24)


def test_samples_sorted_by_class_are_noticed(capsys, detectors, tmp_path):
    """Ten classes in runs: the first 5000 see eight and a third of them, the last 1000 fewer than two."""
    classes = np.sort(np.arange(6000) % 10)
    images = np.zeros((6000, 4, 4, 3), np.uint8)
    images[np.arange(6000), classes // 4, classes % 4, 0] = 255
    np.save(tmp_path / "reference.npy", images[::50])
    for name, order in (("sorted", np.arange(6000)), ("mixed", np.random.RandomState(0).permutation(6000))):
        np.save(tmp_path / f"{name}.npy", images[order])
        metrics, _, _, stderr = evaluate(capsys, tmp_path / f"{name}.npy", "--ref", tmp_path / "reference.npy", "--detector", detectors / "Tiny.pt")
        assert ("sorted by class" in stderr) == (name == "sorted")
        shares = [np.unique(part, return_counts=True)[1] / len(part) for part in np.split(classes[order], [5000])]
        assert metrics["IS"] == pytest.approx(np.mean([np.exp(-(share * np.log(share)).sum()) for share in shares]), rel=0.01)


def test_jpeg_samples_are_noticed(capsys, sets, detectors, tmp_path):
    root, _, samples = sets
    (tmp_path / "samples").mkdir()
    for i in range(5):
        Image.fromarray(samples[i]).save(tmp_path / "samples" / f"{i}.JPEG")
    *_, stderr = evaluate(capsys, tmp_path / "samples", "--ref", root / "reference.npz", "--detector", detectors / "Tiny.pt")
    assert "JPEG" in stderr and "5 samples are too few for 48 features" in stderr


def test_arrays_are_read_in_a_stream(tmp_path):
    images = np.zeros((4000, 64, 64, 3), np.uint8)  # 49 MB
    images[:, 0, 0, 0] = np.arange(4000) % 251
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=images)
    np.savez(tmp_path / "plain.npz", arr_0=images)
    for name in ("compressed.npz", "plain.npz"):
        tracemalloc.start()
        reader = fid.Images(tmp_path / name)
        firsts = np.concatenate([reader[range(i, i + 50)][:, 0, 0, 0].numpy() for i in range(0, 4000, 50)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.array_equal(firsts, np.arange(4000) % 251) and peak < 8e6


# ---- weights
def test_weights_are_downloaded_once_and_checked(capsys, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "WEIGHTS_URL", weights.as_uri())
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", "0" * 64)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(SystemExit):
        fid.load_network(None, None, "cpu")
    assert "invalid hash value" in capsys.readouterr().err and not (tmp_path / "checkpoints" / fid.WEIGHTS).exists()

    monkeypatch.setattr(fid, "WEIGHTS_SHA256", fid.sha256(weights))
    network, space = fid.load_network(None, None, "cpu")
    assert space == fid.ADM_INCEPTION and not network.training
    monkeypatch.setattr(fid, "WEIGHTS_URL", "file:///nowhere")
    assert fid.load_network(None, None, "cpu")[1] == fid.ADM_INCEPTION  # from torch.hub's folder

    monkeypatch.setattr(fid, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(SystemExit):
        fid.load_network(None, None, "cpu")
    assert "is damaged" in capsys.readouterr().err


def test_without_network_one_sentence_says_what_to_do(capsys, sets, tmp_path, monkeypatch):
    def offline(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    status, _, stderr = cli(capsys, "fid", sets[0] / "samples.npz", "--ref", sets[0] / "reference.npz")
    assert status == 2 and len(stderr.splitlines()) == 1
    assert all(part in stderr for part in (fid.WEIGHTS, fid.WEIGHTS_URL, str(tmp_path / "checkpoints"), "--weights", "not known"))


# ---- bad inputs: one sentence, exit status 2, no traceback
def bad(name, folder):
    """Write one bad input into the folder; returns its path and what the sentence has to say."""
    images = np.random.RandomState(0).randint(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    floats = images.astype(np.float32)
    path = folder / ("bad.npz" if "npz" in name else "bad.npy")
    arrays = {
        "outside": (floats * 2, "not whole numbers from 0 to 255"),
        "negative": (images.astype(np.int16) - 200, "not whole numbers from 0 to 255"),
        "unit range": (floats / 255, "not whole numbers from 0 to 255"),
        "nan": (np.where(floats == floats.max(), np.nan, floats), "NaN"),
        "infinite npz": (np.where(floats == floats.max(), np.inf, floats), "infinite"),
        "channels first": (images.transpose(0, 3, 1, 2).copy(), "(8, 3, 16, 16)"),
        "grey": (images[..., 0], "(8, 16, 16)"),
        "alpha npz": (np.concatenate([images, images[..., :1]], 3), "(8, 16, 16, 4)"),
        "empty": (images[:0], "(0, 16, 16, 3)"),
        "three": (images[:3], "at least 4"),
        "fortran": (np.asfortranarray(images), "Fortran"),
        "objects": (np.array([images[0], None], object), "object"),
        "objects npz": (np.array([images[0], None], object), "object"),
        "text": (np.array(["a", "b"]), "<U1"),
        "complex": (images.astype(np.complex64), "complex64"),
    }
    if name in arrays:
        array, says = arrays[name]
        (np.savez(path, arr_0=array) if "npz" in name else np.save(path, array))
        return path, says
    if name == "missing":
        return folder / "missing.npz", "No such file"
    if name == "other kind":
        (folder / "bad.txt").write_text("images")
        return folder / "bad.txt", "neither an .npz, an .npy nor a folder"
    if name == "empty folder":
        (folder / "bad").mkdir()
        (folder / "bad" / "notes.txt").write_text("no image")
        return folder / "bad", "no image files"
    if name.startswith("folder"):
        (folder / "bad").mkdir()
        for i in range(6):
            Image.fromarray(images[i]).save(folder / "bad" / f"{i}.png")
        file = folder / "bad" / "3.png"
        if "mixed" in name:
            Image.fromarray(images[3, :12]).save(file)
        elif "cut" in name:
            file.write_bytes(file.read_bytes()[:200])
        else:
            Image.fromarray(images[3, :, :, 0].astype(np.uint16) * 100).save(file)
        return folder / "bad", {"folder mixed": "pixels and others", "folder cut": "3.png", "folder 16 bit": "3.png"}[name]
    if name == "no arr_0 npz":
        np.savez(path, images=images)
        return path, "arr_0"
    if name == "not a zip npz":
        path.write_bytes(b"PK\3\4 not a zip")
        return path, "zip"
    if name == "empty file":
        path.write_bytes(b"")
        return path, "cannot be read"
    saved = io.BytesIO()
    (np.savez_compressed if "compressed" in name else np.savez if "npz" in name else np.save)(saved, images)
    data = bytearray(saved.getvalue())
    if name.startswith("truncated"):
        path.write_bytes(data[: len(data) * 2 // 3])
        return path, "cannot be read"
    if name.startswith("damaged"):
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
        return path, "bad.npz"
    if name == "short member npz":
        with zipfile.ZipFile(io.BytesIO(bytes(data))) as whole, zipfile.ZipFile(path, "w") as short:
            short.writestr("arr_0.npy", whole.read("arr_0.npy")[:-5000])
        return path, "cut off"
    statistics = {"mu": np.zeros(48), "sigma": np.eye(48), "mu_s": np.zeros(16), "sigma_s": np.eye(16)}
    changes = {"wide statistics npz": ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "another network's"),
               "nan statistics npz": ({"sigma": np.full((48, 48), np.nan)}, "NaN or infinite values in mu or sigma"),
               "object statistics npz": ({"mu": np.array([None] * 48, object)}, "cannot be read")}
    change, says = changes[name]
    np.savez(path, arr_0=images, **{**statistics, **change})
    return path, says


BAD = ["outside", "negative", "unit range", "nan", "infinite npz", "channels first", "grey", "alpha npz", "empty", "three", "fortran",
       "objects", "objects npz", "text", "complex", "missing", "other kind", "empty folder", "folder mixed", "folder cut", "folder 16 bit",
       "no arr_0 npz", "not a zip npz", "empty file", "truncated npy", "truncated npz", "truncated compressed npz", "damaged npz",
       "damaged compressed npz", "short member npz", "wide statistics npz", "nan statistics npz", "object statistics npz"]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(capsys, sets, detectors, tmp_path, name):
    path, says = bad(name, tmp_path)
    options = ("--detector", detectors / "Tiny.pt", "--num-workers", 0, "--batch-size", 4)
    for args in ((path, "--ref", sets[0] / "reference.npz"), (sets[0] / "samples.npz", "--ref", path)):
        if name in ("folder mixed", "folder 16 bit") and path is args[2]:
            continue  # references are cropped to one size, and brought to 8 bits
        status, stdout, stderr = cli(capsys, "fid", *args, *options)
        complaint = [line for line in stderr.splitlines() if "fid.py: error: " in line]
        assert status == 2 and len(complaint) == 1 and says in complaint[0], stderr
        assert "Traceback" not in stderr and not stdout


@pytest.mark.parametrize("args, says", [
    ((), "either --ref"),
    (("--ref", "{reference}", "--save-stats", "x.npz"), "either --ref"),
    (("--save-stats", "x.pkl"), ".npz"),
    (("--ref", "{reference}", "--weights", "w.pth", "--detector", "d.pt"), "exclude each other"),
    (("--ref", "{reference}", "--weights", "nowhere.pth"), "nowhere.pth"),
    (("--ref", "{reference}", "--weights", "{reference}"), "does not hold the weights"),
    (("--ref", "{reference}", "--detector", "nowhere.pt"), "TorchScript"),
    (("--ref", "{reference}", "--detector", "{reference}"), "TorchScript"),
    (("--ref", "{reference}", "--detector", "{detectors}/Broken.pt"), "NaN"),
    (("--ref", "{reference}", "--detector", "{detectors}/Maps.pt"), "(N, D)"),
    (("--ref", "{reference}", "--detector", "{detectors}/Nameless.pt"), "(N, D)"),
    (("--ref", "{reference}", "--detector", "{detectors}/Tiny.pt", "--batch-size", "0"), "--batch-size"),
    (("--ref", "{reference}", "--num-workers", "-1"), "--num-workers"),
    (("--ref", "{reference}", "--reff", "x"), "--reff"),
])
def test_bad_flags_are_one_sentence(capsys, sets, detectors, args, says):
    args = [arg.format(reference=sets[0] / "reference.npz", detectors=detectors) for arg in args]
    status, stdout, stderr = cli(capsys, "fid", sets[0] / "samples.npz", *args)
    complaint = [line for line in stderr.splitlines() if "fid.py: error: " in line]
    assert status == 2 and len(complaint) == 1 and says in complaint[0] and not stdout, stderr
    assert "Traceback" not in stderr


def test_weights_never_run_code(capsys, sets, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"fc.bias": Payload()}, tmp_path / "weights.pth")
    status, _, stderr = cli(capsys, "fid", sets[0] / "samples.npz", "--ref", sets[0] / "reference.npz", "--weights", tmp_path / "weights.pth")
    assert status == 2 and "does not hold the weights" in stderr and not (tmp_path / "ran").exists()


# ---- the demo's detector
def test_demo_detector_knows_the_shapes_and_ranks_what_spoils_them():
    from demo_images import CLASSES, draw

    file = ROOT / "tests" / "demo_detector.pt"
    assert file.stat().st_size < 1_000_000
    module = torch.jit.load(file)
    labels = np.arange(400) % 10
    drawn = [draw(CLASSES[c], np.random.default_rng([7, i]), 64) for i, c in enumerate(labels)]  # a seed that nobody trained on
    images = torch.from_numpy(np.stack([np.asarray(image) for image in drawn])).permute(0, 3, 1, 2)
    out = module(images)
    assert out["features"].shape == (400, 96) and out["spatial"].shape == (400, 112)
    assert (out["logits"].argmax(1).numpy() == labels).mean() > 0.98
    clean, other = out["features"][:200].double().numpy(), out["features"][200:].double().numpy()
    spoilt = {"dark": images[200:] // 2, "blurred": F.avg_pool2d(images[200:].float(), 5, 1, 2).round().to(torch.uint8)}
    for x in spoilt.values():
        assert adm_frechet(clean, module(x)["features"].double().numpy()) > 3 * adm_frechet(clean, other)
