"""The demo, also as a test bench: what it trains, when, and what it makes of the numbers."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import demo
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DETECTOR, ROOT, cli, message, process
from PIL import Image
from scipy import stats
from train_detector import draw_set

from extract_latents import content_id

SMALL = ("--images", 20, "--image-size", 32, "--steps", 2, "--samples", 6, "--model", "SiT-Ti/4")
RUNS = Path("runs/demo/20-images_32-pixels")
METRICS = f"6_{content_id(DETECTOR)}.json"


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys, one_thread, few_steps):
    """bench(*flags) runs the demo in a copy of this repository, and the commands it starts in this process:
    (status, stdout, stderr, names of the run folders that were trained in)."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("*.png", "__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: None)
    trained = []

    def start(command, log=None):
        script, *flags = map(str, command)
        with open(log or os.devnull, "a") as file, contextlib.redirect_stderr(file):
            handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
            status, *_ = cli(None, Path(script).stem, *flags)
            list(map(signal.signal, handlers, handlers.values()))
        if script == "train.py":
            trained.append(Path(flags[flags.index("--run-dir") + 1]).name.split("seed-")[1])
        return SimpleNamespace(
            returncode=status, poll=lambda: status, wait=lambda: status, terminate=lambda: None)

    def call(*flags):
        trained.clear()
        return *cli(capsys, "demo", *SMALL, *flags), [*trained]

    monkeypatch.setattr(demo, "start", start)
    sys.path.append(str(ROOT / "tests/data"))
    return call


