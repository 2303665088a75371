"""REPA-E, train.py --tune-vae: steps against ones written out, in REPA-E's order of three updates; each loss
against its formula; where gradients go; runs that must be the same run; the tuned VAE on its way to samples
and latents; encoders of torch.export; bad input."""

import argparse
import contextlib
import copy
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import demo
import figures
import numpy as np
import pytest
import repa_e
import torch
import torch.nn.functional as F
from benchmark import lpips_weights
from conftest import (
    DETECTOR,
    ROOT,
    TINY,
    cli,
    drawn_numbers,
    drawn_rows,
    message,
    process,
    tiny_encoder,
    write_set,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from export_encoder import export
from functorch.compile import make_boxed_func, nop
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from test_alignments import flags_of
from test_readme import commands
from test_sample import lively
from test_train import assert_same_run, contents, fit, load, log, refused, same_tensors
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves

import models
import sample
import train
from extract_latents import Latents, decode, latent_normalization, load_vae

pytestmark = pytest.mark.usefixtures("all_on_one_thread")
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # of VGG16 in torchvision


@pytest.fixture(scope="module")
def tuning(tmp_path_factory, images, vae):
    """(data with images, flags of train.py): all that REPA-E needs, with weights of its files' format."""
    folder = tmp_path_factory.mktemp("tuning")
    flags = ("--images", images, "--vae", vae, "--image-size", 32, "--num-workers", 1, "--store-images")
    assert cli(None, "extract_latents", *flags, "--out", folder / "set")[0] == 0
    torch.manual_seed(0)
    vgg, lin = lpips_weights(4, 5, 6, 7, 8)
    torch.manual_seed(1)
    for name, weights in {"vgg": vgg | {"classifier.0.weight": torch.zeros(1)}, "lin": lin,
                          "gan": models.Discriminator().state_dict()}.items():
        torch.save(weights, folder / f"{name}.pth", _use_new_zipfile_serialization=False)  # as in their day
    return folder / "set", ["--tune-vae", "--lpips-weights", folder / "vgg.pth", folder / "lin.pth",
                            "--disc-init", folder / "gan.pth"]


@pytest.fixture(scope="module")
def common(tuning):
    return [*tuning[1], *flags_of(["repa"]), "--lr", 1e-3, "--batch-size", 4]


def untuned(flags):
    """Without --tune-vae, in the place of which --variant is."""
    return [flag for flag in flags if flag != "--tune-vae"]


@pytest.fixture
def unpatched(monkeypatch):
    """Undoes what a --variant does to this process."""
    for owner, name in ((train, "vae_losses"), (train, "vae_loss_weights"), (train, "make_parser"),
                        (models.LatentNorm, "update")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture(scope="module")
def tuned_run(tmp_path_factory, tuning, common):
    run = tmp_path_factory.mktemp("tuned") / "run"
    flags = (*common, "--data", tuning[0], "--run-dir", run, "--max-steps", 3, "--ema-decay", 0.5)
    assert cli(None, "train", *TINY, *flags, "--sample-every", 3)[0] == 0
    return run


def lpips_by_numpy(vgg, lin, images, others):
    """The definition, in float64."""
    def conv(x, weight, bias):
        windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
        return np.einsum("bcijhw,ochw->boij", windows, weight) + bias[:, None, None]

    total, vgg, lin = 0, *({name: x.double().numpy() for name, x in each.items()} for each in (vgg, lin))
    pair = [(x.double().numpy() - np.reshape([-0.030, -0.088, -0.188], (3, 1, 1)))
            / np.reshape([0.458, 0.448, 0.450], (3, 1, 1)) for x in (images, others)]
    for stage, numbers in enumerate(STAGES):
        for i, x in enumerate(pair):
            if stage:
                b, c, h, w = x.shape
                x = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(b, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))
            for n in numbers:
                x = conv(x, vgg[f"features.{n}.weight"], vgg[f"features.{n}.bias"]).clip(0)
            pair[i] = x
        unit = [x / (np.sqrt((x**2).sum(axis=1, keepdims=True)) + 1e-10) for x in pair]
        weighted = (unit[0] - unit[1]) ** 2 * lin[f"lin{stage}.model.1.weight"]
        total = total + weighted.sum(axis=1).mean(axis=(1, 2))
    return total


def test_lpips(tuning):
    vgg, lin = map(load, tuning[1][2:4])
    lpips, images = models.LPIPS(vgg, lin), torch.rand(3, 3, 32, 36) * 2 - 1
    others = (images + torch.randn(3, 1, 1, 1) * torch.randn_like(images) / 2).clamp(-1, 1)
    np.testing.assert_allclose(lpips(images, others), lpips_by_numpy(vgg, lin, images, others), rtol=1e-4)
    assert not lpips(images, images).any() and not lpips.state_dict() and not list(lpips.parameters())
    black = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)  # where features may be 0
    lpips(black, black.detach()).sum().backward()
    assert black.grad.isfinite().all()


def test_discriminator():
    """pix2pix's PatchGAN, with the names and the first weights of taming-transformers'."""
    torch.manual_seed(0)
    gan, images = models.Discriminator(), torch.randn(2, 3, 64, 64)
    w, x = gan.state_dict(), images
    for i, stride in ((0, 2), (2, 2), (5, 2), (8, 1), (11, 1)):
        x = F.conv2d(x, w[f"main.{i}.weight"], w.get(f"main.{i}.bias"), stride, padding=1)
        if i in (2, 5, 8):
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            x = (x - mean) / (var + 1e-5).sqrt() * w[f"main.{i + 1}.weight"].view(-1, 1, 1)  # and bias 0
        x = torch.where(x > 0, x, 0.2 * x) if i < 11 else x
    torch.testing.assert_close(gan(images), x, rtol=1e-3, atol=1e-4)
    assert x.shape == (2, 1, 6, 6)
    assert [w[f"main.{i}.weight"].shape[0] for i in (0, 2, 5, 8)] == [64, 128, 256, 512]
    assert {name for name in w if name.endswith("bias")} == {f"main.{i}.bias" for i in (0, 3, 6, 9, 11)}
    for i in (0, 2, 5, 8, 11):
        assert w[f"main.{i}.weight"].std() == pytest.approx(0.02, rel=0.05)
    for i in (3, 6, 9):
        assert w[f"main.{i}.weight"].mean() == pytest.approx(1, abs=0.01) and not w[f"main.{i}.bias"].any()
        assert w[f"main.{i}.weight"].std() == pytest.approx(0.02, rel=0.2)


