"""tests/benchmark.py: counts equal the paper's, kernels are told apart, each mode runs, small, on a CPU, and
ends in time; memory is what autograd saves."""

import json
import shutil
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import benchmark
import numpy as np
import pytest
import torch
from conftest import ROOT, cli, message
from torch.nn.functional import interpolate

from extract_latents import encode, load_vae
from models import LPIPS, Discriminator, SiT_models, SiTBlock

SMALL = [*"--device cpu --precision fp32 --no-compile --model SiT-Ti/2 --repeats 1".split(),
         "--vae", ROOT / "tests" / "data" / "vae"]
KERNELS = {
    "compiled element-wise": "triton_poi_fused_addmm triton_per_fused_native_layer_norm triton_red__to_copy",
    "communication": "ncclDevKernel_AllReduce_Sum_f32_RING_LL", "optimizer": "FusedAdamMathFunctor<float,4>",
    "attention": "flash_fwd_kernel<cutlass::bfloat16_t> fmha_cutlassF_bf16 cudnn_generated_fort_native_sdpa",
    "clipping": "LpNormFunctor<float,(NormType)1> BinaryOpScalarTensorFunctor<float>,std::multiplies<float>",
    "matrix products": "nvjet_tst sm90_xmma_gemm cutlass_80 aten::mm cublasLt::splitKreduce triton_tem_mm",
    "copies": "Memset Memcpy at::native::direct_copy_kernel_cuda aten::copy_", "EMA": "LerpFunctor<float>",
    "element-wise and the rest": "vectorized_elementwise_kernel<4,CUDAFunctor_add> aten::native_layer_norm"}


def measured(capsys, file, *flags):
    """(what the benchmark writes, what it prints)."""
    status, stdout, stderr = cli(capsys, "benchmark", *flags, "--json", file)
    assert status == 0 and not file.with_name(file.name + ".partial").exists(), stderr
    return json.loads(file.read_text()), stdout


def test_kernels_are_told_apart_and_counted_once():
    for kind, names in KERNELS.items():
        assert {name: benchmark.kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)
    event = {"device_type": SimpleNamespace(name="CUDA"), "self_device_time_total": 2000}
    events = [SimpleNamespace(key=str(hides), is_user_annotation=hides, **event) for hides in (False, True)]
    assert benchmark.kernel_ms(events, cuda=True) == [(2.0, "False")]


def test_parameters_and_gflops_are_the_papers():
    """As Table 4 prints them, VAE-REPA's 118.54 aside; of SRA's head it says 2 M, its GFLOPs are of 5.3 M."""
    flags = SimpleNamespace(model="SiT-XL/2")
    works = {name: benchmark.count_work(benchmark.train_args(name, flags)) for name in benchmark.PAPER}
    for method, paper in benchmark.PAPER.items():
        work, plain = works[method], works["plain"]
        assert abs(work["GFLOPs"] - paper["GFLOPs"]) < (0.01 if method == "VAE-REPA" else 0.005)
        assert abs(work["external, M"] - paper["external, M"]) < 0.5
        assert int(work["head, M"]) == (5 if method == "SRA" else paper["head, M"])
        assert work["trained, M"] == pytest.approx(plain["trained, M"] + work["head, M"])
        assert round(plain["trained, M"]) == 675
        inside = {"REPA": 24 * 2 * 257**2 * 1024, "SRA": 20 * 2 * 256**2 * 1152}.get(method, 0) / 1e9
        whole, head = work["GFLOPs with attention"], {"REPA": 2.2146, "SRA": 1.359}.get(method, 0)
        assert whole - work["GFLOPs"] == pytest.approx(56 * 256**2 * 1152 / 1e9 + inside)
        external = inside and work["GFLOPs"] - plain["GFLOPs"] - head + inside
        assert abs(work["operations of a step, G"] - 6 * whole + 4 * external) < 0.01


def test_operations_are_torchs():
    """All but the layer norms', which torch does not count: 4 an element."""
    model, labels = SiT_models["SiT-Ti/2"](vae_repa_depth=2), torch.zeros(1, dtype=torch.long)
    inputs = model, torch.zeros(1, 4, 32, 32), torch.zeros(1), labels, True
    macs, norms = benchmark.count_macs(*inputs), 14 * 4 * 256 * 128
    assert 2 * (sum(macs) - norms) == benchmark.operations(*inputs) and macs[1] == 6 * 2 * 256**2 * 128


