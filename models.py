"""SiT, which predicts the velocity v of a noised latent x_t; its alignment heads; REPA's encoder; and what
REPA-E tunes the VAE with.

Parameter names are SiT's and REPA's, so that their published weights load. Shapes in comments: B images,
N = (H/p)(W/p) tokens of width D, C latent channels, patch size p.
"""

import contextlib
import fcntl
import inspect
import logging
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.export.passes import move_to_device_pass


def modulate(h, shift, scale):
    scale = scale.to(h.dtype)  # float32, where norms are: in bf16, 1 + scale would be rough
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    """Latent (B, C, H, W) -> tokens (B, N, D), row by row."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # all blocks keep this layout


def unpatchify(tokens, patch_size, channels):
    """Tokens (B, N, p * p * C) -> latent (B, C, H, W); within a token the channel runs fastest, as in DiT."""
    b, n, _ = tokens.shape
    side, p = math.isqrt(n), patch_size
    x = tokens.reshape(b, side, side, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side * p, side * p)  # (B, C, h, p, w, p)


def patchify(x, like):
    """Latent (B, C, H, W) -> tokens (B, N, p * p * C), as many as `like` has; `unpatchify`'s inverse."""
    b, c, height, _ = x.shape
    side = math.isqrt(like.shape[1])
    p = height // side
    x = x.reshape(b, c, side, p, side, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, side * side, p * p * c)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D): sines and cosines of t, then an MLP."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def frequencies(device=None):
        return torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=device))

    def forward(self, t):
        angles = t[:, None].float() * self.frequencies(t.device)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype)
        with torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False):  # bf16 is too rough for t
            return self.mlp(waves)


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, D); the table's last row is the null class's, for classifier-free guidance."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


def sincos_positions(hidden_size, side):
    """The fixed sine-cosine table (1, side * side, D): first half of D for the column, second for the row."""
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
        q, k, v = (x.reshape(b, n, self.num_heads, -1).transpose(1, 2)  # each (B, heads, N, D/heads)
                   for x in self.qkv(h).chunk(3, dim=-1))
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
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
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


