"""tests/figures.py: principal components, CKNNA, total variation and speed-up against other definitions; each
command's numbers and pixels against what the scripts give; nothing done twice; bad input."""

import json
import shutil
import sys
from itertools import permutations
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import figures
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, cli, message, write_set
from PIL import Image

import fid
from extract_latents import decode, load_vae
from models import SiT_models, load_encoder
from sample import load_model, rng

DETECTOR = ROOT / "tests" / "data" / "detector.pt2"
pytestmark = pytest.mark.usefixtures("all_on_one_thread")


class Figure:
    """Stands in for matplotlib's, which the tests' packages leave out; the last one made is Figure.last."""

    def __init__(self, size, layout):
        Figure.last = self

    def subplots(self, rows=1, columns=1, squeeze=True, sharey=False):
        self.panels = [MagicMock() for _ in range(columns)]
        return self.panels[0] if squeeze else [self.panels]

    def savefig(self, file, **options):
        file.write(b"a plot")

    def lines(self, panel=0):
        """What was plotted: {label: (x, y)}."""
        calls = [call for call in self.panels[panel].plot.mock_calls if "label" in call.kwargs]
        return {call.kwargs["label"]: (list(call.args[0]), list(call.args[1])) for call in calls}


@pytest.fixture
def plots(monkeypatch):
    module = ModuleType("matplotlib.figure")
    module.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)


def add_noise(checkpoint):
    """To the EMA weights: it tells blocks and classes apart, which a short training does not."""
    contents = torch.load(checkpoint, weights_only=True)
    torch.manual_seed(0)
    for weights in contents["ema"].values():
        weights += 0.2 * torch.randn(weights.shape)
    torch.save(contents, checkpoint)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, latents):
    """Two runs, tiny_plain and tiny_aligned, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    for name, depth in (("plain", 0), ("aligned", 2)):
        flags = ("--data", latents, "--run-dir", folder / f"tiny_{name}", "--vae-repa-depth", depth)
        assert cli(None, "train", *TINY, *flags, "--max-steps", 4, "--lr", 1e-2, "--ckpt-every", 2)[0] == 0
    list(map(add_noise, folder.glob("*/checkpoints/*.pt")))
    return [folder / "tiny_plain", folder / "tiny_aligned"]


@pytest.fixture
def ckpts(runs):
    return [run / "checkpoints" / "0000004.pt" for run in runs]


@pytest.fixture(scope="module")
def stored(tmp_path_factory, images, vae):
    """Latents as in `latents`, with their images."""
    out = tmp_path_factory.mktemp("stored") / "latents"
    flags = ("--images", images, "--vae", vae, "--image-size", 32, "--out", out, "--num-workers", 1)
    assert cli(None, "extract_latents", *flags, "--store-images")[0] == 0
    return out


@pytest.fixture
def sheets(monkeypatch):
    """What was drawn, {file name: (columns, rows, cells)}, where cells[row][column] is an image or None."""
    drawn, draw = {}, figures.draw_sheet

    def spy(columns, rows, cells, path):
        drawn[path.name] = columns, rows, cells
        draw(columns, rows, cells, path)

    monkeypatch.setattr(figures, "draw_sheet", spy)
    return drawn


def draw(capsys, *words):
    """The table that the command prints."""
    status, stdout, stderr = cli(capsys, "figures", *words)
    assert status == 0, stderr
    return rows_of(stdout)


def rows_of(stdout):
    """The cells of the Markdown tables in stdout, without headings."""
    lines = [line.strip("| ").split(" | ") for line in stdout.splitlines() if line.startswith("|")]
    return [line for line in lines[1:] if set(line) != {"---"}]


def literal_components(maps):
    """Scores of numpy's SVD, each place's mean over the images taken off."""
    b, h, w, d = maps.shape
    rows = (maps - maps.mean(0)).reshape(-1, d).astype(np.float64)
    u, s, vt = np.linalg.svd(rows, full_matrices=False)
    signs = np.sign(vt[range(3), abs(vt[:3]).argmax(1)])
    return (u[:, :3] * s[:3] * signs).reshape(b, h, w, 3)


def literal_colours(scores):
    return (np.clip(scores / np.sqrt((scores**2).mean((0, 1, 2))) / 4 + 0.5, 0, 1) * 255).round()


def test_principal_components_are_numpys():
    maps = np.random.default_rng(0).normal(size=(7, 4, 5, 9)) * np.arange(1, 10)
    expected = literal_components(maps)
    got = figures.principal_components(torch.from_numpy(maps))
    np.testing.assert_allclose(got, expected, atol=1e-8)
    place = np.random.default_rng(1).normal(size=(1, 4, 5, 9)) * 100  # is in all images
    shifted = figures.principal_components(torch.from_numpy(maps + place))
    np.testing.assert_allclose(shifted, expected, atol=1e-8)
    np.testing.assert_array_equal(figures.colours(got), literal_colours(expected))
    two = figures.principal_components(torch.from_numpy(maps[..., :2]))
    assert (two[..., 2] == 0).all() and two[..., :2].abs().min() > 0
    assert (figures.colours(two)[..., 2] == 128).all()


def test_a_reference_fixes_order_and_signs():
    """Of maps that hold the reference's components in another order, with other signs and other weights."""
    maps = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 4, 4, 5)) * [5, 4, 3, 0.1, 0.1])
    reference = figures.principal_components(maps)
    other = torch.stack([-9 * reference[..., 2], 6 * reference[..., 0], -3 * reference[..., 1]], -1)
    got = figures.principal_components(other, reference)
    assert torch.equal(figures.colours(got), figures.colours(reference))
    large = reference.repeat_interleave(2, 1).repeat_interleave(2, 2)
    large += torch.tensor([[1, -1], [-1, 1]]).repeat(4, 4)[..., None] * 50  # 0 in the mean of each 2 x 2
    np.testing.assert_allclose(figures.principal_components(other, large), got)