def test_turns_alternate_and_end_in_time(monkeypatch, tmp_path):
    seen, clock = [], iter(range(0, 1000, 10))
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: next(clock))  # a turn takes 10 s
    args = SimpleNamespace(repeats=9, deadline=55, details={"seconds": {}}, json=tmp_path / "b.json")
    seconds = benchmark.take_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, args)
    assert "".join(seen) == "abbaab" and len(seconds["a"]) == len(seconds["b"]) == 2  # the first warms up
    assert json.loads((tmp_path / "b.json.partial").read_text()) == args.details == {"seconds": seconds}


def test_it_ends_in_time(monkeypatch, capsys, tmp_path):
    """What an earlier run wrote stays; what this one has done lies beside it."""
    monkeypatch.setattr(benchmark, "LAST", 1)
    (tmp_path / "b.json").write_text("earlier")
    (tmp_path / "b.json.partial").write_text("earlier, too")
    flags = (*SMALL, "--micro-batch", 1, "--steps", 10**6, "--json", tmp_path / "b.json")
    status, _, stderr = cli(capsys, "benchmark", "profile", *flags)
    assert status == 2 and "profile does not end within 10 minutes" in message(stderr)
    assert benchmark.signal.getitimer(0) == (0, 0) and (tmp_path / "b.json").read_text() == "earlier"
    assert not (tmp_path / "b.json.partial").exists()


def test_a_file_for_each_mode_and_model(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "MODES", dict.fromkeys(benchmark.MODES, lambda *of: {"a": {"b": 1.0}}))
    for words in ("train", "profile", "train --model SiT-L/2"):
        assert cli(capsys, "benchmark", *words.split())[0] == 0
    names = [f"benchmark-{name}.json" for name in ("profile-SiT-XL-2", "train-SiT-L-2", "train-SiT-XL-2")]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names


