"""tests/benchmark.py: counts equal the paper's, kernels are told apart, each mode runs, small, on a CPU."""

import json
from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmark import PAPER
from conftest import ROOT, cli, message

SMALL = ("--device", "cpu", "--precision", "fp32", "--no-compile", "--model", "SiT-Ti/2", "--repeats", 1)
VAE = ("--vae", ROOT / "tests" / "data" / "vae", "--batch-size", 2)
KERNELS = {
    "triton_poi_fused_addmm_gelu_3": "compiled element-wise", "cpp_fused_add_mul_0": "compiled element-wise",
    "triton_per_fused_native_layer_norm_add_1": "compiled element-wise",
    "triton_red_fused__to_copy_sum_7": "compiled element-wise",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t> >": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention", "flash_bwd_convert_dq_kernel<x>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_bprop": "attention", "aten::_fused_adamw_": "optimizer",
    "multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4> >": "optimizer",
    "multi_tensor_apply_kernel<TernaryOpScalarFunctor<float>, at::native::LerpFunctor<float> >": "EMA",
    "multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float, (NormType)1> >": "clipping",
    "multi_tensor_apply_kernel<BinaryOpScalarTensorFunctor<float>, std::multiplies<float> >": "clipping",
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN": "matrix products", "aten::mm": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32": "matrix products", "triton_tem_fused_mm_2": "matrix products",
    "cutlass::Kernel2<cutlass_80_tensorop_bf16>": "matrix products", "aten::addmm": "matrix products",
    "cublasLt::splitKreduce_kernel<32, 16>": "matrix products", "Memset (Device)": "copies",
    "Memcpy HtoD (Pinned -> Device)": "copies", "at::native::direct_copy_kernel_cuda(x)": "copies",
    "vectorized_elementwise_kernel<4, CUDAFunctor_add<float> >": "element-wise and the rest",
    "aten::native_layer_norm": "element-wise and the rest"}


def test_kernels_are_told_apart_and_counted_once():
    assert {name: benchmark.kind_of(name) for name in KERNELS} == KERNELS
    cuda = {"device_type": SimpleNamespace(name="CUDA"), "self_cpu_time_total": 0}
    events = [SimpleNamespace(key=key, is_user_annotation=key == "AdamW.step", self_device_time_total=2000, **cuda)
              for key in ("gemm", "AdamW.step")]
    assert benchmark.kernel_ms(events, cuda=True) == [(2.0, "gemm")]


@pytest.mark.parametrize("method", PAPER)
def test_parameters_and_gflops_are_the_papers(method):
    """As Table 4 prints them, VAE-REPA's 118.54 aside; of SRA's head it says 2 M, its GFLOPs are of 5.3 M."""
    work, plain = (benchmark.count_work(benchmark.train_args(name, SimpleNamespace(model="SiT-XL/2")))
                   for name in (method, "plain"))
    assert abs(work["GFLOPs"] - PAPER[method]["GFLOPs"]) < (0.01 if method == "VAE-REPA" else 0.005)
    assert abs(work["external, M"] - PAPER[method]["external, M"]) < 0.5
    assert int(work["head, M"]) == (5 if method == "SRA" else PAPER[method]["head, M"])
    inside = {"REPA": 24 * 2 * 257**2 * 1024, "SRA": 20 * 2 * 256**2 * 1152}.get(method, 0) / 1e9
    own = 28 * 2 * 256**2 * 1152 / 1e9  # Q K^T and A V
    assert work["GFLOPs with attention"] - work["GFLOPs"] == pytest.approx(own + inside)
    head = {"REPA": 1152 * 2048 + 2048**2 + 2048 * 1024, "SRA": 2 * 1152 * 2304}.get(method, 0) * 256 / 1e9
    external = work["GFLOPs"] - plain["GFLOPs"] - head + inside if head else 0  # has no backward pass
    assert work["operations of a step, G"] == pytest.approx(6 * work["GFLOPs with attention"] - 4 * external)


def test_turns_alternate_and_end_in_time(monkeypatch):
    seen, clock = [], iter(range(0, 1000, 10))
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: next(clock))  # a turn takes 10 s
    args = SimpleNamespace(repeats=9, deadline=75, details={"seconds": {}})
    seconds = benchmark.take_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, args)
    assert "".join(seen) == "abbaabba" and len(seconds["a"]) == len(seconds["b"]) == 3  # the first warms up


def test_memory_is_a_line(monkeypatch):
    peaks = iter([29 * 2**30, 35 * 2**30])  # at 8 and 16 images
    monkeypatch.setattr(benchmark, "Run", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: next(peaks))
    figures = benchmark.measure_memory(SimpleNamespace(), None)
    assert [column["largest --micro-batch"] for column in figures.values()] == [0, 74]  # of 23 and 79 GiB


@pytest.mark.parametrize(("mode", "flags", "expected"), [
    ("train", ("--micro-batch", 1, "--batch-size", 2, "--steps", 1), {"REPA": "2: step / plain's", "SRA": "GFLOPs"}),
    ("profile", ("--micro-batch", 1, "--steps", 1), {"ms": "matrix products", "of the step": "attention"}),
    ("sample", (*VAE, "--steps", 2), {"as it is": "times as fast"}),
    ("extract", (*VAE, "--count", 2, "--image-size", 32, "--num-workers", 1), {"": "hours for ImageNet"}),
    ("fid", ("--count", 20, "--image-size", 8), {"": "minutes"})])
def test_modes(mode, flags, expected, capsys, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(benchmark.fid, "frechet_distance", lambda *statistics: 0.0)  # slow on a CPU
    status, stdout, stderr = cli(capsys, "benchmark", mode, *SMALL, *flags, "--json", tmp_path / "b.json")
    assert status == 0, stderr
    written = json.loads((tmp_path / "b.json").read_text())
    assert {"date", "hardware", "torch", "cudnn", "model", "repeats"} <= written["made_with"].keys()
    s, figures = written["seconds"], written["figures"]
    assert all(f"{figures[name][row]:.5g}" in stdout and row in stdout for name, row in expected.items())
    if mode == "train":
        f, step = figures["VAE-REPA"], s["VAE-REPA 1"][0]
        found = [f[row] for row in ("1: images/s", "it/s on 8 GPUs, no all-reduce", "1: step / plain's",
                                    "2: step, ms", "1: of the products' rate")]
        rate = f["operations of a step, G"] / 1e3 / step / f["products, TFLOP/s"]
        assert found == pytest.approx([1 / step, 8 / 256 / step, step / s["plain 1"][0], 1e3 * s["VAE-REPA 2"][0], rate])
    if mode == "sample":
        assert figures["as it is"]["2 images, s"] == pytest.approx(s["as it is, more"][0] - s["as it is"][0])


@pytest.mark.parametrize(("words", "says"), [
    (("train", "--device", "cuda"), "needs"), (("memory", "--device", "cpu"), "needs"), (("fly",), "fly"),
    (("train", "--batch-size", 3, "--micro-batch", 2), "divisible"), (("train", "--modle", "x"), "--modle"),
    (("profile", "--steps", 0), "--steps"), (("extract", "--count", 1, "--vae", "nowhere"), "nowhere"),
    (("train", "--model", "SiT-Ti/4", "--methods", "REPA"), "16x16")])
def test_bad_flags(words, says, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, stderr = cli(capsys, "benchmark", "--device=cpu", *words)
    assert status == 2 and says in message(stderr)