def literal_cknna(a, b, k):
    """Term by term, as Huh et al. define the sets of neighbours and Song et al. the unbiased HSIC."""
    def hsic(K, L):
        n = range(len(K))
        trace = sum(K[i][j] * L[j][i] for i in n for j in n)
        sums = sum(map(sum, K)) * sum(map(sum, L))
        product = sum(K[i][j] * L[j][m] for i in n for j in n for m in n)
        return trace + sums / (len(n) - 1) / (len(n) - 2) - 2 * product / (len(n) - 2)

    def cosines(x):
        return [[float(u @ v / np.linalg.norm(u) / np.linalg.norm(v)) for v in x] for u in x]

    def masked(values, *others):
        n = len(values)
        near = [[set(sorted((j for j in range(n) if j != i), key=lambda j: -other[i][j])[:k])
                 for i in range(n)] for other in others]
        return [[values[i][j] if all(j in sets[i] for sets in near) else 0 for j in range(n)]
                for i in range(n)]

    K, L = cosines(a), cosines(b)
    own = hsic(masked(K, K), masked(K, K)) * hsic(masked(L, L), masked(L, L))
    return hsic(masked(K, K, L), masked(L, K, L)) / own**0.5


def cknna_of(a, b, k=10):
    return figures.cknna(*(figures.neighbours(torch.as_tensor(x), k) for x in (a, b)))


def test_cknna():
    rng = np.random.default_rng(0)
    a, turn = rng.normal(size=(40, 6)), np.linalg.qr(rng.normal(size=(6, 6)))[0]
    b = a[:, :4] + 0.5 * rng.normal(size=(40, 4))
    assert cknna_of(a, b, 7) == pytest.approx(expected := literal_cknna(a, b, 7), abs=1e-9)
    assert 0.2 < expected < 0.8
    assert cknna_of(a, 3 * a @ turn) == pytest.approx(1, abs=1e-9)
    many = rng.normal(size=(2, 1000, 20))
    assert abs(cknna_of(*many)) < 0.02
    assert cknna_of(many[0], many[1] + many[0]) > 0.1