class Plain(torch.nn.Module):
    """What `vae_losses` needs of a VAE: given parameters of the posterior, and images."""

    def __init__(self, parameters, decoded):
        super().__init__()
        self.posterior, self.decoded = DiagonalGaussianDistribution(parameters), decoded

    def encode(self, images):
        return SimpleNamespace(latent_dist=self.posterior)

    def decode(self, z):
        return SimpleNamespace(sample=self.decoded)


def some_batch(b=3, side=8):
    torch.manual_seed(2)
    return {"images": torch.randint(0, 256, (b, 3, 32, 32), dtype=torch.uint8), "t": torch.rand(b),
            "x": torch.zeros(b, 4, side, side), "y": torch.full((b,), 10), "labels": torch.arange(b),
            "noise": torch.randn(b, 4, side, side), "eps": torch.randn(b, 4, side, side),
            "tokens": torch.randn(b, 4, 32)}


def aligned_model():
    return lively("SiT-Ti/4", 10, repa_depth=2, repa_dim=32, tune_vae=True)


ARGS = argparse.Namespace(precision="fp32", repa_depth=2, micro_batch=3, grad_clip=1.0, l1_weight=1.0,
                          lpips_weight=1.0, kl_weight=1e-6, gan_weight=0.1, tune_repa_weight=1.5)


def test_losses_in_closed_form():
    """Mean absolute error; KL of a Gaussian from the standard one; hinge losses; by image."""
    batch = some_batch()
    mean, logvar = torch.randn(2, 3, 4, 8, 8).double().unbind()
    logvar[0, 0, 0, 0] = 40.0  # clamped to 20
    decoded = torch.rand(3, 3, 32, 32) * 2 - 1
    scores = {"real": torch.tensor([-3.0, 0.5, 2.0]), "fake": torch.tensor([-3.0, 0.5, 2.0]).flip(0)}
    tuned = {"vae": Plain(torch.cat([mean, logvar], 1).float(), decoded), "gan": lambda x: scores[
        "fake" if torch.equal(x, decoded) else "real"].view(3, 1, 1, 1).expand(3, 1, 2, 2)}
    model, tokens = aligned_model(), batch["tokens"]
    z, losses = train.vae_losses(tuned, model, batch, ARGS)
    logvar = logvar.clamp(-30, 20)
    torch.testing.assert_close(z.double(), mean + (logvar / 2).exp() * batch["eps"], rtol=1e-5, atol=1e-5)
    l1 = (decoded - (batch["images"] / 127.5 - 1)).abs().flatten(1).mean(1)
    torch.testing.assert_close(losses["l1"], l1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()),
                                           torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(losses["kl"].double(), kl, rtol=1e-5, atol=0)
    assert losses["gan"].tolist() == [-2.0, -0.5, 3.0]
    # (relu(1 - real) + relu(1 + fake)) / 2
    assert losses["discriminator"].tolist() == [(4 + 3) / 2, (0.5 + 1.5) / 2, (0 + 0) / 2]
    s = batch["t"].view(3, 1, 1, 1)
    x_t = (1 - s) * z / (1 + 1e-4) ** 0.5 + s * batch["noise"]  # by the norm's first statistics
    _, heads = model(x_t, batch["t"], batch["labels"], return_align=True)  # not y, where some are dropped
    cosine = F.cosine_similarity(heads["repa"], tokens, dim=2).mean(1)
    torch.testing.assert_close(losses["tune_repa"], -cosine)
    assert set(losses) == {"l1", "kl", "tune_repa", "gan", "discriminator"}


def test_norm_is_batch_norm():
    """In training and in evaluation, also where the variance is small."""
    torch.manual_seed(0)
    ours, theirs = models.LatentNorm(4), torch.nn.BatchNorm2d(4, eps=1e-4, affine=False)
    scale, shift = torch.tensor([[5.0, 1.0, 0.01, 3.0], [1.0, -50, 0, 3]]).view(2, 4, 1, 1)
    for _ in range(5):
        z = (torch.randn(6, 4, 8, 8) * scale + shift).requires_grad_()
        x = ours.update(z)
        torch.testing.assert_close(x, theirs.train()(z), rtol=1e-4, atol=1e-4)
        assert not x.requires_grad
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
        (a,), (b,) = (torch.autograd.grad((norm(z) ** 3).sum(), z) for norm in (ours, theirs.eval()))
        torch.testing.assert_close(ours(z), theirs(z))
        torch.testing.assert_close(a, b)
    facts = sample.facts_of({}, {"bn." + name: value for name, value in ours.state_dict().items()})
    shift, scale = (torch.tensor(facts[key]).view(4, 1, 1) for key in ("shift", "scale"))
    x = (z.detach() - shift) * scale
    torch.testing.assert_close(x[:, [0, 1, 3]], ours(z)[:, [0, 1, 3]], rtol=1e-3, atol=1e-3)  # but for eps


def reached(loss, modules):
    """Names of the modules of which every parameter has a gradient; of others none may have."""
    found = set()
    for name, module in modules.items():
        grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        nonzero = [g is not None and bool(g.any()) for g in grads]
        assert all(nonzero) or not any(g is not None for g in grads), name
        found |= {name} if all(nonzero) else set()
    return found


