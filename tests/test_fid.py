"""Protects fid.py: the numbers, against a reference Inception's, closed forms, scipy, brute force and numpy.

Also: every form of input, references that it writes and reads, memory, weights and detectors, trusted or
not; and that whatever is bad ends in one sentence, with nothing written.
"""

import fcntl
import io
import json
import math
import tracemalloc
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DETECTOR, cli, message
from PIL import Image
from scipy import linalg

import fid
from extract_latents import load_image
from fid import InceptionV3, frechet_distance, inception_score, precision_recall, resize_bilinear

METRICS = ["FID", "sFID", "IS", "Precision", "Recall"]
DRAWN = np.arange(3, 60, 3)  # rows that are drawn from a reference, in the place of 10,000
pytestmark = pytest.mark.usefixtures("all_on_one_thread")
RELEASED = "4f5e4b100286952afb401a7c4049d030b8e427e342e90dd345e82fcc106bbb52"


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """(network, file) of random weights, in the released file's format: a pickle without batch counts."""
    network, state = InceptionV3().eval().requires_grad_(False), {}
    shapes = {name: x.shape for name, x in network.state_dict().items() if not name.endswith("_tracked")}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        random = np.random.RandomState(i)  # its streams never change
        if name.endswith("conv.weight"):
            value = random.standard_normal(shape) * math.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            value = random.uniform(0.5, 1.5, shape)
        else:
            value = random.standard_normal(shape) * (0.002 if name == "fc.weight" else 0.1)
        state[name] = torch.from_numpy(value.astype(np.float32))
    network.load_state_dict(state)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return network, path


def test_inception_has_the_released_tensors_and_numbers(inception):
    """Names and shapes by their hash. Numbers of torchvision's Inception3, patched as by pytorch-fid."""
    network, path = inception
    shapes = {name: list(value.shape) for name, value in torch.load(path, weights_only=True).items()}
    assert len(shapes) == 472
    assert sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest() == RELEASED

    x = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 64, 64))).to(torch.uint8)
    pool, spatial, logits = network(x).values()
    probabilities = logits.softmax(1)
    assert pool[1, [0, 1, 2047]].tolist() == pytest.approx([0.360482, 0.0869078, 0.543508], rel=2e-4)
    assert [pool.mean().item(), pool.std().item()] == pytest.approx([9.04595, 12.65094], rel=1e-4)
    assert spatial[1, [0, 1, 700, 2022]].tolist() == pytest.approx([0, 0, 7.91232, 2.91032], rel=2e-4)
    assert [spatial.mean().item(), spatial.std().item()] == pytest.approx([3.69254, 4.81730], rel=1e-4)
    expected = [1.341658e-4, 7.193221e-4, 1.043184e-4, 1.105524e-3]
    assert probabilities[1, [0, 1, 700, 1007]].tolist() == pytest.approx(expected, rel=1e-3)


def test_resize_is_that_of_tensorflow_1():
    """Against one matrix per side, of the two weights in each row."""
    x, sides = np.random.RandomState(0).randint(0, 256, (2, 3, 512, 7)), []
    for length in x.shape[2:]:
        source = np.arange(299, dtype=np.float32) * (np.float32(length) / np.float32(299))
        low, one = source.astype(int).clip(max=length - 1), np.eye(length)
        weight = (source - low)[:, None]
        sides.append((1 - weight) * one[low] + weight * one[(low + 1).clip(max=length - 1)])
    out = resize_bilinear(torch.from_numpy(x).float())
    np.testing.assert_allclose(out, sides[0] @ x @ sides[1].T, atol=1e-3)


def statistics(x):
    return x.mean(0), np.cov(x, rowvar=False)


def adm_frechet(x, y):
    """ADM's and TTUR's formula, from features."""
    (m1, s1), (m2, s2) = statistics(x), statistics(y)
    return ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2)).real


def test_frechet_distance():
    """By sqrtm; also with fewer points than dimensions."""
    random = np.random.RandomState(0)
    x = random.standard_normal((500, 60)) @ random.standard_normal((60, 60))
    y = random.normal(1, 2, (400, 60))
    assert frechet_distance(*statistics(x), *statistics(y)) == pytest.approx(adm_frechet(x, y), rel=1e-9)
    x, y = random.standard_normal((20, 80)), random.normal(0, 1.5, (30, 80))
    assert frechet_distance(*statistics(x), *statistics(y)) == pytest.approx(adm_frechet(x, y), rel=1e-4)


