"""Train SiT with VAE-REPA: a small MLP on an early block also predicts the clean latent of the noisy input.

    torchrun --nproc_per_node=8 train.py --model SiT-XL/2 --vae-repa-depth 8  # or `python` on one device

    x_t = (1 - t) x + t noise,  v = dx_t/dt = noise - x           t = 1 is noise, t = 0 is data   (Eq. 1, 3)
    L = mean (v_pred - v)^2 + lambda smooth_l1(x_pred, x; beta)   v_pred: last block, x_pred: block d  (7, 8)

x is the VAE's latent, drawn from its posterior anew every step, shifted and scaled; t ~ U[0, 1]. REPA (arXiv
2410.06940) and SRA (arXiv 2505.02831) are heads with other targets in the same loop; REPA-E (arXiv
2504.10483) tunes the VAE, too. Run the same command again to resume.
"""

import argparse
import contextlib
import copy
import functools
import json
import os
import re
import secrets
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from extract_latents import (Latents, Parser, atomic_write, check_same_settings, fail, first_line,
                             fraction, init_distributed, lock, nonnegative_int, positive_int, read_ahead,
                             run, write_json)
from models import (ALIGN_DEPTHS, LPIPS, SRA_DEPTHS, Discriminator, SiT_models, build_model, load_encoder,
                    load_vae, mean_over_processes, patchify)
from sample import facts_of, load_checkpoint, rng, sample_images, save_grid, save_vae


def interpolate(x, noise, t):
    """(x_t, v) of the linear interpolant: x, noise (B, C, H, W), t (B,)."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x + t * noise, noise - x


def alignment_loss(prediction, target, objective="smooth_l1", beta=0.05):
    """Distance of a head's prediction from its target, tokens (B, N, dim) both -> (B,). Eq. 7, Table 1."""
    prediction, target = prediction.float(), target.float()
    if objective == "cosine":  # of each token's vector
        return -F.cosine_similarity(prediction, target, dim=-1).mean(dim=1)
    if objective == "smooth_l1":
        loss = F.smooth_l1_loss(prediction, target, beta=beta, reduction="none")
    else:
        loss = {"l1": F.l1_loss, "l2": F.mse_loss}[objective](prediction, target, reduction="none")
    return loss.mean(dim=(1, 2))


def training_losses(model, batch, args, ema, encoder):
    """Each image's terms of Eq. 8 before weighting, in float32: {"denoising" and each head's name: (B,)}.

    batch: see `make_batch`; ema: the averaged model, SRA's teacher; encoder: REPA's.
    """
    x, noise, t, y = batch["x"], batch["noise"], batch["t"], batch["y"]
    x_t, v = interpolate(x, noise, t)
    v_pred, heads = model(x_t, t, y, return_align=True)  # heads: their predictions, {name: (B, N, dim)}
    losses = {"denoising": (v_pred.float() - v).square().mean(dim=(1, 2, 3))}  # Eq. 4
    if "vae_repa" in heads:  # VAE-REPA, Eq. 7: the target is the clean latent itself, as patches
        target = patchify(x, ema.patch_size)
        loss = alignment_loss(heads["vae_repa"], target, args.vae_repa_loss, args.vae_repa_beta)
        losses["vae_repa"] = loss * batch["interval_weight"]
    if "repa" in heads:  # REPA: the target is an image encoder's patch tokens
        losses["repa"] = alignment_loss(heads["repa"], encoder(batch["images"]), "cosine")
    if "sra" in heads:  # SRA: the target is a later block of the EMA model, which sees less noise
        x_teacher, _ = interpolate(x, noise, batch["t_teacher"])
        target = ema.block_output(x_teacher, batch["t_teacher"], y, args.sra_teacher_depth)
        losses["sra"] = alignment_loss(heads["sra"], target)
    return losses