def cells(text):
    """The rows of a Markdown table, lists of its cells, without the line under the headings."""
    rows = [[*map(str.strip, line.split("|")[1:-1])] for line in text.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_tables_arithmetic(seeds):
    """Against numpy and scipy's paired t-test, from the printed text."""
    rng = np.random.default_rng(seeds)
    measured = {f"v{i}": rng.normal(5 + i / 3, 0.3, (seeds, len(demo.METRICS))) for i in range(9)}
    headings, first, *rows = cells(demo.table(measured))
    assert headings[1:] == [title for title, *_ in demo.METRICS.values()] and len(rows) == 2 * 8
    bold = 0
    for values, row, difference in zip([*measured.values()][1:], rows[::2], rows[1::2], strict=True):
        for i, (metric, (_, decimals, _)) in enumerate(demo.METRICS.items(), start=1):
            of, base = values[:, i - 1], measured["v0"][:, i - 1]
            within = pytest.approx([of.mean(), np.std(of, ddof=1)], abs=0.51 * 10**-decimals)
            assert [float(x) for x in row[i].split(" ± ")] == within
            shown = re.fullmatch(r"(\*\*)?([-+][\d.]+) ± ([\d.]+)(\*\*)?, (\d)/(\d)", difference[i])
            within = pytest.approx([np.mean(of - base), stats.sem(of - base)], abs=0.51 * 10**-decimals)
            assert [float(shown[2]), float(shown[3])] == within
            better = of < base if metric in ("denoising", "FID", "sFID") else of > base
            assert (int(shown[5]), int(shown[6])) == (better.sum(), seeds)
            assert bool(shown[1]) == bool(shown[4]) == (stats.ttest_rel(of, base).pvalue < 0.05)
            bold += bool(shown[1])
    assert 0 < bold < 8 * len(demo.METRICS)
    assert [float(x.split(" ± ")[0]) for x in first[1:]] == pytest.approx(measured["v0"].mean(0), abs=0.006)


def test_a_table_of_one_seed():
    rows = cells(demo.table({"SiT": np.array([[0.5, 4, 1, 3]]), "mine": np.array([[0.25, 5, 1, 2]])}))
    assert rows[1:] == [["SiT", "0.5000", "4.00", "1.000", "3.00"],
                        ["mine", "0.2500", "5.00", "1.000", "2.00"],
                        ["difference", "-0.2500", "+1.00", "+0.000", "-1.00"]]


def test_the_encoder_says_more_than_the_class():
    """Else REPA teaches SiT little that it is not told: tokens of a class at a place are not all alike."""
    images, labels = draw_set(0, 200)
    with torch.no_grad():
        tokens = F.normalize(demo.Encoder().eval()(images), dim=-1)
    means = torch.stack([tokens[labels == k].mean(0) for k in range(10)])
    assert 0.4 < F.cosine_similarity(means[labels], tokens, dim=-1).mean() < 0.7


def test_variants(bench):
    """Flags reach train.py; what takes longer comes first; a run that is there stays, under another name or
    in another order of its flags, too; the table has what runs logged and fid.py found; of a script that
    changed later the demo speaks, and of none else."""
    status, out, err, trained = bench("--seeds", 2, "--variant", "mine: --lr 1e-4 --vae-repa-loss l1")
    assert status == 0, err
    runs = ["0_vae-repa-loss-l1_lr-0.0001", "1_vae-repa-loss-l1_lr-0.0001", "0_plain", "1_plain"]
    assert trained == runs and "changed" not in out

    def settings(run):
        found = json.loads((RUNS / f"SiT-Ti-4_2-steps_seed-{run}" / "settings.json").read_text())
        return {key: x for key, x in found.items() if key != "run_dir"}

    for seed in (0, 1):
        mine, plain = map(settings, runs[seed::2])
        assert plain["seed"] == seed and plain["vae_repa_depth"] == 0
        assert mine == {**plain, "vae_repa_depth": 2, "lr": 1e-4, "vae_repa_loss": "l1"}
    rows = {row[0]: row[1:] for row in cells(out)}
    for name, run in {"SiT-Ti/4": "plain", "mine": "vae-repa-loss-l1_lr-0.0001"}.items():
        folders = [RUNS / f"SiT-Ti-4_2-steps_seed-{seed}_{run}" for seed in (0, 1)]
        found = [[np.mean([json.loads(line)["denoising"] for line in open(folder / "log.jsonl")]),
                  *(json.loads((folder / METRICS).read_text())[key] for key in ("FID", "sFID", "IS"))]
                 for folder in folders]
        shown = [float(cell.split(" ± ")[0]) for cell in rows[name]]
        assert shown == pytest.approx(np.mean(found, axis=0), rel=2e-3, abs=0.006)
        assert [Image.open(folder / "grid.png").size for folder in folders] == [(8 * 32, 10 * 32)] * 2

    with open("train.py", "a") as file:
        file.write("# changed\n")
    status, out, err, trained = bench(
        "--variant", "again: --vae-repa-loss l1 --lr 0.0001", "--variant", "new: --vae-repa-layers 3")
    assert status == 0 and trained == ["0_vae-repa-layers-3"], err
    (said,) = {line for line in out.splitlines() if "changed" in line}
    assert said.startswith("2 of 3 runs were begun before train.py changed.")
    (listed,) = {line for line in out.splitlines() if "rm -r" in line}
    assert {*re.findall(r"seed-(\S+)", listed)} == {runs[0], runs[2]}
    assert rows["mine"] != {row[0]: row[1:] for row in cells(out)}["again"]  # which is of one seed


def test_own_images(bench, images, vae, tmp_path):
    """A folder of class folders, and its VAE; REPA takes the demo's encoder."""
    status, out, err, trained = bench("--images-from", images, "--vae", vae,
                                      "--variant", "REPA: --repa-depth 2")
    assert status == 0 and trained == ["0_repa-depth-2", "0_plain"], err
    (folder,) = Path("runs/demo").glob(f"{images.name}-????????_32-pixels_{vae.name}-????????")
    facts = json.loads((folder / "latents/latents.json").read_text())
    assert facts["num_classes"] == 3 and facts["vae"] == str(vae)
    for run in folder.glob("SiT-Ti-4_*"):
        about = json.loads((run / METRICS).read_text())
        assert about["reference"] == str((folder / "latents/images.npy").resolve()) and about["count"] == 6
    assert not list(folder.glob("images")) and "| REPA |" in out


class Mean(torch.nn.Module):
    """A detector with features alone: the mean colours of an image's quarters."""

    def forward(self, images):
        return {"features": torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)}


def export_tiny_detector(path):
    example, n = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.export.Dim("n", min=1, max=2**16)
    torch.export.save(torch.export.export(Mean(), (example,), dynamic_shapes=({0: n},), strict=False), path)


def test_what_is_not_mixed_up(bench, images, tmp_path):
    """Other images in a folder of the same name, also with the same names; a detector; a file that a flag
    names; what is damaged is said to be."""
    flags = ("--images-from", tmp_path / "mine", "--variant", "a: --label-dropout 0")
    shutil.copytree(images, tmp_path / "mine")
    status, first, err, trained = bench(*flags)
    assert status == 0 and len(trained) == 2, err
    status, again, _, trained = bench(*flags)
    assert status == 0 and not trained and cells(again) == cells(first)
    export_tiny_detector("other.pt2")
    status, out, err, trained = bench(*flags, "--detector", "other.pt2")
    assert status == 0 and "features of other.pt2" in out, err
    assert [row[:2] for row in cells(out)] == [row[:2] for row in cells(first)] and len(cells(out)[0]) == 3
    (folder,) = Path("runs/demo").glob("mine-*")
    assert len(trained) == 2 and len([*folder.glob("SiT*/6_*.json")]) == 4
    (log,) = folder.glob("*plain/log.jsonl")
    log.write_text("")
    assert "is damaged" in message(bench(*flags)[2])
    for path in (tmp_path / "mine").rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    status, out, err, trained = bench(*flags)
    assert status == 0 and len(trained) == 2 and cells(out) != cells(first), err
    assert len([*Path("runs/demo").glob("mine-*")]) == 2