def test_where_gradients_go(monkeypatch, tuning, vae):
    """Reconstruction's to decoder and encoder, KL's and REPA's to the encoder alone, the hinge loss's to the
    discriminator; and a step leaves none on SiT and its head, which are frozen meanwhile: compiled, they
    would be computed. Processes exchange one tensor for the VAE, one for the discriminator."""
    torch.manual_seed(0)
    kl = load_vae(str(vae)).requires_grad_()
    tuned = torch.nn.ModuleDict({"vae": kl, "gan": models.Discriminator(),
                                 "lpips": models.LPIPS(*map(load, tuning[1][2:4]))})
    model = aligned_model()
    _, losses = train.vae_losses(tuned, model, some_batch(), ARGS)
    parts = {"encoder": torch.nn.ModuleList([kl.encoder, kl.quant_conv]), "gan": tuned["gan"],
             "decoder": torch.nn.ModuleList([kl.decoder, kl.post_quant_conv])}
    found = {name: reached(loss.sum(), parts) for name, loss in losses.items()}
    both = {"encoder", "decoder"}
    assert found == {"l1": both, "lpips": both, "kl": {"encoder"}, "tune_repa": {"encoder"},
                     "gan": both | {"gan"}, "discriminator": {"gan"}}

    hinge = losses.pop("discriminator").mean()
    own = torch.autograd.grad(hinge, list(tuned["gan"].parameters()))
    total = sum(losses[name].mean() * getattr(ARGS, f"{name}_weight") for name in losses)
    expected = torch.autograd.grad(total, list(kl.parameters()))
    batch, stored = some_batch(), {name: p.clone() for name, p in model.named_parameters()}
    model.blocks[0].attn.proj.bias.requires_grad_(False)  # a forker's
    trained, seen, exchanged = [p.requires_grad for p in model.parameters()], [], []
    early_blocks, mean = model.early_blocks, train.mean_over_processes
    monkeypatch.setattr(model, "early_blocks", lambda *of: seen.extend(
        p.requires_grad for p in model.parameters()) or early_blocks(*of))
    monkeypatch.setattr(train, "mean_over_processes", lambda x: exchanged.append(x.numel()) or mean(x))
    kl.to(memory_format=torch.channels_last)
    batch["x"], scalars = train.vae_step(tuned, model, batch, ARGS)
    assert [p.requires_grad for p in model.parameters()] == trained and not any(seen) and seen
    assert exchanged == [sum(p.numel() for p in module.parameters()) for module in (kl, tuned["gan"])]
    assert all(p.grad is None for p in model.parameters())
    assert same_tensors(stored, dict(model.named_parameters()))
    for grads, module, name in ((expected, kl, "vae"), (own, tuned["gan"], "gan")):
        norm = torch.stack([g.norm() for g in grads]).norm()
        torch.testing.assert_close(scalars[f"{name}_grad_norm"], norm, rtol=1e-4, atol=0)
        for g, p in zip(grads, module.parameters()):
            torch.testing.assert_close(p.grad, g / max(norm, 1), rtol=1e-3, atol=1e-6)
    before = [p.grad.clone() for p in kl.parameters()]
    losses = train.training_losses(model, model, batch, argparse.Namespace())
    sum(loss.sum() for loss in losses.values()).backward()  # the diffusion loss and REPA's
    assert not batch["x"].requires_grad and all(map(torch.equal, before, (p.grad for p in kl.parameters())))
    assert all(p.grad.any() for p in model.heads["repa"].parameters())


def test_compiled_blocks_compute_no_gradients_of_weights(tuning, vae):
    """In the VAE's step: of a block's backward only the products towards its input are left."""
    products, tuned = [], torch.nn.ModuleDict({"vae": load_vae(str(vae)).requires_grad_()})
    model = aligned_model()

    def count(graph, inputs):
        products.append(sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend=aot_autograd(fw_compiler=nop, bw_compiler=count))
    train.vae_step(tuned, model, some_batch(), ARGS)
    assert products and set(products) == {4}  # qkv, proj, fc1, fc2; of 10, with weights and c


def plain_loop(settings, folder, steps, vae, gan, lpips, encoder):
    """REPA-E from the files, three optimizers in its order: (log lines, SiT and norm, EMA, VAE, PatchGAN).
    In variants SiT's loss reaches the VAE, through batch norm; or statistics stay as they are."""
    args, facts = SimpleNamespace(**settings), settings["data"]
    moments, labels, images = (torch.from_numpy(np.load(folder / f"{name}.npy"))
                               for name in ("moments", "labels", "images"))
    images = images.permute(0, 3, 1, 2)
    torch.manual_seed(args.seed)
    sit = models.SiT_models[args.model](
        8, in_channels=4, num_classes=facts["num_classes"], vae_repa_depth=args.vae_repa_depth,
        repa_depth=args.repa_depth, repa_dim=32)
    bn = torch.nn.BatchNorm2d(4, eps=1e-4, affine=False)
    if not args.vae_from_scratch:
        bn.running_mean.fill_(facts["shift"])
        bn.running_var.fill_(facts["scale"] ** -2)
    average = {**{k: v.clone() for k, v in sit.state_dict().items()},
               **{f"bn.{k}": v.clone() for k, v in bn.state_dict().items()}}
    optimizers = [torch.optim.AdamW(m.parameters(), args.lr, weight_decay=0) for m in (vae, gan, sit)]
    lines = []

    def step_of(loss, module, optimizer):
        for other in (vae, gan, sit):
            other.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), args.grad_clip)
        optimizer.step()
        return norm.item()

    def sit_loss(x):
        v, heads = sit((1 - s) * x + s * noise, t, y, return_align=True)
        terms = {"denoising": (v - (noise - x)).square().mean(),
                 "repa": -F.cosine_similarity(heads["repa"], tokens, dim=2).mean()}
        total = terms["denoising"] + 0.5 * terms["repa"]
        if args.vae_repa_depth:
            target = models.patchify(x, like=heads["vae_repa"])
            terms["vae_repa"] = F.smooth_l1_loss(heads["vae_repa"], target, beta=0.05)
            total = total + terms["vae_repa"]
        return terms, total

    for step in range(steps):
        rows = torch.tensor(drawn_rows(args.seed, step, args.batch_size, 12))
        eps, noise, t, u_drop, _ = drawn_numbers(args.seed, step, args.batch_size, (4, 8, 8))
        picture, s = images[rows] / 127.5 - 1, t.view(-1, 1, 1, 1)
        tokens, y = encoder(images[rows]), torch.where(u_drop < args.label_dropout, facts["num_classes"],
                                                       labels[rows])
        posterior = vae.encode(picture).latent_dist
        z = posterior.mean + posterior.std * eps
        decoded = vae.decode(z).sample
        x = bn.eval()(z)
        _, heads = sit((1 - s) * x + s * noise, t, labels[rows], return_align=True)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum((1, 2, 3)).mean()
        line = {"l1": (decoded - picture).abs().mean(), "kl": kl,
                "tune_repa": -F.cosine_similarity(heads["repa"], tokens, dim=2).mean()}
        total = args.l1_weight * line["l1"] + 1e-6 * kl + 1.5 * line["tune_repa"]
        if args.lpips_weight:
            line["lpips"] = lpips(decoded, picture).mean()
            total = total + line["lpips"]
        if args.gan_weight:
            line["gan"] = -gan(decoded).mean()
            total = total + 0.1 * line["gan"]
        x = copy.deepcopy(bn).train()(z)  # with its gradient
        if args.tune_vae == "diffusion-loss":
            line["tune_sit"] = sit_loss(x)[0]["denoising"]
            total = total - 1.5 * line.pop("tune_repa") + line["tune_sit"]
        if args.tune_vae == "no-stop-gradient":
            _, line["tune_sit"] = sit_loss(x)
            total = total + line["tune_sit"]
        line["vae_grad_norm"] = step_of(total, vae, optimizers[0])
        if args.gan_weight:
            real, fake = gan(picture), gan(decoded.detach())
            hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            line["discriminator"], line["gan_grad_norm"] = hinge, step_of(hinge, gan, optimizers[1])
        x = (bn.eval() if args.tune_vae == "no-batch-norm" else bn.train())(z.detach())
        terms, total = sit_loss(x)
        line |= terms
        line["grad_norm"] = step_of(total, sit, optimizers[2])
        now = {**sit.state_dict(), **{f"bn.{k}": v for k, v in bn.state_dict().items()}}
        average = {k: v if k.endswith("tracked") else args.ema_decay * v + (1 - args.ema_decay) * now[k]
                   for k, v in average.items()}
        lines.append({name: torch.as_tensor(value).item() for name, value in line.items()})
    return lines, now, average, vae.state_dict(), gan.state_dict()


