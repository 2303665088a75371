"""Train SiT with VAE-REPA: a small MLP on an early block also predicts the clean latent of the noisy input.

    torchrun --nproc_per_node=8 train.py --model SiT-XL/2 --vae-repa-depth 8  # or `python` on one device

    x_t = (1 - t) x + t noise,  v = dx_t/dt = noise - x           t = 1 is noise, t = 0 is data   (Eq. 1, 3)
    L = mean (v_pred - v)^2 + lambda smooth_l1(x_pred, x; beta)   v_pred: last block, x_pred: block d  (7, 8)

x is the VAE's latent, drawn from its posterior anew every step, shifted and scaled; t ~ U[0, 1]. REPA (arXiv
2410.06940) and SRA (arXiv 2505.02831) are heads with other targets in the same loop; REPA-E (arXiv
2504.10483) tunes the VAE, too. Run the same command again to resume.
"""

import argparse
import copy
import json
import os
import re
import secrets
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_

from extract_latents import (
    Latents,
    Parser,
    Progress,
    agree,
    atomic_write,
    check_same_settings,
    content_id,
    fail,
    first_line,
    first_process,
    fraction,
    init_distributed,
    intact,
    load_tensors,
    load_vae,
    lock,
    named_by_flags,
    nonnegative_float,
    nonnegative_int,
    positive_int,
    read_ahead,
    run,
    write_json,
    writing,
)
from models import (
    ALIGN_DEPTHS,
    LPIPS,
    SRA_TEACHERS,
    Discriminator,
    SiT_models,
    build_model,
    load_encoder,
    mean_over_processes,
    patchify,
)
from sample import (
    TRAINING_ONLY,
    autocast,
    bn_statistics,
    draw_grid,
    ema_weights,
    load_decoder,
    newest,
    rng,
    save_vae,
    vae_folder,
)

# ---- The method


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


def training_losses(model, ema, batch, args):
    """The unweighted terms of Eq. 8, {"denoising" and each head's name: (B,) float32}, a number an image.

    ema: the averaged model, SRA's teacher; batch: see `make_batch`.
    """
    x, noise, t, y = batch["x"], batch["noise"], batch["t"], batch["y"]
    x_t, v = interpolate(x, noise, t)
    v_pred, heads = model(x_t, t, y, return_align=True)  # {head of models.SiT: its prediction (B, N, dim)}
    losses = {"denoising": (v_pred.float() - v).square().mean(dim=(1, 2, 3))}  # Eq. 4
    if "vae_repa" in heads:  # VAE-REPA, Eq. 7: the target is the clean latent itself, as patches
        x_pred = heads["vae_repa"]
        loss = alignment_loss(x_pred, patchify(x, like=x_pred), args.vae_repa_loss, args.vae_repa_beta)
        low, high = args.vae_repa_interval  # outside, the loss is 0, and inside larger: the mean is kept
        losses["vae_repa"] = loss * ((low <= t) & (t <= high)) / (high - low)
    if "repa" in heads:  # REPA: the target is an image encoder's patch tokens
        losses["repa"] = alignment_loss(heads["repa"], batch["tokens"], "cosine")
    if "sra" in heads:  # SRA: the target is a later block of the EMA model, which sees less noise
        x_teacher, _ = interpolate(x, noise, batch["t_teacher"])
        with torch.no_grad():
            target, _ = ema.early_blocks(x_teacher, batch["t_teacher"], y, args.sra_teacher_depth)
        losses["sra"] = alignment_loss(heads["sra"], target)
    return losses


def loss_weights(args, epoch):
    """lambda of Eq. 8 for each term of `training_losses`."""
    return {
        "denoising": 1.0,
        "vae_repa": args.vae_repa_weight,
        "repa": args.repa_weight,
        "sra": args.sra_weight * 0.1 ** (max(epoch - 149, 0) / 1000),  # a tenth every 1000 epochs
    }


