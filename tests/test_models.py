"""models.py against independent references: values and gradients of SiT and its heads; the papers' names,
sizes, parameter counts and FLOPs; DiT's initialisation; depth 0 as plain SiT."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from models import SiT, SiT_models, patchify
from train import alignment_loss

SMALL = {"input_size": 8, "in_channels": 4, "num_classes": 10, "hidden_size": 32, "depth": 4, "num_heads": 4}


def randomised(model):
    """The model with every parameter drawn anew: zero initialisation hides whatever it multiplies."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    return model


def inputs(channels=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, channels, 8, 8, generator=g), torch.rand(3, generator=g), torch.tensor([3, 0, 10])


def on_meta(name, **options):
    with torch.device("meta"):
        return SiT_models[name](**options)


def mae_positions(dim, side):
    """MAE's get_2d_sincos_pos_embed: the column's half of dim first; each is sin, then cos."""
    grid = np.meshgrid(np.arange(side, dtype=np.float64), np.arange(side, dtype=np.float64))
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    column, row = (np.outer(positions, omega) for positions in grid)
    return np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)


def dit_unpatchify(tokens, p, c):
    """DiT's and REPA's unpatchify."""
    h = w = int(tokens.shape[1] ** 0.5)
    x = torch.einsum("nhwpqc->nchpwq", tokens.reshape(len(tokens), h, w, p, p, c))
    return x.reshape(len(tokens), c, h * p, w * p)


def linear(state, name, h):
    return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(state, i, h, c, heads):
    b, n, d = h.shape
    # shift, scale, gate of the attention, then of the MLP
    m = linear(state, f"blocks.{i}.adaLN_modulation.1", F.silu(c))[:, None].split(d, dim=-1)
    normed = F.layer_norm(h, (d,), eps=1e-6) * (1 + m[1]) + m[0]
    q, k, v = linear(state, f"blocks.{i}.attn.qkv", normed).split(d, dim=-1)
    mixed = []
    for head in torch.arange(d).chunk(heads):
        attention = (q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(d / heads)).softmax(-1)
        mixed.append(attention @ v[..., head])
    h = h + m[2] * linear(state, f"blocks.{i}.attn.proj", torch.cat(mixed, dim=-1))
    hidden = linear(state, f"blocks.{i}.mlp.fc1", F.layer_norm(h, (d,), eps=1e-6) * (1 + m[4]) + m[3])
    return h + m[5] * linear(state, f"blocks.{i}.mlp.fc2", F.gelu(hidden, approximate="tanh"))