def assert_close_weights(found, expected):
    for name in found:
        if not name.endswith("tracked"):
            off = (found[name] - expected[name]).abs() > 1e-4
            # of a gradient that is 0 to rounding, Adam takes any sign
            assert off.float().mean() < 1e-3 or off.sum() < 3, name


@pytest.mark.parametrize("flags", [
    ("--label-dropout", 0.5, "--ema-decay", 0.7), ("--vae-repa-depth", 1, "--grad-clip", 0.1),
    ("--lpips-weight", 0, "--gan-weight", 0, "--l1-weight", 3),
    ("--variant", "diffusion-loss"), ("--variant", "no-stop-gradient", "--vae-repa-depth", 1),
    ("--variant", "no-batch-norm")], ids=lambda flags: "_".join(map(str, flags)))
def test_training_equals_a_plain_loop(capsys, unpatched, tuning, common, vae, tmp_path, flags):
    script = "repa_e" if "--variant" in flags else "train"
    flags = [*(common if script == "train" else untuned(common)), *map(str, flags)]
    lines, state = fit(capsys, tuning[0], tmp_path / "run", *flags, "--max-steps", 3, script=script)
    gan = models.Discriminator()
    gan.load_state_dict(load(tuning[1][5]))
    networks = (load_vae(str(vae)).requires_grad_(), gan, models.LPIPS(*map(load, tuning[1][2:4])),
                models.Encoder(tiny_encoder(), 32))
    expected, sit, average, tuned, judge = plain_loop(state["settings"], tuning[0], 3, *networks)
    for line, other in zip(lines, expected, strict=True):
        assert set(line) - set(other) == {
            "step", "grad_norm_max", "epoch", "seconds", "images_per_s", "memory_gib"}
        for name, value in other.items():
            assert line[name] == pytest.approx(value, rel=2e-3, abs=1e-5), (line["step"], name)
    assert_close_weights(state["model"], sit)
    assert_close_weights(state["ema"], average)
    found = {"vae": tuned, **({"gan": judge} if "--gan-weight" not in flags else {})}
    assert {name.split(".")[0] for name in state["tuned"]} == set(found)
    for part, weights in found.items():
        own = {n.removeprefix(f"{part}."): x for n, x in state["tuned"].items() if n.startswith(part)}
        assert_close_weights(own, weights)


def test_resumes_to_the_bit(capsys, tuning, common, tmp_path):
    """VAE, discriminator and optimizers too, and the folder of the VAE beside each checkpoint."""
    flags = (*common, "--vae-from-scratch", "--ckpt-every", 2, "--max-steps")
    for name, steps in (("whole", 4), ("parts", 1), ("parts", 4)):
        _, state = fit(capsys, tuning[0], tmp_path / name, *flags, steps)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    other = load(tmp_path / "parts" / "state.pt")
    assert same_tensors(state["tuned"], other["tuned"])
    counts = [sum(1 for name in state[part] if "running" not in name and "tracked" not in name and
                  name != "pos_embed") for part in ("model", "tuned")]
    assert len(state["opt"]["state"]) == sum(counts)
    for name in ("0000002-vae", "0000004-vae"):
        a, b = (contents(tmp_path / run / "checkpoints" / name) for run in ("whole", "parts"))
        assert list(a.values()) == list(b.values()) and len(a) == 2


@pytest.mark.parametrize("flags, mean, var", [((), 0.25, 4), (("--vae-from-scratch",), 0, 1)])
def test_how_it_begins(capsys, tuning, common, vae, tmp_path, flags, mean, var):
    """With the VAE and its latents' statistics, which an EMA of decay 1 keeps, or random weights and 0, 1."""
    _, state = fit(capsys, tuning[0], tmp_path / "run", *common, *flags, "--max-steps", 1, "--ema-decay", 1)
    assert state["ema"]["bn.running_mean"].tolist() == [mean] * 4
    assert state["ema"]["bn.running_var"].tolist() == [var] * 4
    about = json.loads((tuning[0] / "latents.json").read_text())
    assert (about["shift"], about["scale"]) == (0.25, 0.5)
    start = load_vae(str(vae)).state_dict()
    moved = max((state["tuned"][f"vae.{name}"] - x).abs().max() for name, x in start.items())
    assert (moved < 0.0015) == (not flags) and moved > 5e-4  # by a step of 1e-3


