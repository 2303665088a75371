"""Power cuts: what a disk may hold after one is rebuilt, for moments all through training, extraction and
sampling; then the same command must end with the same bytes as if nothing had happened.

A disk keeps what was fsynced. Of anything else, content and names alike, it may keep any part.
"""

import builtins
import functools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import cli, message

import models

pytestmark = pytest.mark.usefixtures("all_on_one_thread", "few_steps")


class Node:
    """A file (`now` and `safe` are bytes) or a folder ({name: Node}); safe is what a power cut leaves of it.

    names: of a folder, changes that are not safe yet, [(name that goes or None, name that comes or None, its
    Node)].
    """

    def __init__(self, now):
        self.now, self.safe, self.names = now, type(now)(), []

    def settle(self):
        self.safe, self.names = self.now.copy() if isinstance(self.now, dict) else self.now, []


class Disk:
    """Watches a folder while a command runs in this process; `states` collects what power cuts may leave."""

    def __init__(self, root, monkeypatch):
        self.root, self.states, self.inodes, self.busy, self.last = root, {}, {}, False, "the start"
        self.top = self.node(root)
        self.scan(self.top, root)
        for node in self.inodes.values():
            node.settle()
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "remove"),
                             (os, "mkdir"), (os, "rmdir"), (os, "open"), (builtins, "open")):
            monkeypatch.setattr(module, name, self.watched(name, getattr(module, name)))

    def node(self, path):
        """The Node of what lies there, which keeps it when it is renamed."""
        number = os.stat(path).st_ino
        if number not in self.inodes:
            self.inodes[number] = Node({} if os.path.isdir(path) else b"")
        return self.inodes[number]

    def watched(self, name, real):
        def call(*args, **kwargs):
            if self.busy or name == "open" and not os.path.abspath(str(args[0])).startswith(str(self.root)):
                return real(*args, **kwargs)
            self.look()
            result = real(*args, **kwargs)
            if name == "fsync":
                self.inodes.get(os.fstat(args[0]).st_ino, Node(b"")).settle()
            self.last = f"{name} {args[0]}"
            self.look()
            return result
        return call

    def look(self):
        self.busy = True
        self.scan(self.top, self.root)
        for tree in self.possible():
            self.states.setdefault(frozenset(tree.items()), self.last)
        self.busy = False

    def scan(self, folder, path):
        """Note what has changed in a folder."""
        found = {entry.name: self.node(entry.path) for entry in os.scandir(path)}
        gone = {name: node for name, node in folder.now.items() if found.get(name) is not node}
        for name, node in found.items():
            if folder.now.get(name) is not node:
                old = next((old for old, other in gone.items() if other is node), None)
                folder.names.append((old, name, node))
                gone.pop(old, None), gone.pop(name, None)
        folder.names += [(name, None, None) for name in gone]
        before, folder.now = folder.now, found
        for node in before.values():
            if node not in found.values():
                self.inodes = {n: x for n, x in self.inodes.items() if x is not node}  # n may be given again
        for name, node in found.items():
            if isinstance(node.now, dict):
                self.scan(node, path / name)
            elif (content := (path / name).read_bytes()) != node.now:
                node.now = content

    def folders(self, node):
        return [node, *(x for child in node.now.values() if isinstance(child.now, dict)
                        for x in self.folders(child))]

    def possible(self):
        """{path: bytes, or None for a folder} of each state: names that are not safe are all lost, all there,
        one alone there or lost; content that is not is lost, half there, half zeros, or there."""
        pending = [(id(folder), change) for folder in self.folders(self.top) for change in folder.names]
        choices = [[], pending, *([each] for each in pending),
                   *([x for x in pending if x is not each] for each in pending)]
        for chosen in choices:
            for fate in ("lost", "half", "zeros", "there"):
                tree = {}
                self.build(self.top, "", chosen, fate, tree)
                yield tree

    def build(self, folder, path, chosen, fate, tree):
        names = dict(folder.safe)
        for owner, (old, new, node) in chosen:
            if owner == id(folder):
                names.pop(old, None)
                if new:
                    names[new] = node
        for name, node in names.items():
            if isinstance(node.now, dict):
                tree[path + name] = None
                self.build(node, f"{path}{name}/", chosen, fate, tree)
            else:
                tree[path + name] = partly(node.safe, node.now, fate)


@functools.cache  # states share what they hold
def partly(safe, now, fate):
    """A file's content when part of what was written is lost."""
    if safe == now or fate in ("lost", "there"):
        return safe if fate == "lost" else now
    size = max(len(safe), len(now))
    old, new = (np.frombuffer(x.ljust(size, b"\0"), np.uint8) for x in (safe, now))
    (different,) = np.nonzero(old != new)
    middle = (different[0] + different[-1] + 1) // 2 if len(different) else size
    if fate == "zeros" or len(safe) == len(now):
        return now[:middle] + old[middle:].tobytes()
    return now[:middle]


def watched(root, command):
    """A Disk after command(), which works in the folder root."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(root, patch)
        command()
        disk.look()
    return disk


def rebuild(root, tree):
    """Make the folder root what a state of a Disk says."""
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path, content in sorted(tree.items()):
        (root / path).mkdir() if content is None else (root / path).write_bytes(content)


def result(root):
    """{file: what it holds} of what a command made; without what differs from run to run, such as times."""
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {name: held(path) for name, path in files.items() if not name.endswith("lock")}


def held(path):
    try:
        if path.name == "log.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            return [{**line, "images_per_s": 0, "memory_gib": 0, "seconds": 0} for line in lines]
        if path.suffix == ".pt":  # equal objects can be pickled as one or as several
            return plain({**torch.load(path, weights_only=True), "log": ""})
    except Exception:  # it is damaged
        pass
    return path.read_bytes()


def plain(x):
    """A checkpoint with its tensors as bytes."""
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    return (str(x.dtype), x.shape, x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("script, flags", [
    ("train", "--model SiT-Ti/8 --data latents --batch-size 4 --max-steps 3 --ckpt-every 2 --state-every 3 "
     "--log-every 1 --sample-every 3 --run-dir disk/runs/a"),
    ("extract_latents", "--images images --vae vae --image-size 32 --batch-size 6 --store-images "
     "--out disk/data/latents"),
    ("sample", "--ckpt model.pt --num-samples 3 --batch-size 2 --num-steps 2 --out disk/a/b.npz")])
def test_power_cuts(capsys, monkeypatch, latents, checkpoint, images, vae, tmp_path, script, flags):
    for name, there in {"latents": latents, "model.pt": checkpoint, "images": images, "vae": vae}.items():
        (tmp_path / name).symlink_to(there)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.SiT_models, "SiT-Ti/8", models.partial(
        models.SiT, depth=2, hidden_size=32, num_heads=2, patch_size=8))
    root = tmp_path / "disk"
    root.mkdir()
    run = lambda: cli(capsys, script, *flags.split())  # noqa: E731
    states, expected = watched(root, run).states, result(root)
    assert len(expected) > 1 and len(states) > 30
    for state, after in states.items():
        rebuild(root, dict(state))
        status, _, err = run()
        assert status == 0, f"{after}: {message(err)}"
        assert result(root) == expected, after
    print(f"\n{script}: {len(states)} states, none lost")
