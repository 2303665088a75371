"""README keeps its word: each local link, file, picture and flag in it exists, and each command parses."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import repa_e
import torch.distributed.run
from conftest import DETECTOR, ROOT, TINY, cli, drawn_rows
from PIL import Image
from test_alignments import METHODS, flags_of
from test_fid import METRICS
from test_train import SHARED, assert_close_run, log

import extract_latents

DOCS = {name: (ROOT / name).read_text() for name in ("README.md", "tests/PAPERS.md", "tests/CLUSTER.md")}
README = DOCS["README.md"]
SCRIPTS = ("train", "sample", "fid", "extract_latents", "demo", "benchmark", "figures", "repa_e",
           "convert_vae", "export_encoder", "train_vae")
sys.path.append(str(ROOT / "tests" / "data"))


def text_of(doc):
    """A document without its blocks of code, and the words that are set as code in it."""
    text = re.sub(r"^```.*?^```", "", DOCS[doc], flags=re.S | re.M)
    return text, re.findall(r"`([^`]+)`", text)


def commands(doc):
    """Each command line of a document; those that a table's flags stand for, too."""
    text, words = text_of(doc)
    blocks = "".join(re.findall(r"```bash\n(.*?)```", DOCS[doc], re.S)).replace("\\\n", "")
    lines = [*blocks.splitlines(), *re.findall(r"^    (\S.*)", text, re.M), *words]
    lines = [part for line in lines for part in line.split(" && ")]
    first = None  # a row's flags, of train.py, which the next row may continue with an ellipsis
    for more, flags in re.findall(r"^\|(?: \w+[\w-]* \|)? (… )?`(--[^`]*)`", text, re.M):
        first = first if more else flags
        lines.append(f"python train.py {first} {flags if more else ''}")
    for script, flags in re.findall(r"^\| `([\w/]+\.py) (--[^`]+)`", text, re.M):
        lines.append(f"python {script} {'--ckpt a.pt ' if script == 'sample.py' else ''}{flags}")
    lines = [re.sub(r"^for .*; do (.*); done$", r"\1", line).replace("$scale", "1.5") for line in lines]
    return [line for line in lines if re.match(r"(python|torchrun) .*(\.py|-m )", line)]


@pytest.mark.parametrize("command", [command for doc in DOCS for command in commands(doc)])
def test_commands_can_be_pasted(monkeypatch, command):
    """The script's own parser takes them, and torchrun's."""
    assert not re.search(r"…|\b(FILE|FOLDER|NAME|DIR|MODE)\b", command)
    launcher, *words = shlex.split(command)
    if words[:2] == ["-m", "pytest"]:
        return
    if launcher == "torchrun":
        launched = torch.distributed.run.get_args_parser().parse_args(words)
        monkeypatch.setenv("WORLD_SIZE", launched.nproc_per_node)
        words = [launched.training_script, *launched.training_script_args]
    assert (ROOT / words[0]).exists()
    monkeypatch.setattr(sys, "argv", words)
    importlib.import_module(Path(words[0]).stem).parse_args()


def test_flags_exist(monkeypatch):
    """Those that the text names alone, too."""
    def options(parser):
        commands = [action.choices for action in parser._actions if action.nargs == argparse.PARSER]
        parsers = [parser, *(command for choices in commands for command in choices.values())]
        known[script] = {flag for parser in parsers for flag in parser._option_string_actions}
        raise SystemExit

    torchrun = torch.distributed.run.get_args_parser()._option_string_actions
    known = {"torchrun": {*torchrun, "--signals-to-handle"}}  # which torch 2.6 lacks, as README says
    monkeypatch.setattr(extract_latents.Parser, "parse_args", options)
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args()
    known["repa_e"] |= {*repa_e.variant_parser()._option_string_actions}
    every = set().union(*known.values(), {"--early-v-depth", "--qk-norm", "--shm-size", "--dependency"})
    shown = 0
    for doc in DOCS:
        _, words = text_of(doc)
        for word in words:
            named = re.match(r"(?:tests/)?(\w+)\.py ", word)
            for flag in re.findall(r"(?<![\w-])--[\w-]+", word):
                assert flag in (known[named[1]] if named else every), word
                shown += 1
    assert shown > 100 and len(commands("README.md")) > 15 and len(commands("tests/PAPERS.md")) > 70
    assert commands("tests/CLUSTER.md")