def test_processes_and_micro_batches(capsys, tuning, common, tmp_path):
    """Change nothing, the statistics of the norm included; but for the discriminator, whose batch norm sees
    one forward pass, and which has no say here.

    Gradients are compared, by Adam's mean of them: of one that is 0 to rounding, a weight takes any sign, so
    that a larger --lr would drive the runs apart.
    """
    flags = (*common, "--gan-weight", 1e-9, "--batch-size", 8, "--max-steps", 3, "--lr", 1e-5)
    pair = ("--data", tuning[0], "--run-dir", tmp_path / "pair", "--micro-batch", 2)
    with ThreadPoolExecutor() as beside:
        two = beside.submit(process, "train", *TINY, *flags, *pair, processes=2)
        fit(capsys, tuning[0], tmp_path / "whole", *flags)
        fit(capsys, tuning[0], tmp_path / "micro", *flags, "--micro-batch", 2)
    two.result()
    own, (whole, *others) = ("gan", "discriminator", "gan_grad_norm"), (
        (log(tmp_path / name), load(tmp_path / name / "state.pt")) for name in ("whole", "micro", "pair"))
    for lines, state in others:
        for a, b in zip(lines, whole[0], strict=True):
            for key in a.keys() - {"seconds", "images_per_s", "memory_gib", *own}:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (a["step"], key)
            assert all(a[key] != 0 for key in own)
        for name in ("bn.running_mean", "bn.running_var"):
            for part in ("model", "ema"):
                torch.testing.assert_close(state[part][name], whole[1][part][name], rtol=1e-4, atol=1e-5)
        weights = [*state["model"], *(name for name in state["tuned"] if name.startswith("vae."))]
        count = sum(not name.startswith(("bn.", "pos_embed")) for name in weights)  # the PatchGAN's are last
        pairs = [[each["opt"]["state"][i]["exp_avg"] for each in (state, whole[1])] for i in range(count)]
        largest = max(gradient.abs().max() for _, gradient in pairs)
        for found, gradient in pairs:
            assert (found - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-6 * largest


def test_bf16(capsys, tuning, common, tuned_run, tmp_path):
    """Networks in bf16, losses and latents in float32, near those of float32."""
    flags, exact = (*common, "--max-steps", 2, "--precision", "bf16"), log(tuned_run)[:2]
    rounded, state = fit(capsys, tuning[0], tmp_path / "bf16", *flags)
    assert exact != rounded and all(x.dtype in (torch.float32, torch.int64) for x in state["tuned"].values())
    for a, b in zip(rounded, exact, strict=True):
        for name in ("l1", "kl", "tune_repa", "lpips", "denoising", "repa"):
            assert a[name] == pytest.approx(b[name], rel=0.05, abs=0.02), name
    seen, half = [], (torch.randn(3, n, side, side).bfloat16() for n, side in ((8, 8), (3, 32)))
    tuned = {"vae": Plain(*half), "gan": lambda x: seen.append(x.dtype) or x[:, :1],
             "lpips": lambda a, b: seen.extend([a.dtype, b.dtype]) or (a - b).mean((1, 2, 3))}
    args = argparse.Namespace(**{**vars(ARGS), "precision": "bf16"})
    z, losses = train.vae_losses(tuned, aligned_model(), some_batch(), args)
    assert {z.dtype, *seen, *(loss.dtype for loss in losses.values())} == {torch.float32}


def test_a_discriminator_that_was_moved(capsys, tuning, common, tuned_run, tmp_path):
    """A run goes on with its file elsewhere, and with no other."""
    gan = common.index("--disc-init") + 1
    flags = (*TINY, "--data", tuning[0], "--run-dir", tuned_run, "--max-steps", 3, "--ema-decay", 0.5)
    moved = [*common[:gan], shutil.copy(common[gan], tmp_path / "moved.pth"), *common[gan + 1 :]]
    status, out, _ = cli(capsys, "train", *flags, *moved)
    assert status == 0 and "nothing left to do at step 3" in out
    torch.save(models.Discriminator().state_dict(), tmp_path / "moved.pth")
    status, _, err = cli(capsys, "train", *flags, *moved)
    assert status == 2 and "disc_init_content is" in message(err)


def test_it_learns(capsys, tuning, common, tmp_path):
    """From scratch, reconstructions get closer and SiT's tokens more like the encoder's, at once."""
    flags = (*common, "--vae-from-scratch", "--max-steps", 25, "--lr", 5e-3, "--batch-size", 8)
    lines, _ = fit(capsys, tuning[0], tmp_path / "run", *flags, "--gan-weight", 0)
    first, last = ({name: np.mean([line[name] for line in part]) for name in lines[0]}
                   for part in (lines[:5], lines[-5:]))
    assert last["l1"] < 0.8 * first["l1"] and last["repa"] < first["repa"] - 0.1
    assert last["tune_repa"] < first["tune_repa"] - 0.1


def test_the_tuned_vae_is_a_vae(capsys, tuned_run, images, tmp_path):
    """Extracted by it, x is what the checkpoint's SiT was trained on, and decodes as the VAE does."""
    folder, state = tuned_run / "checkpoints" / "0000003-vae", load(tuned_run / "state.pt")
    vae = load_vae(str(folder))
    weights = {f"vae.{name}": x for name, x in vae.state_dict().items()}
    assert all(torch.equal(x, state["tuned"][name]) for name, x in weights.items())
    flags = ("--images", images, "--vae", folder, "--image-size", 32, "--num-workers", 1)
    status, _, err = cli(capsys, "extract_latents", *flags, "--out", tmp_path / "set", "--store-images",
                         "--reconstruct")
    assert status == 0, err
    pictures = np.load(tmp_path / "set" / "images.npy")
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
        decoded = ((vae.decode(posterior.mean).sample + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    mean, std = (state["ema"][f"bn.running_{name}"].view(-1, 1, 1) for name in ("mean", "var"))
    assert not torch.equal(mean, state["model"]["bn.running_mean"].view(-1, 1, 1))
    stored = Latents(tmp_path / "set").read(np.arange(12))
    x, std_x = stored["mean"], stored["std"]
    torch.testing.assert_close(x, (posterior.mean - mean) / std.sqrt(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(std_x, posterior.std / std.sqrt(), rtol=2e-3, atol=2e-3)
    facts = Latents(tmp_path / "set").facts
    shown = decode(vae, x, facts["shift"], facts["scale"])
    assert (shown - decoded).abs().max() <= 1
    stored = np.load(tmp_path / "set" / "reconstructions.npy")  # for rFID
    assert abs(stored - decoded.numpy()).max() <= 1 and (stored == decoded.numpy()).mean() > 0.99
    rfid = (tmp_path / "set" / "reconstructions.npy", "--ref", tmp_path / "set" / "images.npy",
            "--detector", DETECTOR, "--num-workers", 1)
    status, out, err = cli(capsys, "fid", *rfid)
    assert status == 0 and "FID" in out, err
    again = ("--vae-repa-depth", 0, "--max-steps", 1)  # the second stage
    fit(capsys, tmp_path / "set", tmp_path / "second", *again)

    _, trained = sample.load_model(tuned_run / "checkpoints" / "0000003.pt")
    assert trained["data"]["vae"] == str(folder) == facts["vae"]
    assert (trained["data"]["shift"], trained["data"]["scale"]) == (facts["shift"], facts["scale"])


def test_a_tuned_checkpoint_samples(capsys, tuned_run, tmp_path):
    """By --ckpt alone, also where the run was moved to: as its SiT and VAE do by hand, and as the grid of
    training."""
    run = shutil.copytree(tuned_run, tmp_path / "moved")
    ckpt, state = run / "checkpoints/0000003.pt", load(run / "state.pt")
    flags = ("--ckpt", ckpt, "--num-steps", 5, "--per-class", 1, "--mode", "ode", "--out", run / "a.png")
    status, _, err = cli(capsys, "sample", *flags)
    assert status == 0, err
    model, vae = sample.load_model(ckpt)[0], load_vae(str(run / "checkpoints/0000003-vae"))
    noise = sample.randn_like(torch.zeros(3, 4, 8, 8), [sample.rng(0, i, "cpu") for i in range(3)])
    x = sample.sample_ode(model, noise, torch.arange(3), num_steps=5)
    mean, var = (state["ema"][f"bn.running_{name}"].view(-1, 1, 1) for name in ("mean", "var"))
    with torch.no_grad():
        pixels = ((vae.decode(x * var.sqrt() + mean).sample + 1) * 127.5).round().clamp(0, 255)
    pixels, found = pixels.permute(0, 2, 3, 1).flatten(0, 1).numpy(), np.asarray(Image.open(run / "a.png"))
    assert abs(found - pixels).max() <= 1 and (found == pixels).mean() > 0.99
    grid = ("--ckpt", ckpt, "--num-steps", 50, "--per-class", 4, "--mode", "ode", "--cfg-scale", 4,
            "--out", run / "b.png")
    assert cli(capsys, "sample", *grid)[0] == 0
    a, b = (np.asarray(Image.open(path)) for path in (run / "b.png", run / "samples" / "0000003.png"))
    assert abs(a.astype(int) - b).max() <= 1
    shutil.rmtree(run / "checkpoints" / "0000003-vae")
    status, _, err = cli(capsys, "sample", "--ckpt", run / "checkpoints/0000003.pt")
    assert status == 2 and "0000003-vae" in message(err)


def test_published_checkpoints(tmp_path):
    """REPA-E's hold its norm beside SiT's weights; their latents are undone by it."""
    model, mean, var = lively("SiT-S/8", 7, 16), torch.randn(4), torch.rand(4) + 0.5
    weights = {**model.state_dict(), "projectors.0.0.weight": torch.ones(3), "bn.running_mean": mean,
               "bn.running_var": var, "bn.num_batches_tracked": torch.tensor(5)}
    torch.save({"ema": weights, "vae": {}, "args": argparse.Namespace(), "steps": 400000}, tmp_path / "a.pt")
    loaded, settings = sample.load_model(tmp_path / "a.pt")
    assert same_tensors(loaded.state_dict(), model.state_dict())
    assert settings["data"]["vae"] == "REPA-E/e2e-sdvae-hf" and settings["data"]["shift"] == mean.tolist()
    np.testing.assert_allclose(settings["data"]["scale"], var.numpy() ** -0.5, rtol=1e-6)


def test_published_vaes(capsys, images, vae, tmp_path):
    """REPA-E's have statistics per channel; without these in the config, SD's scale is not taken."""
    folder = shutil.copytree(vae, tmp_path / "e2e-sdvae-hf")
    for name in ("/models--REPA-E--e2e-sdvae-hf/snapshots/0a1b", "REPA-E/e2e-sdvae-hf", "/e2e-runs/sd", None):
        config = {"scaling_factor": 0.18215, "latent_channels": 4, "_name_or_path": name}
        known = not name or name.endswith("sd")
        with contextlib.nullcontext() if known else pytest.raises(ValueError, match="latents_mean"):
            assert latent_normalization(config) == (0, 0.18215)
    config = json.loads((vae / "config.json").read_text())
    config |= {"scaling_factor": 0.18215, "shift_factor": None}
    flags = ("--images", images, "--vae", folder, "--image-size", 32, "--num-workers", 1)
    flags += ("--out", tmp_path / "set")
    (folder / "config.json").write_text(json.dumps(config))
    status, _, err = cli(capsys, "extract_latents", *flags)
    assert status == 2 and "latents_mean and latents_std" in message(err)
    means, stds = {"latents_mean": [1.0, 2.0, 3.0, 4.0]}, {"latents_std": [1.0, 2.0, 4.0, 8.0]}
    (folder / "config.json").write_text(json.dumps(config | means | stds))
    assert cli(capsys, "extract_latents", *flags)[0] == 0
    about = json.loads((tmp_path / "set" / "latents.json").read_text())
    assert (about["shift"], about["scale"]) == ([1, 2, 3, 4], [1, 0.5, 0.25, 0.125])


def test_an_exported_encoder_is_the_encoder(capsys, tuning, common, tuned_run, tmp_path):
    """The same run, to rounding."""
    export(models.Encoder(tiny_encoder(), 32), tmp_path / "a.pt2", 32)
    encoder, images = models.load_encoder(str(tmp_path / "a.pt2"), 32), some_batch(5)["images"]
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(images)
    torch.testing.assert_close(tokens, models.Encoder(tiny_encoder(), 32)(images))
    assert (encoder.side, encoder.dim) == (2, 32) and not tokens.requires_grad
    flags = (*common, "--max-steps", 2, "--repa-encoder", tmp_path / "a.pt2")
    lines, _ = fit(capsys, tuning[0], tmp_path / "own", *flags)
    for a, b in zip(lines, log(tuned_run)[:2], strict=True):
        assert a["repa"] == pytest.approx(b["repa"], rel=1e-4) and a["l1"] == pytest.approx(b["l1"], rel=1e-4)


class Tokens(torch.nn.Module):
    """Makes a tensor."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, images):
        return images.float().mean((1, 2, 3)).view(-1, *[1] * len(self.shape)) + torch.zeros(self.shape)


@pytest.fixture
def programs(tmp_path):
    """[(file, side of its images)]: a detector and two encoders, made on a CPU."""
    export(models.Encoder(tiny_encoder(), 32), tmp_path / "encoder.pt2", 32)
    export(Tokens(4, 5), tmp_path / "tokens.pt2", 32)
    return [(DETECTOR, 64), (tmp_path / "encoder.pt2", 32), (tmp_path / "tokens.pt2", 32)]


def test_programs_on_another_device(programs):
    """Than that they were made on, with their weights, constants, and tensors that they make."""
    for path, size in programs:
        x = torch.zeros(3, 3, size, size, dtype=torch.uint8, device="meta")
        assert {out.device.type for out in tree_leaves(models.load_program(path, "meta")(x))} == {"meta"}


@pytest.mark.parametrize("shape, says", [
    ((9, 5), "3x3 tokens, SiT 2x2"), ((5, 5), "square grid"), ((5,), "square grid"), (None, "a.pt2")])
def test_encoders_that_do_not_fit(capsys, tuning, common, tmp_path, shape, says):
    (tmp_path / "a.pt2").write_bytes(b"x")
    if shape:
        export(Tokens(*shape), tmp_path / "a.pt2", 32)
    flags = (*common, "--repa-encoder", tmp_path / "a.pt2")
    assert says in refused(capsys, tuning[0], tmp_path / "run", *flags)


@pytest.mark.slow
def test_a_variant_on_two_processes(capsys, unpatched, tuning, common, tmp_path):
    """Gradients pass the norm's statistics over both; its run is named, and kept apart from others."""
    plain = (*common, "--gan-weight", 0, "--lpips-weight", 0, "--batch-size", 8, "--lr", 1e-5,
             "--max-steps", 2)
    flags = (*untuned(plain), "--variant", "no-stop-gradient")
    whole, state = fit(capsys, tuning[0], tmp_path / "whole", *flags, script="repa_e")
    process("tests/repa_e", *TINY, *flags, "--data", tuning[0], "--run-dir", tmp_path / "pair", processes=2)
    other = load(tmp_path / "pair/state.pt")
    for a, b in zip(log(tmp_path / "pair"), whole, strict=True):
        for key in a.keys() - {"seconds", "images_per_s", "memory_gib"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (a["step"], key)
    first = len(state["model"]) - 3  # in the optimizer, of the VAE: SiT's come first
    gradients = [[each["opt"]["state"][i]["exp_avg"] for each in (state, other)]
                 for i in range(first, len(state["opt"]["state"]))]
    assert len(gradients) == len(state["tuned"])
    largest = max(mine.abs().max() for mine, _ in gradients)
    for mine, theirs in gradients:
        assert (mine - theirs).abs().max() <= 1e-3 * mine.abs().max() + 1e-6 * largest
    assert state["settings"]["tune_vae"] == "no-stop-gradient"
    assert "tune_vae is 'no-stop-gradient' there" in refused(capsys, tuning[0], tmp_path / "whole", *plain)


@pytest.mark.parametrize("flags, says", [
    (("--variant", "nothing"), "nothing"),
    (("--variant", "diffusion-loss", "--tune-vae"), "exclude each other"),
    (("--tune-vae", "--variant=diffusion-loss"), "exclude each other"),
    (("--variant=no-batch-norm", "--vae-from-scratch"), "with no-batch-norm"),
    (("--variant=no-batch-norm", "--repa-depth", 0), "needs REPA"),
    (("--variant=no-stop-gradient", "--sra-depth", 2), "--sra-depth")])
def test_variants_that_are_refused(capsys, unpatched, tuning, common, tmp_path, flags, says):
    assert says in refused(capsys, tuning[0], tmp_path / "run", *untuned(common), *flags, script="repa_e")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["diffusion-loss", "no-stop-gradient"])
def test_without_stop_gradient_the_latents_collapse(tmp_path, variant):
    """Tables 1 and 7, on the demo's images: if the diffusion loss reaches the VAE, an image's pixels get
    nearly one latent, which is easy to denoise; before, most of the variance is within images."""
    images, data, size = tmp_path / "images", tmp_path / "set", demo.SIZE
    process("tests/data/draw_images", images, "--count", 400, "--size", size)
    process("extract_latents", "--images", images, "--out", data, "--vae", ROOT / "tests/data/vae",
            "--image-size", size, "--store-images")
    export(demo.Encoder(), tmp_path / "encoder.pt2", size)
    process("tests/repa_e", "--variant", variant, *repa_e.TUNED, "--data", data, "--run-dir",
            tmp_path / "run", "--model", "SiT-Ti/2", "--vae-repa-depth", 0, "--repa-depth", 2,
            "--repa-encoder", tmp_path / "encoder.pt2", "--batch-size", 32, "--max-steps", 100, "--lr", 1e-3,
            "--sample-every", 0)
    images = torch.from_numpy(np.load(data / "images.npy")).permute(0, 3, 1, 2) / 127.5 - 1
    within = []
    for vae in (ROOT / "tests/data/vae", tmp_path / "run/checkpoints/0000100-vae"):
        with torch.no_grad():
            z = load_vae(str(vae)).encode(images).latent_dist.mean
        within.append(figures.variance(z) / z.var(dim=(0, 2, 3)).mean().item())
    assert within[0] > 0.8 and within[1] < 0.1, within


ROWS = sorted({line for line in commands("tests/PAPERS.md") if re.match("python .*(train|repa_e).py", line)})


@pytest.mark.slow
@pytest.mark.parametrize("line", ROWS)
def test_each_row_of_the_papers_trains(capsys, unpatched, tuning, tmp_path, line):
    """Two steps of each command in the tables of PAPERS.md, with a small SiT on small latents."""
    script, words = re.match(r"python (?:tests/)?(\w+)\.py (.*)", line).groups()
    words = re.sub(r"--(data|repa-encoder|model) \S+", "", words).split()
    small = ("--model", "SiT-S/4", "--repa-encoder", "dinov2_vitt14", "--sra-teacher-depth", 12)
    lpips = tuning[1][1:4] if "--lpips-weight" not in words else ()
    flags = (*small, *lpips, *words, "--max-steps", 2)
    lines, _ = fit(capsys, tuning[0], tmp_path / "run", *flags, script=script)
    assert len(lines) == 2 and len(ROWS) > 45
    assert ("tune_sit" in lines[0]) == ("stop-gradient" in line or "diffusion" in line)
    assert ("l1" in lines[0]) == ("tune" in line or "variant" in line)
    assert ("vae_repa" in lines[0]) == ("--vae-repa-depth 0" not in line)


@pytest.mark.slow
def test_the_comparison():
    """Its table has PAPERS.md's columns and methods, and two pictures."""
    run = process("tests/repa_e", "--steps", 20, "--lr", 1e-3)
    lines = re.findall(r"^\|.*", run.stdout, re.M)
    folder = ROOT / "runs/repa-e/2000-images"
    shown = (ROOT / "tests/PAPERS.md").read_text().splitlines()
    assert lines[0] in shown and Image.open(folder / "reconstructions.png").size == (640, 7 * 64)
    assert Image.open(folder / "samples.png").size == (16 * 64, 6 * 64)
    lines = [line for line in lines[2:] if not line.startswith("| difference |")]
    for line, method in zip(lines, repa_e.METHODS, strict=True):
        assert line.startswith(f"| {method} |") and any(row.startswith(f"| {method} |") for row in shown)


BAD = [
    (("--repa-depth", 0), "--repa-depth"), (("--repa-weight", 0), "--repa-depth"),
    (("--lpips-weights", "a.pth", "b.pth"), "a.pth"), (("--kl-weight", -1), "--kl-weight"),
    (("--disc-init", "nowhere.pth"), "nowhere.pth"), (("--lpips-weights", "LIN", "VGG"), "--lpips-weights"),
    (("--disc-init", "VGG"), "vgg.pth"), (("--gan-weight", "nan"), "--gan-weight")]


@pytest.mark.parametrize("flags, says", BAD)
def test_bad_flags(capsys, tuning, common, tmp_path, flags, says):
    vgg, lin = tuning[1][2:4]
    flags = [{"VGG": vgg, "LIN": lin}.get(flag, flag) for flag in flags]
    assert says in refused(capsys, tuning[0], tmp_path / "run", *common, *flags)


def test_what_else_is_refused(capsys, data, tuning, common, tmp_path, tuned_run):
    """No images, another VAE's latents, a VAE without a posterior, a run with the flag resumed without or the
    reverse."""
    from diffusers import VQModel  # slow to import

    plain = [flag for flag in common if flag != "--tune-vae"]
    scratch = (*plain, "--vae-from-scratch")
    assert "--vae-from-scratch needs" in refused(capsys, tuning[0], tmp_path / "r", *scratch)
    assert "nobody/nothing" in refused(capsys, data, tmp_path / "r", *common)
    without = shutil.copytree(tuning[0], tmp_path / "without")
    (without / "images.npy").unlink()
    assert "--store-images" in refused(capsys, without, tmp_path / "r", *common)
    export(Tokens(4, 5), tmp_path / "a.pt2", 64)
    vq = tmp_path / "vq"
    VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(vq)
    about = {**json.loads((tuning[0] / "latents.json").read_text()), "vae_content": None}
    for i, (vae, images, says) in enumerate((
            (str(vq), None, "vq for 32 pixels: it has no Gaussian posterior"),
            (about["vae"], (12, 64, 64, 3), "for 64 pixels: it makes other latents than [4, 8, 8]"))):
        other = ("--repa-encoder", tmp_path / "a.pt2") if i == 1 else ()  # that takes any size
        folder = shutil.copytree(tuning[0], tmp_path / f"set{i}")
        (folder / "latents.json").write_text(json.dumps({**about, "vae": vae}))
        if images:
            np.save(folder / "images.npy", np.zeros(images, np.uint8))
        assert says in refused(capsys, folder, tmp_path / "r", *common, *other)
    small = write_set(tmp_path / "small", size=4, image_size=16, vae=about["vae"])
    export(Tokens(1, 5), tmp_path / "b.pt2", 16)
    said = refused(capsys, small, tmp_path / "r", *common, "--repa-encoder", tmp_path / "b.pt2")
    assert "a discriminator for 16 pixels" in said
    fit(capsys, tuning[0], tmp_path / "plain", *plain, "--max-steps", 2)
    assert "tune_vae" in refused(capsys, tuning[0], tmp_path / "plain", *common)
    assert "tune_vae" in refused(capsys, tuning[0], tuned_run, *plain, "--ema-decay", 0.5)


def test_a_loss_of_the_vae_that_is_not_finite(capsys, tuning, common, tmp_path):
    """Stops training at its step, before a checkpoint holds it."""
    flags = (*TINY, *common, "--data", tuning[0], "--run-dir", tmp_path / "run", "--max-steps", 1)
    status, _, err = cli(capsys, "train", *flags, "--l1-weight", "inf")  # SiT's gradient of step 1 is finite
    assert status == 2 and "not finite at step 1:" in message(err)
    assert not list((tmp_path / "run").rglob("*.pt"))
