"""tests/figures.py: principal components, CKNNA, total variation and speed-up against other definitions; each
command's numbers and pixels against what the scripts give; nothing done twice; bad input."""

import contextlib
import functools
import json
import shutil
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import figures
import numpy as np
import pytest
import torch
from conftest import DETECTOR, TINY, cli, message, write_set
from PIL import Image

import fid
from extract_latents import (
    content_id,
    decode,
    encode,
    latent_normalization,
    list_images,
    load_image,
    load_vae,
)
from models import SiT_models, load_encoder
from sample import load_model, rng

pytestmark = pytest.mark.usefixtures("all_on_one_thread")


@pytest.fixture
def panel(monkeypatch):
    """Where figures are plotted: stands in for matplotlib, which the tests' packages leave out."""
    panel, module = MagicMock(), MagicMock()
    figure = module.Figure.return_value
    figure.subplots = lambda rows=1, columns=1, squeeze=True, sharey=False: (
        panel if squeeze else [[panel] * columns])
    figure.savefig = lambda file, **options: file.write(b"a plot")
    monkeypatch.setitem(sys.modules, "matplotlib", module)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    return panel


def lines(panel):
    """What was plotted, last under each label: {label: (x, y)}."""
    calls = [call for call in panel.plot.mock_calls if "label" in call.kwargs]
    return {call.kwargs["label"]: (list(call.args[0]), list(call.args[1])) for call in calls}


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
def stored(tmp_path_factory, latents, images):
    """The latents, with their images."""
    out = shutil.copytree(latents, tmp_path_factory.mktemp("stored") / "latents")
    np.save(out / "images.npy", np.stack([load_image(file, 32) for file in list_images(images)[1]]))
    return out


@pytest.fixture(scope="module", autouse=True)
def one_detector():
    """To load it takes a second: here, that is done once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "load_program", functools.cache(fid.load_program))
        yield


@pytest.fixture
def sheet(monkeypatch):
    """Its call_args.args: columns, rows, cells[row][column], an image or None, and path of the last one."""
    monkeypatch.setattr(figures, "draw_sheet", Mock(wraps=figures.draw_sheet))
    return figures.draw_sheet


def draw(capsys, *words):
    """The cells of the Markdown table that the command prints, without headings."""
    status, stdout, stderr = cli(capsys, "figures", *words)
    assert status == 0, stderr
    lines = [line.strip("| ").split(" | ") for line in stdout.splitlines() if line.startswith("|")]
    return lines[2:]


def refused(capsys, says, *words):
    status, _, stderr = cli(capsys, "figures", *words)
    assert status == 2 and says in message(stderr)


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


def literal_cknna(a, b, k):
    """As Huh et al. define the sets of neighbours and Song et al. the unbiased HSIC."""
    def hsic(K, L):
        n = len(K)
        sums = K.sum() * L.sum() / (n - 1) / (n - 2)
        return np.trace(K @ L) + sums - 2 * (K @ L).sum() / (n - 2)

    def cosines(x):
        """Of all pairs; and whether the second is one of the first one's k nearest."""
        x = x / np.linalg.norm(x, axis=1, keepdims=True).astype(np.float64)
        K, near = x @ x.T, np.zeros((len(x), len(x)), bool)
        for i, row in enumerate(K):
            near[i, [j for j in np.argsort(-row) if j != i][:k]] = True
        return K, near

    (K, near_K), (L, near_L) = cosines(a), cosines(b)
    own = hsic(K * near_K, K * near_K) * hsic(L * near_L, L * near_L)
    return hsic(K * near_K * near_L, L * near_K * near_L) / own**0.5


def cknna_of(a, b, k=10):
    return figures.cknna(*(figures.neighbours(torch.as_tensor(x), k) for x in (a, b)))


def test_cknna():
    rng = np.random.default_rng(0)
    a, turn = rng.normal(size=(40, 6)), np.linalg.qr(rng.normal(size=(6, 6)))[0]
    b = a[:, :4] + 0.5 * rng.normal(size=(40, 4))
    assert cknna_of(a, b, 7) == pytest.approx(expected := literal_cknna(a, b, 7), abs=1e-9)
    assert 0.2 < expected < 0.8
    assert cknna_of(a, 3 * a @ turn) == pytest.approx(1, abs=1e-9)