def test_inception_score():
    one_hot = np.eye(4, dtype=np.float32)[[*range(4)] * 1250 + [0] * 10]
    assert inception_score(one_hot) == pytest.approx((4 + 1) / 2)  # the short last chunk counts as much
    by_class = np.eye(4, dtype=np.float32).repeat(100, 0)
    assert inception_score(by_class, split_size=100) == pytest.approx(1)  # in order, never shuffled


def exact_distances(u, v):
    return ((u[:, None].astype(np.float64) - v) ** 2).sum(2)


def half_distances(u, v):
    u, v = u.astype(np.float16), v.astype(np.float16)
    norm_u, norm_v = ((x * x).astype(np.float32).sum(1).astype(np.float16) for x in (u, v))
    dot = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
    return np.maximum(norm_u[:, None] - 2 * dot + norm_v, 0)


def shares_in_manifolds(reference, samples, distances, k=3):
    """Precision and recall by their definition, of a function that gives all distances of two sets."""
    reference_radii, sample_radii = (np.sort(distances(x, x), axis=1)[:, k] for x in (reference, samples))
    between = distances(reference, samples)
    return (between <= reference_radii[:, None]).any(0).mean(), (between <= sample_radii).any(1).mean()


@pytest.mark.parametrize("block, k", [(7, 1), (10_000, 3), (16, 5)])
def test_precision_recall_by_brute_force(block, k):
    """Of small whole numbers with many ties; of numbers that float16 rounds; of some too large for it."""
    random = np.random.RandomState(k)
    grids = random.randint(0, 6, (40, 3)), random.randint(2, 10, (33, 3))
    normal = [np.abs(random.standard_normal((n, 200))).astype(np.float32) for n in (150, 180)]
    rounded = shares_in_manifolds(*normal, half_distances, k)
    assert rounded != shares_in_manifolds(*normal, exact_distances, k)
    assert precision_recall(*normal, k, block) == pytest.approx(rounded, abs=1e-12)
    for sets in (grids, [x * 100 for x in grids]):  # squares up to 10^7 are exact in float32
        expected = shares_in_manifolds(*sets, exact_distances, k)
        assert 0 < expected[0] < 1 and 0 < expected[1] < 1 and expected[0] != expected[1]
        assert precision_recall(*sets, k, block) == pytest.approx(expected, abs=1e-12)


def tiny(images):
    """Means of 4 x 4 cells, which for the images of `sets` are multiples of 1 / 64: exact in any order."""
    cells = images.float().unflatten(3, (4, -1)).unflatten(2, (4, -1)).mean((3, 5)) / 256
    features = cells.flatten(1)
    return {"features": features, "spatial": cells[:, 0].flatten(1), "logits": 8 * features[:, :10]}