def test_another_base_and_a_run_that_was_interrupted(bench):
    """Differences are from --base; a run that other code began does not go on with today's, nor is one of
    another device taken for one of this."""
    flags = ("--base", "VAE-REPA:", "--variant", "l2: --vae-repa-loss l2")
    status, out, err, trained = bench(*flags)
    assert status == 0 and trained == ["0_vae-repa", "0_vae-repa-loss-l2"], err
    assert [row[0] for row in cells(out)] == ["", "VAE-REPA", "l2", "difference"]
    folder = RUNS / "SiT-Ti-4_2-steps_seed-0_vae-repa"
    (folder / METRICS).unlink()
    whole, models = (folder / "log.jsonl").read_text(), Path("models.py").read_text()
    (folder / "log.jsonl").write_text("")
    status, out, err, trained = bench(*flags)  # train.py has nothing left to do, and writes its log again
    assert status == 0 and trained == ["0_vae-repa"] and "changed" not in out, err
    assert (folder / "log.jsonl").read_text() == whole
    (folder / "log.jsonl").write_text("")
    Path("models.py").write_text(models + "# changed")
    status, _, err, trained = bench(*flags)
    assert status == 2 and f"{folder} was begun with another models.py" in message(err) and not trained
    (folder / "log.jsonl").write_text(whole)
    Path("models.py").write_text(models)
    record = (folder / "made_of.json").read_text()
    for old, new, says in (("0.002", "0.003", "set of flags"), ('"cpu"', '"cuda"', "kind of device")):
        (folder / "made_of.json").write_text(record.replace(old, new))
        assert record.count(old) == 1 and f"another {says}" in message(bench(*flags)[2])


BAD = [  # flags, what is said
    (("--variant", "mine"), 'not "NAME: FLAGS"'), (("--variant", "a: '--lr 3"), "No closing quotation"),
    (("--variant", "my/own: --lr x"), "my-own: error: argument --lr"),
    (("--variant", "a: --vae-repa-dpeth 3"), "--vae-repa-dpeth"),
    (("--variant", "a: --seed 3"), "cannot have --seed"),
    (("--variant", "a: --data=x"), "cannot have --data"),
    (("--variant", "a:", "--variant", "a: --lr 1"), "two variants are called a"),
    (("--variant", "a: --vae-repa-depth 99"), "vae_repa depth 99"),
    (("--variant", "a: --tune-vae"), "--tune-vae needs REPA"),
    (("--variant", "a: --lr inf"), "/output.txt train.py: error: weights are not finite"),
    (("--variant", "a: --log-every 7"), "cannot have --log-every"),
    (("--base", "a: --seed 1"), "--variant a cannot have --seed"), (("--base", "a"), "--base"),
    (("--variant", "a: -h"), "cannot have -h"), (("--variant", "a\nb: --lr 1"), "--variant"),
    (("--variant", "a: --init tests/demo.py", "--variant", "b: --init ./tests/demo.py"), "b and a have"),
    (("--images", 15), "draw_images.py failed"), (("--images-from", "nowhere"), "nowhere"),
    (("--detector", "nowhere.pt2"), "nowhere.pt2"), (("--samples", 3), "at least 4"),
    (("--seeds", 0), "--seeds")]


@pytest.mark.parametrize("flags, says", BAD)
def test_bad_flags(bench, flags, says):
    """Said before anything is trained, where it can be known."""
    status, _, err, trained = bench(*flags)
    assert status == 2 and says in message(err) and len(trained) == 2 * ("--lr inf" in str(flags))


def test_the_picture(tmp_path, monkeypatch, capsys):
    """The differences, if there is matplotlib; if not, what to do."""
    measured = {name: np.random.default_rng(len(name)).normal(size=(3, 4)) for name in ("a", "$\\b$", "cc")}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        demo.draw(measured, tmp_path / "a.png")
    assert "pip install matplotlib" in capsys.readouterr().out and not (tmp_path / "a.png").exists()
    pytest.importorskip("matplotlib")
    demo.draw(measured, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 1000


@pytest.mark.slow
def test_the_demo(tmp_path):
    """It ends with the table and its pictures; another --steps is another run."""
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__")
    repo = shutil.copytree(ROOT, tmp_path / "repo", ignore=ignored)
    for steps in (4, 3):
        said = process(repo / "tests" / "demo", "--images", 100, "--steps", steps).stdout
        assert [len(row) for row in cells(said)] == [5] * 4 and "nan" not in said
    grids = [Image.open(grid) for grid in repo.glob("runs/demo/100-images/*/grid.png")]
    assert [grid.size for grid in grids] == [(8 * 64, 10 * 64)] * 4