def final_layer(state, name, h, c):
    shift, scale = linear(state, f"{name}.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=-1)
    return linear(state, f"{name}.linear", F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def reference(state, x_t, t, y, patch, head_depths):
    """(v, predictions of the heads by name, outputs of the 4 blocks of 4 heads), from the weights by name."""
    channels, width = x_t.shape[1], state["x_embedder.proj.bias"].shape[0]
    patches = F.unfold(x_t, patch, stride=patch).transpose(1, 2)  # (B, N, C * p * p), as a conv's weight lies
    h = patches @ state["x_embedder.proj.weight"].reshape(width, -1).T + state["x_embedder.proj.bias"]
    h = h + torch.from_numpy(mae_positions(width, x_t.shape[-1] // patch)).float()
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    hidden = F.silu(linear(state, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
    c = linear(state, "t_embedder.mlp.2", hidden) + state["y_embedder.embedding_table.weight"][y]
    outputs, predictions = [], {}
    for i in range(4):
        outputs.append(h := block(state, i, h, c, heads=4))
    for name, depth in head_depths.items():
        out = outputs[depth - 1]
        layers = sorted({key.rsplit(".", 1)[0] for key in state if key.startswith(f"heads.{name}.mlp.")})
        for layer in layers:
            out = linear(state, layer, out)
            out = F.silu(out) if name == "vae_repa" or layer != layers[-1] else out
        out = final_layer(state, "heads.vae_repa.final_layer", out, c) if name == "vae_repa" else out
        predictions[name] = out
    return dit_unpatchify(final_layer(state, "final_layer", h, c), patch, channels), predictions, outputs


@pytest.mark.parametrize("patch, channels, layers, depths", [
    (2, 4, 5, (2, 4, 1)), (1, 16, 2, (4, 1, 3)), (4, 3, 3, (1, 2, 2)), (2, 4, 5, (3, 0, 0))])
def test_values_and_gradients_equal_a_plain_reimplementation(patch, channels, layers, depths):
    """Of the velocity and every head, on every block, for every class and the null class."""
    asked = dict(zip(("vae_repa", "repa", "sra"), depths))
    model = randomised(SiT(**{**SMALL, "in_channels": channels}, patch_size=patch, vae_repa_layers=layers,
                           repa_dim=24, **{f"{name}_depth": depth for name, depth in asked.items()}))
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    x_t, t, y = inputs(channels)
    v, predictions = model(x_t, t, y, return_align=True)
    built = {name: depth for name, depth in asked.items() if depth}
    v_ref, expected, outputs = reference(state, x_t, t, y, patch, built)
    assert predictions.keys() == model.heads.keys() == built.keys() and model.head_depths == built
    assert model.x_embedder(x_t).is_contiguous()  # as (B, N, D), the order that all blocks keep: it is faster
    pairs = [(v, v_ref), *((predictions[name], expected[name]) for name in built)]
    for out, ref in pairs:
        assert ref.std() > 0.1
        torch.testing.assert_close(out, ref, rtol=1e-4, atol=3e-5)
    assert torch.equal(model(x_t, t, y), v)

    sum(out.square().mean() for out, _ in pairs).backward()
    sum(ref.square().mean() for _, ref in pairs).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, state[name].grad, rtol=1e-3, atol=1e-5, msg=name)
    for depth in range(1, 5):
        h, _ = model.early_blocks(x_t, t, y, depth)
        assert h.is_contiguous()
        torch.testing.assert_close(h, outputs[depth - 1], rtol=1e-4, atol=1e-4)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]  # 1e-6 hardly shows in the values
    assert len(norms) == 2 * 4 + 2 and all(norm.eps == 1e-6 and not norm.elementwise_affine for norm in norms)


@pytest.mark.parametrize("p, c, side", [(2, 4, 3), (1, 16, 3), (4, 3, 2)])
def test_tokens_have_dits_order(p, c, side):
    tokens = torch.randn(2, side * side, p * p * c)
    x = dit_unpatchify(tokens, p, c)
    assert torch.equal(models.unpatchify(tokens, p, c), x)
    assert torch.equal(models.patchify(x, like=tokens), tokens)


def test_depth_0_is_plain_sit_to_the_bit():
    """Heads draw their weights last, and change no velocity."""
    torch.manual_seed(3)
    plain = SiT(**SMALL)
    torch.manual_seed(3)
    aligned = SiT(**SMALL, vae_repa_depth=2, repa_depth=1, sra_depth=4)
    shared = {k: v for k, v in aligned.state_dict().items() if not k.startswith("heads.")}
    assert list(shared) == list(plain.state_dict()) and len(aligned.state_dict()) > len(shared)
    assert all(torch.equal(shared[k], v) for k, v in plain.state_dict().items())

    randomised(aligned)
    plain.load_state_dict({k: v for k, v in aligned.state_dict().items() if k in shared})
    v, nothing = plain(*inputs(), return_align=True)
    assert torch.equal(v, aligned(*inputs(), return_align=True)[0]) and v.std() > 0.1 and nothing == {}


def test_weights_have_sits_names_and_shapes():
    """Published checkpoints load by them. The position table is MAE's, and no parameter."""
    layers = {"t_embedder.mlp.0": (1152, 256), "t_embedder.mlp.2": (1152, 1152),
              "final_layer.linear": (16, 1152), "final_layer.adaLN_modulation.1": (2304, 1152)}
    block = {"attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.fc1": (4608, 1152),
             "mlp.fc2": (1152, 4608), "adaLN_modulation.1": (6912, 1152)}
    layers |= {f"blocks.{i}.{name}": shape for i in range(28) for name, shape in block.items()}
    expected = {"pos_embed": (1, 256, 1152), "y_embedder.embedding_table.weight": (1001, 1152),
                "x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,)}
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    model = on_meta("SiT-XL/2")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert "pos_embed" not in dict(model.named_parameters())
    table = models.sincos_positions(1152, 16)
    np.testing.assert_allclose(table[0].numpy(), mae_positions(1152, 16), atol=1e-6)


def test_presets_are_dits_and_sits():
    sizes = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6),
             "Ti": (6, 128, 4)}  # which is ours
    assert set(SiT_models) == {f"SiT-{size}/{p}" for size in sizes for p in (1, 2, 4, 8)}
    for name in SiT_models:
        size, p = name.removeprefix("SiT-").split("/")
        model, (depth, width, heads) = on_meta(name), sizes[size]
        assert len(model.blocks) == depth and model.x_embedder.proj.weight.shape == (width, 4, int(p), int(p))
        assert all(block.attn.num_heads == heads and block.mlp.fc1.out_features == 4 * width
                   for block in model.blocks)


def gflops(model, return_align):
    """Of one image, as fvcore counts: multiply-adds of layers, 4 per normalised element, no attention."""
    counts = []

    def count(module, args, out):
        counts.append(out.numel() * (4 if isinstance(module, nn.LayerNorm) else module.weight[0].numel()))

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module.register_forward_hook(count)
    with torch.device("meta"):
        model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1).long(), return_align=return_align)
    return sum(counts) / 1e9


def test_parameters_and_flops_are_the_papers():
    """The head is not run where nobody asks for it, so sampling costs what plain SiT costs."""
    xl = on_meta("SiT-XL/2", vae_repa_depth=8, repa_depth=8, sra_depth=8)
    assert round(sum(v.numel() for v in on_meta("SiT-XL/2").state_dict().values()) / 1e6, 1) == 675.1
    heads = {name: sum(p.numel() for p in head.parameters()) for name, head in xl.heads.items()}
    assert heads["repa"] == 8_131_328 and heads["sra"] == 5_311_872  # REPA's and SRA's
    assert gflops(xl, False) == pytest.approx(114.46, rel=1e-3)
    assert gflops(on_meta("SiT-XL/2", vae_repa_depth=8), True) == pytest.approx(118.55, rel=1e-3)
    for name, layers, millions, cost in [("SiT-XL/2", 5, 18.608, 4.085), ("SiT-L/2", 5, 14.706, 3.229),
                                         ("SiT-B/2", 5, 8.277, 1.817), ("SiT-B/2", 2, 1.784, 0.156)]:
        model = on_meta(name, vae_repa_depth=2, vae_repa_layers=layers)
        assert round(sum(p.numel() for p in model.heads.parameters()) / 1e6, 3) == millions
        assert round(gflops(model, True) - gflops(on_meta(name), False), 3) == cost


def test_initialisation():
    torch.manual_seed(0)
    model = SiT(8, hidden_size=256, depth=2, num_heads=4, vae_repa_depth=2, repa_depth=1, sra_depth=1)
    normal = {"y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"}
    for name, p in model.named_parameters():
        if name.endswith(("bias", "final_layer.linear.weight")) or "adaLN_modulation" in name:
            assert not p.any(), name
        elif name in normal:
            assert p.std().item() == pytest.approx(0.02, rel=0.02), name
            assert p.abs().max() > 0.06, name  # a uniform distribution of this width ends at 0.035
        else:
            rows = p.flatten(1)  # the patch embedding counts as a linear layer
            bound = math.sqrt(6 / sum(rows.shape))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_a_cosine_has_a_direction():
    """With it the head's last layer does not start at zero, and its first gradient is not 1e8; all else is
    as ever."""
    heads = {"vae_repa_depth": 2, "repa_depth": 2, "sra_depth": 1}
    plain, cosine = (torch.manual_seed(0) and SiT(**SMALL, **heads, vae_repa_loss=loss)
                     for loss in ("smooth_l1", "cosine"))
    changed = [name for (name, a), b in zip(plain.named_parameters(), cosine.parameters())
               if not torch.equal(a, b)]
    assert changed == ["heads.vae_repa.final_layer.linear.weight"]
    x, t, y = inputs()
    _, heads = cosine(x, t, y, return_align=True)
    alignment_loss(heads["vae_repa"], patchify(x, like=heads["vae_repa"]), "cosine").mean().backward()
    assert 0 < sum(p.grad.norm() for p in cosine.heads["vae_repa"].parameters()) < 10


def test_bf16_keeps_what_is_small():
    """Autocast rounds products alone: neither t's embedding, nor 1 + scale, which it would make a 1. A model
    of bf16 weights runs all the same."""
    model = SiT(**SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        h, c = model.embed(*inputs())
    assert torch.equal(c, model.embed(*inputs())[1]) and h.dtype == c.dtype == torch.float32
    shift, scale = torch.full((2, 1, 8), 2.0**-10, dtype=torch.bfloat16)
    h = torch.ones(1, 3, 8)
    assert torch.equal(models.modulate(h, shift, scale), h + 2.0**-9)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.bfloat16()(*inputs()).isfinite().all()


@pytest.mark.parametrize("sizes", [
    {"input_size": 6, "patch_size": 4}, {"vae_repa_depth": 5}, {"vae_repa_depth": -1}, {"repa_depth": 5},
    {"sra_depth": -1}, {"vae_repa_depth": 1, "vae_repa_layers": 1}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=r"\d"):
        SiT(**{**SMALL, **sizes})
