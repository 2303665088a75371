"""models.py against independent references: SiT's arithmetic, positions, names, counts, FLOPs and initialisation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from models import SiT, SiT_models

SMALL = {"input_size": 8, "in_channels": 4, "num_classes": 10, "hidden_size": 32, "depth": 4, "num_heads": 4}


def randomised(model, seed=0):
    """The model with every parameter drawn anew: zero initialisation hides whatever it multiplies."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    return model


def inputs(batch=3, channels=4, size=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, channels, size, size, generator=g), torch.rand(batch, generator=g),
            torch.randint(0, 11, (batch,), generator=g))


def on_meta(name, **options):
    with torch.device("meta"):
        return SiT_models[name](**options)


def mae_positions(dim, side):
    """MAE's get_2d_sincos_pos_embed: the grid puts w first; each coordinate fills half of dim with sin, then cos."""
    axis = np.arange(side, dtype=np.float64)
    grid = np.stack(np.meshgrid(axis, axis))  # grid[0] runs along the columns

    def one_axis(position):
        omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
        out = np.einsum("m,d->md", position.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    return np.concatenate([one_axis(grid[0]), one_axis(grid[1])], axis=1)


def dit_unpatchify(tokens, p, c):
    """DiT's and REPA's unpatchify."""
    h = w = int(tokens.shape[1] ** 0.5)
    x = torch.einsum("nhwpqc->nchpwq", tokens.reshape(len(tokens), h, w, p, p, c))
    return x.reshape(len(tokens), c, h * p, w * p)


def layer_norm(h):
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def silu(h):
    return h / (1 + (-h).exp())


def gelu_tanh(h):
    return h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def linear(state, name, h):
    return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def condition(state, t, y):
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies[None]
    hidden = silu(linear(state, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
    t_emb = linear(state, "t_embedder.mlp.2", hidden)
    return t_emb + state["y_embedder.embedding_table.weight"][y]


def block(state, i, h, c, heads):
    b, n, d = h.shape
    # shift, scale, gate of the attention, then of the MLP
    m = linear(state, f"blocks.{i}.adaLN_modulation.1", silu(c))[:, None].split(d, dim=-1)
    q, k, v = linear(state, f"blocks.{i}.attn.qkv", layer_norm(h) * (1 + m[1]) + m[0]).split(d, dim=-1)
    mixed = torch.zeros_like(h)
    for head in torch.arange(d).chunk(heads):
        attention = (q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(d / heads)).softmax(-1)
        mixed[..., head] = attention @ v[..., head]
    h = h + m[2] * linear(state, f"blocks.{i}.attn.proj", mixed)
    hidden = gelu_tanh(linear(state, f"blocks.{i}.mlp.fc1", layer_norm(h) * (1 + m[4]) + m[3]))
    return h + m[5] * linear(state, f"blocks.{i}.mlp.fc2", hidden)


def final_layer(state, name, h, c):
    shift, scale = linear(state, f"{name}.adaLN_modulation.1", silu(c))[:, None].chunk(2, dim=-1)
    return linear(state, f"{name}.linear", layer_norm(h) * (1 + scale) + shift)


def reference(state, x_t, t, y, patch, heads, depth, align_depth):
    """(v, tokens of x) of SiT with VAE-REPA's head, from its weights by name."""
    channels, width = x_t.shape[1], state["x_embedder.proj.bias"].shape[0]
    patches = F.unfold(x_t, patch, stride=patch).transpose(1, 2)  # (B, N, C * p * p), as a conv's weight lies
    h = patches @ state["x_embedder.proj.weight"].reshape(width, -1).T + state["x_embedder.proj.bias"]
    h = h + torch.from_numpy(mae_positions(width, x_t.shape[-1] // patch)).float()
    c, x = condition(state, t, y), None
    for i in range(depth):
        h = block(state, i, h, c, heads)
        if i + 1 == align_depth:
            hidden = h
            weights = [k for k in state if k.startswith("heads.vae_repa.mlp") and k.endswith(".weight")]
            for layer in sorted(weights):
                hidden = silu(linear(state, layer.removesuffix(".weight"), hidden))
            x = final_layer(state, "heads.vae_repa.final_layer", hidden, c)
    return dit_unpatchify(final_layer(state, "final_layer", h, c), patch, channels), x


@pytest.mark.parametrize("p, c, side", [(2, 4, 4), (1, 16, 3), (4, 3, 2)])
def test_unpatchify_has_dits_order_and_patchify_inverts_it(p, c, side):
    tokens = torch.arange(2 * side * side * p * p * c, dtype=torch.float32).reshape(2, side * side, -1)
    assert torch.equal(models.unpatchify(tokens, p, c), dit_unpatchify(tokens, p, c))
    assert torch.equal(models.patchify(models.unpatchify(tokens, p, c), p), tokens)
    x = torch.randn(2, c, side * p, side * p)
    assert torch.equal(models.unpatchify(models.patchify(x, p), p, c), x)


def test_a_token_is_one_patch_row_by_row():
    x = torch.randn(1, 4, 6, 6)
    tokens = models.patchify(x, 2)
    for row in range(3):
        for column in range(3):
            patch = x[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[0, 3 * row + column], patch.permute(1, 2, 0).reshape(-1))


@pytest.mark.parametrize("dim, side", [(1152, 16), (192, 2), (32, 5)])
def test_position_table_is_maes(dim, side):
    table = models.sincos_positions(dim, side)
    assert table.shape == (1, side * side, dim) and table.dtype == torch.float32
    np.testing.assert_allclose(table[0].numpy(), mae_positions(dim, side), atol=1e-6)


def both(model, *inputs):
    """(velocity, the tokens that VAE-REPA's head predicts or None)."""
    v, predictions = model(*inputs, return_align=True)
    return v, predictions.get("vae_repa")


@pytest.mark.parametrize("patch, channels, layers, align_depth",
                         [(2, 4, 5, 2), (1, 16, 5, 4), (1, 32, 2, 1), (4, 3, 3, 3)])
def test_forward_equals_a_plain_reimplementation(patch, channels, layers, align_depth):
    model = randomised(SiT(**{**SMALL, "in_channels": channels}, patch_size=patch, vae_repa_depth=align_depth,
                           vae_repa_layers=layers))
    x_t, t, y = inputs(channels=channels)
    with torch.no_grad():
        v, x = both(model, x_t, t, y)
        v_ref, x_ref = reference(model.state_dict(), x_t, t, y, patch, 4, 4, align_depth)
    assert v.shape == x_t.shape and x.shape == (3, (8 // patch) ** 2, patch * patch * channels)
    assert v_ref.std() > 0.1 and x_ref.std() > 0.1
    torch.testing.assert_close(v, v_ref, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(x, x_ref, rtol=1e-4, atol=2e-5)


def test_norms_have_sits_epsilon_and_no_weights():
    norms = [m for m in SiT(**SMALL, vae_repa_depth=1).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * 4 + 2
    assert all(norm.eps == 1e-6 and not norm.elementwise_affine for norm in norms)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_head_reads_the_output_of_block_d(depth):
    model = randomised(SiT(**SMALL, vae_repa_depth=depth))
    x_t, t, y = inputs()
    outputs = []
    hooks = [block.register_forward_hook(lambda module, args, out: outputs.append(out)) for block in model.blocks]
    with torch.no_grad():
        x = both(model, x_t, t, y)[1]
        c = model.t_embedder(t) + model.y_embedder(y)
        by_hand = [model.heads["vae_repa"](h, c) for h in outputs]
    for hook in hooks:
        hook.remove()
    assert [torch.equal(x, other) for other in by_hand] == [i + 1 == depth for i in range(4)]


def test_the_residual_stream_is_row_major():
    """Every block's output and its gradient, tokens (B, N, D), lie in this order in memory."""
    model = randomised(SiT(**SMALL, vae_repa_depth=1, repa_depth=2, sra_depth=3))
    stream, gradients = [], []

    def note(block, args, h):
        stream.append(h)
        h.register_hook(gradients.append)

    for block in model.blocks:
        block.register_forward_hook(note)
    v, predictions = model(*inputs(), return_align=True)
    sum(x.square().mean() for x in (v, *predictions.values())).backward()
    assert len(stream) == len(gradients) == 4 and len(predictions) == 3
    assert all(h.shape == (3, 16, 32) and h.is_contiguous() for h in (*stream, *gradients))


@pytest.mark.parametrize("flags, shapes, names", [
    ({}, {}, []),
    ({"vae_repa_depth": 2, "vae_repa_layers": 3, "sra_depth": 0}, {"vae_repa": (3, 16, 64)},
     ["vae_repa.mlp.0", "vae_repa.mlp.2", "vae_repa.final_layer.linear",
      "vae_repa.final_layer.adaLN_modulation.1"]),
    ({"vae_repa_depth": 0, "repa_depth": 4, "repa_dim": 10, "sra_depth": 1},
     {"sra": (3, 16, 128), "repa": (3, 16, 10)},
     ["repa.mlp.0", "repa.mlp.2", "repa.mlp.4", "sra.mlp.0", "sra.mlp.2"])],
    ids=["none", "VAE-REPA", "REPA and SRA"])
def test_build_model_builds_the_heads_that_settings_ask_for(flags, shapes, names):
    """Settings are what a checkpoint holds: train.py's flags by name, most of which are not the model's."""
    data = {"latent_shape": [16, 8, 8], "num_classes": 10, "shift": 0.0, "scale": 1.0, "vae": "none"}
    settings = {"model": "SiT-Ti/2", "data": data, "batch_size": 4, "sra_teacher_depth": 4, **flags}
    model, plain = models.build_model(settings, heads=True), models.build_model(settings)
    for built, expected in ((model, shapes), (plain, {})):
        v, predictions = built(*inputs(channels=16), return_align=True)
        assert v.shape == (3, 16, 8, 8) and built.num_classes == 10
        assert {name: x.shape for name, x in predictions.items()} == expected
    assert model.head_depths == {name: flags[f"{name}_depth"] for name in shapes}
    own = model.state_dict().keys() - plain.state_dict().keys()
    assert own == {f"heads.{name}.{kind}" for name in names for kind in ("weight", "bias")}
    assert own == {name for name in model.state_dict() if name.startswith(models.HEADS)}


def test_alignment_trains_the_blocks_up_to_d_and_no_later_one():
    model = randomised(SiT(**SMALL, vae_repa_depth=2))
    x_t, t, y = inputs()
    both(model, x_t, t, y)[1].square().mean().backward()
    for name, p in model.named_parameters():
        late = name.startswith(("blocks.2.", "blocks.3.", "final_layer."))
        reached = p.grad is not None and bool(p.grad.abs().max() > 0)
        assert reached != late, name


def test_depth_0_is_plain_sit_to_the_bit():
    torch.manual_seed(3)
    plain = SiT(**SMALL)
    torch.manual_seed(3)
    aligned = SiT(**SMALL, vae_repa_depth=2)
    shared = {k: v for k, v in aligned.state_dict().items() if not k.startswith("heads.")}
    assert list(shared) == list(plain.state_dict()) and len(aligned.state_dict()) > len(shared)
    assert all(torch.equal(shared[k], v) for k, v in plain.state_dict().items())

    randomised(aligned)
    plain.load_state_dict({k: v for k, v in aligned.state_dict().items() if k in shared})
    x_t, t, y = inputs()
    with torch.no_grad():
        v = plain(x_t, t, y)
        assert v.std() > 0.1
        assert torch.equal(v, aligned(x_t, t, y)) and torch.equal(v, both(aligned, x_t, t, y)[0])
        v_plain, nothing = both(plain, x_t, t, y)
    assert torch.equal(v, v_plain) and nothing is None


def test_an_image_does_not_depend_on_the_rest_of_its_batch():
    model = randomised(SiT(**SMALL, vae_repa_depth=2))
    x_t, t, y = inputs(batch=4)
    with torch.no_grad():
        together = both(model, x_t, t, y)
        for i in range(4):
            alone = both(model, x_t[i : i + 1], t[i : i + 1], y[i : i + 1])
            for a, b in zip(together, alone):
                torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-5)


def test_the_condition_matters():
    model = randomised(SiT(**SMALL, vae_repa_depth=2))
    x_t, t, y = inputs()
    with torch.no_grad():
        v, x = both(model, x_t, t, y)
        for other in (both(model, x_t, 1 - t, y), both(model, x_t, t, (y + 1) % 11)):
            for a, b in zip(other, (v, x)):
                assert (a - b).abs().flatten(1).amax(dim=1).min() > 1e-2


def test_the_model_itself_drops_no_labels():
    model = randomised(SiT(**SMALL, vae_repa_depth=2))
    x_t, t, y = inputs(batch=256)
    with torch.no_grad():
        trained, sampled = both(model.train(), x_t, t, y), both(model.eval(), x_t, t, y)
    assert torch.equal(trained[0], sampled[0]) and torch.equal(trained[1], sampled[1])


def test_parameter_names_and_shapes_are_sits():
    linears = {"t_embedder.mlp.0": (1152, 256), "t_embedder.mlp.2": (1152, 1152),
               "final_layer.linear": (16, 1152), "final_layer.adaLN_modulation.1": (2304, 1152)}
    for i in range(28):
        linears |= {f"blocks.{i}.attn.qkv": (3456, 1152), f"blocks.{i}.attn.proj": (1152, 1152),
                    f"blocks.{i}.mlp.fc1": (4608, 1152),
                    f"blocks.{i}.mlp.fc2": (1152, 4608), f"blocks.{i}.adaLN_modulation.1": (6912, 1152)}
    expected = {"pos_embed": (1, 256, 1152), "y_embedder.embedding_table.weight": (1001, 1152),
                "x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,)}
    for name, shape in linears.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {k: tuple(v.shape) for k, v in on_meta("SiT-XL/2").state_dict().items()} == expected


def test_parameter_counts_are_the_papers():
    xl = on_meta("SiT-XL/2", vae_repa_depth=0)
    assert round(sum(v.numel() for v in xl.state_dict().values()) / 1e6, 1) == 675.1
    assert not any(p is xl.pos_embed for p in xl.parameters())  # fixed
    heads = [("SiT-XL/2", 5, 18.608), ("SiT-L/2", 5, 14.706), ("SiT-B/2", 5, 8.277), ("SiT-B/2", 2, 1.784)]
    for name, layers, millions in heads:
        with_head, without = on_meta(name, vae_repa_depth=2, vae_repa_layers=layers), on_meta(name)
        count = sum(p.numel() for p in with_head.parameters()) - sum(p.numel() for p in without.parameters())
        assert round(count / 1e6, 3) == millions, (name, layers)


@pytest.mark.parametrize("layers, widths", [(2, [8, 8]), (3, [8, 16, 8]), (5, [8, 16, 16, 16, 8])])
def test_widths_of_the_head(layers, widths):
    head = models.AlignHead(8, 2, 4, layers)
    stack = [m for m in head.mlp if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in stack] == list(zip(widths, widths[1:]))
    assert [type(m) for m in head.mlp[1::2]] == [nn.SiLU] * (layers - 1)  # the last one too, before the final layer


def gflops(model, return_align):
    """Multiply-adds of one image as fvcore counts: linear, conv, 4 per LayerNorm element, no attention products."""
    total = 0

    def count(module, args, out):
        nonlocal total
        if isinstance(module, nn.LayerNorm):
            total += 4 * out.numel()
        else:
            total += out.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module.register_forward_hook(count)
    with torch.device("meta"):
        model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long), return_align=return_align)
    return total / 1e9


def test_flops_are_the_papers():
    assert gflops(on_meta("SiT-XL/2"), False) == pytest.approx(114.46, rel=1e-3)
    assert gflops(on_meta("SiT-XL/2", vae_repa_depth=8), True) == pytest.approx(118.55, rel=1e-3)
    heads = [("SiT-XL/2", 5, 4.085), ("SiT-L/2", 5, 3.229), ("SiT-B/2", 5, 1.817), ("SiT-B/2", 2, 0.156)]
    for name, layers, head in heads:
        with_head = on_meta(name, vae_repa_depth=2, vae_repa_layers=layers)
        assert round(gflops(with_head, True) - gflops(on_meta(name), False), 3) == head, (name, layers)
    # the head is not run where nobody asks for it, so sampling costs what plain SiT costs
    assert gflops(on_meta("SiT-B/2", vae_repa_depth=2), False) == gflops(on_meta("SiT-B/2"), False)


def test_presets():
    """Depths, widths and heads of DiT and SiT, every one at every patch size."""
    sizes = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
    assert set(SiT_models) == {f"SiT-{size}/{p}" for size in [*sizes, "Ti"] for p in (1, 2, 4, 8)}
    for name in SiT_models:
        size, p = name.removeprefix("SiT-").split("/")
        model = on_meta(name, vae_repa_depth=models.ALIGN_DEPTHS[size])
        with torch.device("meta"):
            v, x = both(model, torch.empty(2, 4, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.long))
        assert v.shape == (2, 4, 32, 32) and x.shape == (2, (32 // int(p)) ** 2, 4 * int(p) ** 2)
        own = (len(model.blocks), model.pos_embed.shape[2], model.blocks[0].attn.num_heads)
        depth, width, heads = sizes.get(size, own)  # the papers have no Ti
        assert len(model.blocks) == depth and model.x_embedder.proj.weight.shape == (width, 4, int(p), int(p))
        assert all(block.attn.num_heads == heads and block.mlp.fc1.out_features == 4 * width for block in model.blocks)
    assert {size: models.ALIGN_DEPTHS[size] for size in ("B", "L", "XL")} == {"B": 2, "L": 8, "XL": 8}


def test_initialisation():
    torch.manual_seed(0)
    model = SiT(input_size=32, hidden_size=256, depth=4, num_heads=4, num_classes=1000,
                vae_repa_depth=2, repa_depth=3, sra_depth=1)
    normal = {"y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"}
    checked = set()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "adaLN_modulation" in name or name.endswith("final_layer.linear.weight"):
            assert not p.any(), name
        elif name in normal:
            assert p.std().item() == pytest.approx(0.02, rel=0.02), name
            assert p.abs().max() > 0.06, name  # a uniform distribution of this width ends at 0.035
            checked.add(name)
        else:
            rows = p.flatten(1)  # the patch embedding counts as a linear layer
            bound = math.sqrt(6 / sum(rows.shape))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
    assert checked == normal
    v, x = both(model, *inputs(size=32))
    assert not v.any() and not x.any()


@pytest.mark.parametrize("sizes", [
    {"input_size": 6, "patch_size": 4}, {"vae_repa_depth": 5}, {"vae_repa_depth": -1}, {"repa_depth": 5},
    {"sra_depth": -1}, {"vae_repa_depth": 1, "vae_repa_layers": 1}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=r"\d"):
        SiT(**{**SMALL, **sizes})
