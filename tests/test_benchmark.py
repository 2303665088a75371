"""tests/benchmark.py: the columns that are the same on every machine equal the paper's; the modes run small on a CPU."""

import json
from statistics import median

import pytest
import torch
from benchmark import KINDS, METHODS, PAPER, count_macs, external_parameters, load_encoder, settings_of
from conftest import ROOT, cli

from models import HEADS, build_model

DEMO_VAE = ROOT / "tests" / "demo_vae"
SMALL = ("--device", "cpu", "--model", "SiT-Ti/2", "--micro-batch", 2, "--steps", 1, "--repeats", 2,
         "--repa-encoder", "dinov2_vitt14")


def measure(capsys, *args):
    """What the benchmark prints."""
    status, stdout, stderr = cli(capsys, "benchmark", *args)
    assert status == 0, stderr
    return stdout


@pytest.mark.parametrize("method", METHODS)
def test_gflops_and_parameters_are_the_papers(method):
    """Table 4, to the digit that it prints; for SRA's head it says 2 M, and its GFLOPs are those of a head of 5.3 M."""
    with torch.device("meta"):
        encoder = load_encoder("dinov2_vitl14") if method == "REPA" else None
    settings = settings_of(method, "SiT-XL/2")
    as_paper, with_attention, external = count_macs(settings, encoder)
    external_m, head_m, _, gflops, _ = PAPER["SiT-XL/2", method]
    assert as_paper / 1e9 == pytest.approx(gflops, abs=0.02)
    products = 28 * 2 * 256**2 * 1152  # QK^T and AV of 28 blocks, 256 tokens of width 1152
    products += {"REPA": 24 * 2 * 257**2 * 1024, "SRA": 20 * 2 * 256**2 * 1152}.get(method, 0)
    assert with_attention - as_paper == products
    assert (external > 0.3 * with_attention) == (method in ("REPA", "SRA")) and external < with_attention / 2
    assert abs(external_parameters(settings, encoder) / 1e6 - external_m) < 1
    with torch.device("meta"):
        model = build_model(settings, heads=True)
    head = sum(p.numel() for name, p in model.named_parameters() if name.startswith(HEADS))
    assert head == 5_311_872 if method == "SRA" else int(head / 1e6) == head_m


def test_train_mode(capsys, tmp_path):
    stdout = measure(capsys, "train", *SMALL, "--json", tmp_path / "b.json")
    figures = json.loads((tmp_path / "b.json").read_text())
    plain, aligned = figures["plain"], figures["VAE-REPA"]
    assert figures["REPA"]["external_parameters_m"] > 0 == aligned["external_parameters_m"] < figures["SRA"]["external_parameters_m"]
    assert plain["head_parameters_m"] == 0 < aligned["head_parameters_m"] and plain["gflops_as_paper"] < aligned["gflops_as_paper"]
    for name in METHODS:
        f = figures[name]
        assert len(f["step_ms"]) == 2 and f["images_per_s"] == pytest.approx(2e3 / (sum(f["step_ms"]) / 2))
        # 8 devices at 32 images each are a batch of 256; here a step has 2
        assert f["it_per_s_at_256"] == pytest.approx(f["images_per_s"] * 8 / 256) and not f["it_per_s_measured"]
        settings = settings_of(name, "SiT-Ti/2", 32)
        _, macs, external = count_macs(settings, load_encoder("dinov2_vitt14") if name == "REPA" else None)
        assert f["gflops_with_attention"] == macs / 1e9
        flops = (6 * (macs - external) + 2 * external) * f["images_per_s"]
        assert f["utilisation"] == pytest.approx(flops / (1e12 * f["product_tflops"]))
    assert aligned["cost_over_plain"] == pytest.approx(
        sum(a / b - 1 for a, b in zip(aligned["step_ms"], plain["step_ms"])) / 2)
    assert figures["made_with"]["model"] == "SiT-Ti/2" and figures["made_with"]["torch"] == torch.__version__
    assert f"{aligned['images_per_s']:.1f}" in stdout and "utilisation" in stdout


def test_profile_mode(capsys, tmp_path):
    measure(capsys, "profile", *SMALL, "--json", tmp_path / "b.json")
    spent = json.loads((tmp_path / "b.json").read_text())["ms_per_step"]
    assert {"matrix products", "attention", "optimizer", "EMA"} <= set(spent) <= {kind for kind, _ in KINDS} | {"element-wise and the rest"}
    assert max(spent, key=spent.get) in ("matrix products", "attention", "element-wise and the rest")