def in_this_process(called, status=None):
    """A subprocess.Popen that runs a script's main here, or only gives a status."""
    @contextlib.contextmanager
    def popen(command):
        called.append([str(word) for word in command[1:]])
        ended = cli(None, Path(command[1]).stem, *command[2:])[0] if status is None else status
        yield SimpleNamespace(wait=lambda: ended, terminate=lambda: None)
    return popen


def test_convergence(runs, images, capsys, tmp_path, panel, sheet, monkeypatch):
    """What sample.py and fid.py give, in the table, the plot and the sheet; each is done once."""
    called = []
    monkeypatch.setattr(figures.subprocess, "Popen", in_this_process(called))
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
    curves = lines(panel)
    assert list(curves) == ["plain", "aligned"] and curves["aligned"][0] == [2, 4]
    assert curves["aligned"][1][1] == metrics["FID"]
    assert (tmp_path / "convergence.png").read_bytes() == b"a plot"

    columns, rows, cells, path = sheet.call_args.args
    assert columns == [("step", "2"), ("", "4")]
    assert rows == [("class 0", "plain"), ("", "aligned"), ("class 1", "plain"), ("", "aligned"),
                    ("class 2", "plain"), ("", "aligned")]
    guided = ("--classes", 0, 1, 2, "--per-class", 1, "--cfg-scale", 4)
    cli(None, "sample", *sampler, *guided, "--out", png := tmp_path / "classes.png")
    assert np.array_equal(np.concatenate([row[1] for row in cells[1::2]]), np.asarray(Image.open(png)))
    assert not np.array_equal(cells[0][1], cells[1][1]) and path == tmp_path / "images.png"

    called.clear()
    assert draw(capsys, *both) == table and not called
    assert draw(capsys, *both, "--steps", 4, 2) == table
    draw(capsys, *both, "--metric", "IS", "--steps", 4, "--names", "a", "b")
    assert not called and lines(panel)["b"] == ([4], [metrics["IS"]])
    samples = runs[0] / "figures" / "6_ode-2" / "0000002.npz"
    written, record = samples.stat().st_mtime_ns, samples.with_suffix(".json")
    again = ("convergence", runs[0], "--ref", images / "class0", *flags, "--steps", 2)
    draw(capsys, *again)
    assert len(called) == 2 and samples.stat().st_mtime_ns == written  # only measured again
    record.write_text(json.dumps({**json.loads(record.read_text()), "feature_space": "another"}))
    draw(capsys, *again, "--classes", 1)
    assert len(called) == 5 and "another" not in record.read_text() and called[2][-1].endswith(".png")
    samples.unlink()  # it is large: the metrics are enough
    for damaged in (record.read_text()[:-9], "[3]", ""):
        record.write_text(damaged)
        draw(capsys, *again)
    assert len(called) == 11 and json.loads(record.read_text())["count"] == 6
    draw(capsys, *again)
    assert len(called) == 11
    checkpoint = runs[0] / "checkpoints" / "0000002.pt"
    shutil.copy(runs[0] / "checkpoints" / "0000004.pt", checkpoint.with_name("\u00b2\u00b3.pt"))
    draw(capsys, *again)
    kept = checkpoint.read_bytes()
    shutil.copy(runs[0] / "checkpoints" / "0000004.pt", checkpoint)  # trained anew, as it were
    status, _, stderr = cli(capsys, "figures", *again)
    assert status == 2 and "ckpt_content is" in stderr
    checkpoint.write_bytes(kept)


@pytest.fixture
def measured(tmp_path, panel, monkeypatch):
    """Runs with different checkpoints; measure gives what is in the files."""
    monkeypatch.setattr(figures, "draw_classes", lambda path, args: [np.zeros((8, 8, 3), np.uint8)] * 2)
    monkeypatch.setattr(figures, "measure", lambda path, space, args: json.loads(path.read_text()))
    monkeypatch.setattr(figures.fid, "Images", lambda ref, side: None)
    curves = {"a": {90: (9, 1), 100: (6, 2), 1000: (4, 5), 2000: (5, 3)}, "b": {90: (6, 3), 100: (2, 9)},
              "c": {90: (7, 1)}, "d": {30: (3, 8), 90: (6, 3)}, "e": {90: (4, 5)}}
    for name, curve in curves.items():
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        for step, (distance, score) in curve.items():
            (tmp_path / name / "checkpoints" / f"{step}.pt").write_text(json.dumps(
                {"FID": distance, "IS": score}))
    runs = [tmp_path / name for name in curves]
    return "convergence", *runs, "--ref", "x", "--detector", DETECTOR, "--classes", 0, 1, "--out", tmp_path


