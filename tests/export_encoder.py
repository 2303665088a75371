"""An image encoder of transformers (`pip install transformers`) as a file for train.py --repa-encoder:

    python tests/export_encoder.py clip-l --out clip-l.pt2

It sees the images and gives the tokens that REPA and REPA-E take: of CLIP those before the last norm, of the
others those after it, without the class token. DINOv2's equal those of train.py's own, which come with code
by torch.hub. Without a network, give --source a downloaded folder.
"""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import models  # noqa: E402  (found only now)
from extract_latents import Parser, atomic_write, fail, first_line, positive_int, run  # noqa: E402

CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # mean and std of its images
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# class of transformers, name on the hub, statistics of images, tokens before the patches'
ENCODERS = {"clip-l": ("CLIPVisionModel", "openai/clip-vit-large-patch14", CLIP, 1),
            "i-jepa-h": ("IJepaModel", "facebook/ijepa_vith14_1k", IMAGENET, 0),
            "dinov2-b": ("Dinov2Model", "facebook/dinov2-base", IMAGENET, 1),
            "dinov2-l": ("Dinov2Model", "facebook/dinov2-large", IMAGENET, 1)}


class Encoder(models.Encoder):
    """uint8 images (B, 3, S, S) -> patch tokens (B, N, dim) of a network of transformers.

    It sees 7/8 of S pixels, as in REPA: 224 for 256. Raises ValueError if they do not fit it.
    """

    def __init__(self, network, image_size, statistics, extra_tokens):
        torch.nn.Module.__init__(self)  # of the parent, only how images are prepared is wanted
        self.network, self.extra_tokens, self.input_size = network, extra_tokens, image_size * 7 // 8
        patch = network.config.patch_size
        if image_size * 7 % 8 or self.input_size % patch:
            raise ValueError(f"7/8 of {image_size} pixels is not a multiple of {patch}, its patches' side")
        if network.config.model_type == "dinov2":
            table = network.embeddings.position_embeddings
            table.data = models.resample_positions(table.detach(), self.input_size // patch)
        elif network.config.image_size != self.input_size:
            raise ValueError(f"it sees {network.config.image_size} pixels, not 7/8 of {image_size}")
        for name, values in zip(("mean", "std"), statistics):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images):
        x = self.preprocess(images).to(self.network.dtype)
        tokens = self.network(x).last_hidden_state
        return tokens[:, self.extra_tokens :]


def export(module, path, image_size):
    """Write an encoder as a program of torch.export for any number of images."""
    example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    n = torch.export.Dim("n", min=1, max=2**16)  # torch 2.6 asks for a maximum
    with torch.no_grad():  # else torch 2.6 cannot save modules that say so themselves
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: n},), strict=False)
    with atomic_write(path) as file:
        torch.export.save(program, file)


def load_network(name, source, precision):
    """A network of transformers. Raises OSError, ValueError and more."""
    import transformers  # optional

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    network, loaded = getattr(transformers, name).from_pretrained(source, output_loading_info=True)
    if missing := loaded["missing_keys"]:
        raise ValueError(f"it has no {min(missing)}")
    if (found := network.config.model_type) != (wanted := network.config_class.model_type):
        raise ValueError(f"it is of the type {found}, not {wanted}")
    if bad := [name for name, x in network.named_parameters() if not x.isfinite().all()]:
        raise ValueError(f"{bad[0]} is not finite")
    return network.to({"bf16": torch.bfloat16, "fp32": torch.float32}[precision])


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("encoder", choices=ENCODERS, help="to export")
    add("--out", required=True, metavar="FILE.pt2", help="to write")
    add("--source", help="a folder, or another name on the hub (default: the encoder's)")
    add("--image-size", type=positive_int, default=256, help="of the images that it gets")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="of its weights and tokens")
    return parser.parse_args()


def main():
    args = parse_args()
    if "RANK" in os.environ:
        fail("start this with python, not torchrun")
    name, source, *options = ENCODERS[args.encoder]
    source = args.source or source
    if not args.out.endswith(".pt2") or os.path.lexists(args.out):
        fail(f"--out {args.out} must end in .pt2, and not exist")
    try:
        encoder = Encoder(load_network(name, source, args.precision), args.image_size, *options)
        with torch.no_grad():
            _, count, dim = encoder(torch.zeros(1, 3, args.image_size, args.image_size)).shape
    except ImportError:
        fail("this needs transformers: `pip install transformers`, then run the same command again")
    except Exception as error:  # hub, network, files and shapes have no common class
        fail(f"cannot load {args.encoder} from {source}: {first_line(error)}")
    export(encoder, args.out, args.image_size)
    print(f"{args.out}: {count} tokens of {dim} numbers for {args.image_size} pixels")


if __name__ == "__main__":
    run(main)