def test_variance_and_total_variation_of_known_latents():
    z = torch.zeros(2, 2, 3, 4)
    z[0, 0] = torch.arange(4)  # a ramp along x: 3 rows of 3 differences of 1, variance 1.25
    z[1, 1, 1, 1] = -2  # a point: 4 neighbours, variance 4 (1/12 - 1/144)
    assert figures.total_variation(z) == (9 + 8) / 4
    assert figures.variance(z) == pytest.approx((1.25 + 4 * 11 / 144) / 4)
    assert figures.total_variation(z.transpose(2, 3) + 7) == (9 + 8) / 4


def test_speed_up():
    slow = {100: 9.0, 200: 7.0, 400: 5.0}
    assert figures.speed_up(slow, slow) == (400, 400)
    assert figures.speed_up(slow, {50: 9.0, 100: 6.0, 200: 2.0}) == (400, 125)
    assert figures.speed_up(slow, {100: 8.0, 300: 6.0, 900: 5.5}) == (400, None)
    assert figures.speed_up(slow, {30: 4.0, 60: 3.0}) == (400, 30)
    assert figures.speed_up({1: 8.0, 2: 3.0, 3: 4.0}, {1: 5.0, 2: 1.0, 3: 9.0}) == (2, 1.5)


def in_this_process(called, status=None):
    """A subprocess.run that runs a script's main here, or only gives a status."""
    def run(command):
        called.append([str(word) for word in command[1:]])
        if status is None:
            return SimpleNamespace(returncode=cli(None, Path(command[1]).stem, *command[2:])[0])
        return SimpleNamespace(returncode=status)
    return run