def test_sample_mode(capsys, tmp_path):
    stdout = measure(capsys, "sample", "--device", "cpu", "--model", "SiT-Ti/2", "--vae", DEMO_VAE, "--batch-size", 2,
                  "--num-steps", 4, "--repeats", 3, "--json", tmp_path / "b.json")
    f = json.loads((tmp_path / "b.json").read_text())
    for name in ("plain", "ours"):
        assert len(f[name]["sampler_s"]) == 3
        assert f[name]["images_per_s"] == pytest.approx(2 / (median(f[name]["sampler_s"]) + f["decode_ms"] / 1e3))
        assert f[name]["hours_1_device"] == pytest.approx(50_000 / f[name]["images_per_s"] / 3600)
        assert f[name]["hours_8_devices"] == pytest.approx(f[name]["hours_1_device"] / 8)
    assert f["speedup"] == pytest.approx(median(a / b for a, b in zip(f["plain"]["sampler_s"], f["ours"]["sampler_s"])))
    assert f["decode_share"] == pytest.approx(f["decode_ms"] / (f["decode_ms"] + 1e3 * median(f["ours"]["sampler_s"])))
    # on a CPU the plain loop is true float32, so that the same noise and labels give the same latents to the bit
    assert f["plain"]["difference_from_float32"] == 0
    assert 1e-7 < f["difference_nudged"] < 0.03 and 1e-5 < f["ours"]["difference_from_float32"] < 0.03
    assert f["difference_other_seed"] > 0.3
    # t = 1, 0.68, 0.36, 0.04: one call without guidance and three with it, which have twice the images
    assert f["guided_call_ms"] > 1.2 * f["unguided_call_ms"]
    assert median(f["ours"]["sampler_s"]) > 0.4e-3 * (f["unguided_call_ms"] + 3 * f["guided_call_ms"])
    assert f["made_with"]["precision"] == "bf16" and f"{f['speedup']:.2f} times as fast" in stdout


def test_extract_mode(capsys, tmp_path):
    stdout = measure(capsys, "extract", "--device", "cpu", "--vae", DEMO_VAE, "--image-size", 64, "--count", 30,
                  "--num-workers", 0, "--repeats", 3, "--json", tmp_path / "b.json")
    f = json.loads((tmp_path / "b.json").read_text())
    for name in ("loader", "encoder", "whole"):
        assert len(f[f"{name}_s"]) == 3 and f[f"{name}_images_per_s"] == pytest.approx(30 / median(f[f"{name}_s"]))
    # without loader processes nothing overlaps: the whole takes as long as its parts
    assert median(f["whole_s"]) > 0.6 * (median(f["loader_s"]) + median(f["encoder_s"])) and f["whole_over_slower"] < 1.3
    assert f["whole_over_slower"] == pytest.approx(
        median(max(a, b) / c for a, b, c in zip(f["loader_s"], f["encoder_s"], f["whole_s"])))
    assert f["hours_imagenet_1_device"] == pytest.approx(1_281_167 / f["whole_images_per_s"] / 3600)
    assert f["hours_imagenet_8_devices"] == pytest.approx(f["hours_imagenet_1_device"] / 8)
    assert 100 < f["resident_mib_at_quarter"] and abs(f["resident_mib_at_end"] - f["resident_mib_at_quarter"]) < 100
    assert 60 < f["jpeg_kib"] < 160  # ImageNet's mean is about 110
    assert f["peak_gpu_gib"] is None and f["made_with"]["precision"] == "fp32"
    assert f"{f['whole_images_per_s']:.1f}" in stdout


def test_fid_mode(capsys, tmp_path):
    stdout = measure(capsys, "fid", "--device", "cpu", "--count", 10, "--batch-size", 4, "--image-size", 64,
                  "--pr-count", 1500, "--json", tmp_path / "b.json")
    f = json.loads((tmp_path / "b.json").read_text())
    seconds = f["seconds"]
    for name in ("reading", "network"):
        assert f[f"{name}_images_per_s"] == pytest.approx(10 / seconds[name])
    assert f["extract_images_per_s"] == pytest.approx(20 / sum(f["extract_s"]))
    assert f["extract_images_per_s"] < 1.3 * f["network_images_per_s"] < f["reading_images_per_s"]
    assert f["minutes_per_1000_images"] == pytest.approx(1000 / f["extract_images_per_s"] / 60)
    assert f["pr_points"] == [1500, 1500] and seconds["precision_recall_many"] > seconds["precision_recall"] > 0
    whole = 60_000 / f["extract_images_per_s"] + seconds["fid"] + seconds["sfid"] + seconds["inception_score"] * 50_000 / 10
    whole += seconds["precision_recall_many"] * (50_000**2 + 10_000**2 + 50_000 * 10_000) / (3 * 1500**2)
    assert f["minutes_50k_and_10k_extrapolated"] == pytest.approx(whole / 60)
    metrics = f["metrics"]  # two sets of one distribution: near, and not the same
    assert metrics["FID"] > 0 and metrics["sFID"] > 0 and 1 <= metrics["IS"] < 10
    assert 0 < metrics["Precision"] <= 1 and 0 < metrics["Recall"] <= 1
    assert 100 < f["peak_resident_mib_extract"] <= f["peak_resident_mib"]
    assert f"{f['minutes_50k_and_10k_extrapolated']:.1f}, extrapolated" in stdout


def test_what_a_mode_cannot_do(capsys):
    for words, says in ((("sample", "--precision", "fp32"), "--precision"), (("fid", "--precision", "bf16"), "--precision"),
                        (("fid", "--pr-count", "3"), "--pr-count"), (("fid", "--count", "3"), "--count")):
        status, _, stderr = cli(capsys, "benchmark", *words, "--device", "cpu")
        assert status == 2 and stderr.strip().count("\n") == 0 and says in stderr


def test_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, says in ((("train", "--device", "cuda"), "--device cuda"), (("memory", "--device", "cpu"), "memory")):
        status, _, stderr = cli(capsys, "benchmark", *words)
        assert status == 2 and stderr.strip().count("\n") == 0 and says in stderr