def loss_weight(name, args, epoch=0):
    """lambda of Eq. 8, the flag --NAME-weight; SRA's falls to a tenth every 1000 epochs after epoch 149."""
    if name == "denoising":
        return 1.0
    weight = getattr(args, f"{name}_weight")
    return weight * 0.1 ** (max(epoch - 149, 0) / 1000) if name == "sra" else weight


def training_step(model, ema, optimizer, encoder, batch, args, epoch):
    """One optimizer step on this process's images; model may be wrapped in DDP.

    Returns scalars by name: the means of their losses before weighting, and "grad_norm" over all processes.
    """
    raw_model, local_batch, means = getattr(model, "module", model), len(batch["x"]), {}
    micros = micro_batches(batch, args)
    for micro in micros:
        last = micro is micros[-1]  # only then does DDP average the gradients
        with contextlib.nullcontext() if last or model is raw_model else model.no_sync():
            with torch.autocast(batch["x"].device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                losses = training_losses(model, micro, args, ema, encoder)
            losses = {name: loss.sum() / local_batch for name, loss in losses.items()}
            sum(loss_weight(name, args, epoch) * loss for name, loss in losses.items()).backward()  # Eq. 8
        means = {name: means.get(name, 0) + loss.detach() for name, loss in losses.items()}
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    update_ema(ema, raw_model, args.ema_decay)
    return {**means, "grad_norm": grad_norm}


def micro_batches(batch, args):
    """A batch {name: (b, …)} in parts of --micro-batch images."""
    parts = zip(*(values.split(args.micro_batch) for values in batch.values()))
    return [dict(zip(batch, part)) for part in parts]


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model: parameters, and REPA-E's statistics of latents."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    if hasattr(model, "bn"):
        torch._foreach_lerp_(list(ema.bn.buffers()), list(model.bn.buffers()), 1 - decay)


def vae_losses(tuned, model, encoder, batch, args):
    """Latents z of REPA-E's VAE, and each image's terms of its loss and its discriminator's: {name: (B,)}.

    tuned: {"vae", "gan", "lpips"}, the latter two if they have weight; model: SiT, not wrapped in DDP.
    """
    images, t = batch["images"].float() / 127.5 - 1, batch["t"]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        posterior = tuned["vae"].encode(images).latent_dist
        posterior = type(posterior)(posterior.parameters.float())
        z = posterior.mean + posterior.std * batch["eps"]
        decoded = tuned["vae"].decode(z).sample
        x_t, _ = interpolate(model.bn(z), batch["noise"], t)
        prediction, target = model.align(x_t, t, batch["labels"], "repa"), encoder(batch["images"])
    decoded = decoded.float()
    losses = {"l1": (decoded - images).abs().mean(dim=(1, 2, 3)), "kl": posterior.kl(),
              "tune_repa": alignment_loss(prediction, target, "cosine")}  # reaches the encoder through SiT
    if "lpips" in tuned:
        losses["lpips"] = tuned["lpips"](decoded, images)
    if "gan" in tuned:
        losses["gan"] = -tuned["gan"](decoded).mean(dim=(1, 2, 3))
        real, fake = tuned["gan"](images), tuned["gan"](decoded.detach())  # the discriminator's hinge loss
        losses["discriminator"] = (F.relu(1 - real) + F.relu(1 + fake)).mean(dim=(1, 2, 3)) / 2
    return z, losses


def tune_vae(tuned, model, encoder, batch, args):
    """REPA-E's part of a step: batch["x"] becomes the VAE's latents, normalised over the global batch, and
    detached, as the diffusion loss would make them collapse; VAE and discriminator get gradients.

    With these, the optimizer in `training_step` updates both along with SiT. That equals REPA-E's three
    updates in a row: none of their gradients sees another's update. Returns scalars by name.
    """
    latents, means = [], {}
    for micro in micro_batches(batch, args):
        z, losses = vae_losses(tuned, model, encoder, micro, args)
        latents.append(z.detach())
        losses = {name: loss.sum() / len(batch["x"]) for name, loss in losses.items()}
        means = {name: means.get(name, 0) + loss.detach() for name, loss in losses.items()}
        if "gan" in tuned:
            losses.pop("discriminator").backward()
        loss = sum(loss_weight(name, args) * loss for name, loss in losses.items())
        loss.backward(inputs=list(tuned["vae"].parameters()))  # neither SiT's nor the discriminator's
    for name, module in tuned.items():
        weights = [p for p in module.parameters() if p.grad is not None]
        for p in weights:
            mean_over_processes(p.grad)
        if weights:  # LPIPS has none
            means[f"{name}_grad_norm"] = torch.nn.utils.clip_grad_norm_(weights, args.grad_clip)
    batch["x"] = model.bn.update(torch.cat(latents))
    return means


def step_rows(facts, args, step):
    """Rows (batch_size,) of a step's global batch, cut from an endless series of shuffled epochs."""
    count, positions = facts["count"], np.arange(step * args.batch_size, (step + 1) * args.batch_size)
    epochs, places = np.divmod(positions, count)
    rows = [epoch_order(count, args.seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(rows)


@functools.lru_cache(maxsize=4)
def epoch_order(count, seed, epoch):
    return np.random.default_rng([seed, 2, epoch]).permutation(count)


def make_batch(stored, step, facts, args, local, device):
    """What `training_losses` needs of b images, the slice `local` of the global batch: {name: (b, …)}.

    stored: from `Latents.read`. Random numbers are drawn for the whole batch and depend on (seed, step)
    alone: neither a resume nor the number of processes changes them.
    """
    pin = device.type == "cuda"  # so that copies do not wait for the GPU
    mean, std, y, *images = ((x.pin_memory() if pin else x).to(device, non_blocking=True) for x in stored)
    g, size = rng([args.seed, 1], step, device), args.batch_size
    eps, noise = torch.randn(2, size, *facts["latent_shape"], generator=g, device=device)
    t, u_drop, u_teacher = torch.rand(3, size, generator=g, device=device)
    low, high = args.vae_repa_interval
    inside = ((low <= t) & (t <= high)).float()
    inside *= size / inside.sum().clamp(min=1)  # a mean over the batch is then one over the images inside
    batch = {"x": mean + std * eps[local], "noise": noise[local], "t": t[local],
             "y": torch.where(u_drop[local] < args.label_dropout, facts["num_classes"], y),  # the null class
             "interval_weight": inside[local],
             "t_teacher": (t - args.sra_t_max * u_teacher).clamp(min=0)[local],
             "eps": eps[local], "labels": y}  # REPA-E's: none dropped
    return {**batch, "images": images[0]} if images else batch


def compile_layers(model, ema, args):
    """Compile layer by layer, which is quick, for fixed sizes: sample grids have others."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each layer's graph in three
    teacher = ema.blocks[: args.sra_teacher_depth] if args.sra_depth else []
    for layer in (*model.blocks, *model.heads.values(), model.final_layer, *teacher):
        layer.compile(dynamic=False)


def check_finite(done, history):
    """Stop, on all processes, at a gradient norm in history that is not finite."""
    for step, scalars in enumerate(history, start=done - len(history) + 1):
        if not all(scalars[name].isfinite() for name in scalars if name.endswith("grad_norm")):
            fail(f"the loss or its gradient is not finite at step {step}: is --lr too high, a latent bad?")


def log_line(done, history, images_per_s):
    """A line of log.jsonl: means over the steps in history and the processes."""
    rows = torch.stack([torch.stack(list(scalars.values())) for scalars in history])  # (steps, scalars)
    means = mean_over_processes(rows.mean(dim=0))
    return {"step": done, **dict(zip(history[0], means.tolist())), "grad_norm_max": rows[:, -1].max().item(),
            "images_per_s": images_per_s, "memory_gib": torch.cuda.max_memory_allocated() / 2**30}


def draw_grid(ema, vae, facts, args, path):
    """Rows of 4 images of up to 10 classes, always from the same noise, guided as in Fig. 4."""
    classes = np.linspace(0, facts["num_classes"] - 1, min(facts["num_classes"], 10)).astype(int)
    y = np.repeat(classes, 4)
    facts = facts_of(facts, ema.state_dict())
    images = sample_images(ema, vae, facts, range(len(y)), y, args.seed, args.precision,
                           mode="ode", num_steps=50, cfg_scale=4.0 if args.label_dropout else 1.0)
    save_grid(images.cpu().numpy(), 4, path)


def save(path, checkpoint):
    with atomic_write(path) as file:
        torch.save(checkpoint, file)  # tensors, numbers, dicts: loads weights-only


def start_wandb(args, settings):
    """The module wandb; the run's folder keeps the W&B run's id for resumes."""
    try:
        import wandb  # optional

        path = Path(args.run_dir, "wandb_id.json")
        if not path.exists():
            write_json(path, secrets.token_hex(4))
        wandb.init(project=args.wandb, id=json.loads(path.read_text()), name=path.parent.name, resume="allow",
                   config=settings, dir=args.run_dir)
        return wandb
    except Exception as error:
        fail(f"--wandb {args.wandb}: {first_line(error)} (installed? logged in, by `wandb login`?)")


signals = []  # names of those received


def any_signal():
    """Whether any process was asked to stop; does not wait for the GPU."""
    noted = torch.tensor(len(signals))
    if dist.is_initialized():
        dist.all_reduce(noted, dist.ReduceOp.MAX)
    return bool(noted)


def nonnegative_float(text):
    if not float(text) >= 0:
        raise ValueError
    return float(text)


def parse_args():
    cuda = torch.cuda.is_available()
    parser = Parser(__doc__)
    add = parser.add_argument_group("model and data").add_argument
    add("--model", choices=SiT_models, default="SiT-XL/2", metavar="SIZE", help="SiT-{XL,L,B,S,Ti}/{1,2,4,8}")
    add("--data", default="data/latents", help="folder that extract_latents.py wrote")
    add = parser.add_argument_group("VAE-REPA").add_argument
    add("--vae-repa-depth", type=nonnegative_int, help="block to align (default: 8; B, S, Ti: 2); 0 is off")
    add("--vae-repa-weight", type=nonnegative_float, default=1.0, help="lambda of Eq. 8")
    add("--vae-repa-loss", choices=["smooth_l1", "l1", "l2", "cosine"], default="smooth_l1", help="Table 1")
    add("--vae-repa-beta", type=nonnegative_float, default=0.05, help="beta of smooth_l1, Eq. 7")
    add("--vae-repa-layers", type=positive_int, default=5, help="of the head, at least 2")
    add("--vae-repa-interval", type=fraction, nargs=2, default=[0, 1], metavar=("LO", "HI"),
        help="align where LO <= t <= HI")
    add = parser.add_argument_group("REPA").add_argument
    add("--repa-depth", type=nonnegative_int, default=0, help="block to align (REPA: 8); 0 is off")
    add("--repa-weight", type=nonnegative_float, default=0.5, help="lambda")
    add("--repa-encoder", default="dinov2_vitb14",
        help="name in torch.hub's facebookresearch/dinov2, or FILE.pt2, a program of torch.export")
    add("--repa-hub", metavar="DIR", help="clone of it with REPA_ENCODER_pretrain.pth inside")
    add = parser.add_argument_group("SRA").add_argument
    add("--sra-depth", type=nonnegative_int, default=0, help="block to align (SRA: XL 8, L 6, B 3); 0 is off")
    add("--sra-weight", type=nonnegative_float, default=0.2, help="lambda until epoch 149, then falling")
    add("--sra-teacher-depth", type=positive_int, help="the EMA model's block (default: XL 20, L 16, B 8)")
    add("--sra-t-max", type=fraction, default=0.2, help="the teacher's t is smaller by up to this")
    add = parser.add_argument_group("REPA-E").add_argument
    add("--tune-vae", action="store_true", help="train the VAE, too; needs REPA")
    add("--vae-from-scratch", action="store_true", help="from random weights")
    for term, weight in {"l1": 1.0, "lpips": 1.0, "kl": 1e-6, "gan": 0.1, "tune-repa": 1.5}.items():
        add(f"--{term}-weight", type=nonnegative_float, default=weight, help="of this term of the VAE's loss")
    add("--lpips-weights", nargs=2, metavar=("VGG", "LIN"), default=["vgg16-397923af.pth", "vgg.pth"],
        help="torchvision's VGG16, and weights/v0.1/vgg.pth of the lpips project")
    add("--disc-init", metavar="FILE", help="weights of the discriminator (default: random)")
    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=positive_int, default=256, help="images per step over all processes")
    add("--micro-batch", type=positive_int, help="images per forward and process (default: all)")
    add("--max-steps", type=positive_int, default=400_000, help="optimizer steps")
    add("--lr", type=nonnegative_float, default=1e-4, help="AdamW's constant learning rate")
    add("--grad-clip", type=nonnegative_float, default=1.0, help="largest gradient norm; inf is none")
    add("--ema-decay", type=fraction, default=0.9999, help="of the weights that sample")
    add("--label-dropout", type=fraction, default=0.1, help="fraction of labels made the null class")
    add("--seed", type=nonnegative_int, default=0, help="of weights, data order and noise")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32", help="of the products")
    add("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="torch.compile the layers")
    add = parser.add_argument_group("output").add_argument
    add("--run-dir", help="folder to write or resume in (default: runs/, then the flags)")
    add("--log-every", type=positive_int, default=100, help="steps between lines of log.jsonl")
    add("--ckpt-every", type=positive_int, default=50_000, help="steps between numbered checkpoints")
    add("--state-every", type=positive_int, default=10_000, help="steps between rewrites of state.pt")
    add("--sample-every", type=nonnegative_int, default=10_000, help="steps between sample grids; 0 is off")
    add("--wandb", metavar="PROJECT", help="log there too, to Weights & Biases")
    args = parser.parse_args()

    size = args.model.split("-")[1].split("/")[0]
    args.vae_repa_depth = ALIGN_DEPTHS[size] if args.vae_repa_depth is None else args.vae_repa_depth
    for name in list(vars(args)):
        if name.endswith("_depth") and not getattr(args, name.replace("_depth", "_weight"), 1):
            setattr(args, name, 0)  # weight 0 builds no head either
    if args.sra_depth:
        args.sra_teacher_depth = args.sra_teacher_depth or SRA_DEPTHS[size][1]
    low, high = args.vae_repa_interval
    if low > high:
        fail(f"--vae-repa-interval {low} {high} must have LO <= HI")
    if args.tune_vae and not args.repa_depth or args.vae_from_scratch and not args.tune_vae:
        fail("--tune-vae needs REPA (--repa-depth, --repa-weight), and --vae-from-scratch needs --tune-vae")
    args.run_dir = args.run_dir or default_run_dir(args, parser)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    args.micro_batch = args.micro_batch or max(args.batch_size // world_size, 1)
    if args.batch_size % (world_size * args.micro_batch):
        fail(f"--batch-size {args.batch_size} is not divisible by {world_size} process(es) x --micro-batch "
             f"{args.micro_batch}")
    return args


# flags that a resume may change; of --data, the facts are compared and not the path
FREE = ("run_dir", "micro_batch", "max_steps", "compile", "log_every", "ckpt_every", "state_every",
        "sample_every", "repa_hub", "lpips_weights", "wandb")


def default_run_dir(args, parser):
    """runs/MODEL, then each flag that changes what is learned and is not at its default."""
    words = [args.model, *(f"{key}-{value}" for key, value in vars(args).items()
                           if key not in (*FREE, "model") and value != parser.get_default(key))]
    return "runs/" + "_".join(re.sub(r"[^\w.]+|_", "-", word).strip("-") for word in words)


@torch.no_grad()
def load_tuned(args, facts):
    """The modules {"vae", "gan", "lpips"} for `tune_vae`, tried on a grey image; raises ValueError."""
    tuned, source, size = torch.nn.ModuleDict(), facts["vae"], facts["image_size"]
    try:
        vae, image = load_vae(source), torch.zeros(1, 3, size, size)
        if args.vae_from_scratch:
            vae = type(vae).from_config(vae.config).eval()
        tuned["vae"] = vae.requires_grad_()
        posterior = getattr(vae.encode(image), "latent_dist", None)
        if not posterior:
            raise ValueError("it has no Gaussian posterior")
        if list(posterior.mean.shape[1:]) != facts["latent_shape"]:
            raise ValueError(f"it makes other latents than {facts['latent_shape']}, which --data holds")
        vae.decode(posterior.mean).sample - image  # of one size
        if args.gan_weight:
            source, tuned["gan"] = "a discriminator", Discriminator()
            tuned["gan"](image)
            if source := args.disc_init:
                tuned["gan"].load_state_dict(torch.load(source, "cpu", weights_only=True))
        if args.lpips_weight:
            vgg, lin = args.lpips_weights
            source = f"--lpips-weights {vgg} {lin} (--lpips-weight 0 does without)"
            tuned["lpips"] = LPIPS(*(torch.load(file, "cpu", weights_only=True) for file in (vgg, lin)))
            tuned["lpips"](image, image)
    except Exception as error:  # hub, config, weights, sizes
        raise ValueError(f"--tune-vae cannot use {source} for {size} pixels: {first_line(error)}") from error
    return tuned


def prepare(args):
    """Every check, before the GPU is touched: (latents, settings, model, EMA, `load_tuned`'s, and each or
    None: the saved state, REPA's encoder, the VAE for grids).
    """
    run_dir, encoder, vae, tuned = Path(args.run_dir), None, None, torch.nn.ModuleDict()
    latents = Latents(args.data, with_images=args.repa_depth > 0)
    settings = {**vars(args), "data": latents.facts}
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        if args.repa_depth:
            encoder = load_encoder(args.repa_encoder, args.repa_hub, latents.facts["image_size"])
            settings["repa_dim"] = encoder.dim
        torch.manual_seed(args.seed)
        model = build_model(settings, heads=True)
        side = model.input_size // model.patch_size
        if encoder and encoder.side != side:
            raise ValueError(f"the encoder has {encoder.side}x{encoder.side} tokens, SiT {side}x{side}")
        if args.sra_depth and not args.sra_depth < args.sra_teacher_depth <= len(model.blocks):
            raise ValueError(f"--sra-teacher-depth {args.sra_teacher_depth} is not above --sra-depth "
                             f"{args.sra_depth} and at most {len(model.blocks)}")
        if args.tune_vae:
            tuned = load_tuned(args, latents.facts)
            if not args.vae_from_scratch:
                model.bn.running_mean.copy_(torch.from_numpy(latents.shift).flatten())
                model.bn.running_var.copy_(torch.from_numpy(latents.scale).flatten() ** -2)
    except ValueError as error:
        fail(first_line(error))
    flat = {**settings, **latents.facts, "data": args.data}
    path, state = run_dir / "settings.json", None
    if path.exists():
        check_same_settings(path, {key: flat[key] for key in flat if key not in (*FREE, "data")})
    try:
        path = run_dir / "state.pt"
        if path.exists():
            state = load_checkpoint(path)
            model.load_state_dict(state["model"])
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        if state:
            ema.load_state_dict(state["ema"])
            tuned.load_state_dict(state.get("tuned", {}))
            weights = [*model.parameters(), *tuned.parameters()]
            torch.optim.AdamW(weights).load_state_dict(state["opt"])  # only a check
            state = {"step": int(state["step"]), "opt": state["opt"]}
        if first and 0 < args.sample_every <= args.max_steps:
            path = latents.facts["vae"]
            vae = tuned["vae"] if tuned else load_vae(path)
    except Exception as error:  # files can be wrong in many ways
        fail(f"{path} does not fit {args.model} and these latents: {first_line(error)}")
    if first:
        lock(run_dir / "lock", run_dir)
        write_json(run_dir / "settings.json", flat)
    return latents, settings, model, ema, tuned, state, encoder, vae


def main():
    args = parse_args()
    latents, settings, raw_model, ema, tuned, state, encoder, vae = prepare(args)
    facts, run_dir, start = latents.facts, Path(args.run_dir), state["step"] if state else 0

    rank, world_size, device = init_distributed()
    wandb = start_wandb(args, settings) if args.wandb and rank == 0 else None
    for module in filter(None, (raw_model, ema, tuned, encoder, vae)):
        module.to(device)
    trained = [*raw_model.parameters(), *tuned.parameters()]
    optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.999), weight_decay=0, fused=True)
    if state:
        optimizer.load_state_dict(state.pop("opt"))
    if args.compile:
        compile_layers(raw_model, ema, args)
    model = raw_model
    if world_size > 1:
        starts = [None] * world_size
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            fail(f"processes resume from steps {starts}: all must see the same --run-dir")
        model = DDP(raw_model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # they are equal
    if rank == 0:
        print(f"{run_dir}: from step {start}, on {world_size} x {device.type}")

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(signal.Signals(number).name))
    local_batch = args.batch_size // world_size
    local = slice(rank * local_batch, (rank + 1) * local_batch)  # of each global batch
    steps = range(start, args.max_steps)
    rows = (step_rows(facts, args, step)[local] for step in steps)
    progress = tqdm(steps, "training", args.max_steps, initial=start, disable=rank > 0)
    history, done, clock = [], start, time.perf_counter()  # history: since the last log line
    for step, stored in zip(progress, read_ahead(latents.read, rows, threads=4)):
        batch = make_batch(stored, step, facts, args, local, device)
        epoch = step * args.batch_size // facts["count"]
        scalars = tune_vae(tuned, raw_model, encoder, batch, args) if tuned else {}
        history.append(scalars | training_step(model, ema, optimizer, encoder, batch, args, epoch))

        done, stop = step + 1, any_signal()
        log, numbered, resumable, draw = (every and done % every == 0 for every in (
            args.log_every, args.ckpt_every, args.state_every, args.sample_every))
        numbered = numbered or done == args.max_steps
        if log or numbered or resumable or draw or stop:
            check_finite(done, history)  # waits for the GPU
        if log:
            line = log_line(done, history, len(history) * args.batch_size / (time.perf_counter() - clock))
            if rank == 0:
                with open(run_dir / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                progress.set_postfix({key: f"{line[key]:.3g}" for key in (*history[0], "images_per_s")})
        if rank == 0 and (numbered or resumable or stop):
            checkpoint = {"ema": ema.state_dict(), "step": done, "settings": settings}
            if numbered:
                path = run_dir / "checkpoints" / f"{done:07d}.pt"
                if tuned:
                    save_vae(path, tuned["vae"], checkpoint["ema"])
                save(path, checkpoint)
            checkpoint |= {"model": raw_model.state_dict(), "opt": optimizer.state_dict()}
            if tuned:
                checkpoint["tuned"] = tuned.state_dict()
            save(run_dir / "state.pt", checkpoint)
        if rank == 0 and draw:
            grid = run_dir / "samples" / f"{done:07d}.png"
            draw_grid(ema, vae, facts, args, grid)
        if wandb and log:
            wandb.log(line, step=done)
        if wandb and draw:
            wandb.log({"samples": wandb.Image(str(grid))}, step=done)
        if log:
            history, clock = [], time.perf_counter()
        if stop:
            break
    if rank == 0:
        stopped = f", stopped by {' '.join(signals) or 'a signal'}; run the same command again to resume"
        print(f"{run_dir}: done at step {done}{stopped if done < args.max_steps else ''}")


if __name__ == "__main__":
    run(main)