class SiT(nn.Module):
    """SiT (arXiv 2401.08740) with alignment heads, each on the output of block NAME_depth, counted from 1.

    model(x_t, t, y) -> v (B, C, H, W), for latents x_t (B, C, H, W) with H = W = input_size, times t (B,) in
    [0, 1], where 1 is noise, and labels y (B,), from 0 to num_classes - 1 or model.null_class.
    model(x_t, t, y, return_align=True) -> (v, {head: predicted tokens (B, N, dim)}): "vae_repa" predicts the
    clean latent (dim = p * p * C, see `patchify`), "repa" the encoder's tokens (repa_dim), "sra" the
    teacher's (D). Depth 0 builds no head. vae_repa_loss: "cosine" only changes how its head starts.
    tune_vae: hold REPA-E's norm of latents, `bn`, for the EMA and the checkpoints; train.py applies it.
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000,
                 vae_repa_depth=0, vae_repa_layers=5, vae_repa_loss="smooth_l1", repa_depth=0, repa_dim=768,
                 sra_depth=0, tune_vae=False):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"latent size {input_size} is not divisible by the patch size {patch_size}")
        if vae_repa_layers < 2:
            raise ValueError(f"an alignment head has at least 2 layers, not {vae_repa_layers}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.null_class = num_classes

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        # a buffer, which the optimizer does not touch
        self.register_buffer("pos_embed", sincos_positions(hidden_size, input_size // patch_size))
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.initialize_weights()

        self.heads = nn.ModuleDict()  # made last: with the same seed, the rest starts as plain SiT does
        self.head_depths = {}
        if vae_repa_depth:
            head = AlignHead(hidden_size, patch_size, in_channels, vae_repa_layers)
            self.add_head("vae_repa", vae_repa_depth, head)
        if repa_depth:
            self.add_head("repa", repa_depth, Projector(hidden_size, 2048, 2048, repa_dim))
        if sra_depth:
            self.add_head("sra", sra_depth, Projector(hidden_size, 2 * hidden_size, hidden_size))
        if vae_repa_depth and vae_repa_loss == "cosine":  # zeros have no direction: its gradient would be 1e8
            nn.init.xavier_uniform_(self.heads["vae_repa"].final_layer.linear.weight)
        self.bn = LatentNorm(in_channels) if tune_vae else None

    def add_head(self, name, depth, head):
        """Let head(h, c) predict from the output h (B, N, D) of block `depth`, counted from 1."""
        if not 1 <= depth <= len(self.blocks):
            raise ValueError(f"{name} depth {depth} is not one of the {len(self.blocks)} blocks (0 is off)")
        self.heads[name], self.head_depths[name] = head, depth

    def initialize_weights(self):
        init_linears(self)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:  # adaLN-Zero: every block starts as the identity
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        zero_final_layer(self.final_layer)

    def embed(self, x_t, t, y):
        """Tokens (B, N, D) and condition c (B, D)."""
        return self.x_embedder(x_t) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)

    def forward(self, x_t, t, y, return_align=False):
        h, c = self.embed(x_t, t, y)
        predictions = {}
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, c)                                      # (B, N, D)
            if return_align:
                predictions |= {name: head(h, c) for name, head in self.heads.items()
                                if self.head_depths[name] == depth}
        v = unpatchify(self.final_layer(h, c), self.patch_size, self.in_channels)  # (B, C, H, W)
        return (v, predictions) if return_align else v

    def early_blocks(self, x_t, t, y, depth):
        """The output (B, N, D) of block `depth`, and c (B, D); later blocks do not run."""
        h, c = self.embed(x_t, t, y)
        for block in self.blocks[:depth]:
            h = block(h, c)
        return h, c


# depth, width, attention heads
SIZES = {"SiT-XL": (28, 1152, 16), "SiT-L": (24, 1024, 16), "SiT-B": (12, 768, 12), "SiT-S": (12, 384, 6),
         "SiT-Ti": (6, 128, 4)}  # which is ours
SiT_models = {f"{size}/{p}": partial(SiT, depth=depth, hidden_size=width, num_heads=num_heads, patch_size=p)
              for size, (depth, width, num_heads) in SIZES.items() for p in (1, 2, 4, 8)}
ALIGN_DEPTHS = {"SiT-XL": 8, "SiT-L": 8}  # the block that the paper aligns (4.2), of others block 2
SRA_TEACHERS = {"SiT-XL": 20, "SiT-L": 16, "SiT-B": 8, "SiT-S": 8}  # the block that is SRA's target, or 4


def build_model(settings, heads=True):
    """The SiT of a run's settings, with all that they say of it; heads: with what only training needs.

    settings: train.py's flags by name, "data": facts on the latents, and with REPA "repa_dim".
    """
    network, (channels, size, _) = SiT_models[settings["model"]], settings["data"]["latent_shape"]
    options = {name: settings[name] for name in inspect.signature(network).parameters
               if settings.get(name) is not None}  # flags that are named as its parameters are
    model = network(
        input_size=size, in_channels=channels, num_classes=settings["data"]["num_classes"], **options)
    if not heads:
        model.heads, model.head_depths, model.bn = nn.ModuleDict(), {}, None
    return model


def linears(*widths):
    """Linear layers of these widths, SiLU after each."""
    return [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.SiLU())]


class AlignHead(nn.Module):
    """VAE-REPA's MLP P (section 3.2.2): block output (B, N, D), c (B, D) -> clean patches (B, N, p * p * C).

    `layers` - 1 linear layers with SiLU (5: D -> 2D -> 2D -> 2D -> D, 2: D -> D), then SiT's final layer.
    The paper gives no widths; these reproduce its parameter counts and FLOPs (section 4.2, Table 4).
    """

    def __init__(self, hidden_size, patch_size, out_channels, layers):
        super().__init__()
        self.mlp = nn.Sequential(*linears(hidden_size, *[2 * hidden_size] * (layers - 2), hidden_size))
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
        init_linears(self)
        zero_final_layer(self.final_layer)

    def forward(self, h, c):
        return self.final_layer(self.mlp(h), c)


class Projector(nn.Module):
    """REPA's and SRA's head: an MLP, (B, N, D) -> (B, N, widths[-1])."""

    def __init__(self, *widths):
        super().__init__()
        self.mlp = nn.Sequential(*linears(*widths)[:-1])
        init_linears(self)

    def forward(self, h, c):
        return self.mlp(h)


def init_linears(module):
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def zero_final_layer(layer):
    nn.init.zeros_(layer.adaLN_modulation[1].weight)
    nn.init.zeros_(layer.linear.weight)


class Encoder(nn.Module):
    """A DINOv2 of torch.hub as REPA uses it: uint8 images (B, 3, S, S) -> patch tokens (B, N, dim).

    It sees 7/8 of image_size: 224 pixels for 256, 448 for 512. Raises ValueError if sizes do not fit.
    """

    def __init__(self, network, image_size):
        super().__init__()
        self.input_size = image_size * 7 // 8
        if image_size * 7 % 8 or self.input_size % network.patch_size:
            raise ValueError(f"7/8 of {image_size} pixels is not a multiple of {network.patch_size}")
        self.side = self.input_size // network.patch_size
        self.dim = network.pos_embed.shape[2]
        network.pos_embed = nn.Parameter(resample_positions(network.pos_embed.detach(), self.side))
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # of ImageNet
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def preprocess(self, images):
        """uint8 (B, 3, S, S) -> what the network sees: normalised, then resized, bicubic, no antialias."""
        x = (images.float() / 255 - self.mean) / self.std
        return F.interpolate(x, size=(self.input_size, self.input_size), mode="bicubic")

    @torch.no_grad()
    def forward(self, images):
        return self.network.forward_features(self.preprocess(images))["x_norm_patchtokens"]


def resample_positions(pos_embed, side):
    """Positions (1, 1 + n, D) -> (1, 1 + side * side, D): the class token's is kept, the grid is resized."""
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    old = math.isqrt(grid.shape[1])
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


