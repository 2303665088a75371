"""tests/benchmark.py: counts equal the paper's, kernels are told apart, each mode runs, small, on a CPU."""

import json
from types import SimpleNamespace

import benchmark
import pytest
import torch
from conftest import ROOT, cli, message

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


def test_kernels_are_told_apart_and_counted_once():
    for kind, names in KERNELS.items():
        assert {name: benchmark.kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)
    event = {"device_type": SimpleNamespace(name="CUDA"), "self_device_time_total": 2000}
    events = [SimpleNamespace(key=str(hides), is_user_annotation=hides, **event) for hides in (False, True)]
    assert benchmark.kernel_ms(events, cuda=True) == [(2.0, "False")]


@pytest.mark.parametrize(("method", "paper"), benchmark.PAPER.items())
def test_parameters_and_gflops_are_the_papers(method, paper):
    """As Table 4 prints them, VAE-REPA's 118.54 aside; of SRA's head it says 2 M, its GFLOPs are of 5.3 M."""
    flags = SimpleNamespace(model="SiT-XL/2")
    work, plain = (benchmark.count_work(benchmark.train_args(name, flags)) for name in (method, "plain"))
    assert abs(work["GFLOPs"] - paper["GFLOPs"]) < (0.01 if method == "VAE-REPA" else 0.005)
    assert abs(work["external, M"] - paper["external, M"]) < 0.5
    assert int(work["head, M"]) == (5 if method == "SRA" else paper["head, M"])
    inside = {"REPA": 24 * 2 * 257**2 * 1024, "SRA": 20 * 2 * 256**2 * 1152}.get(method, 0) / 1e9
    assert work["GFLOPs with attention"] - work["GFLOPs"] == pytest.approx(56 * 256**2 * 1152 / 1e9 + inside)
    external = inside and work["GFLOPs"] - plain["GFLOPs"] - {"REPA": 2.2146, "SRA": 1.359}[method] + inside
    assert abs(work["operations of a step, G"] - 6 * work["GFLOPs with attention"] + 4 * external) < 0.01


def test_turns_alternate_and_end_in_time(monkeypatch):
    seen, clock = [], iter(range(0, 1000, 10))
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: next(clock))  # a turn takes 10 s
    args = SimpleNamespace(repeats=9, deadline=65, details={"seconds": {}})
    seconds = benchmark.take_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, args)
    assert "".join(seen) == "abbaab" and len(seconds["a"]) == len(seconds["b"]) == 2  # the first warms up


def test_memory_is_a_line(monkeypatch):
    monkeypatch.setattr(benchmark, "Run", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", iter([25 * 2**30, 31 * 2**30]).__next__)
    figures = benchmark.measure_memory(SimpleNamespace(), None).values()
    assert [f["largest --micro-batch"] for f in figures] == [5, 80]  # of 23 and 79 GiB


@pytest.mark.parametrize(("flags", "column", "row"), [
    ("train --methods plain VAE-REPA REPA --micro-batch 1 --batch-size 2 --steps 2", "REPA", "2: step, ms"),
    ("profile --micro-batch 1 --steps 1", "of the step", "attention"),
    ("sample --batch-size 2 --steps 2", "as it is", "times as fast"),
    ("extract --batch-size 2 --count 2 --image-size 32 --num-workers 1", "", "hours for ImageNet"),
    ("fid --count 20 --image-size 8", "", "minutes")])
def test_modes(flags, column, row, capsys, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(benchmark.fid, "frechet_distance", lambda *statistics: 0.0)  # slow on a CPU
    status, stdout, stderr = cli(capsys, "benchmark", *flags.split(), *SMALL, "--json", tmp_path / "b.json")
    assert status == 0, stderr
    written = json.loads((tmp_path / "b.json").read_text())
    assert {"date", "hardware", "torch", "cudnn", "model", "repeats"} <= written["made_with"].keys()
    assert f"{written['figures'][column][row]:.5g}" in stdout and row in stdout
    if flags.startswith("train"):
        f, s = written["figures"]["VAE-REPA"], {name: turns[0] for name, turns in written["seconds"].items()}
        step, products = s["VAE-REPA 1"] / 2, 20 * 512**3 / s["products"]
        expected = {"1: images/s": 1 / step, "disk / repeated batch": 2 * step / s["VAE-REPA again"],
                    "1: step / plain's": 2 * step / s["plain 1"], benchmark.ON_8: 8 / 256 / step,
                    "2: step, ms": 1e3 * s["VAE-REPA 2"], "products, TFLOP/s": products / 1e12,
                    "1: of the products' rate": 1e9 * f["operations of a step, G"] / step / products}
        assert {row: f[row] for row in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("words", "says"), [
    ("train --device cuda", "needs"), ("memory", "needs"), ("fly", "fly"), ("profile --steps 0", "steps"),
    ("train --batch-size 3 --micro-batch 2", "divisible"), ("extract --count 1 --vae nowhere", "nowhere"),
    ("train --modle x", "--modle"), ("train --model SiT-Ti/4 --methods REPA", "16x16")])
def test_bad_flags(words, says, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, stderr = cli(capsys, "benchmark", "--device=cpu", *words.split())
    assert status == 2 and says in message(stderr)