def anchors(doc):
    """What headings of a document are linked by."""
    headings = re.findall(r"^#+ (.*)", text_of(doc)[0], re.M)
    found = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    assert len(set(found)) == len(found)
    return found


@pytest.mark.parametrize("doc", DOCS)
def test_links_and_files(doc):
    """Links point at the lines that they name, pictures are small, scripts and headings exist."""
    links = re.findall(r"\[`(\w+)`\]\(([\w/.]+\.py)#L(\d+)\)", DOCS[doc])
    for name, file, line in links:
        there = ((ROOT / doc).parent / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", there), f"{name} is not at {file}#L{line}"
    text, pictures = text_of(doc)[0], 0
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (ROOT / doc).parent / path if path else ROOT / doc
            assert file.exists(), target
            if file.suffix == ".md" and anchor:
                assert anchor in anchors(str(file.resolve().relative_to(ROOT))), target
            if file.suffix == ".png":
                pictures += 1
                Image.open(file).load()
                assert os.path.getsize(file) <= 300_000
    named = re.findall(r"(?<![\w./])[\w./]+\.(?:py|patch)\b", DOCS[doc])
    assert not [file for file in named if not any((ROOT / at / file).exists() for at in ("", "tests"))]
    assert named and (len(links) >= 6 and pictures >= 2 or doc != "README.md")


def test_each_table_of_the_papers():
    """As many rows as the papers have: Table 1 with five metrics each, and so on."""
    sections = re.split(r"^#+ ", DOCS["tests/PAPERS.md"], flags=re.M)
    rows = {section.split("\n")[0]: re.findall(r"^\| [^|\n]*(?:`|\+|none|not|SiT)[^\n]*", section, re.M)
            for section in sections}
    counts = {"VAE-REPA, Table 1": 14, "VAE-REPA, Table 2": 10, "VAE-REPA, Table 3": 7,
              "VAE-REPA, Table 4": 12, "REPA-E, Table 1": 3, "REPA-E, Tables 2 and 8": 10,
              "REPA-E, Tables 3, 4 and 6": 16, "REPA-E, Table 5": 4, "REPA-E, Table 7": 4,
              "REPA-E, Table 9": 3, "REPA-E, Table 10": 4}
    assert counts == {name.split(":")[0]: len(found) for name, found in rows.items() if ", Table" in name}


def test_two_machines(capsys, monkeypatch, data, images, tmp_path, one_thread):
    """CLUSTER.md's line, by two agents of torchrun on this machine: they train, with all losses, and measure
    what one process does, and say no more; torch would, on the detector's format. One speaks to W&B."""
    cluster = DOCS["tests/CLUSTER.md"]
    (line,) = (line for line in commands("tests/CLUSTER.md") if "--nnodes" in line)
    flags, of_slurm = (re.findall(r"--[\w-]+", re.search(rf"{start} (.*?)train\.py", text, re.S)[1])
                       for start, text in (("torchrun", line), ("srun.*? torchrun", cluster)))
    assert flags == of_slurm and len(flags) == 5
    launch = shlex.split(line.split(" train.py")[0].replace("_node=8", "_node=1"))[1:]
    (tmp_path / "wandb.py").write_text(
        "def init(**_): print(end='W&B;')\ndef log(*_, step): print(step, end=';')\n")
    for folder in (one := tmp_path / "one", two := tmp_path / "two"):
        folder.mkdir()
    runs = {"train": (*TINY, *flags_of(METHODS), *SHARED, "--data", data, "--run-dir", "run",
                      "--max-steps", 3, "--micro-batch", 2, "--wandb", "sit"),
            "fid": (data / "images.npy", "--ref", images, "--detector", DETECTOR, "--json", "fid.json",
                    "--batch-size", 2)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    options = {"cwd": two, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    monkeypatch.chdir(one)
    monkeypatch.syspath_prepend(tmp_path)
    for i, (script, flags) in enumerate(runs.items()):
        host = f"localhost:{20000 + (2 * os.getpid() + i) % 10000}"  # below the ports that clients are given
        command = [sys.executable, "-m", "torch.distributed.run",
                   *(word.replace("HOST:29500", host) for word in launch), ROOT / f"{script}.py", *flags]
        with ThreadPoolExecutor() as beside:
            agents = [beside.submit(subprocess.run, [*map(str, command)], **options) for _ in range(2)]
            status, of_one, _ = cli(capsys, script, *flags)
        ended = [agent.exception() or agent.result() for agent in agents]  # if one hangs the other tells why
        assert [status, *(getattr(each, "returncode", None) for each in ended)] == [0, 0, 0], ended
        said, of_one = (re.sub(r"\d x cpu|\d\.\d{4}", "", text)
                        for text in ("".join(each.stdout for each in ended), of_one))
        assert said == of_one
        assert said.count("W&B;") == said.count("1;2;3;") == (script == "train"), said
        # an agent that ends after the one with the store cannot tell it so, which torch reports at length
        late = r"(?s)\[W[^\n]*TCPStore(?:(?!error:).)*RendezvousConnectionError\.\n"
        shown = re.split("[\r\n]+", "\n".join(re.sub(late, "", each.stderr) for each in ended))
        assert [line for line in shown if line.strip() and "%|" not in line] == []
    del sys.modules["wandb"]
    assert_close_run(one / "run", two / "run", 3)
    for a, b in zip(*(log(folder / "run") for folder in (one, two)), strict=True):
        assert a == pytest.approx({**b, "images_per_s": a["images_per_s"], "seconds": a["seconds"]}, rel=1e-5)
    metrics, of_two = (json.loads((folder / "fid.json").read_text()) for folder in (one, two))
    assert [metrics[name] for name in METRICS] == pytest.approx([of_two[name] for name in METRICS], rel=1e-4)


def test_from_python(checkpoint, one_thread):
    """README's lines, which draw what the command does."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert code.count('"runs/mine"') == 1 and len(code.splitlines()) <= 5
    exec(code.replace('"runs/mine"', repr(str(checkpoint.parent.parent))), found := {})
    out = checkpoint.parent / "from-python.npz"
    flags = ("--classes", 0, "--seed", 0, "--precision", "fp32", "--num-steps", 50, "--out", out)
    assert cli(None, "sample", "--ckpt", checkpoint, *flags)[0] == 0
    images, drawn = found["images"].numpy(), np.load(out)["arr_0"]
    assert images.dtype == np.uint8 and images.shape == drawn.shape == (8, 32, 32, 3)
    assert np.abs(images.astype(int) - drawn).max() <= 1 and images.std() > 5


@pytest.fixture
def repo(tmp_path):
    """A copy of the scripts."""
    folder = tmp_path / "repo"
    folder.mkdir()
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    return folder


def apply(repo, patch):
    """As README says; the examples change the scripts as they are now."""
    subprocess.run(["git", "apply", "--unsafe-paths", ROOT / "tests/data" / patch], cwd=repo, check=True)


def edit(path, before, after):
    assert path.read_text().count(before) == 1, before
    path.write_text(path.read_text().replace(before, after))


def run_all(repo, *commands):
    """Run commands of a copy one after another; in one process, which imports but once."""
    commands = [list(map(str, words)) for words in commands]
    code = f"""import importlib, sys
sys.path[:0] = {[str(repo), str(repo / "tests")]}
for sys.argv in {commands}:
    importlib.import_module(sys.argv[0]).main()"""
    run = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]


def test_a_loss_of_ones_own(latents, repo):
    """README's example, and a target that is stored: it trains, logs, resumes, samples with them."""
    apply(repo, "early_velocity.patch")
    edit(repo / "train.py", "    latents = Latents(", '    extras.append("clip")\n    latents = Latents(')
    edit(repo / "train.py", "    return losses\n\n\ndef loss_weights", """\
    losses["clip"] = batch["clip"].mean(dim=1) * v_pred.mean(dim=(1, 2, 3)).exp()
    return losses\n\n\ndef loss_weights""")
    edit(repo / "train.py", '        "denoising": 1.0,\n', '        "denoising": 1.0, "clip": 0.5,\n')
    shutil.copytree(latents, repo / "set")
    clip = np.random.default_rng(0).random((12, 5), np.float32)
    np.save(repo / "set" / "clip.npy", clip)
    train = ("train", *TINY, "--data", "set", "--early-v-depth", 3, "--lr", 1e-3, "--max-steps")
    run = repo / "runs" / "SiT-Ti-4_data-set_vae-repa-depth-2_early-v-depth-3_batch-size-4_lr-0.001"
    run_all(repo, (*train, 3), (*train, 6, "--micro-batch", 2),
            ("sample", "--ckpt", run / "checkpoints/0000006.pt", "--num-steps", 2, "--per-class", 1))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert list(lines[0])[1:5] == ["denoising", "vae_repa", "early_v", "clip"] and len(lines) == 6
    assert lines[0]["early_v"] == pytest.approx(lines[0]["denoising"], rel=1e-5)  # both predict 0 at first
    assert lines[5]["early_v"] != lines[5]["denoising"]
    assert lines[0]["clip"] == pytest.approx(clip[drawn_rows(0, 0, 4, 12)].mean(), rel=1e-5)  # of this batch


def test_a_transformer_of_ones_own(latents, repo):
    """README's example, flags for parameters that SiT has already, and tables such as RoPE's: with heads and
    without, what is sampled and drawn is the network that was trained and resumed."""
    shutil.copytree(ROOT / "tests", repo / "tests", ignore=shutil.ignore_patterns("__pycache__", "*.pt2"))
    apply(repo, "qk_norm.patch")
    edit(repo / "models.py", "        self.blocks = nn.ModuleList(", """\
        self.register_buffer("table", torch.randn(1) * 0 + 0.5, persistent=False)
        self.number = torch.arange(3)
        self.register_buffer("step", torch.tensor(3))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        g = torch.Generator().manual_seed(0)
        self.register_buffer("drawn", torch.empty(1).normal_(generator=g), persistent=False)
        self.blocks = nn.ModuleList(""")
    edit(repo / "models.py", "        return self.x_embedder(x_t) + self.pos_embed,", """\
        scale = self.table * self.number[2] * self.drawn * self.mask.exp()[0, 0]
        return self.x_embedder(x_t) + scale * self.pos_embed,""")
    edit(repo / "train.py", '    add("--qk-norm",', """\
    add("--mlp-ratio", type=float, default=4.0)
    add("--num-heads", type=positive_int)
    add("--qk-norm",""")
    (repo / "check.py").write_text("""
import sys, torch, models, sample
def main():
    path = sys.argv[1]
    torch.manual_seed(0)
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4)
    model, settings = sample.load_model(path)
    trained = models.build_model(settings)
    trained.load_state_dict(torch.load(path, weights_only=True)["ema"])
    assert torch.equal(model(x, t, y), trained(x, t, y))
    block, norms = model.blocks[0], settings["qk_norm"]
    assert (type(block.attn.q_norm) is torch.nn.LayerNorm) == norms and not model.heads
    assert block.attn.num_heads == 2 and block.mlp.fc1.out_features == 256
    if not norms:  # then num_heads shows in no weight
        other = models.build_model({**settings, "num_heads": None}, heads=False)
        other.load_state_dict(model.state_dict())
        assert not torch.allclose(model(x, t, y), other(x, t, y), atol=1e-4)
""")
    shared = ("train", *TINY, "--data", latents, "--lr", 0.1, "--ema-decay", 0.1, "--mlp-ratio", 2,
              "--num-heads", 2)
    commands, ckpts = [], []
    for name, *flags in (("plain", "--vae-repa-depth", 0), ("norm", "--vae-repa-depth", 2, "--qk-norm")):
        train = (*shared, *flags, "--run-dir", name, "--max-steps")
        ckpt = repo / name / "checkpoints" / "0000004.pt"
        commands += [(*train, 2), (*train, 4), ("check", ckpt),
                     ("sample", "--ckpt", ckpt, "--num-steps", 2, "--per-class", 1),
                     ("figures", "features", "--ckpt", ckpt, "--data", latents, "--layers", 1, "--out", name)]
        ckpts.append(ckpt)
    run_all(repo, *commands)
    for ckpt in ckpts:
        assert (ckpt.parent.parent / "features.png").exists() and list(ckpt.parent.glob("0000004_*.png"))


def test_the_top_level_holds_what_was_promised():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    promised = {"README.md", "requirements.txt", "train.py", "sample.py", "models.py", "fid.py",
                "extract_latents.py", "tests"}
    assert {path.split("/")[0] for path in tracked if path[0] != "."} == promised