def test_convergence(runs, images, capsys, tmp_path, plots, sheets, monkeypatch):
    """What sample.py and fid.py give, in the table, the plot and the sheet; each is done once."""
    called = []
    monkeypatch.setattr(figures.subprocess, "run", in_this_process(called))
    sampler = ("--mode", "ode", "--num-steps", 2)
    flags = ("--detector", DETECTOR, "--num-samples", 6, *sampler, "--out", tmp_path)
    both = ("convergence", *runs, "--ref", images, *flags)
    table = draw(capsys, *both)
    assert [Path(command[0]).name for command in called] == ["sample.py"] * 4 + ["sample.py", "fid.py"] * 4
    assert [row[:2] for row in table] == [["plain", "2"], ["plain", "4"], ["aligned", "2"], ["aligned", "4"]]

    sampler = ("--ckpt", runs[1] / "checkpoints" / "0000004.pt", *sampler)
    cli(None, "sample", *sampler, "--num-samples", 6, "--out", npz := tmp_path / "6.npz")
    cli(None, "fid", npz, "--ref", images, "--detector", DETECTOR, "--json", tmp_path / "6.json")
    metrics = json.loads((tmp_path / "6.json").read_text())
    names = ["FID", "sFID", "IS", "Precision", "Recall"]
    assert [float(value) for value in table[3][2:]] == pytest.approx([metrics[n] for n in names], abs=0.005)
    lines = Figure.last.lines()
    assert list(lines) == ["plain", "aligned"] and lines["aligned"][0] == [2, 4]
    assert lines["aligned"][1][1] == metrics["FID"]
    assert (tmp_path / "convergence.png").read_bytes() == b"a plot"

    columns, rows, cells = sheets["images.png"]
    assert columns == [("step", "2"), ("", "4")]
    assert rows == [("class 0", "plain"), ("", "aligned"), ("class 1", "plain"), ("", "aligned"),
                    ("class 2", "plain"), ("", "aligned")]
    guided = ("--classes", 0, 1, 2, "--per-class", 1, "--cfg-scale", 4)
    cli(None, "sample", *sampler, *guided, "--out", png := tmp_path / "classes.png")
    assert np.array_equal(np.concatenate([row[1] for row in cells[1::2]]), np.asarray(Image.open(png)))
    assert not np.array_equal(cells[0][1], cells[1][1]) and (tmp_path / "images.png").exists()

    called.clear()
    assert draw(capsys, *both) == table and not called
    assert draw(capsys, *both, "--steps", 4, 2) == table
    draw(capsys, *both, "--metric", "IS", "--steps", 4, "--names", "a", "b")
    assert not called and Figure.last.lines()["b"] == ([4], [metrics["IS"]])
    samples = runs[0] / "figures" / "6_ode-2" / "0000002.npz"
    written = samples.stat().st_mtime_ns
    draw(capsys, "convergence", runs[0], "--ref", images / "class0", *flags, "--steps", 2)
    assert len(called) == 2 and samples.stat().st_mtime_ns == written  # only measured again
    record = samples.with_suffix(".json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "feature_space": "another"}))
    draw(capsys, "convergence", runs[0], "--ref", images / "class0", *flags, "--steps", 2)
    assert len(called) == 4 and "another" not in record.read_text()
    called.clear()
    draw(capsys, "convergence", runs[0], "--ref", images, *flags, "--steps", 2, "--classes", 1)
    assert len(called) == 3 and called[0][-1].endswith(".png")


@pytest.fixture
def measured(tmp_path, plots, monkeypatch):
    """Runs of which run b lacks a checkpoint; measure gives what is in the files."""
    monkeypatch.setattr(figures, "draw_classes", lambda path, args: [np.zeros((8, 8, 3), np.uint8)] * 2)
    monkeypatch.setattr(figures, "measure", lambda path, space, args: json.loads(path.read_text()))
    monkeypatch.setattr(figures.fid, "Images", lambda ref, side: None)
    curves = {"a": {90: (9, 1), 100: (6, 2), 1000: (4, 5)}, "b": {90: (6, 3), 100: (2, 9)}, "c": {90: (7, 1)}}
    for name, curve in curves.items():
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        for step, (distance, score) in curve.items():
            (tmp_path / name / "checkpoints" / f"{step}.pt").write_text(json.dumps(
                {"FID": distance, "IS": score}))
    runs = [tmp_path / name for name in curves]
    return "convergence", *runs, "--ref", "x", "--detector", DETECTOR, "--classes", 0, 1, "--out", tmp_path


@pytest.mark.parametrize("metric, best, step, reached", [
    ("FID", 4, 1000, 90 + 10 * np.log(6 / 4) / np.log(6 / 2)), ("IS", 5, 1000, 90 + 10 / 3)])
def test_the_speed_up_that_is_shown(measured, capsys, sheets, metric, best, step, reached):
    """Printed, and as an arrow and a factor; steps in order of their numbers."""
    status, stdout, stderr = cli(capsys, "figures", *measured, "--metric", metric)
    assert status == 0 and f"a: best {metric} {best}, at step {step}\n" in stdout
    assert f"b: reaches it by step {reached:.0f}, {step / reached:.2f} times as fast\n" in stdout
    assert "c: does not reach it\n" in stdout
    arrow, factor = Figure.last.panels[0].annotate.mock_calls
    assert arrow.args == ("", (pytest.approx(reached), best), (step, best))
    assert factor.args[0] == f"{step / reached:.1f}×"
    assert Figure.last.lines()["a"][0] == [90, 100, 1000] and rows_of(stdout)[2][3] == ""  # no sFID
    cells = sheets["images.png"][2]
    assert [[image is None for image in row] for row in cells] == 2 * [[False] * 3, [False, False, True],
                                                                       [False, True, True]]


def test_a_metric_that_is_not_there(measured, capsys):
    status, _, stderr = cli(capsys, "figures", *measured, "--metric", "Recall")
    assert status == 2 and "gives no Recall" in message(stderr)


def test_a_script_that_fails(runs, images, capsys, tmp_path, plots, monkeypatch):
    """Under torchrun if so asked; its status is the command's, and one that is killed is named."""
    called = []
    flags = ("convergence", runs[0], "--ref", images, "--detector", DETECTOR, "--nproc-per-node", 8)
    monkeypatch.setattr(figures, "draw_classes", lambda path, args: [np.zeros((32, 32, 3), np.uint8)])
    monkeypatch.setattr(figures.subprocess, "run", in_this_process(called, status=3))
    status, _, stderr = cli(capsys, "figures", *flags)
    assert status == 3 and len(called) == 1 and not stderr
    assert called[0][:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    assert called[0][called[0].index("--num-samples") + 1] == "50000"
    monkeypatch.setattr(figures.subprocess, "run", in_this_process(called, status=-9))
    status, _, stderr = cli(capsys, "figures", *flags)
    assert status == 2 and "sample.py was killed by signal 9" in message(stderr)


def outputs_of(ckpt, data, t, labels=False):
    """Latents' means x (12, C, H, W) of a set, and each block's output (12, N, D) for them, by hooks."""
    model, trained = load_model(ckpt)
    about = json.loads((data / "latents.json").read_text())
    x = (np.load(data / "moments.npy").astype(np.float32)[:, :4] - about["shift"]) * about["scale"]
    noise = [torch.randn(x.shape[1:], generator=rng(0, row, "cpu")) for row in range(len(x))]
    y, outputs = torch.from_numpy(np.load(data / "labels.npy")) if labels else torch.full((12,), 3), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, _, output: outputs.append(output))
    with torch.no_grad():
        model((1 - t) * torch.from_numpy(x) + t * torch.stack(noise), torch.full((12,), t), y)
    return x, outputs


def literal_match(scores, reference):
    """Scores (12, h, w, 3) in the order and with the signs that match a reference best, of all orders."""
    side = reference.shape[1] // scores.shape[1]
    pooled = reference.reshape(12, scores.shape[1], side, scores.shape[2], side, 3).mean((2, 4))
    r = np.corrcoef(pooled.reshape(-1, 3).T, scores.reshape(-1, 3).T)[:3, 3:]
    order = list(max(permutations(range(3)), key=lambda order: abs(r[range(3), order]).sum()))
    return scores[..., order] * np.sign(r[range(3), order])


def test_features(ckpts, latents, vae, capsys, tmp_path, sheets, monkeypatch):
    """Pixels of the sheet from hooks on the blocks and numpy's SVD, over all 12 images, in batches of 5."""
    monkeypatch.setattr(figures, "BATCH", 5)
    draw(capsys, "features", "--ckpt", ckpts[0], "--ckpt", ckpts[1], "--data", latents, "--t", 1, 0.25, 1,
         "--images", 2, "--layers", 1, 6, "--out", tmp_path)
    columns, rows, cells = sheets["features.png"]
    assert columns == [("", "image"), ("", "latent"), ("plain", "block 1"), ("", "block 6"),
                       ("aligned", "block 1"), ("", "block 6")]
    chosen = np.random.default_rng(0).permutation(12)[:2]
    assert rows == [(f"image {chosen[0]}", "t = 0.25"), ("", "t = 1.0"),
                    (f"image {chosen[1]}", "t = 0.25"), ("", "t = 1.0")]
    for i, t in enumerate((0.25, 1.0)):
        for column, ckpt, layer in ((2, 0, 0), (3, 0, 5), (5, 1, 5)):
            x, outputs = outputs_of(ckpts[ckpt], latents, t)
            latent = literal_components(x.transpose(0, 2, 3, 1))
            maps = literal_components(outputs[layer].reshape(12, 2, 2, -1).numpy())
            expected = literal_colours(literal_match(maps, latent))[chosen]
            got = np.stack([cells[i][column], cells[2 + i][column]]).astype(float)
            assert abs(got - expected).max() <= 1
    expected = literal_colours(latent)[chosen]
    assert abs(np.stack([cells[0][1], cells[2][1]]).astype(float) - expected).max() <= 1
    images = decode(load_vae(vae), torch.from_numpy(x[chosen]), 0.25, 0.5)  # its scale and shift
    assert torch.equal(torch.stack([cells[0][0], cells[2][0]]), images) and cells[1][:2] == [None, None]
    assert np.asarray(Image.open(tmp_path / "features.png")).shape[1] > 6 * 128


def test_models_of_others(ckpts, capsys, tmp_path, plots):
    """A published file, without settings, of a VAE that encodes like the one of the latents; another size."""
    data = write_set(tmp_path / "data", vae="/models/sd-vae-ft-mse", scale=[0.18215] * 4, shift=0)
    for size in ("Ti/4", "S/2"):
        torch.manual_seed(0)
        model = SiT_models[f"SiT-{size}"](input_size=8, num_classes=5)
        torch.save({"ema": model.state_dict()}, tmp_path / f"{size[:-2]}.pt")
    table = draw(capsys, "cknna", "--ckpt", tmp_path / "Ti.pt", tmp_path / "S.pt", "--data", data, "--t", 0.5,
                 "--target", "latents", "--k", 4, "--count", 9, "--out", tmp_path)
    assert [row[:2] for row in table] == [[size, str(i + 1)] for size, n in (("Ti", 6), ("S", 12))
                                          for i in range(n)]
    assert all(0 < float(row[2]) < 1 for row in table)


@pytest.mark.parametrize("target", ["latents", DETECTOR, "dinov2_vitt14"])
def test_cknna_of_blocks(ckpts, stored, capsys, tmp_path, plots, target):
    """The numbers, table and plot from hooks on the blocks and the definition, term by term."""
    table = draw(capsys, "cknna", "--ckpt", *ckpts, "--data", stored, "--target", target, "--k", 4,
                 "--t", 0.5, "--out", tmp_path)
    found = json.loads((tmp_path / "cknna.json").read_text())
    x, outputs = outputs_of(ckpts[1], stored, 0.5)
    images = torch.from_numpy(np.load(stored / "images.npy")).permute(0, 3, 1, 2)
    if target == "latents":
        features = x.mean((2, 3))
    elif target == DETECTOR:
        features = fid.load_program(target, "cpu")(images)["features"].numpy()
    else:
        features = load_encoder(target, 32)(images).mean(1).numpy()
    expected = [literal_cknna(h.mean(1).numpy(), features, 4) for h in outputs]
    assert found["aligned"]["0.5"] == pytest.approx(expected, abs=1e-5)
    assert [row[:2] for row in table[5:8]] == [["plain", "6"], ["aligned", "1"], ["aligned", "2"]]
    assert [float(row[2]) for row in table[6:]] == pytest.approx(expected, abs=2e-3)
    assert Figure.last.lines()["aligned"] == ([1, 2, 3, 4, 5, 6], found["aligned"]["0.5"])


def test_a_model_without_null_class(latents, vae, capsys, tmp_path, plots):
    """It gets the images' labels, which must be of its classes."""
    flags = ("--data", latents, "--run-dir", tmp_path / "run", "--label-dropout", 0, "--lr", 1e-2)
    assert cli(None, "train", *TINY, *flags, "--max-steps", 3)[0] == 0
    add_noise(ckpt := tmp_path / "run" / "checkpoints" / "0000003.pt")
    draw(capsys, "cknna", "--ckpt", ckpt, "--data", latents, "--target", "latents", "--k", 4, "--t", 0.5,
         "--out", tmp_path)
    x, outputs = outputs_of(ckpt, latents, 0.5, labels=True)
    expected = [literal_cknna(h.mean(1).numpy(), x.mean((2, 3)), 4) for h in outputs]
    found = json.loads((tmp_path / "cknna.json").read_text())["0000003"]["0.5"]
    assert found == pytest.approx(expected, abs=1e-5)
    other = write_set(tmp_path / "other", vae=str(vae), shift=0.25, scale=0.5)
    status, _, stderr = cli(capsys, "figures", "features", "--ckpt", ckpt, "--data", other)
    assert status == 2 and "num_classes is 3, not 10" in message(stderr)


def test_latents(latents, capsys, tmp_path, sheets):
    """Variance and total variation of z, from the stored means; -2 z has the same colours."""
    twice = tmp_path / "twice"
    shutil.copytree(latents, twice)
    moments = np.load(latents / "moments.npy")
    np.save(twice / "moments.npy", moments * np.float16([-2] * 4 + [2] * 4).reshape(-1, 1, 1))
    table = draw(capsys, "latents", "--data", latents, twice, "--names", "latents", "twice", "--images", 3,
                 "--out", tmp_path)
    z = moments[:, :4].astype(np.float64)
    variation = sum(abs(np.diff(z, axis=axis)).sum((2, 3)).mean() for axis in (2, 3))
    assert [row[0] for row in table] == ["latents", "twice"] and table[0][2] == "4×8×8"
    for row, scale in zip(table, (1, 2)):
        assert float(row[3]) == pytest.approx(scale**2 * z.var((2, 3)).mean(), rel=1e-3)
        assert float(row[4]) == pytest.approx(scale * variation, rel=1e-3)
    columns, rows, cells = sheets["latents.png"]
    chosen = np.random.default_rng(0).permutation(12)[:3]
    assert columns == [("", "image"), ("", "latents"), ("", "twice")]
    assert rows == [("", f"image {row}") for row in chosen]
    expected = literal_colours(literal_components(z.transpose(0, 2, 3, 1)))[chosen]
    for column in (1, 2):
        assert abs(np.stack([row[column] for row in cells]).astype(float) - expected).max() <= 1
    small = write_set(tmp_path / "small", size=4, files_sha256=None)  # of another resolution, and flat
    np.save(small / "moments.npy", np.zeros((12, 8, 4, 4), np.float16))
    table = draw(capsys, "latents", "--data", latents, small, twice, "--count", 5, "--out", tmp_path)
    assert [row[2] for row in table] == ["4×8×8", "4×4×4", "4×8×8"]
    images, first, other, last = sheets["latents.png"][2][0]
    assert other.shape == (4, 4, 3) and torch.equal(first, last)


def test_a_sheet(tmp_path):
    """Images stand where they should, small ones enlarged in blocks, large ones reduced."""
    red, blue = (np.full((side, side, 3), colour, np.uint8)
                 for side, colour in ((2, [255, 0, 0]), (256, [0, 0, 255])))
    red[1, 1] = 0, 255, 0
    columns = [("first", "a"), ("", "b"), ("second", "c")]
    figures.draw_sheet(columns, [("", "row")], [[red, None, blue]], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    boxes = []
    for colour in ([255, 0, 0], [0, 255, 0], [0, 0, 255]):
        where = np.argwhere((sheet == colour).all(2))
        boxes.append([*where.min(0), *where.max(0)])
    (top, left, bottom, right), green, (*corner, _, _) = boxes
    assert (bottom - top, right - left) == (127, 127) and (sheet == [255, 0, 0]).all(2).sum() == 3 * 64**2
    assert green == [top + 64, left + 64, bottom, right]
    assert corner[0] == top and corner[1] > right + 128 + 16 and boxes[2][2:] == [bottom, corner[1] + 127]
    assert (sheet[top:, right + 1 : corner[1]] == 255).all() and (sheet[:top] < 128).any()


def test_names():
    def names(*paths):
        return figures.short_names(SimpleNamespace(names=None), list(paths))
    assert names("runs/SiT-XL-2_vae-repa-depth-0/", "runs/SiT-XL-2_lr-0.1") == ["vae-repa-depth-0", "lr-0.1"]
    assert names("a_b/checkpoints/0000200.pt", "a_b/checkpoints/0000400.pt") == ["0000200", "0000400"]
    assert names("runs/SiT-XL-2", "runs/SiT-XL-2_repa-depth-8") == ["SiT-XL-2", "repa-depth-8"]
    assert names("one/file.pt") == ["file"]


def test_matplotlib_itself(tmp_path):
    """The plots that it draws, where it is installed."""
    pytest.importorskip("matplotlib")
    figure, args = figures.new_figure(4, 3), SimpleNamespace(metric="FID", detector=None)
    figures.plot_convergence(figure.subplots(), {"a": {1: 9.0, 2: 5.0}, "b": {1: 4.0, 2: 3.0}}, args)
    figures.save_figure(figure, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (600, 450)


@pytest.mark.parametrize("words, says", [
    ("convergence {run}/checkpoints --ref {images}", "checkpoints has no STEP.pt"),
    ("convergence {run} --ref {images} --steps 2 3", "checkpoints has no 3.pt"),
    ("convergence {run} --ref {images} --names a b", "2 --names for"),
    ("convergence {run} {run} --ref {images}", "the same name"),
    ("convergence {run}", "--ref"),
    ("convergence {run} --ref {ckpt} --detector {detector} --num-steps 1", "cannot be read as images"),
    ("convergence {run} --ref {images} --detector {ckpt}", "cannot be loaded"),
    ("convergence {run} --ref {images} --weights {ckpt}", "cannot be loaded"),
    ("convergence {run} --ref {images} --detector {detector} --cfg-scale 0.5", "--cfg-scale"),
    ("features --ckpt {ckpt} --data {other}", "vae is {vae}, not nothing"),
    ("features --ckpt {ckpt} --data {small}", "latent_shape is [4, 8, 8], not [4, 4, 4]"),
    ("features --ckpt {ckpt} --data {latents} --count 1", "at least 2"),
    ("features --ckpt {ckpt} --data {latents} --layers 7", "has 6 blocks"),
    ("features --ckpt {images} --data {latents}", "no checkpoint"),
    ("features --ckpt {ckpt} --data {latents} --t 1.5", "--t"),
    ("cknna --ckpt {ckpt} --data {latents}", "--store-images"),
    ("cknna --ckpt {ckpt} --data {latents} --target latents --k 12", "at least 13"),
    ("cknna --ckpt {ckpt} --data {stored} --target {ckpt}2", "cannot be loaded"),
    ("cknna --ckpt {ckpt} --data {stored} --target dinov2_nowhere", "cannot be loaded"),
    ("latents --data {latents} {other}", "other images"),
    ("latents --data {latents} --count 1", "at least 2"),
    ("convergence {run} --ref {images} --detector {detector} --weights x", "not allowed with"),
    ("latents --data nowhere", "no latents"), ("paint", "paint"), ("", "COMMAND")])
def test_bad_input(words, says, runs, ckpts, images, latents, stored, vae, capsys, tmp_path, plots,
                   monkeypatch):
    called = []
    monkeypatch.setattr(figures.subprocess, "run", in_this_process(called))
    write_set(tmp_path / "other", scale=1, shift=0)
    write_set(tmp_path / "small", size=4, vae=str(vae))
    paths = {"run": runs[0], "ckpt": ckpts[0], "images": images, "latents": latents, "stored": stored,
             "detector": DETECTOR, "vae": vae.name, "other": tmp_path / "other", "small": tmp_path / "small"}
    out = ["--out", tmp_path / "out"] if words else []
    status, _, stderr = cli(capsys, "figures", *words.format(**paths).split(), *out)
    assert status == 2 and says.format(**paths) in message(stderr)
    assert not (tmp_path / "out").exists() and not [call for call in called if "--num-samples" in call]


def test_under_torchrun(latents, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    status, _, stderr = cli(capsys, "figures", "latents", "--data", latents)
    assert status == 2 and "not torchrun" in message(stderr)


def test_without_matplotlib(runs, images, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, stderr = cli(capsys, "figures", "convergence", *runs, "--ref", images)
    assert status == 2 and "pip install matplotlib" in message(stderr)