def training_step(model, ema, optimizer, batch, args, epoch):
    """One optimizer step on this process's images; model may be wrapped in DDP.

    Returns scalars by name: the mean over these images of each unweighted loss, and the gradient's norm.
    """
    weights, means, micros = loss_weights(args, epoch), {}, micro_batches(batch, args)
    for micro in micros:
        model.require_backward_grad_sync = micro is micros[-1]  # DDP then averages over the processes
        with autocast(batch["x"].device, args.precision):
            losses = training_losses(model, ema, micro, args)
        if forgotten := losses.keys() - weights.keys():
            fail(f"loss_weights has no weight for {' and '.join(forgotten)}, of training_losses")
        losses = {name: loss.sum() / len(batch["x"]) for name, loss in losses.items()}
        sum(weights[name] * loss for name, loss in losses.items()).backward()  # Eq. 8
        means = {name: means.get(name, 0) + loss.detach() for name, loss in losses.items()}
    means["grad_norm"] = clip_grad_norm_(model.parameters(), args.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    update_ema(ema, model, args.ema_decay)
    return means


def micro_batches(batch, args):
    """A batch {name: (b, …)} in parts of --micro-batch images."""
    parts = zip(*(values.split(args.micro_batch) for values in batch.values()))
    return [dict(zip(batch, part)) for part in parts]


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model: parameters, and REPA-E's statistics of latents."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    if ema.bn:
        raw_model = getattr(model, "module", model)  # DDP's
        torch._foreach_lerp_(list(ema.bn.buffers()), list(raw_model.bn.buffers()), 1 - decay)


# ---- The batch


def make_batch(stored, step, null_class, args, local, device):
    """What `training_losses` needs of b images, the slice `local` of the global batch: {name: (b, …)}.

    stored: from `Latents.read`; extras in it go into the batch as they are. Random numbers are drawn for the
    whole batch and depend on (seed, step) alone: neither a resume nor the number of processes changes them.
    The order of the images has its own stream (`Latents.rows`), as have the first weights (`build`).
    """
    pin = device.type == "cuda"  # so that copies do not wait for the GPU
    batch = {name: (x.pin_memory() if pin else x).to(device, non_blocking=True) for name, x in stored.items()}
    mean, std = batch.pop("mean"), batch.pop("std")
    g, size = rng([args.seed, 1], step, device), args.batch_size
    eps, noise = torch.randn(2, size, *mean.shape[1:], generator=g, device=device)
    t, u_drop, u_teacher = torch.rand(3, size, generator=g, device=device)
    t_teacher = (t - args.sra_t_max * u_teacher).clamp(min=0)
    y = torch.where(u_drop[local] < args.label_dropout, null_class, batch["labels"])
    return {**batch, "x": mean + std * eps[local], "noise": noise[local], "t": t[local], "y": y,
            "t_teacher": t_teacher[local], "eps": eps[local]}  # labels and eps: for REPA-E


def image_tokens(encoder, batch, args):
    """REPA's target (b, N, dim): the encoder's patch tokens of the batch's images."""
    with autocast(batch["images"].device, args.precision):
        return torch.cat([encoder(images) for images in batch["images"].split(args.micro_batch)])


# ---- REPA-E, with --tune-vae


def vae_losses(tuned, model, batch, args):
    """Latents z of the VAE, and each image's terms of its loss and its discriminator's: {name: (B,)}.

    tuned: {"vae", "gan", "lpips"}, the latter two if they have weight; model: SiT, not wrapped in DDP.
    """
    images, t = batch["images"].float() / 127.5 - 1, batch["t"]
    with autocast(images.device, args.precision):
        posterior = tuned["vae"].encode(images).latent_dist
        posterior = type(posterior)(posterior.parameters.float())  # mean, std and KL in float32
        z = posterior.mean + posterior.std * batch["eps"]
        decoded = tuned["vae"].decode(z).sample
        x_t, _ = interpolate(model.bn(z), batch["noise"], t)
        h, c = model.early_blocks(x_t, t, batch["labels"], args.repa_depth)  # no label dropped
        prediction = model.heads["repa"](h, c)
    decoded = decoded.float()
    losses = {"l1": (decoded - images).abs().mean(dim=(1, 2, 3)), "kl": posterior.kl(),
              "tune_repa": alignment_loss(prediction, batch["tokens"], "cosine")}
    if "lpips" in tuned:
        losses["lpips"] = tuned["lpips"](decoded, images)
    if "gan" in tuned:
        losses["gan"] = -tuned["gan"](decoded).mean(dim=(1, 2, 3))
        real, fake = tuned["gan"](images), tuned["gan"](decoded.detach())  # the discriminator's hinge loss
        losses["discriminator"] = (F.relu(1 - real) + F.relu(1 + fake)).mean(dim=(1, 2, 3)) / 2
    return z, losses


def vae_loss_weights(args):
    """The weight of each term of the VAE's loss in `vae_losses`."""
    return {"l1": args.l1_weight, "kl": args.kl_weight, "tune_repa": args.tune_repa_weight,
            "lpips": args.lpips_weight, "gan": args.gan_weight}


def vae_step(tuned, model, batch, args):
    """REPA-E's part of a step, which gives VAE and discriminator their gradients: (x, scalars by name).

    x: the VAE's latents, normalised over the global batch, and detached, as the diffusion loss would make
    them collapse. The optimizer in `training_step` then updates both along with SiT. That equals REPA-E's
    three updates in a row: none of their gradients sees another's update.
    """
    weights, latents, means = vae_loss_weights(args), [], {}
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:  # else compiled blocks compute gradients of their weights, though nobody asks for them
        p.requires_grad_(False)
    for micro in micro_batches(batch, args):
        z, losses = vae_losses(tuned, model, micro, args)
        latents.append(z.detach())
        losses = {name: loss.sum() / len(batch["x"]) for name, loss in losses.items()}
        means = {name: means.get(name, 0) + loss.detach() for name, loss in losses.items()}
        if "gan" in tuned:
            losses.pop("discriminator").backward()  # the rest is the VAE's
        loss = sum(weights[name] * loss for name, loss in losses.items())
        loss.backward(inputs=list(tuned["vae"].parameters()))  # not the discriminator's
    for p in frozen:
        p.requires_grad_()
    for name, module in tuned.items():
        trained = [p for p in module.parameters() if p.grad is not None]
        if trained:  # LPIPS has none
            gradients = [p.grad for p in trained]  # in one all-reduce, which is faster than one for each
            flat = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
                gradient.copy_(mean.view_as(gradient))
            means[f"{name}_grad_norm"] = clip_grad_norm_(trained, args.grad_clip)
    return model.bn.update(torch.cat(latents)), means


# ---- Logs and checkpoints


def check_finite(done, history, model):
    """Stop, on all processes, at a gradient norm in history, or a weight, that is not finite."""
    for step, scalars in enumerate(history, start=done - len(history) + 1):
        if not all(scalars[name].isfinite() for name in scalars if name.endswith("grad_norm")):
            fail(f"the loss or its gradient is not finite at step {step}: is --lr too high, a latent bad?")
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        fail(f"weights are not finite after step {done}: is --lr too high?")


def log_line(done, history, epoch, seconds, images_per_s):
    """A line of log.jsonl: means over the steps in history and the processes; seconds of training so far."""
    rows = torch.stack([torch.stack(list(scalars.values())) for scalars in history])  # (steps, scalars)
    means = mean_over_processes(rows.mean(dim=0))
    largest = torch.stack([scalars["grad_norm"] for scalars in history]).max()
    return {"step": done, **dict(zip(history[0], means.tolist())), "grad_norm_max": largest.item(),
            "epoch": epoch, "seconds": seconds, "images_per_s": images_per_s,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30}


def save(path, checkpoint):
    with atomic_write(path) as file:
        torch.save(checkpoint, file)  # tensors, numbers, dicts: loads weights-only


def save_checkpoints(run_dir, step, numbered, settings, parts):
    """Write state.pt, for a resume, and, if numbered, checkpoints/STEP.pt, for sample.py."""
    checkpoint = {"ema": parts["ema"].state_dict(), "step": step, "settings": settings}
    if numbered:
        path = run_dir / "checkpoints" / f"{step:07d}.pt"
        if "tuned" in parts:
            save_vae(vae_folder(path), parts["tuned"]["vae"], *bn_statistics(checkpoint["ema"]))
        save(path, checkpoint)
    checkpoint["log"] = Path(run_dir, "log.jsonl").read_text()  # a resume writes the file anew
    save(run_dir / "state.pt", checkpoint | {name: part.state_dict() for name, part in parts.items()})


def resume(args, settings, parts):
    """Load what `save_checkpoints` wrote with these settings, if it did: (its step, or 0; its log, or "")."""
    run_dir, parser = Path(args.run_dir), make_parser()
    path, record, log_path = (run_dir / name for name in ("state.pt", "settings.json", "log.jsonl"))
    compared = {key: x for key, x in {**settings, **settings["data"]}.items() if key not in (*FREE, "data")}
    defaults = {key: parser.get_default(key) for key in vars(args)}  # of flags that are newer than the run
    cure = "give another --run-dir"
    if not path.exists():
        others = [name for name in ("log.jsonl", "checkpoints", "samples") if (run_dir / name).exists()]
        learned = others != ["log.jsonl"] or log_path.stat().st_size  # else settings may still change
        if record.exists() and learned:
            check_same_settings(record, compared, cure=cure)
        if others and not record.exists() or len([*run_dir.glob("checkpoints/*.pt")]) > 1:
            fail(f"{run_dir} has {others[0]}, but no state.pt to go on from; {cure}")
        return 0, ""
    try:
        state = load_tensors(path)
        check_same_settings(path, compared, {**defaults, **state["settings"]}, cure)
        for there, here in ((state["settings"], settings), (state["settings"]["data"], settings["data"])):
            # of files that are no longer there
            here |= {key: x for key, x in there.items() if key.endswith("_content") and not here.get(key)}
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if type(step := state["step"]) is not int or step < 0:
            raise ValueError(f"its step is {step}")
        return step, state["log"]
    except Exception as error:  # files can be wrong in many ways
        fail(f"{path} cannot be resumed from: {first_line(error)} ({cure})")


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


# ---- Flags


def make_parser():
    cuda = torch.cuda.is_available()
    parser = Parser(__doc__)
    add = parser.add_argument_group("model and data").add_argument
    add("--model", choices=SiT_models, default="SiT-XL/2", metavar="SIZE", help="SiT-{XL,L,B,S,Ti}/{1,2,4,8}")
    add("--data", default="data/latents", help="folder that extract_latents.py wrote")
    add("--init", metavar="FILE", help="start from the EMA weights of this checkpoint, or of a run's newest")
    add = parser.add_argument_group("VAE-REPA").add_argument
    add("--vae-repa-depth", type=nonnegative_int, help="block to align (default: 8; B, S, Ti: 2); 0 is off")
    add("--vae-repa-weight", type=nonnegative_float, default=1.0, help="lambda of Eq. 8")
    add("--vae-repa-loss", choices=["smooth_l1", "l1", "l2", "cosine"], default="smooth_l1",
        help="distance from the clean latent")
    add("--vae-repa-beta", type=nonnegative_float, default=0.05, help="beta of smooth_l1, Eq. 7")
    add("--vae-repa-layers", type=positive_int, default=5, help="linear layers of the head, at least 2")
    add("--vae-repa-interval", type=fraction, nargs=2, default=[0, 1], metavar=("LO", "HI"),
        help="align where LO <= t <= HI")
    add = parser.add_argument_group("REPA").add_argument
    add("--repa-depth", type=nonnegative_int, default=0, help="block to align (REPA: 8); 0 is off")
    add("--repa-weight", type=nonnegative_float, default=0.5, help="lambda")
    add("--repa-encoder", default="dinov2_vitb14",
        help="name in torch.hub's facebookresearch/dinov2, or FILE.pt2, a program of torch.export")
    add = parser.add_argument_group("SRA").add_argument
    add("--sra-depth", type=nonnegative_int, default=0, help="block to align (SRA: XL 8, L 6, B 3); 0 is off")
    add("--sra-weight", type=nonnegative_float, default=0.2, help="lambda until epoch 149, then falling")
    add("--sra-teacher-depth", type=positive_int, help="the EMA model's block (default: XL 20, L 16, B 8)")
    add("--sra-t-max", type=fraction, default=0.2, help="the teacher's t is smaller by up to this")
    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=positive_int, default=256, help="images per step over all processes")
    add("--micro-batch", type=positive_int, help="images per forward and process (default: all)")
    add("--max-steps", type=positive_int, default=400_000, help="optimizer steps; with more a run goes on")
    add("--lr", type=nonnegative_float, default=1e-4, help="AdamW's constant learning rate")
    add("--grad-clip", type=nonnegative_float, default=1.0, help="largest gradient norm; inf is none")
    add("--ema-decay", type=fraction, default=0.9999, help="of the weights that sample")
    add("--label-dropout", type=fraction, default=0.1, help="fraction of labels made the null class")
    add("--seed", type=nonnegative_int, default=0, help="of weights, data order and noise")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32",
        help="of matrix products (default: bf16 on a GPU, else fp32)")
    add("--compile", action=argparse.BooleanOptionalAction, default=cuda,
        help="torch.compile the layers; on a GPU it is on")
    add = parser.add_argument_group("output").add_argument
    add("--run-dir", help="folder to write or resume in (default: runs/, then the flags)")
    add("--log-every", type=positive_int, default=100, help="steps between lines of log.jsonl")
    add("--ckpt-every", type=positive_int, default=50_000, help="steps between numbered checkpoints")
    add("--state-every", type=positive_int, default=10_000, help="steps between rewrites of state.pt")
    add("--sample-every", type=nonnegative_int, default=10_000, help="steps between sample grids; 0 is off")
    add("--wandb", metavar="PROJECT", help="log there too, to Weights & Biases")
    add = parser.add_argument_group("REPA-E").add_argument
    add("--tune-vae", action="store_true", help="train the VAE, too; needs REPA")
    add("--vae-from-scratch", action="store_true", help="with --tune-vae: from random weights")
    for term, weight in {"l1": 1.0, "lpips": 1.0, "gan": 0.1, "tune-repa": 1.5}.items():
        add(f"--{term}-weight", type=nonnegative_float, default=weight, help="of this term of the VAE's loss")
    add("--kl-weight", type=nonnegative_float, default=1e-6,
        help="of its KL, a sum over the latent: at S pixels, 1e-6 (256 / S)^2 weighs as much")
    add("--lpips-weights", nargs=2, metavar=("VGG", "LIN"), default=["vgg16-397923af.pth", "vgg.pth"],
        help="torchvision's VGG16, and weights/v0.1/vgg.pth of the lpips project")
    add("--disc-init", metavar="FILE", help="weights of the discriminator (default: random)")
    return parser