@pytest.mark.parametrize(("bf16", "tokens", "vectors", "weights"), [(True, 48, 26, 36), (False, 80, 40, 0)])
def test_a_blocks_saved_bytes_by_hand(bf16, tokens, vectors, weights):
    """Bytes an element in bf16 (in float32: 4). Of h's size: two layer norms' inputs and outputs, 4 each, and
    statistics; what enters the products, 2, 2, 2 and 4 x 2; qkv, 3 x 2; what attention and MLP give the
    gates, 2 each; GELU's input, 4 x 2. Of c's: c, 4; its SiLU, 2; six parts, 2 each; 1 + scale twice, 4.
    Weights are there anyway, but not autocast's copies of 18 D^2."""
    b, n, d, heads = 3, 16, 32, 4
    block = SiTBlock(d, heads, mlp_ratio=4.0)
    h, c = torch.randn(b, n, d, requires_grad=True), torch.randn(b, d, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        saved = benchmark.saved_bytes([block], block, h, c)
    statistics = 4 * 4 * n + 4 * heads * n  # of the norms and of attention
    assert saved == b * (tokens * n * d + statistics + vectors * d) + weights * d**2


def test_memory_on_paper(capsys, tmp_path, one_thread):
    """20 bytes a parameter, and 2 of each weight that autocast rounds; without images nothing else but the
    encoder's weights. For an image, an element of h in the blocks takes 48 bytes, or 36 if compiled."""
    encoder = benchmark.random_encoder("dinov2_vitt14")
    size, projector = sum(p.numel() for p in encoder.parameters()), {"repa_depth": 2, "repa_dim": encoder.dim}
    for how, least, most, parts in (
            ("--compile", 36, 48, {"plain": (0, {})}),
            ("--no-compile", 48, 80, {"VAE-REPA": (0, {"vae_repa_depth": 2}), "REPA": (size, projector)})):
        flags = ("memory", *SMALL[:2], "--model", "SiT-Ti/2", how, "--methods", *parts)
        figures = measured(capsys, tmp_path / "b.json", *flags)[0]["figures"]
        for name, (external, heads) in parts.items():
            parameters = dict(SiT_models["SiT-Ti/2"](**heads).named_parameters())
            rounded = [p for key, p in parameters.items() if p.ndim > 1 and "embedding" not in key
                       and "t_embedder" not in key]
            counts = (sum(p.numel() for p in group) for group in (parameters.values(), rounded))
            fixed = np.dot([20, 2, 4], [*counts, external])
            assert figures[name]["without images, GiB"] == pytest.approx(fixed / 2**30)
            assert least < figures[name]["an image, MiB"] * 2**20 / (6 * 256 * 128) < most


@pytest.mark.slow
def test_repa_es_memory_on_paper(capsys, tmp_path, one_thread):
    """REPA's, and 16 bytes a parameter that is tuned, 4 of LPIPS; for an image in bf16, LPIPS and the
    discriminator are float32: in bf16 it would take 100 MiB less."""
    flags = ("memory", *SMALL, "--methods")
    rounded = measured(capsys, tmp_path / "b.json", *flags, "REPA-E", "--precision", "bf16")[0]["figures"]
    assert 350 < rounded["REPA-E"]["an image, MiB"] < 380
    figures = measured(capsys, tmp_path / "b.json", *flags, "REPA", "REPA-E")[0]["figures"]
    benchmark.write_tuning(SimpleNamespace(vae=str(SMALL[-1])), tmp_path)
    buffers = LPIPS(*(torch.load(tmp_path / f"{name}.pth") for name in ("vgg", "lin"))).buffers()
    tuned = [p for module in (load_vae(SMALL[-1]), Discriminator()) for p in module.parameters()]
    fixed = 16 * sum(p.numel() for p in tuned) + 4 * sum(b.numel() for b in buffers)
    more = 2**30 * (figures["REPA-E"]["without images, GiB"] - figures["REPA"]["without images, GiB"])
    assert more == pytest.approx(fixed, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_memory_is_the_compilers(monkeypatch, capsys, tmp_path):
    """With Inductor's kernels as with its partition alone."""
    figures, real = [], torch.compile
    for compiler in (real, lambda *of, backend, **how: real(*of, **how)):
        monkeypatch.setattr(torch, "compile", compiler)
        flags = ("memory", *SMALL[:2], "--model", "SiT-Ti/2")
        figures.append(measured(capsys, tmp_path / "b.json", *flags)[0]["figures"])
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_readme_has_the_memory(capsys, tmp_path):
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.count("|") == 5]
    printed = {row[0].replace("`", "").removeprefix(" computed: ").strip(): row[1:]
               for row in rows if row[0].startswith(" computed: ")}
    largest, sizes = "largest --micro-batch in {} GiB", (24, 40, 80)
    several = [cell.split(", ") for cell in printed.pop(largest.format("24, 40, 80"))]
    printed |= {largest.format(gib): of_size for gib, of_size in zip(sizes, zip(*several, strict=True))}
    printed = {name: list(map(float, cells)) for name, cells in printed.items()}
    assert len(printed) == 5
    for i, size in enumerate("B L XL".split()):
        flags = ("memory", *SMALL[:2], "--model", f"SiT-{size}/2", "--methods", "VAE-REPA")
        figures = measured(capsys, tmp_path / "b.json", *flags)[0]["figures"]["VAE-REPA"]
        assert {row: cells[i] for row, cells in printed.items()} == {
            row: round(figures[row], row.startswith("without")) for row in printed}
    figures = measured(capsys, tmp_path / "b.json", "memory", *SMALL[:2], "--methods", "REPA-E")[0]["figures"]
    each, fixed = (figures["REPA-E"][row] for row in ("an image, MiB", "without images, GiB"))
    about = " ".join((ROOT / "tests" / "PAPERS.md").read_text().split())
    assert f"An image takes {each / 1024:.1f} GiB, the rest {fixed:.0f} (computed)" in about


def test_memory_on_a_gpu_is_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "Run", lambda *of: SimpleNamespace(peak_gib=19 + of[-1][0] / 2))
    args = SimpleNamespace(methods=["plain"], device=torch.device("cuda"), details={}, json=tmp_path / "b")
    figures = benchmark.measure_memory(args, None)["plain"]
    most = [figures[f"largest --micro-batch in {gib} GiB"] for gib in (24, 40, 80)]
    assert most == [2, 17, 53]  # in nine tenths


@pytest.mark.parametrize(("flags", "column", "row"), [
    ("train --methods plain REPA --micro-batch 1 --batch-size 2 --steps 2", "REPA", "2 by 1: step, ms"),
    ("profile --micro-batch 1 --steps 1", "of the step", "attention"),
    ("sample --batch-size 1 --steps 2", "as it is", "times as fast"),
    ("extract --batch-size 2 --count 2 --image-size 32 --num-workers 1", "", "hours for ImageNet"),
    ("fid --count 20 --image-size 8", "", "minutes")])