def expected_of(reference, samples, drawn=slice(None)):
    """(metrics, statistics of the reference) in numpy, with the images `drawn` from the reference."""
    r, s = ({name: y.double().numpy() for name, y in tiny(torch.from_numpy(x).permute(0, 3, 1, 2)).items()}
            for x in (reference, samples))
    p = np.exp(s["logits"]) / np.exp(s["logits"]).sum(1, keepdims=True)
    values = [adm_frechet(r[name], s[name]) for name in ("features", "spatial")]
    values.append(math.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    values += shares_in_manifolds(r["features"][drawn], s["features"], half_distances)
    stored = [*statistics(r["features"]), *statistics(r["spatial"])]
    return dict(zip(METRICS, values)), dict(zip(("mu", "sigma", "mu_s", "sigma_s"), stored))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(folder, 60 references, 50 samples), 32 x 32 x 3, in all forms that fid.py reads, and tiny.pt2."""
    root, random = tmp_path_factory.mktemp("sets"), np.random.RandomState(0)
    patterns, arrays = random.uniform(-1, 1, (2, 4, 4, 3)), []  # two directions, so that neighbours exist
    for name, count, shift in (("reference", 60, 0), ("samples", 50, 9)):
        cells = np.tensordot(random.normal(shift, 8, (count, 2)), patterns, 1)
        cells += random.normal(30, 3, cells.shape)
        arrays.append(np.kron(cells.clip(0, 63).astype(np.uint8) * 4, np.ones((1, 8, 8, 1), np.uint8)))
        np.savez(root / f"{name}.npz", arr_0=arrays[-1])
        np.savez_compressed(root / f"{name}_compressed.npz", arr_0=arrays[-1])
        np.save(root / f"{name}.npy", arrays[-1])
        for i, image in enumerate(arrays[-1]):
            folder = root / ("elsewhere" if i % 3 == 2 else name) / f"{name}{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:03d}.png")
        (root / name / "linked").symlink_to(root / "elsewhere" / f"{name}2")
        (root / name / ".DS_Store").write_text("hidden files are no images")
    (root / "tiny.pt2").write_text("stands for `tiny`")
    with pytest.MonkeyPatch.context() as patch:
        load = fid.load_program
        patch.setattr(fid, "load_program", lambda file, device: (
            tiny if file == root / "tiny.pt2" else load(file, device)))
        yield root, *arrays


def evaluate(capsys, root, *args, detector="tiny.pt2"):
    """Run fid.py in the folder of `sets`: (metrics, everything that --json wrote, stdout, stderr)."""
    args = [root / x if (root / str(x)).exists() else x for x in (*args, "--detector", detector)]
    args += ["--batch-size", 7, "--json", root / "out.json"]
    (root / "out.json").unlink(missing_ok=True)  # of other samples, it would be refused
    status, stdout, stderr = cli(capsys, "fid", *args)
    assert status == 0, stderr
    written = json.loads((root / "out.json").read_text())
    metrics = {name: written[name] for name in METRICS if name in written}
    table = [line for line in stdout.splitlines() if line.startswith("  ")]
    assert table == [f"  {name:<10} {value:.4f}" for name, value in metrics.items()]
    return metrics, written, stdout, stderr


def refused(capsys, says, *args):
    status, stdout, stderr = cli(capsys, "fid", *args)
    said = message(stderr)
    assert status == 2 and says in said and said.startswith("fid.py: error: ") and not stdout, stderr


@pytest.mark.parametrize("samples, reference, left_out", [
    ("samples.npz", "reference.npz", ()), ("samples_compressed.npz", "reference", ()),
    ("samples.npy", "reference_compressed.npz", ("spatial", "sFID", "logits", "IS")),
    ("samples", "reference.npy", ("spatial", "sFID"))])
def test_command_equals_numpy(capsys, sets, monkeypatch, samples, reference, left_out):
    """On every form of images, with the metrics that the detector's outputs allow. Statistics are of all
    images; precision and recall of those drawn from a reference, but an .npz, which holds what was drawn."""
    root, array, of_samples = sets
    outputs = lambda x: {name: y for name, y in tiny(x).items() if name not in left_out}  # noqa: E731
    monkeypatch.setattr(fid, "load_program", lambda path, device: outputs)
    monkeypatch.setattr(fid.Images, "drawn", lambda self: DRAWN)
    count, drawn = (60, slice(None)) if reference.endswith("z") else (19, DRAWN)
    if files := fid.Images(root / reference).files:
        array = array[[int(file.stem) for file in files]]
    metrics, written, stdout, stderr = evaluate(capsys, root, samples, "--ref", reference, "--num-workers", 2)
    expected = expected_of(array, of_samples, drawn)[0]
    assert metrics == pytest.approx({x: expected[x] for x in expected if x not in left_out}, rel=1e-6)
    assert len({0, 1, metrics["Precision"], metrics["Recall"]}) == 4
    space = f"detector {sha256((root / 'tiny.pt2').read_bytes()).hexdigest()[:16]}"
    assert written == {**metrics, "samples": str(root / samples), "reference": str(root / reference),
                       "count": 50, "feature_space": space}
    assert f"{samples} (50 images)" in stdout and f"{space}, not ImageNet" in stdout
    assert f"{reference} ({count} images, statistics of 60)" in stdout


@pytest.mark.parametrize("form", ["images.npz", "images.npy"])
def test_arrays_are_read_by_rows(tmp_path, form):
    array = np.random.default_rng(0).integers(0, 256, (10_500, 16, 16, 3), np.uint8)  # 8 MB
    np.savez(tmp_path / form, array) if form.endswith("z") else np.save(tmp_path / form, array)
    tracemalloc.start()
    images = fid.Images(tmp_path / form)
    assert tracemalloc.get_traced_memory()[1] < 1.2e6  # checksums are computed by parts of 1 MB
    tracemalloc.reset_peak()
    assert np.array_equal(images.read([7, 9000]), array[[7, 9000]])
    assert tracemalloc.get_traced_memory()[1] < 2e5
    tracemalloc.stop()
    drawn = np.random.default_rng(0).permutation(10_500)[:10_000]
    assert np.array_equal(images.drawn(), np.sort(drawn))  # for ever, or references would change


def test_saved_references(capsys, sets, tmp_path, monkeypatch):
    """They have the images drawn and the statistics of all, which replace those of an .npz's own images."""
    (root, reference, samples), file = sets, tmp_path / "ref.npz"
    monkeypatch.setattr(fid.Images, "drawn", lambda self: DRAWN)
    args = ("--save-stats", file, root / "reference.npz", "--detector", root / "tiny.pt2")
    with monkeypatch.context() as patch:
        patch.setattr(fid, "lock", lambda path, output: Path(output).touch())
        refused(capsys, "ref.npz exists", *args)  # another process has made it meanwhile
    file.unlink()
    assert "19 images, statistics of 60" in cli(capsys, "fid", *args)[1]
    expected_metrics, expected = expected_of(reference, samples, DRAWN)
    with np.load(file) as archive:  # as ADM's evaluator reads it
        stored = dict(archive)
    space = {"feature_space": stored.pop("feature_space")}
    assert set(stored) == {"arr_0", *expected}
    for name, value in {**expected, "arr_0": reference[DRAWN]}.items():
        np.testing.assert_allclose(stored[name], value, rtol=1e-9, atol=1e-12)
        assert stored[name].dtype == value.dtype
    metrics, _, stdout, _ = evaluate(capsys, root, "samples.npy", "--ref", file)
    assert metrics == pytest.approx(expected_metrics, rel=1e-6) and "19 images, stored statistics" in stdout
    of_another = ("--ref", file, "--detector", DETECTOR)
    refused(capsys, "holds statistics of detector", root / "samples.npz", *of_another)

    np.savez(file, stored["arr_0"], mu=expected["mu"] + 2, sigma=expected["sigma"], **space)
    for pair in ((file, "--ref", "reference"), ("reference", "--ref", file)):
        metrics, *_ = evaluate(capsys, root, *pair)
        assert metrics["FID"] == pytest.approx(48 * 2**2, rel=1e-6) and "sFID" not in metrics

    file.unlink()
    monkeypatch.setattr(fid, "init_distributed", lambda *_: (1, 2, torch.device("cpu")))
    assert cli(capsys, "fid", *args)[:2] == (0, "") and not file.exists()  # the first process writes


def test_only_references_in_folders_are_cropped(capsys, sets, tmp_path):
    """As ADM crops: to the samples' side, or to --image-size; all in a fixed shuffled order."""
    random, (root, _, samples), folder = np.random.RandomState(0), sets, tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(random.randint(0, 256, (40, 48 + i, 3), np.uint8)).save(folder / f"{i}.png")
    files, detector = fid.Images(folder, 24).files, ("--detector", root / "tiny.pt2")
    assert [int(file.stem) for file in files] == np.random.default_rng(0).permutation(6).tolist()
    for side, size in ((24, ("--image-size", 24)), (32, ())):
        cropped = np.stack([load_image(x, side) for x in files])
        metrics, *_ = evaluate(capsys, root, "samples.npz", "--ref", folder, *size)
        assert metrics["FID"] == pytest.approx(expected_of(cropped, samples)[0]["FID"], rel=1e-6)
    save = (folder, "--save-stats", tmp_path / "ref.npz", "--image-size", 32)
    assert cli(capsys, "fid", *save, *detector)[0] == 0
    with np.load(tmp_path / "ref.npz") as reference:
        assert np.array_equal(reference["arr_0"], cropped)
    for args in (("samples.npy", "--ref", "reference.npz"), ("reference.npz", "--save-stats", "x.npz")):
        args = [root / x if "." in x else x for x in args]
        refused(capsys, "images have 32 x 32 pixels, not 24 squared", *args, "--image-size", 24, *detector)
    refused(capsys, "not 40 squared", folder, "--ref", folder, "--image-size", 32, "--detector", DETECTOR)
    (squares := tmp_path / "squares").mkdir()
    for i in range(6):
        Image.new("RGB", (40 - (i == 5), 40)).save(squares / f"{i}.png")
    refused(capsys, "5.png (of (40, 39) pixels, and others of (40, 40))", squares, "--ref", folder, *detector)
    files[-1].write_bytes(files[-1].read_bytes()[:-40])
    says = f"{folder}: cannot be used: {files[-1]} ("
    refused(capsys, says, root / "samples.npz", "--ref", folder, *detector)


def test_demo_detector_knows_the_shapes_and_ranks_what_spoils_them(monkeypatch):
    monkeypatch.syspath_prepend(DETECTOR.parent)
    from draw_images import CLASSES, draw

    module, labels = fid.load_program(DETECTOR, torch.device("cpu")), np.arange(200) % 10
    drawn = [np.asarray(draw(CLASSES[c], np.random.default_rng([7, i]), 64)) for i, c in enumerate(labels)]
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    assert (module(images)["logits"].argmax(1).numpy() == labels).mean() > 0.98
    blurred = F.avg_pool2d(images[100:].float(), 5, 1, 2).round().to(torch.uint8)
    clean, other, *spoilt = (module(x)["features"].double().numpy()
                             for x in (images[:100], images[100:], images[100:] // 2, blurred))
    assert min(adm_frechet(clean, x) for x in spoilt) > 3 * adm_frechet(clean, other)


def test_inception_by_command(capsys, sets, inception, tmp_path, monkeypatch):
    """Weights are downloaded once, and checked; outputs and what ADM stores arrive where they belong."""
    (network, weights), (_, reference, samples) = inception, sets
    np.save(tmp_path / "samples.npy", samples[:5])
    stored = {"mu": np.ones(2048), "sigma": np.eye(2048), "mu_s": np.ones(63), "sigma_s": np.eye(63)}
    np.savez(tmp_path / "adm.npz", reference[:4], **stored)
    compare, given = (tmp_path / "samples.npy", "--ref", tmp_path / "adm.npz"), []
    monkeypatch.setattr(fid, "frechet_distance", lambda *x: given.append(x) or len(given))  # which is slow
    monkeypatch.setattr(fid, "resize_bilinear", lambda x: resize_bilinear(x, 75))  # 299 takes longer
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for url, says in (("file:///no", "--weights, and file:///no"), (weights.as_uri(), "invalid hash value")):
        monkeypatch.setattr(fid, "WEIGHTS_URL", url)
        refused(capsys, says, *compare)
        assert not any((tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", digest := sha256(weights.read_bytes()).hexdigest())
    download = torch.hub.download_url_to_file

    def alone(*args):  # other processes of a machine wait
        with open(tmp_path / "download.lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        download(*args)

    monkeypatch.setattr(torch.hub, "download_url_to_file", alone)
    _, stdout, _ = cli(capsys, "fid", *compare, "--json", tmp_path / "out.json")
    assert f"features: {fid.ADM_INCEPTION}\n" in stdout
    monkeypatch.setattr(fid, "WEIGHTS_URL", "file:///no")
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", "")
    refused(capsys, f"{fid.ADM_INCEPTION}, not of Inception with weights {digest[:16]}", *compare)

    r, s = (list(network(torch.from_numpy(x).permute(0, 3, 1, 2)).values())
            for x in (reference[:4], samples[:5]))
    written = json.loads((tmp_path / "out.json").read_text())
    metrics = [1, 2, inception_score(s[2].softmax(1)), *precision_recall(r[0], s[0])]
    assert [written[name] for name in METRICS] == pytest.approx(metrics, rel=1e-5)
    computed = [x for features in s[:2] for x in statistics(features.double().numpy())]
    for found, expected in zip(sum(given, ()), [*computed[:2], stored["mu"], stored["sigma"], *computed[2:],
                                                stored["mu_s"], stored["sigma_s"]], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


# What a pickle may hold: code, which makes the file `ran` when it is read
Payload = type("Payload", (), {"__reduce__": lambda self: (Path.touch, (Path("ran"),))})
IMAGES = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3)).astype(np.uint8)
STATISTICS = {"mu": np.zeros(48), "sigma": np.eye(48), "feature_space": "detector " + 16 * "0"}


def file_of(save, *arrays, cut=None, damage=0, **named):
    """What numpy's `save` writes, as bytes."""
    file = io.BytesIO()
    save(file, *arrays, **named)
    data = bytearray(file.getvalue())
    data[len(data) // 2] ^= damage
    return bytes(data[:cut])


@pytest.mark.parametrize("name, data, says", [(name, data, "cannot be read as images") for name, data in {
    "missing.npz": None, ".": None, "text": b"text", "cut.npz": file_of(np.savez, IMAGES, cut=-9),
    "damaged.npz": file_of(np.savez_compressed, IMAGES, damage=255), "name.npz": file_of(np.savez, a=IMAGES),
    "floats.npz": file_of(np.savez, IMAGES.astype(np.float32)), "three.npy": file_of(np.save, IMAGES[:3]),
    "order.npz": file_of(np.savez, np.asfortranarray(IMAGES)), "grey.npz": file_of(np.savez, IMAGES[..., 0]),
    "code.npy": file_of(np.save, np.array([Payload()])), "code.npz": file_of(np.savez, np.array([Payload()])),
    "code_too.npz": file_of(np.savez, IMAGES, mu=np.array([Payload()]))}.items()] + [
    ("wide.npz", file_of(np.savez, IMAGES, **{**STATISTICS, "mu": np.zeros(9), "sigma": np.eye(9)}),
     "mu of another network"),
    ("adm.npz", file_of(np.savez, IMAGES, mu=np.zeros(48), sigma=np.eye(48)),
     f"statistics of {fid.ADM_INCEPTION}")])
def test_bad_files(capsys, sets, tmp_path, monkeypatch, name, data, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "sha256", lambda path: 64 * "0")
    if data is not None:
        Path(name).write_bytes(data)
    for args in ((name, "--ref", sets[0] / "reference.npz"), (sets[0] / "samples.npz", "--ref", name)):
        refused(capsys, says, *args, "--detector", sets[0] / "tiny.pt2")
    assert not Path("ran").exists()


@pytest.mark.parametrize("args, says", [
    ("", "--ref --save-stats is required"), ("--ref {ref} --save-stats x.npz", "not allowed with"),
    ("--save-stats x.pkl", ".npz"), ("--save-stats x.npz --json x.json", "no --json"),
    ("--ref {ref} --weights w --detector d", "not allowed with"), ("--ref {ref} --reff x", "--reff"),
    *[(f"--ref {{ref}} --{flag} 0", flag) for flag in ("batch-size", "num-workers", "image-size")],
    *[(f"--ref {{ref}} --{flag}", f"{flag.split()[1]} cannot be loaded")
      for flag in ("weights missing", "weights code", "detector missing", "detector code.pt2")],
    (lambda x: {**tiny(x), "spatial": tiny(x)["spatial"].log().log()}, "not finite"),
    (lambda x: {**tiny(x), "spatial": x.float()}, "(B, D)"),
    (lambda x: {"features": tiny(x)["features"].repeat(2, 1)}, "(B, D)"),
    (lambda x: {"pool": x.flatten(1)}, "features")])
def test_bad_flags_and_networks(capsys, sets, tmp_path, monkeypatch, args, says):
    """Code that is pickled in weights, or somewhere in a program, does not run; outputs must be features."""
    monkeypatch.chdir(tmp_path)
    if callable(outputs := args):
        monkeypatch.setattr(fid, "load_program", lambda path, device: outputs)
        args = "--save-stats ref.npz --detector code --batch-size 3"
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)  # which an earlier test may have left
    code = file_of(lambda file, x: torch.save(x, file), {"fc.bias": Payload()})
    Path("code").write_bytes(code)
    with zipfile.ZipFile(DETECTOR) as good, zipfile.ZipFile("code.pt2", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, code if name.endswith(".pt") else good.read(name))
    refused(capsys, says, sets[0] / "samples.npz", *args.format(ref=sets[0] / "reference.npz").split())
    assert {path.name for path in tmp_path.iterdir()} == {"code", "code.pt2"}