@pytest.mark.parametrize("metric, best, step, reached", [
    ("FID", 4, 1000, 90 + 10 * np.log(6 / 4) / np.log(6 / 2)), ("IS", 5, 1000, 90 + 10 / 3)])
def test_the_speed_up_that_is_shown(measured, panel, capsys, sheet, metric, best, step, reached):
    """Printed, and as an arrow and a factor; steps in order of their numbers."""
    status, stdout, stderr = cli(capsys, "figures", *measured, "--metric", metric)
    assert status == 0 and f"a: best {metric} {best}, at step {step}\n" in stdout
    assert f"b: reaches it by step {reached:.0f}, {step / reached:.2f} times as fast\n" in stdout
    assert "c: does not reach it\n" in stdout
    for name, first in (("d", 30), ("e", 90)):
        assert f"{name}: reaches it by step {first}, {1000 / first:.2f} times as fast\n" in stdout
    assert f"| a | 1000 | {4:.2f} |  | {5:.2f} |  |  |\n" in stdout  # no sFID
    arrow, factor, *_ = panel.annotate.mock_calls
    assert arrow.args == ("", (pytest.approx(reached), best), (step, best))
    assert factor.args[0] == f"{step / reached:.1f}×"
    assert lines(panel)["a"][0] == [90, 100, 1000, 2000]
    there = [[int(image is not None) for image in row] for row in sheet.call_args.args[2]]
    assert there == 2 * [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0],
                         [0, 1, 0, 0, 0]]
    refused(capsys, "gives no Recall", *measured, "--metric", "Recall")