class ExportedEncoder:
    """A program of torch.export as REPA's encoder: uint8 images (B, 3, S, S) -> tokens (B, N, dim)."""

    def __init__(self, path, image_size):
        self.path = path
        self.to("cpu")
        for count in (3, 2):  # it must take any number
            shape = self(torch.zeros(count, 3, image_size, image_size, dtype=torch.uint8)).shape
            self.side, self.dim = math.isqrt(shape[1]), shape[-1]
            if shape != (count, self.side**2, self.dim):
                raise ValueError(f"for {count} images it gives {tuple(shape)}, no tokens of a square grid")

    def to(self, device):
        self.program = load_program(self.path, device)
        return self

    @torch.no_grad()
    def __call__(self, images):
        with torch.autocast(images.device.type, enabled=False):  # it runs as exported
            return self.program(images.contiguous())


def load_program(path, device):
    """A program of torch.export as a module on the device."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # else code that is pickled in the file would run
    logging.disable(logging.CRITICAL)  # it logs tracebacks
    try:
        return move_to_device_pass(torch.export.load(path), str(device)).module()
    finally:
        logging.disable(logging.NOTSET)


def load_encoder(name, image_size):
    """REPA's encoder: FILE.pt2, or a name in torch.hub's facebookresearch/dinov2. Raises ValueError."""
    try:
        if name.endswith(".pt2"):
            return ExportedEncoder(name, image_size)
        with hub_lock():
            return Encoder(torch.hub.load("facebookresearch/dinov2:main", name, verbose=False), image_size)
    except Exception as error:  # hub, network, code, file and shape errors have no common class
        raise ValueError(f"cannot load --repa-encoder {name} (or give a FILE.pt2): {error}") from error


@contextlib.contextmanager
def hub_lock():
    """Within it, one process of a machine downloads into torch.hub's folder, and the others wait."""
    os.makedirs(torch.hub.get_dir(), exist_ok=True)
    with open(Path(torch.hub.get_dir(), "download.lock"), "w") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class LatentNorm(nn.Module):
    """REPA-E's batch norm of latents z (B, C, H, W): nn.SyncBatchNorm without weights, also on a CPU.

    forward takes the running statistics; `update` the batch's, over all processes, and updates the former.
    """

    EPS, MOMENTUM = 1e-4, 0.1

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def start(self, shift, scale):
        """Begin with the statistics of latents that become (z - shift) * scale: numbers, or lists of C."""
        self.running_mean.copy_(torch.as_tensor(np.float32(shift)))
        self.running_var.copy_(torch.as_tensor(np.float32(scale) ** -2))

    def forward(self, z):
        return F.batch_norm(z, self.running_mean, self.running_var, eps=self.EPS)

    @torch.no_grad()
    def update(self, z):
        mean = mean_over_processes(z.mean((0, 2, 3)))
        var = mean_over_processes((z - mean.view(-1, 1, 1)).square().mean((0, 2, 3)))
        count = z[:, 0].numel() * (dist.get_world_size() if dist.is_initialized() else 1)
        self.running_mean.lerp_(mean, self.MOMENTUM)
        self.running_var.lerp_(var * count / (count - 1), self.MOMENTUM)  # unbiased, as torch's
        return F.batch_norm(z, mean, var, eps=self.EPS)