def parse_args():
    parser = make_parser()
    args = parser.parse_args()
    size = args.model.split("/")[0]
    if args.vae_repa_depth is None:
        args.vae_repa_depth = ALIGN_DEPTHS.get(size, 2)
    args.vae_repa_depth *= args.vae_repa_weight > 0  # weight 0 builds no head either
    args.repa_depth *= args.repa_weight > 0
    args.sra_depth *= args.sra_weight > 0
    if args.sra_depth:
        args.sra_teacher_depth = args.sra_teacher_depth or SRA_TEACHERS.get(size, 4)
    low, high = args.vae_repa_interval
    if low >= high:
        fail(f"--vae-repa-interval {low} {high} must have LO < HI")
    if args.tune_vae and not args.repa_depth or args.vae_from_scratch and not args.tune_vae:
        fail("--tune-vae needs REPA (--repa-depth, --repa-weight), and --vae-from-scratch needs --tune-vae")
    args.run_dir = args.run_dir or "runs/" + named_by_flags(
        args.model.replace("/", "-"), args, parser, ("model", *FREE))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    args.micro_batch = args.micro_batch or max(args.batch_size // world_size, 1)
    if args.batch_size % (world_size * args.micro_batch):
        fail(f"--batch-size {args.batch_size} is not divisible by {world_size} process(es) x --micro-batch "
             f"{args.micro_batch}")
    return args


# what a resume may change
FREE = ("run_dir", "micro_batch", "max_steps", "compile", "log_every", "ckpt_every", "state_every",
        "sample_every", "lpips_weights", "wandb", "class_names")


# ---- The run


def start_from(model, path):
    """Give model the EMA weights of a checkpoint, ours or published, and print which. Raises ValueError.

    Heads and the tables of classes and positions stay new if they do not fit; all else must fit.
    """
    try:
        own, weights = model.state_dict(), ema_weights(load_tensors(path))
        part_of = {name: ".".join(name.split(".")[:2]) for name in {**own, **weights}}  # as heads.repa
        here, there = ({name: tuple(x.shape) for name, x in each.items()} for each in (own, weights))
        differ = [name for name in part_of if here.get(name) != there.get(name)]
        for name in differ:
            if not name.startswith((*TRAINING_ONLY, "y_embedder.", "pos_embed")):
                raise ValueError(f"its {name} is {there.get(name)}, not {here.get(name)}: another --model?")
        new = {part_of[name] for name in differ}
        taken = {name: x for name, x in weights.items() if part_of[name] not in new}
        for name in taken.keys() & dict(model.named_parameters()):
            if not taken[name].is_floating_point() or not taken[name].isfinite().all():
                raise ValueError(f"its {name} is not finite")
        model.load_state_dict(taken, strict=False)
    except Exception as error:  # of many kinds
        raise ValueError(f"--init {path} cannot be used: {first_line(error)}") from error
    if first_process():
        new, unused = (", ".join(sorted(new & {part_of[name] for name in each})) or "none"
                       for each in (own, weights))
        print(f"--init {path}: {len(taken)} tensors; new here: {new}; not used of it: {unused}")


def load_tuned(args, facts):
    """The modules that `vae_step` takes; the VAE is the one that made the latents. Raises ValueError."""
    source, size = facts["vae"], facts["image_size"]
    try:
        vae, grey = load_vae(source, facts["vae_content"]), torch.zeros(1, 3, size, size)
        if args.vae_from_scratch:
            vae = type(vae).from_config(vae.config).eval()
        posterior = getattr(vae.encode(grey), "latent_dist", None)
        if not posterior:
            raise ValueError("it has no Gaussian posterior")
        if list(posterior.mean.shape[1:]) != facts["latent_shape"]:
            raise ValueError(f"it makes other latents than {facts['latent_shape']}, which --data holds")
        tuned = torch.nn.ModuleDict({"vae": vae.requires_grad_()})
        if args.gan_weight:
            source, tuned["gan"] = "a discriminator", Discriminator()
            tuned["gan"](grey)
            if source := args.disc_init:
                tuned["gan"].load_state_dict(load_tensors(source))
        if args.lpips_weight:
            vgg, lin = args.lpips_weights
            source = f"--lpips-weights {vgg} {lin} (--lpips-weight 0 does without)"
            tuned["lpips"] = LPIPS(load_tensors(vgg), load_tensors(lin))
        return tuned
    except Exception as error:  # hub, config, weights, sizes
        raise ValueError(f"--tune-vae cannot use {source} for {size} pixels: {first_line(error)}") from error


def build(args, facts):
    """What the flags ask for, new and on the CPU: (model, EMA model, REPA's encoder or None, modules of
    `vae_step`, settings). settings: what checkpoints keep, and `build_model` needs.
    """
    encoder, tuned, settings = None, torch.nn.ModuleDict(), {**vars(args), "data": facts}
    init = args.init and newest(args.init)
    try:
        files = {"init": init, "repa_encoder": args.repa_encoder, "disc_init": args.disc_init}
        for flag, file in files.items():
            if file and os.path.exists(file):
                settings[f"{flag}_content"] = content_id(intact(file))  # if moved, it must be the same
        if args.repa_depth:
            encoder = load_encoder(args.repa_encoder, facts["image_size"])
            settings["repa_dim"] = encoder.dim
        torch.manual_seed(args.seed)
        model = build_model(settings)
        for head in ("vae_repa", "repa", "sra"):
            if settings[f"{head}_depth"] and head not in model.heads:
                raise ValueError(f"{args.model} has no head for {head}: set its depth to 0")
        if init and not Path(args.run_dir, "state.pt").exists():
            start_from(model, init)
        side = model.input_size // model.patch_size
        if encoder and encoder.side != side:
            raise ValueError(f"the encoder has {encoder.side}x{encoder.side} tokens, SiT {side}x{side}")
        if args.sra_depth and not args.sra_depth < args.sra_teacher_depth <= len(model.blocks):
            raise ValueError(f"--sra-teacher-depth {args.sra_teacher_depth} is not above --sra-depth "
                             f"{args.sra_depth} and at most {len(model.blocks)}")
        if args.tune_vae:
            tuned = load_tuned(args, facts)
    except ValueError as error:
        fail(first_line(error))
    if tuned and not args.vae_from_scratch:
        model.bn.start(facts["shift"], facts["scale"])
    return model, copy.deepcopy(model).eval().requires_grad_(False), encoder, tuned, settings


def compile_layers(model, ema, args):
    """Compile layer by layer, which is quick, for fixed sizes: sample grids have others."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each layer's graph in three
    teacher = ema.blocks[: args.sra_teacher_depth] if args.sra_depth else []
    for layer in (*model.blocks, *model.heads.values(), model.final_layer, *teacher):
        layer.compile(dynamic=False)


def describe(model, args, facts, start, devices):
    """Print what the run is."""
    tokens = (model.input_size // model.patch_size) ** 2
    every, heads = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.heads))
    print(f"{args.run_dir}: from step {start} to {args.max_steps}, on {devices}")
    print(f"  {every - heads:.1f} M parameters, heads {heads:.1f} M: {', '.join(model.heads) or 'none'}")
    print(f"  {facts['count']} images of {facts['num_classes']} classes, latents {facts['latent_shape']}, "
          f"{tokens} tokens; {facts['count'] / args.batch_size:.1f} steps an epoch")
    left, suits = args.ema_decay**args.max_steps, 1 - float(f"{10 / args.max_steps:.1g}")
    if left > 0.03:
        print(f"  --ema-decay {args.ema_decay} leaves {left:.0%} of the initial weights in the samples; for "
              f"{args.max_steps} steps take {max(suits, 0):g}")


def main():
    # checks, on the CPU
    args = parse_args()
    extras = ["images"] if args.repa_depth else []
    latents = Latents(args.data, extras)
    facts, first = latents.facts, first_process()
    run_dir, log_path = Path(args.run_dir), Path(args.run_dir, "log.jsonl")
    raw_model, ema, encoder, tuned, settings = build(args, facts)
    trained = [*raw_model.parameters(), *tuned.parameters()]
    optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.999), weight_decay=0, fused=True)
    parts = {"model": raw_model, "ema": ema, "opt": optimizer} | ({"tuned": tuned} if tuned else {})
    vae = None
    if first and 0 < args.sample_every <= args.max_steps:
        vae = tuned["vae"] if tuned else load_decoder(facts, "cpu")[0]
    if first:
        lock(run_dir / "lock", run_dir)
    start, log_before = resume(args, settings, parts)
    if first:
        write_json(run_dir / "settings.json", settings)
        with atomic_write(log_path) as file:
            file.write(log_before.encode())

    # to the GPU
    rank, world_size, device = init_distributed()
    agree({**settings, "run_dir": f"{run_dir}, at step {start}"})
    if start >= args.max_steps:
        if first:
            print(f"{run_dir}: nothing left to do at step {start}; a larger --max-steps goes on")
        return
    wandb = start_wandb(args, settings) if args.wandb and rank == 0 else None
    for module in filter(None, (raw_model, ema, tuned, encoder, vae)):
        module.to(device)
    optimizer.load_state_dict(optimizer.state_dict())  # moves its state to where the weights are now
    if args.compile:
        compile_layers(raw_model, ema, args)
    model = raw_model
    if dist.is_initialized():
        model = DDP(raw_model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # they stay equal; as an argument, newer torch warns of it
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        describe(raw_model, args, facts, start, f"{world_size} x {name}")

    # the loop
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(signal.Signals(number).name))
    local_batch = args.batch_size // world_size
    local = slice(rank * local_batch, (rank + 1) * local_batch)  # of each global batch
    steps = range(start, args.max_steps)
    rows = (latents.rows(step, args.batch_size, args.seed)[local] for step in steps)
    progress = Progress(steps, "training", total=args.max_steps, initial=start)
    history, done, clock = [], start, time.perf_counter()  # history: since the last log line
    began = clock - float((re.findall(r'"seconds": ([\d.]+)', log_before) or [0])[-1])
    for step, stored in zip(progress, read_ahead(latents.read, rows, threads=4)):
        batch, scalars = make_batch(stored, step, raw_model.null_class, args, local, device), {}
        if encoder:
            batch["tokens"] = image_tokens(encoder, batch, args)
        if tuned:
            batch["x"], scalars = vae_step(tuned, raw_model, batch, args)
        epoch = step * args.batch_size // facts["count"]
        history.append(scalars | training_step(model, ema, optimizer, batch, args, epoch))

        done, stop = step + 1, any_signal()
        log, numbered, resumable, draw = (every and done % every == 0 for every in (
            args.log_every, args.ckpt_every, args.state_every, args.sample_every))
        if done == args.max_steps:
            log = numbered = True
        if log or numbered or resumable or draw or stop:
            check_finite(done, history, raw_model)  # waits for the GPU
        if log:
            now = time.perf_counter()
            line = log_line(done, history, done * args.batch_size / facts["count"], now - began,
                            len(history) * args.batch_size / (now - clock))
            if rank == 0:
                with writing(log_path, "a") as file:
                    file.write(json.dumps(line) + "\n")
                shown = {key: f"{line[key]:.3g}" for key in (*history[0], "images_per_s")}
                progress.set_postfix(shown, refresh=False)
        if rank == 0 and draw:
            grid = run_dir / "samples" / f"{done:07d}.png"
            draw_grid(grid, ema, vae, facts, args.seed, args.precision,
                      cfg_scale=4.0 if args.label_dropout else 1.0)  # Fig. 4's
        if rank == 0 and (numbered or resumable or stop):  # last: a resume does nothing before it again
            save_checkpoints(run_dir, done, numbered, settings, parts)
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
