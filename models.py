"""SiT with alignment heads: a transformer that predicts the velocity v of a noised latent x_t; and REPA's image encoder.

Parameter names are those of SiT and REPA, so that their published weights load. Shapes in comments: B images, N = (H/p)(W/p)
tokens of width D, C latent channels, patch size p.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


def modulate(h, shift, scale):
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    """Latent (B, C, H, W) -> tokens (B, N, D), row by row."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def unpatchify(tokens, patch_size, channels):
    """Tokens (B, N, p * p * C) -> latent (B, C, H, W); within a token the channel runs fastest, as in DiT."""
    b, n, _ = tokens.shape
    side, p = math.isqrt(n), patch_size
    x = tokens.reshape(b, side, side, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side * p, side * p)  # (B, C, h, p, w, p)


def patchify(x, patch_size):
    """Latent (B, C, H, W) -> tokens (B, N, p * p * C); the inverse of `unpatchify`."""
    b, c, height, width = x.shape
    p = patch_size
    x = x.reshape(b, c, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (height // p) * (width // p), p * p * c)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D): sines and cosines of t, then an MLP."""

    def __init__(self, hidden_size, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.frequencies = frequencies

    def forward(self, t):
        half = self.frequencies // 2
        omega = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t[:, None].float() * omega
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Labels (B,) in [0, num_classes] -> (B, D). The last row, num_classes, is the null class of classifier-free guidance."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


def sincos_positions(hidden_size, side):
    """The fixed 2-D sine-cosine table (1, side * side, D): the first half of D encodes the column, the second the row."""
    omega = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    column, row = line.expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(1, side * side, hidden_size).float()


class Attention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, h):
        b, n, d = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, hidden_size, ratio):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(ratio * hidden_size))
        self.fc2 = nn.Linear(int(ratio * hidden_size), hidden_size)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class SiTBlock(nn.Module):
    """A transformer block whose shifts, scales and gates come from the condition c (adaLN-Zero)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, h, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        h = h + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(h), shift_msa, scale_msa))
        return h + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(h), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> patches (B, N, p * p * C)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(h), shift, scale))


class AlignHead(nn.Module):
    """VAE-REPA's MLP P (paper section 3.2.2): block output (B, N, D) -> predicted clean patches (B, N, p * p * C).

    `layers` - 1 linear layers, SiLU after each, then SiT's final layer, which counts as one. With 5: D -> 2D -> 2D -> 2D -> D;
    with 2: D -> D. The paper gives no widths; these reproduce its parameter counts and FLOPs (section 4.2, Table 4).
    """

    def __init__(self, hidden_size, patch_size, out_channels, layers):
        super().__init__()
        widths = [hidden_size, *[2 * hidden_size] * (layers - 2), hidden_size]
        self.mlp = nn.Sequential(*[m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.SiLU())])
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)

    def forward(self, h, c):
        return self.final_layer(self.mlp(h), c)


class SiT(nn.Module):
    """SiT (arXiv 2401.08740) with, if vae_repa_depth > 0, VAE-REPA's head on the output of block vae_repa_depth (1-based).

    model(x_t, t, y) -> v (B, C, H, W), for latents x_t (B, C, H, W) with H = W = input_size, times t (B,) in [0, 1], 1 is
    noise, and labels y (B,) where y = num_classes is the null class.
    model(x_t, t, y, return_align=True) -> (v, predictions), a dict that holds for each head there is what it predicts:
    "vae_repa" the clean latent (B, C, H, W), "repa" the encoder's tokens (B, N, repa_dim), "sra" the teacher's (B, N, D).
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
                 num_classes=1000, vae_repa_depth=0, vae_repa_layers=5, repa_depth=0, repa_dim=768, sra_depth=0):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"latent size {input_size} is not divisible by the patch size {patch_size}")
        self.align_depths = {"vae_repa": vae_repa_depth, "repa": repa_depth, "sra": sra_depth}
        for method, at in self.align_depths.items():
            if not 0 <= at <= depth:
                raise ValueError(f"{method} depth {at} is not within the model's {depth} blocks (0 turns it off)")
        if vae_repa_layers < 2:
            raise ValueError(f"an alignment head has at least 2 layers, not {vae_repa_layers}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes = num_classes

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        # a buffer and not a parameter, so that neither the optimizer nor the EMA touches it
        self.register_buffer("pos_embed", sincos_positions(hidden_size, input_size // patch_size))
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.initialize_weights()
        if vae_repa_depth:  # heads are made last: with the same seed, the rest starts as plain SiT does
            self.vae_repa_head = AlignHead(hidden_size, patch_size, in_channels, vae_repa_layers)
            init_linears(self.vae_repa_head)
            zero_final_layer(self.vae_repa_head.final_layer)
        if repa_depth:  # named as in REPA's files
            self.projectors = nn.ModuleList([nn.Sequential(
                nn.Linear(hidden_size, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, repa_dim))])
            init_linears(self.projectors)
        if sra_depth:  # named as in SRA's files
            self.ap_head = nn.Sequential(
                nn.Linear(hidden_size, 2 * hidden_size), nn.SiLU(), nn.Linear(2 * hidden_size, hidden_size))
            init_linears(self.ap_head)

    def initialize_weights(self):
        init_linears(self)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in self.blocks:  # adaLN-Zero: every block starts as the identity
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        zero_final_layer(self.final_layer)

    def embed(self, x_t, t, y):
        """Tokens (B, N, D) and condition (B, D)."""
        return self.x_embedder(x_t) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)

    def forward(self, x_t, t, y, return_align=False):
        h, c = self.embed(x_t, t, y)
        predictions = {}
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, c)                                      # (B, N, D)
            if return_align:
                predictions |= self.align(h, c, depth)
        v = unpatchify(self.final_layer(h, c), self.patch_size, self.in_channels)  # (B, C, H, W)
        return (v, predictions) if return_align else v

    def align(self, h, c, depth):
        """What the heads on block `depth` predict from its output h (B, N, D)."""
        predictions = {}
        if depth == self.align_depths["vae_repa"]:
            predictions["vae_repa"] = unpatchify(self.vae_repa_head(h, c), self.patch_size, self.in_channels)
        if depth == self.align_depths["repa"]:
            predictions["repa"] = self.projectors[0](h)
        if depth == self.align_depths["sra"]:
            predictions["sra"] = self.ap_head(h)
        return predictions

    def block_output(self, x_t, t, y, depth):
        """The output (B, N, D) of block `depth`; the blocks after it do not run. It is what SRA's teacher gives."""
        h, c = self.embed(x_t, t, y)
        for block in self.blocks[:depth]:
            h = block(h, c)
        return h


def init_linears(module):
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def zero_final_layer(layer):
    nn.init.zeros_(layer.adaLN_modulation[1].weight)
    nn.init.zeros_(layer.linear.weight)


class Encoder(nn.Module):
    """A DINOv2 as REPA uses it: uint8 images (B, 3, S, S) -> normalised patch tokens (B, N, dim), without gradient.

    network: a DINOv2 of torch.hub, with pos_embed (1, 1 + n, dim), patch_size and forward_features. image_size: S; the
    network sees it at 7/8 of that, 224 pixels for 256 and 448 for 512. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, network, image_size):
        super().__init__()
        self.input_size = image_size * 7 // 8
        if image_size * 7 % 8 or self.input_size % network.patch_size:
            raise ValueError(f"7/8 of an image of {image_size} pixels does not hold whole patches of {network.patch_size}")
        self.side = self.input_size // network.patch_size
        self.dim = network.pos_embed.shape[2]
        network.pos_embed = nn.Parameter(resample_positions(network.pos_embed.detach(), self.side))
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # of ImageNet
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def preprocess(self, images):
        """uint8 (B, 3, S, S) -> what the network sees: normalised, then resized by bicubic interpolation without antialias."""
        x = (images.float() / 255 - self.mean) / self.std
        return F.interpolate(x, size=(self.input_size, self.input_size), mode="bicubic")

    @torch.no_grad()
    def forward(self, images):
        return self.network.forward_features(self.preprocess(images))["x_norm_patchtokens"]


def resample_positions(pos_embed, side):
    """Position table (1, 1 + n, D) -> (1, 1 + side * side, D): the class token's kept, the grid's bicubic with antialias."""
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    old = math.isqrt(grid.shape[1])
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


# size: depth, width, heads
SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6), "Ti": (6, 128, 4)}
SiT_models = {f"SiT-{size}/{patch}": partial(SiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
              for size, (depth, width, heads) in SIZES.items() for patch in (1, 2, 4, 8)}
# the block whose output the paper aligns (section 4.2), and SRA's student and teacher; S and Ti are in no paper
ALIGN_DEPTHS = {"XL": 8, "L": 8, "B": 2, "S": 2, "Ti": 2}
SRA_DEPTHS = {"XL": (8, 20), "L": (6, 16), "B": (3, 8), "S": (3, 8), "Ti": (2, 4)}