def mean_over_processes(x):
    """x, averaged in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


class LPIPS(nn.Module):
    """Perceptual distance (B,) of images (B, 3, S, S) in [-1, 1] from others (arXiv 1801.03924, version 0.1).

    vgg: torchvision's weights of vgg16; lin: the lpips project's for it.
    """

    STAGES = (0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)  # convolutions, numbered as in vgg

    def __init__(self, vgg, lin):
        super().__init__()
        weights = {"shift": torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1),
                   "scale": torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)}
        for i, stage in enumerate(self.STAGES):
            names = [f"features.{n}.{kind}" for n in stage for kind in ("weight", "bias")]
            weights |= {name: vgg[name] for name in names}
            weights[f"lin{i}"] = lin[f"lin{i}.model.1.weight"]
        for name, value in weights.items():
            self.register_buffer(name.replace(".", "_"), value.float(), persistent=False)

    def features(self, images):
        """The maps (B, width, h, w) of VGG's five stages, each pixel's vector of length 1."""
        w, x, maps = dict(self.named_buffers()), (images - self.shift) / self.scale, []
        for stage in self.STAGES:
            x = F.max_pool2d(x, 2) if maps else x
            for n in stage:
                x = F.relu(F.conv2d(x, w[f"features_{n}_weight"], w[f"features_{n}_bias"], padding=1))
            maps.append(F.normalize(x, dim=1, eps=1e-10))
        return maps

    def forward(self, images, others):
        pairs = enumerate(zip(self.features(images), self.features(others)))
        return sum(F.conv2d((a - b).square(), getattr(self, f"lin{i}")).mean((1, 2, 3))
                   for i, (a, b) in pairs)


class Discriminator(nn.Module):
    """pix2pix's PatchGAN, named as in taming-transformers: images (B, 3, S, S) -> realness (B, 1, h, w)."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for a, b, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers += [nn.Conv2d(a, b, 4, stride, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, padding=1))
        for layer in self.main:
            if not isinstance(layer, nn.LeakyReLU):
                nn.init.normal_(layer.weight, float(isinstance(layer, nn.BatchNorm2d)), 0.02)

    def forward(self, images):
        return self.main(images)