def test_a_script_that_fails(runs, images, capsys, tmp_path, panel, monkeypatch):
    """Under torchrun if so asked; its status is the command's, and one that is killed is named. This one does
    not start under torchrun, or without matplotlib."""
    called = []
    flags = ("convergence", runs[0], "--ref", images, "--detector", DETECTOR, "--nproc-per-node", 8)
    monkeypatch.setattr(figures, "draw_classes", lambda path, args: [np.zeros((32, 32, 3), np.uint8)])
    monkeypatch.setattr(figures.subprocess, "Popen", in_this_process(called, status=3))
    refused(capsys, "cannot be read as images", *flags, "--ref", DETECTOR)
    status, _, stderr = cli(capsys, "figures", *flags)
    assert status == 3 and len(called) == 1 and not stderr
    assert called[0][:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    assert called[0][called[0].index("--num-samples") + 1] == "50000"
    monkeypatch.setattr(figures.subprocess, "Popen", in_this_process(called, status=-9))
    refused(capsys, "sample.py was killed by signal 9", *flags)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(capsys, "pip install matplotlib", *flags)
    monkeypatch.setenv("RANK", "0")
    refused(capsys, "not torchrun", *flags)


def outputs_of(ckpt, data, t, labels=False):
    """Latents' means x (12, C, H, W) of a set, and each block's output (12, N, D) for them, by hooks."""
    model, trained = load_model(ckpt)
    about = json.loads((data / "latents.json").read_text())
    shift, scale = (np.float32(about[key]).reshape(-1, 1, 1) for key in ("shift", "scale"))
    x = (np.load(data / "moments.npy").astype(np.float32)[:, :4] - shift) * scale
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


def test_features(ckpts, latents, vae, capsys, tmp_path, sheet, monkeypatch):
    """Pixels of the sheet from hooks on the blocks and numpy's SVD, over all 12 images, in batches of 5."""
    monkeypatch.setattr(figures, "BATCH", 5)
    draw(capsys, "features", "--ckpt", ckpts[0], "--ckpt", ckpts[1], "--data", latents, "--t", 1, 0.25, 1,
         "--images", 2, "--layers", 1, 6, "--out", tmp_path)
    columns, rows, cells, _ = sheet.call_args.args
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


def test_models_of_others(capsys, tmp_path, panel):
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


@pytest.mark.parametrize("target", [DETECTOR, "dinov2_vitt14"])
def test_cknna_of_blocks(ckpts, stored, capsys, tmp_path, panel, target):
    """The numbers, table and plot from hooks on the blocks and the definition, term by term."""
    table = draw(capsys, "cknna", "--ckpt", *ckpts, "--data", stored, "--target", target, "--k", 4,
                 "--t", 0.5, "--out", tmp_path)
    found = json.loads((tmp_path / "cknna.json").read_text())
    _, outputs = outputs_of(ckpts[1], stored, 0.5)
    images = torch.from_numpy(np.load(stored / "images.npy")).permute(0, 3, 1, 2)
    if target == DETECTOR:
        features = fid.load_program(target, "cpu")(images)["features"].numpy()
    else:
        features = load_encoder(target, 32)(images).mean(1).numpy()
    expected = [literal_cknna(h.mean(1).numpy(), features, 4) for h in outputs]
    assert found["aligned"]["0.5"] == pytest.approx(expected, abs=1e-5)
    assert [row[:2] for row in table[5:8]] == [["plain", "6"], ["aligned", "1"], ["aligned", "2"]]
    assert [float(row[2]) for row in table[6:]] == pytest.approx(expected, abs=2e-3)
    assert lines(panel)["aligned"] == ([1, 2, 3, 4, 5, 6], found["aligned"]["0.5"])


def test_alignment(runs, stored, vae, capsys, tmp_path, panel):
    """For each checkpoint the block that agrees most, by the definition, on latents of the run's own VAE; FID
    as `convergence` has left it."""
    fixed = shutil.copytree(runs[0], tmp_path / "fixed", ignore=shutil.ignore_patterns("figures"))
    run = tmp_path / "tuned"
    flags = ("--data", stored, "--run-dir", run, "--repa-depth", 2, "--repa-encoder", "dinov2_vitt14")
    tune = ("--tune-vae", "--lpips-weight", 0, "--gan-weight", 0, "--max-steps", 4, "--ckpt-every", 2)
    assert cli(None, "train", *TINY, *flags, *tune, "--lr", 0.02, "--ema-decay", 0)[0] == 0
    sampler = ("--num-samples", 6, "--mode", "ode", "--num-steps", 2)
    words = ("alignment", fixed, run, "--data", stored, "--target", "dinov2_vitt14", "--k", 4, *sampler,
             "--out", tmp_path, "--names", "fixed", "tuned")
    table = draw(capsys, *words)
    pictures = torch.from_numpy(np.load(stored / "images.npy")).permute(0, 3, 1, 2)
    features = load_encoder("dinov2_vitt14", 32)(pictures).mean(1).numpy()
    found = json.loads((tmp_path / "alignment.json").read_text())
    assert [row[:2] for row in table] == [["fixed", "2"], ["fixed", "4"], ["tuned", "2"], ["tuned", "4"]]
    for row, cells, folder in zip(found, table, (fixed, fixed, run, run)):
        ckpt = folder / "checkpoints" / f"{row['step']:07d}.pt"
        own = str(vae) if folder == fixed else f"{ckpt.with_suffix('')}-vae"
        shift, scale = latent_normalization(load_vae(own).config)
        data = shutil.copytree(stored, tmp_path / f"{folder.name}_{row['step']}")
        np.save(data / "moments.npy", encode(load_vae(own), pictures).numpy())  # in float32
        about = json.loads((data / "latents.json").read_text())
        (data / "latents.json").write_text(json.dumps(about | {"shift": shift, "scale": scale}))
        _, outputs = outputs_of(ckpt, data, 0.5)
        agreement = [literal_cknna(h.mean(1).numpy(), features, 4) for h in outputs]
        assert row["CKNNA"] == pytest.approx(max(agreement), abs=1e-4)
        assert agreement[row["layer"] - 1] == pytest.approx(max(agreement), abs=1e-4)
        assert cells[2:] == [str(row["layer"]), f"{row['CKNNA']:.3f}"] and row["FID"] is None
    assert lines(panel)["tuned"] == ([2, 4], [row["CKNNA"] for row in found[2:]])

    made = {"reference": "a.npz", "feature_space": "Inception"}
    for row, folder in zip(found[:3], (fixed, fixed, run)):
        record = folder / "figures/6_ode-2" / f"{row['step']:07d}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({**made, "FID": 9 - 2 * row["CKNNA"]}))
        content = content_id(folder / "checkpoints" / f"{row['step']:07d}.pt")
        record.with_suffix(".npz.json").write_text(json.dumps({"ckpt_content": content}))
    panel.plot.reset_mock()
    table = draw(capsys, *words, "--layer", 3)
    assert [cells[2] for cells in table] == ["3"] * 4 and [len(cells) for cells in table] == [5, 5, 5, 4]
    dots, tuned = [call.args for call in panel.plot.mock_calls if "label" not in call.kwargs]
    assert len(dots[0]) == 2 and tuned[1] == (9 - 2 * found[2]["CKNNA"],)
    draw(capsys, *words)
    assert panel.set_title.call_args.args == ("r² = 1.00",)  # of the line from which they were made
    assert panel.set.call_args.kwargs["ylabel"] == "FID (Inception)"
    for damaged in ({"FID": "x"}, {"FID": None}, {}):
        record.write_text(json.dumps(damaged))
        assert [len(cells) for cells in draw(capsys, *words, "--layer", 1)] == [5, 5, 4, 4]
    record.write_text(json.dumps({**made, "reference": "b.npz", "FID": 3.5}))
    refused(capsys, "different references", *words)
    record.with_suffix(".npz.json").write_text(json.dumps({"ckpt_content": "of one before"}))
    assert [len(cells) for cells in draw(capsys, *words, "--layer", 1)] == [5, 5, 4, 4]


def test_a_model_without_null_class(latents, vae, capsys, tmp_path, panel):
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
    refused(capsys, "num_classes is 3, not 10", "features", "--ckpt", ckpt, "--data", other)


def test_latents(latents, capsys, tmp_path, sheet):
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
    columns, rows, cells, _ = sheet.call_args.args
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
    _, first, other, last = sheet.call_args.args[2][0]
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
    assert names("runs/SiT-XL-2", "runs/SiT-XL-2_repa-depth-8") == ["SiT-XL-2", "repa-depth-8"]


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
    ("convergence {run} --ref {images} --detector {ckpt}", "cannot be loaded"),
    ("features --ckpt {ckpt} --data {other}", "vae is {vae}, not nothing"),
    ("features --ckpt {ckpt} --data {small}", "latent_shape is [4, 8, 8], not [4, 4, 4]"),
    ("features --ckpt {ckpt} --data {latents} --count 1", "at least 2"),
    ("features --ckpt {ckpt} --data {latents} --layers 7", "has 6 blocks"),
    ("features --ckpt {ckpt} --data {latents} --t 1.5", "--t"),
    ("cknna --ckpt {ckpt} --data {latents}", "--store-images"),
    ("cknna --ckpt {ckpt} --data {latents} --target latents --k 12", "at least 13"),
    ("cknna --ckpt {ckpt} --data {stored} --target dinov2_nowhere", "cannot be loaded"),
    ("alignment {run} --data {latents}", "--store-images"),
    ("alignment {run} --data {stored} --steps 3 --target dinov2_vitt14", "checkpoints has no 3.pt"),
    ("alignment {run} --data {stored} --target dinov2_vitt14 --k 4 --layer 7", "has 6 blocks"),
    ("alignment {run} --data {stored} --k 12", "at least 13"),
    ("alignment {run} --data {larger} --target {detector} --k 4", "it makes latents of [4, 16, 16]"),
    ("latents --data {latents} {other}", "other images"),
    ("latents --data {latents} --count 1", "at least 2"),
    ("convergence {run} --ref {images} --detector {detector} --weights x", "not allowed with"),
    ("", "COMMAND")])
def test_bad_input(words, says, runs, ckpts, images, latents, stored, vae, capsys, tmp_path, panel):
    write_set(tmp_path / "other", scale=1, shift=0)
    write_set(tmp_path / "small", size=4, vae=str(vae))
    write_set(tmp_path / "larger", image_size=64)
    paths = {"run": runs[0], "ckpt": ckpts[0], "images": images, "latents": latents, "stored": stored,
             "detector": DETECTOR, "vae": vae.name}
    paths |= {name: tmp_path / name for name in ("other", "small", "larger")}
    out = ["--out", tmp_path / "out"] if words else []
    refused(capsys, says.format(**paths), *words.format(**paths).split(), *out)
    assert not (tmp_path / "out").exists()