def test_modes(flags, column, row, capsys, tmp_path, monkeypatch, one_thread):
    resets, caches = Mock(wraps=torch.compiler.reset), Mock(wraps=benchmark.fresh_inductor_cache)
    monkeypatch.setattr(torch.compiler, "reset", resets)
    monkeypatch.setattr(benchmark, "fresh_inductor_cache", caches)
    monkeypatch.setattr(benchmark.fid, "frechet_distance", lambda *statistics: 0.0)  # slow on a CPU, and so
    monkeypatch.setattr(benchmark.fid, "resize_bilinear", partial(interpolate, size=75))  # would be 299
    written, stdout = measured(capsys, tmp_path / "b.json", *flags.split(), *SMALL)
    assert {"date", "hardware", "torch", "cudnn", "model", "repeats"} <= written["made_with"].keys()
    assert f"{written['figures'][column][row]:.5g}" in stdout and row in stdout
    f, s = written["figures"][column], {name: turns[0] for name, turns in written["seconds"].items()}
    products = 20 * 512**3 / s["products"]
    if flags.startswith("extract"):
        each = benchmark.operations(encode, load_vae(SMALL[-1]), torch.zeros(1, 3, 32, 32))
        assert f["of the products' rate"] == pytest.approx(each * f["images/s"] / products)
    if flags.startswith("fid"):
        network = benchmark.fid.InceptionV3().eval().to("meta")
        each = benchmark.operations(network, torch.zeros(1, 3, 8, 8, device="meta"))
        assert f["of the products' rate"] == pytest.approx(24 * each / products / (60 * f["minutes"]))
    if flags.startswith("train"):
        assert resets.call_count == caches.call_count == 2  # each method pays for its compilation
        step = s["REPA 1"] / 2
        least = 1e9 * f["operations of a step, G"] / products
        least += 40 * 1e6 * f["trained, M"] / (80 * 2**24 / s["copies"])
        expected = {"1: images/s": 1 / step, "reading / repeated batch": 2 * step / s["REPA again"],
                    "1: step / plain's": 2 * step / s["plain 1"],
                    "2 by 1: step, ms": 1e3 * s["REPA 2 by 1"], "products, TFLOP/s": products / 1e12,
                    "1: of the products' rate": 1e9 * f["operations of a step, G"] / step / products,
                    "1: of the limit": least / step}
        assert {row: f[row] for row in expected} == pytest.approx(expected)
    if flags.startswith("profile"):
        least, of_ema = written["figures"]["the least, ms"], {"optimizer": 7 / 3, "a step": 13 / 3}
        least["a step"] -= least["matrix products"] + least["attention"]
        assert {row: least[row] / least["EMA"] for row in of_ema} == pytest.approx(of_ema)


def test_a_step_of_32_images(capsys, tmp_path, one_thread):
    """It is the one that the paper's 8 GPUs do each, and measured once where --batch-size is 32, too."""
    flags = "--model SiT-Ti/8 --methods plain --micro-batch 32 --batch-size 32 --steps 1".split()
    written, _ = measured(capsys, tmp_path / "b.json", "train", *SMALL, *flags)
    (step,), figures = written["seconds"]["plain 32"], written["figures"]["plain"]
    assert figures[benchmark.ON_8] == pytest.approx(8 * 32 / 256 / step)
    assert not any("by" in name for name in written["seconds"])
    assert any("attention" in name for name in written["made_with"]["attention kernels"])


def test_tf32_is_the_plain_samplers_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark.sample, "main", lambda: seen.append(torch.backends.cuda.matmul.allow_tf32))
    for precision in ("bf16", "fp32", "bf16"):
        benchmark.run_script(benchmark.sample, "--precision", precision)
    assert seen == [False, True, False]


@pytest.mark.parametrize(("words", "says"), [
    ("train --device cuda", "needs"), ("fly", "fly"), ("profile --steps 0", "steps"),
    ("train --batch-size 3 --micro-batch 2", "divisible"), ("extract --count 1 --vae nowhere", "nowhere"),
    ("train --modle x", "--modle"), ("train --methods REPA-E", "REPA-E is a method of memory"),
    ("memory --attention flash", "--attention is of train and profile, not of memory"),
    ("profile --methods plain", "--methods is of train and memory"),
    ("profile --micro-batch 1 2", "takes one"), ("sample --attention flash", "--attention is of"),
    ("train --attention cudnn", "needs a GPU"),
    ("train --model SiT-Ti/4 --methods REPA", "16x16")])
def test_bad_flags(words, says, capsys):
    status, _, stderr = cli(capsys, "benchmark", "--device=cpu", *words.split())
    assert status == 2 and says in message(stderr)
