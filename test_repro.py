"""The tests, in the order of the files: pytest -q -m "not slow" test_repro.py. No GPU, no downloads."""
import contextlib
import copy
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import eval as evaluation
import mamba
import model as gpt
import train
from data import TRAIN, Graphs, PathStar, UserError, draw, held_out, identities, inputs, random_stream
from mamba import Mamba, MambaConfig, selective_scan, selective_scan_ref
from model import GPT, GPTConfig, generate

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)
slow = pytest.mark.slow  # left out by -m "not slow"; there is no pytest.ini to declare it in

torch.set_num_threads(1)  # sums in one order, so that equal means equal to the bit
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup runs the tests
# The first graphs of the authors' own deg_2_path_5_nodes_50 file.
OFFICIAL = """\
32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12
17,12|22,28|49,17|9,24|49,9|13,7|12,22|24,13/49,7=49,9,24,13,7
28,40|17,24|35,37|37,28|40,5|15,10|24,15|35,17/35,10=35,17,24,15,10
13,36|30,11|7,12|7,13|12,30|16,34|11,1|36,16/7,1=7,12,30,11,1
12,45|2,44|33,29|34,28|22,33|44,34|12,2|45,22/12,29=12,45,22,33,29
15,40|35,18|34,15|19,34|48,37|19,48|37,35|40,23/19,23=19,34,15,40,23
""".splitlines()

# Every setting is named, so that a better recipe in a preset changes no test.
TINY = dict(preset="paper", deg=2, path_len=3, num_nodes=7, n_layer=2, n_embd=32, batch_size=8, n_train=64,
            n_test=32, max_steps=12, eval_every=4, warmup=5, average=0.8, stop_at=0, optimizer="muon",
            lr=0.01, weight_decay=0.0, ahead=0.0, deep=False, device="cpu", dtype="float32", compile=False)
TASK = PathStar(2, 3, 7)
BOTH_MODELS = pytest.mark.parametrize("model", ["gpt", "mamba"])
MAIN = {f"{module.__name__}.py": module.main for module in (data, gpt, mamba, evaluation, train)}
FILES = {"config.json", "ckpt.pt", "log.jsonl"}

@pytest.fixture(autouse=True)
def uncompiled():
    """Nothing is compiled unless a test asks for it; no test sees what another has set."""
    torch.compiler.set_stance("force_eager")

@contextlib.contextmanager
def compiling():
    """Compile in here; skip the test where there is no compiler."""
    with torch.compiler.set_stance("default"):
        try:
            torch.compile(torch.sin)(torch.zeros(2))
        except Exception as error:
            pytest.skip(f"torch.compile fails: {type(error).__name__}")
        yield

def tiny(model="gpt", **given):
    """The flags of a run that takes a second; a file of graphs takes the place of a number of them."""
    own = dict(n_head=4, short_conv=4, mimetic=True) if model == "gpt" else dict(d_state=16, a_scale=1.0)
    replaced = {f"n_{name[:-5]}" for name in given if name.endswith("_file")}
    return {k: v for k, v in (TINY | own | dict(model=model) | given).items() if k not in replaced}

def new_run(**given):
    return train.Run(train.settle(tiny(**dict(max_steps=1000) | given)))

def command(**given):
    """Settings -> the command line that asks for them."""
    return [f"--{'' if x else 'no-'}{name}" if isinstance(x, bool) else f"--{name}={x}"
            for name, x in tiny(**given).items() if x is not False or name in ("compile", "deep", "mimetic")]

def trained(folder, **given):
    """Run train.py in this process -> its last checkpoint."""
    train.main(command(out_dir=folder, **given))
    return checkpoint(folder)

def checkpoint(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)

def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

def same(a, b):
    """Whether two checkpoints are equal to the bit, but for the clock and the settings (the folder)."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "settings"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

def assert_close(a, b, tolerance):
    """Equal up to a share of the largest value."""
    assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max().clamp(min=1e-30)

def shaken(model, by=0.2):
    """Every parameter moved at random, so that none is at a value (0, 1) which hides a mistake."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn(p.shape, generator=g)
    return model.eval()

@pytest.fixture
def call(monkeypatch, capfd):
    def main(script, *argv, refused=False):
        """Run a script in this process -> its lines; refused in one line, exit code 2: stdout, stderr."""
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        capfd.readouterr()
        with pytest.raises(SystemExit) if refused else contextlib.nullcontext() as stop:
            MAIN[script]()
        out, error = capfd.readouterr()
        if not refused:
            return out.splitlines()
        assert stop.value.code == 2 and re.fullmatch(rf"{script}: error: .+\n", error), error
        return out, error
    return main

# data.py -------------------------------------------------------------------------------------------------
def edge_sets(graphs):
    return {frozenset(zip(prefix[:-3:3], prefix[1:-3:3])) for prefix in graphs[0].tolist()}

def assert_path_star(task, prefix, target):
    """Check every property of one graph, from its tokens alone, in plain Python."""
    assert len(prefix) == task.prefix_len == 3 * task.num_edges + 3 and len(target) == task.path_len
    assert prefix[2:-3:3] == [task.bar] * (task.num_edges - 1) + [task.slash] and prefix[-1] == task.equals
    edges, (first, goal) = list(zip(prefix[:-3:3], prefix[1:-3:3])), prefix[-3:-1]
    nodes, parent = {v for edge in edges for v in edge}, {v: u for u, v in edges}
    assert len(nodes) == 1 + task.num_edges and min(nodes) >= 0 and max(nodes) < task.num_nodes
    assert len(parent) == task.num_edges and first not in parent
    leaves = nodes - set(parent.values())
    assert len(leaves) == task.deg and goal in leaves
    for leaf in leaves:
        path = [leaf]
        while path[-1] != first:
            path.append(parent[path[-1]])
        assert len(path) == task.path_len
        assert leaf != goal or target == (path if task.reverse else path[::-1])

@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("deg, path_len, num_nodes",
                         [(2, 5, 50), (1, 2, 2), (5, 5, 21), (3, 2, 300), (20, 5, 100), (2, 20, 50)])
def test_every_sampled_graph_is_a_path_star(tmp_path, deg, path_len, num_nodes, reverse):
    """Separators, distinct labels, d arms of l - 1 nodes, the path; and a file holds it all."""
    task = PathStar(deg, path_len, num_nodes, reverse)
    graphs = task.sample(50, random_stream(7))
    assert [x.shape for x in graphs] == [(50, task.prefix_len), (50, path_len), (50, deg, path_len - 1)]
    data.save(tmp_path / "text", task, graphs)
    again = data.load(tmp_path / "text", task)
    assert torch.equal(again.prefix, graphs.prefix) and torch.equal(again.target, graphs.target)
    for prefix, target, arms, read in zip(*(x.tolist() for x in graphs), again.arms.tolist()):
        assert_path_star(task, prefix, target)
        path = target[::-1] if reverse else target
        assert arms[0] == path[1:] == read[0] and sorted(arms) == sorted(read)

def test_nothing_but_the_edges_gives_the_answer_away():
    """Labels and the order of the edges are uniform, so no place in the text is better than a guess, 1/d."""
    graphs, n = PathStar(3, 4, 12).sample(6000, random_stream(0)), 6000
    for position in (-3, -2, 0):  # the start, the goal, the first node of the text
        counts = torch.bincount(graphs.prefix[:, position], minlength=12)
        assert (counts - n / 12).abs().max() < 5 * (n / 12) ** 0.5
    where = (graphs.prefix[:, 1:-3:3] == graphs.arms[:, 0, :1]).int().argmax(1)  # of the edge to choose first
    assert (torch.bincount(where, minlength=9) - n / 9).abs().max() < 5 * (n / 9) ** 0.5

@pytest.mark.parametrize("reverse", [False, True])
def test_official_lines_are_read_and_written_to_the_letter(tmp_path, reverse):
    """encode, decode, load, save: there and back; nothing else becomes training data or is overwritten."""
    task, official = PathStar(2, 5, 50, reverse), tmp_path / "official"
    for line in OFFICIAL:
        prefix, target = task.encode(line)
        assert_path_star(task, prefix.tolist(), target.tolist())
        assert task.decode(prefix, target) == line
    official.write_text("\n".join(OFFICIAL) + "\n")
    data.save(tmp_path / "again", task, data.load(official, task))
    assert official.read_bytes() == (tmp_path / "again").read_bytes()
    with pytest.raises(FileExistsError):
        data.save(official, task, data.load(official, task))
    for old, new in ((OFFICIAL[0], ""), ("16,12", "16"), ("16,12|", ""), ("=32", "= 32"), ("=32", "=32,32"),
                     ("32,3|", "32,03|"), ("|", ";"), ("6,16,12", "6,16,12é"), ("47,28", "47,50"),
                     ("47,28", "47,12"), ("47,28", "3,28"), ("47,28", "47,32"), ("/32,12", "/32,28"),
                     ("/32,12", "/34,12"), ("=32,34,6", "=32,6,34"), ("=32,34,6,16,12", "=32,3,19,47,28")):
        lines = [*OFFICIAL[1:3], OFFICIAL[0].replace(old, new), OFFICIAL[4]]
        official.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=f"{official}, line 3: "):
            data.load(official, task)

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """whole_file: what an interrupt leaves is the old file, or none."""
    (tmp_path / "old").write_bytes(b"before")
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt), data.whole_file(tmp_path / name) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old", b"before")]

def test_sets_are_drawn_by_their_key_and_disjoint():
    """draw, held_out: of a tiny task a tenth of the graphs a set, or one line; so if nothing is left."""
    task, small = PathStar(2, 5, 50), PathStar(2, 3, 5)  # 5! labellings, two to a graph
    validation, test = held_out(task, 500)
    assert same([validation, test], held_out(task, 500)) and validation.prefix.dtype == torch.long
    assert len(edge_sets(validation)) == 1000 and len(edge_sets(validation) | edge_sets(test)) == 1500
    assert not edge_sets(held_out(task, 500, validation)[0]) & edge_sets(validation)
    assert [len(x.prefix) for x in held_out(small, 500)] == [6, 6]
    with pytest.raises(UserError, match="num_nodes 2"):
        held_out(PathStar(1, 2, 2), 500)
    last, *others = set(identities(draw(small, 2000, set(), TRAIN)))
    assert {*identities(draw(small, 5, {*others}, TRAIN, 0, piece=1))} == {last}
    with pytest.raises(UserError, match="num_nodes 5"):
        draw(small, 10, {last, *others}, TRAIN, 0)
    a, b, other = (draw(task, 100, set(), TRAIN, seed) for seed in (0, 0, 1))
    assert same(a, b) and not edge_sets(a) & edge_sets(other)

@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "fresh"])
def test_batches_depend_on_seed_and_step_alone(fixed):
    """Batches: any order of calls, any object; an epoch of a fixed set holds every graph once."""
    task = PathStar(2, 5, 50)
    graphs = task.sample(64, random_stream(3)) if fixed else None
    a, b, other = (data.Batches(task, 8, seed, "cpu", graphs) for seed in (5, 5, 6))
    forwards, backwards = [a(step) for step in range(20)], [b(step) for step in reversed(range(20))][::-1]
    assert same(forwards, backwards) and same(a(4), forwards[4]) and not same(other(4), forwards[4])
    rows = torch.cat([prefix for prefix, _ in forwards[:16]])
    assert len(rows.unique(dim=0)) == (64 if fixed else 128) and rows.dtype == torch.long
    if fixed:
        assert same(rows[:64].unique(dim=0), graphs.prefix.unique(dim=0)) and not same(rows[:64], rows[64:])

def test_inputs_hide_the_target_from_a_teacherless_model():
    """inputs(): teacherless, another target gives the same input; standard, the target shifted by one."""
    task = PathStar(2, 5, 50)
    prefix, target, _ = task.sample(6, random_stream(0))
    fed = inputs(task, prefix, target, True)
    assert torch.equal(fed, inputs(task, prefix, target.flip(0), True))
    assert (fed[:, task.prefix_len:] == task.dollar).all() and torch.equal(fed[:, :task.prefix_len], prefix)
    assert torch.equal(inputs(task, prefix, target, False), torch.cat([prefix, target], 1)[:, :-1])

# model.py, and both models -------------------------------------------------------------------------------
def published_gpt(model, idx):
    """GPT-2 in fp64 with an explicit softmax, and the short convolution of q, k, v."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])
    linear = lambda x, name: x @ w[name + ".weight"].T + w[name + ".bias"]
    w = {name: p.double() for name, p in model.state_dict().items()}
    t, k = idx.shape[1], model.config.short_conv
    x = w["wte.weight"][idx] + w["wpe.weight"][:t]
    for i in range(model.config.n_layer):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").mT
        if k:
            taps = w[f"h.{i}.attn.conv.weight"]
            qkv = qkv + F.conv1d(qkv, taps, padding=k - 1, groups=len(taps))[..., :t]
        q, key, v = (y.unflatten(-1, (model.config.n_head, -1)).transpose(1, 2) for y in qkv.mT.chunk(3, -1))
        scores = (q @ key.mT / q.shape[-1] ** 0.5).exp() * torch.ones(t, t).tril()
        y = scores / scores.sum(-1, keepdim=True) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        x = x + linear((h := linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")) * torch.special.ndtr(h),
                       f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T

def published_mamba(model, idx):
    """Mamba in fp64 from the formulas of the paper, the recurrence written out as a sum over the past."""
    silu = lambda x: x / (1 + torch.exp(-x))
    rms = lambda x, w: w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    weights = {name: p.double() for name, p in model.state_dict().items()}
    x, t = weights["backbone.embedding.weight"][idx], idx.shape[1]
    for i in range(model.config.n_layer):
        w = {k.split(".", 3)[3]: p for k, p in weights.items() if k.startswith(f"backbone.layers.{i}.")}
        w = {name.removeprefix("mixer."): p for name, p in w.items()}
        u, gate = (rms(x, w["norm.weight"]) @ w["in_proj.weight"].T).chunk(2, -1)
        u = F.conv1d(u.mT, w["conv1d.weight"], w["conv1d.bias"], padding=3, groups=u.shape[-1])[..., :t].mT
        u, n = silu(u), w["A_log"].shape[1]
        dt, B, C = (u @ w["x_proj.weight"].T).split([w["dt_proj.weight"].shape[1], n, n], -1)
        delta = torch.log1p(torch.exp(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"]))
        past = delta.cumsum(1)[:, :, None] - delta.cumsum(1)[:, None]  # (b, t, s, d): the time from s to t
        decay = torch.exp(past[..., None] * -torch.exp(w["A_log"])) * torch.ones(t, t).tril()[..., None, None]
        y = torch.einsum("btsdn,bsd,bsn,bsd,btn->btd", decay, delta, B, u, C) + w["D"] * u
        x = x + (y * silu(gate)) @ w["out_proj.weight"].T
    return rms(x, weights["backbone.norm_f.weight"]) @ weights["backbone.embedding.weight"].T

CONFIGS = {"gpt": (GPT, GPTConfig(20, block_size=37, n_layer=2, n_head=4, n_embd=32, short_conv=0)),
           "conv": (GPT, GPTConfig(20, block_size=37, n_layer=2, n_head=2, n_embd=16, short_conv=4)),
           "mamba": (Mamba, MambaConfig(20, n_layer=2, d_model=16, d_state=4))}

@pytest.mark.parametrize("name", CONFIGS)
def test_models_equal_the_published_formulas(name):
    """Causality, blocks, norms, positions, tied head: against code that shares no line with the scripts."""
    torch.manual_seed(0)
    kind, config = CONFIGS[name]
    model = shaken(kind(config))
    for idx in (torch.randint(20, (3, 19)), torch.randint(20, (3, 37))):
        with torch.no_grad():
            assert_close(model(idx), (published_mamba if kind is Mamba else published_gpt)(model, idx), 1e-5)

@pytest.mark.parametrize("name, t", [("mamba", 19), *(pytest.param("conv", t, marks=slow) for t in (19, 37))])
def test_a_compiled_block_trains_as_an_uncompiled_one(name, t):
    """Where convolution, attention, GELU and scan go ways of their own; the compiler takes a block whole."""
    torch.manual_seed(0)
    (kind, config), results, counters = CONFIGS[name], [], torch._dynamo.utils.counters
    block, x = shaken(next(iter(kind(config).layers()))), torch.randn(2, t, 16, requires_grad=True)
    for context in (contextlib.nullcontext(), compiling()):
        with context:
            counters.clear()
            y = block(x)
            loss = (y - y.detach().roll(1, dims=1)).square().mean() + y.mean()
            results.append((y.detach(), *torch.autograd.grad(loss, [x, *block.parameters()])))
        block.compile(dynamic=False)
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    for want, got in zip(*results):
        assert_close(got, want, 1e-5)

def test_models_have_the_names_and_the_initialisation_of_their_references():
    """GPT-2, with its scaled c_proj; state-spaces/mamba, whose step sizes no sweep may overwrite."""
    torch.manual_seed(0)
    weights = GPT(GPTConfig(54, block_size=40, n_layer=4, n_head=4, n_embd=64, short_conv=0)).state_dict()
    layer = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    modules = ["ln_f", *(f"h.{i}.{name}" for i in range(4) for name in layer)]
    assert {*weights} - {f"{x}.{kind}" for x in modules for kind in ("weight", "bias")} == {
        "wte.weight", "wpe.weight"}
    for name, p in weights.items():
        std = 0.02 / math.sqrt(2 * 4) if name.endswith("c_proj.weight") else 0.02
        assert abs(p.std() / std - 1) < 0.06 if p.ndim == 2 else (p == name.endswith("weight")).all(), name
    for q, k, v in (x.attn.c_attn.weight.chunk(3) for x in GPT(GPTConfig(54, 40, 4, mimetic=True)).h):
        assert torch.equal(q, k) and abs(8 * q.std() - 1) < 0.06 and abs(v.std() / 0.02 - 1) < 0.06
    model = Mamba(MambaConfig(vocab_size=54, n_layer=4, d_model=64, d_state=16))
    shapes = {k.replace("backbone.layers.0", "0"): tuple(p.shape) for k, p in model.state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if ".layers." not in name} == {
        "backbone.embedding.weight": (54, 64), "0.norm.weight": (64,), "0.mixer.in_proj.weight": (256, 64),
        "0.mixer.conv1d.weight": (128, 1, 4), "0.mixer.conv1d.bias": (128,), "0.mixer.A_log": (128, 16),
        "0.mixer.x_proj.weight": (36, 128), "0.mixer.dt_proj.weight": (128, 4), "0.mixer.D": (128,),
        "0.mixer.dt_proj.bias": (128,), "0.mixer.out_proj.weight": (64, 128), "backbone.norm_f.weight": (64,)}
    for m in (layer.mixer for layer in model.layers()):
        dt = F.softplus(m.dt_proj.bias).detach()
        assert torch.equal(m.A_log, torch.arange(1, 17).float().log().expand(128, 16)) and (m.D == 1).all()
        assert 0.999e-3 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 0.1001
        assert abs(dt.log().mean() - math.log(1e-2)) < 0.5  # log-uniform
        assert 0.9 / 2 < m.dt_proj.weight.abs().max() <= 1 / 2  # 1/sqrt(dt_rank)
        assert 0.95 < m.out_proj.weight.abs().max() * 128 ** 0.5 * 4 ** 0.5 <= 1.0001  # by 1/sqrt(n_layer)
    scaled = Mamba(MambaConfig(vocab_size=9, n_layer=1, d_model=8, d_state=2, a_scale=0.01))
    assert_close(scaled.layers()[0].mixer.A_log.exp(), torch.tensor([0.01, 0.02]).expand(16, 2), 1e-6)

@BOTH_MODELS
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_parameter_groups_are_disjoint_and_complete(model, optimizer):
    """"What has two dimensions decays" takes A_log and the embeddings along; Muon would too."""
    _, net = evaluation.build(train.settle(tiny(model)))
    maps = r"(c_attn|c_proj|c_fc|in_proj|x_proj|dt_proj|out_proj)\.weight$"
    matrices, seen = {id(p) for name, p in net.named_parameters() if re.search(maps, name)}, []
    for opt in gpt.configure_optimizers(net, optimizer, 0.01, 0.02, 0.5):
        for group in opt.param_groups:
            seen += map(id, group["params"])
            decayed, muon = group["weight_decay"] == 0.5, isinstance(opt, torch.optim.Muon)
            assert decayed or group["weight_decay"] == 0
            assert all((id(p) in matrices) == decayed for p in group["params"])
            assert muon == (decayed and optimizer == "muon") and group["base_lr"] == (0.02 if muon else 0.01)
    assert sorted(seen) == sorted(map(id, net.parameters()))

@pytest.mark.parametrize("decay", [0, 0.1])
def test_muon_in_batches_is_torchs(decay):
    """Tall, wide and square matrices, two of each and one alone, with a rate that changes and is a tensor."""
    moved = []
    for kind, number in ((torch.optim.Muon, float), (gpt.Muon, torch.tensor)):
        torch.manual_seed(0)
        shapes = (24, 8), (8, 24), (24, 8), (8, 8), (8, 24), (8, 8), (5, 7)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        before, optimizer = [p.detach().clone() for p in params], kind(params, weight_decay=decay)
        for lr in (0.1, 0.2, 0.05):
            optimizer.param_groups[0]["lr"] = number(lr)
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        moved.append([p.detach() - p_0 for p, p_0 in zip(params, before)])
    for want, got in zip(*moved):
        assert (want - got).norm() < 0.01 * want.norm()  # both compute in bfloat16

# mamba.py ------------------------------------------------------------------------------------------------
def scan_arguments(l, d, decay, dtype=torch.float64, scale=1):
    """Random arguments of the scan; `decay` is about the factor that the state shrinks by in a step."""
    g = torch.Generator().manual_seed(l)
    normal = lambda *shape: torch.randn(shape, generator=g).double()
    delta = scale * (0.5 + torch.rand(2, l, d, generator=g).double())
    A = math.log(decay) * (0.5 + torch.rand(d, 4, generator=g).double())
    arguments = normal(2, l, d), delta, A, normal(2, l, 4), normal(2, l, 4), normal(d)
    return [x.to(dtype).requires_grad_() for x in arguments]

def with_gradients(scan, arguments):
    """y, and the gradient of every argument for a random gradient of y."""
    y = scan(*arguments)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    gradients = torch.autograd.grad(y, arguments, dy)
    return dict(zip(("y", "u", "delta", "A", "B", "C", "D"), (y.detach(), *gradients)))

def assert_scan_equals_the_loop(tolerance, *sizes, **given):
    """In fp64, or in the dtype that is given against the loop in fp64."""
    want = with_gradients(selective_scan_ref, scan_arguments(*sizes, **given | dict(dtype=torch.float64)))
    got = with_gradients(selective_scan, scan_arguments(*sizes, **given))
    for name in want:
        assert got[name].dtype == given.get("dtype", torch.float64) and got[name].isfinite().all()
        assert_close(got[name], want[name], tolerance)

@pytest.mark.parametrize("decay", [0.99, 0.5, 1e-10])
@pytest.mark.parametrize("l", [1, 2, 3, 5, 31, 32, 33, 67])
def test_scan_equals_the_loop_with_every_gradient(l, decay):
    """selective_scan: both sides of every chunk border, any decay; its gradient is written by hand."""
    assert_scan_equals_the_loop(1e-12, l, 6, decay)
    assert_scan_equals_the_loop(1e-12, l, 32, decay)
    assert_scan_equals_the_loop(1e-5, l, 32, decay, dtype=torch.float32)

@pytest.mark.parametrize("scale", [0, 1e-6, 1e2, 1e6])
def test_scan_stays_finite_at_any_step_size(scale):
    """cumsum and log-space forms of the scan overflow here."""
    assert_scan_equals_the_loop(1e-5, 300, 6, 0.1, dtype=torch.float32, scale=scale)

def test_compiled_scan_equals_the_loop():
    """What the compiler makes of the chunk functions as shipped, forwards and back; one kernel for all l."""
    with compiling():
        assert torch.compile(mamba.exp2)(torch.zeros(1)) == 1  # a step size of 0 keeps the state as it is
        assert_scan_equals_the_loop(1e-5, 19, 32, 0.99, dtype=torch.float32)
        assert mamba.compiled.cache_info().currsize == 3, "the scan ran uncompiled"
        torch._dynamo.utils.counters.clear()
        for l, decay in ((19, 0.5), (19, 1e-10), (8, 0.5), (67, 0.9)):
            assert_scan_equals_the_loop(1e-5, l, 32, decay, dtype=torch.float32)
        assert not torch._dynamo.utils.counters["frames"]["ok"], "compiled again, for a length or a value"

def test_mamba_step_equals_forward():
    """The constant-memory step, token by token from its own state alone."""
    torch.manual_seed(0)
    model = shaken(Mamba(MambaConfig(vocab_size=20, n_layer=3, d_model=32, d_state=4)))
    idx, state = torch.randint(20, (3, 19)), None
    with torch.no_grad():
        want = model(idx)
        for t in range(19):
            logits, state = model.step(idx[:, t], state)
            assert_close(logits, want[:, t], 1e-5)

def test_scan_without_a_compiler_says_so_once_and_is_right(monkeypatch, capsys):
    """run, compiler_failed: whatever is called how often; but memory that runs out is no missing compiler."""
    def kernel(function, *tensors):
        if torch._dynamo.eval_frame._stance.stance == "default":
            raise error
        return function(*tensors)
    monkeypatch.setattr(mamba, "compiled", lambda function: lambda *tensors: kernel(function, *tensors))
    torch.compiler.set_stance("default")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(error)):
            selective_scan(*scan_arguments(40, 6, 0.5))
    error = OSError(28, "No space left on device\nand so on")
    assert_scan_equals_the_loop(1e-12, 40, 6, 0.5)
    said = r"failed under torch.compile \(OSError: .*No space left on device.*\): trying uncompiled.*\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    with pytest.raises(KeyError):  # it is off already
        gpt.compiler_failed(KeyError())

# eval.py, on runs made by hand: their weights are random, or a Reader's answers are known ----------------
CURE = "teacherless + look-ahead + deep"
RECORD = dict(command="python train.py --seed 0", commit="abc1234+", torch="2.13", python="3.12",
              device="cpu", device_name="some CPU", threads=1, date="2026-01-01", resumed_at=[])
SETTINGS = train.settle(tiny(path_len=4, num_nodes=20, n_test=60, max_steps=9)) | dict(record=RECORD)

def fake_run(folder, **given):
    """A run's folder as of train.py, with random weights and a made-up log."""
    settings = SETTINGS | given
    torch.manual_seed(settings["seed"])
    _, model = evaluation.build(settings)
    lines = [dict(step=i, samples=8 * i, accuracy=i / 10, graphs="validation",
                  token_accuracy=[i / 10 + j / 100 for j in range(settings["path_len"])]) for i in (3, 6, 9)]
    state = dict(step=9, seconds=90.0, log=lines, settings=settings, model=model.state_dict())
    folder.mkdir(parents=True)
    torch.save(state, folder / "ckpt.pt")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder

@pytest.fixture
def run(tmp_path):
    return fake_run(tmp_path / "run")

class Reader(nn.Module):
    """A hand-made model that looks up edges in its prefix, with noise. `first`: how it finds the first node;
    "cheat", as the first-listed child; "plan", back from the goal; "recite", so too, and all of the path."""
    def __init__(self, task, first, scale=0):
        super().__init__()
        self.task, self.first, self.scale = task, first, scale
        self.noise = GPT(GPTConfig(task.vocab_size, task.seq_len - 1, 1, n_head=2, n_embd=16, short_conv=0))
        for p in self.noise.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, idx):
        p = self.task.prefix_len
        parents, children = idx[:, :p - 3:3], idx[:, 1:p - 3:3]
        look_up = lambda keys, values, x: values.gather(1, (keys[:, None] == x[:, :, None]).int().argmax(2))
        answer = look_up(parents, children, idx)
        answer[:, p - 1] = idx[:, p - 3]
        node = idx[:, p - 2:p - 1]
        for i in reversed(range(p, p + self.task.path_len - 1)):  # from the goal back to the start
            if i < idx.shape[1] and (self.first == "recite" or self.first == "plan" and i == p):
                answer[:, i:i + 1] = node
            node = look_up(children, parents, node)
        return 9.0 * F.one_hot(answer, self.task.vocab_size) + self.scale * self.noise(idx)

def test_evaluate_equals_a_slow_computation_in_plain_python():
    """Graph by graph; what the model generates is right in the same graphs; all batches have one shape."""
    n, found, choose = 12, [], random.Random(0)
    for i in range(60):
        deg, path_len = choose.randint(1, 5), choose.randint(2, 6)
        num_nodes = 1 + deg * (path_len - 1) + choose.choice([0, 1, 5, 40])
        task = PathStar(deg, path_len, num_nodes, choose.random() < 0.5)
        teacherless, size = choose.random() < 0.5, choose.randint(1, n + 2)
        torch.manual_seed(i)
        graphs, l = task.sample(n, random_stream(i)), task.target_len
        model = Reader(task, choose.choice(["cheat", "plan", "recite"]), choose.choice([1, 2, 3]))
        def answer(prefix, target):
            fed = prefix + (task.path_len - 1) * [task.dollar] if teacherless else prefix + target[:-1]
            with torch.no_grad():
                logits = model(torch.tensor([fed]))[0].tolist()[-l:]
            return logits, [max(range(len(row)), key=row.__getitem__) for row in logits]
        losses, right, hans, shapes = [], [], [], set()
        for prefix, target, arms in zip(*(x.tolist() for x in graphs)):
            logits, said = answer(prefix, target)
            losses += [math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(logits, target)]
            right.append([a == b for a, b in zip(said, target)])
            if task.deg > 1 and task.path_len > 3 and not task.reverse and not teacherless:
                wrong = [target[0], *arms[1]]
                hans.append([a == b for a, b in zip(answer(prefix, wrong)[1][2:], wrong[2:])])
        own = generate(model, task, graphs.prefix, teacherless)
        assert (own == graphs.target).all(1).tolist() == [*map(all, right)]
        model.register_forward_pre_hook(lambda _, args: shapes.add(args[0].shape))
        small = Graphs(*(x.to(torch.uint8) for x in graphs))  # as a drawn set is kept
        got = evaluation.evaluate(model, task, small, teacherless, size)
        want = dict(n_graphs=n, loss=sum(losses) / len(losses), accuracy=sum(map(all, right)) / n,
                    token_accuracy=[sum(column) / n for column in zip(*right)])
        if hans:
            want |= dict(clever_hans=sum(all(x[:-1]) for x in hans) / n,
                         follows=[sum(column) / n for column in zip(*hans)])
        assert got.keys() == want.keys() and shapes == {(min(n, size), task.seq_len - 1)}
        for name in want:
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), (task, name)
        found.append((want["accuracy"], want.get("clever_hans", 0)))
    assert all(sum(0 < x < 1 for x in column) >= 2 for column in zip(*found))  # some right, some wrong

@pytest.mark.parametrize("damage", ["cut", "anywhere", "directory", "attribute"])
def test_a_damaged_checkpoint_never_gives_other_numbers(run, damage):
    """load_model: an attribute makes an entry a folder, and its tensor what was in memory before."""
    ckpt, choose, want = run / "ckpt.pt", random.Random(0), evaluation.load_model(run)[1]
    whole, least = ckpt.read_bytes(), zipfile.ZipFile(ckpt).start_dir if damage == "directory" else 0
    positions = [choose.randrange(least, len(whole)) for _ in range(25)] + [least, len(whole) - 1]
    if damage == "attribute":
        positions = [match.start() + 38 for match in re.finditer(b"PK\1\2", whole)][::10]
    for at in positions:
        byte = whole[at] ^ (16 if damage == "attribute" else choose.randrange(1, 256))
        ckpt.write_bytes(whole[:at] + (b"" if damage == "cut" else bytes([byte]) + whole[at + 1:]))
        with contextlib.suppress(UserError):
            got = evaluation.load_model(run)[1]
            assert same(got, want) and got["settings"] == want["settings"] and got["seconds"] == 90

class Bomb:
    __reduce__ = lambda self: (os.mkdir, ("mark",))

def test_a_foreign_file_in_a_run_is_refused_by_name_and_runs_no_code(tmp_path, monkeypatch, run):
    """Also an older run's, without some of the settings of today."""
    monkeypatch.chdir(tmp_path)
    state = checkpoint(run)
    for spoilt, zipped in ((dict(model=Bomb()), True), (dict(model=Bomb()), False), (dict(seconds="1"), True),
                           (dict(model={"a": torch.zeros(1)}), True), (dict(settings={"seed": 0}), True)):
        torch.save(state | spoilt, run / "ckpt.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="ckpt.pt: cannot be read"):
            evaluation.load_model(run)
    assert not Path("mark").exists() and pickle.loads(pickle.dumps(Bomb())) is None and Path("mark").exists()
    for name in SETTINGS.keys() - {"resume"}:
        torch.save(state | dict(settings={k: v for k, v in SETTINGS.items() if k != name}), run / "ckpt.pt")
        with pytest.raises(UserError, match=f"ckpt.pt: cannot be read.*{name}"):
            evaluation.load_run(run)

@pytest.mark.parametrize("reverse", [False, True])
def test_a_row_tells_the_run_and_its_record(tmp_path, call, reverse):
    """--json, on the run's own test graphs."""
    run = fake_run(tmp_path / "run", reverse=reverse)
    row, (_, state, task, model) = json.loads(call("eval.py", run, "--json")[0]), evaluation.load_model(run)
    result = evaluation.evaluate(model, task, held_out(task, 60)[1], False)
    assert row == RECORD | result | dict(
        run=str(run), task="G(2,4), N = 20", model="gpt", objective="reverse" if reverse else "standard",
        seed=0, steps=9, samples=72, minutes=1.5, solved=False, note=None, table=False, paper=None,
        chance=0.5, n_graphs=60, settings={k: v for k, v in state["settings"].items() if k != "record"})

def test_show_and_layers_see_the_test_graphs_that_are_asked_for(tmp_path, call):
    """All of the run's, the first n_test of them, or those of a file; --layers ends where the model does."""
    run = fake_run(tmp_path / "run", path_len=2, num_nodes=12)
    _, _, task, model = evaluation.load_model(run)
    test, other, file = held_out(task, 60)[1], task.sample(5, random_stream(9)), tmp_path / "some.txt"
    data.save(file, task, other)
    for argv, graphs in (([], test), (["--n_test", 7], Graphs(*(x[:7] for x in test))),
                         (["--test_file", file, "--n_test", 3], Graphs(*(x[:3] for x in other)))):
        lines = call("eval.py", run, "--show", 100, "--layers", *argv)
        shown = [re.split("  +(?:model: )?", line) for line in lines if "model: " in line]
        assert sorted(text for _, text, _ in shown) == sorted(task.decode(*x) for x in zip(*graphs[:2]))
        assert all((text.split("=")[1] == said) == (label == "right") for label, text, said in shown)
        tokens = [line.split("% ")[1] for line in lines if line.startswith("layer")]
        want = evaluation.evaluate(model, task, graphs, False)["token_accuracy"]
        assert len(tokens) == 2 and tokens[1] == " ".join(map(evaluation.percent, want))

def rows_file(folder, *rows):
    row = dict(task="G(2,5), N = 50", model="gpt", objective="standard", accuracy=0.5, seed=0, device="cpu",
               command="train", minutes=3.0, table=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row | given) + "\n" for given in rows))
    return folder / "rows.jsonl"

def test_kept_rows_give_the_readmes_table(tmp_path, call):
    """Those with table = true, seeds together, the paper's beside its own objective, nothing rounded up."""
    file = rows_file(tmp_path, {}, dict(accuracy=0.506, minutes=9.0), dict(accuracy=0.9, table=False),
                     dict(model="mamba", accuracy=0.29, device="cuda", minutes=0.44),
                     dict(objective=CURE, accuracy=0.99999), dict(objective=CURE, accuracy=1, device="cuda"),
                     dict(task="G(3,5), N = 50", model="mamba", objective="reverse", accuracy=1))
    assert call("eval.py", file)[2:] == [
        "|G(2,5)|standard|50.3 (50.0-50.6)|50|2|6.0 cpu|29.0|49|1|0.4 cuda|",
        f"|G(2,5)|{CURE}|99.9 (99.9-100.0)|-|2|3.0 cpu, 3.0 cuda|-|-|0|-|",
        "|G(3,5)|reverse|-|-|0|-|100.0|-|1|3.0 cpu|"]
    root = Path(__file__).parent
    if not (root / "assets" / "runs.jsonl").exists():
        pytest.skip("assets/runs.jsonl is not there")
    table = call("eval.py", root / "assets" / "runs.jsonl")
    assert table[2:] == [line for line in (root / "README.md").read_text().splitlines() if line[:3] == "|G("]

def test_rows_that_were_kept_stand_for_the_runs(tmp_path, monkeypatch, call, run):
    """What needs a run's folder is refused; a bad file is named, and the others are in the table."""
    rows, bad = tmp_path / "rows.jsonl", tmp_path / "bad.jsonl"
    rows.write_text(call("eval.py", run, "--json")[0] + "\n")
    assert call("eval.py", rows, "--json") == call("eval.py", run, "--json")
    for flag in ("--n_test=5", "--show=1", "--layers", "--plot=x.png", "--device=cpu", "--no-compile"):
        assert "need a run's folder" in call("eval.py", rows, flag, refused=True)[1]
    for text, word in (("", ""), ("[1]", ""), ("{}", "table"), ('{"table": 1}', "task"), ("{}\n{", "line 2")):
        bad.write_text(text)
        out, error = call("eval.py", run, bad, rows, refused=True)
        assert "bad.jsonl" in error and word in error and out.splitlines() == 2 * call("eval.py", run)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: bytearray(2**62))
    assert "smaller --n_test" in call("eval.py", run, refused=True)[1]

def test_figures_show_every_cell_and_node(tmp_path, monkeypatch, capfd):
    """--bars: the paper's beside its own objective only, nothing rounded up, what is not drawn is said.
    --plot: of one run its nodes from start to goal, also of a reversed path; each graph has its chance."""
    figure, axes = pytest.importorskip("matplotlib.figure").Figure, []
    monkeypatch.setattr(figure, "savefig", lambda figure, *_, **__: axes.append(figure.axes))
    rows = rows_file(tmp_path, dict(accuracy=0.5), dict(accuracy=0.52), dict(objective=CURE, accuracy=0.9996),
                     dict(objective="other"), dict(task="G(10,5), N = 50", objective="reverse", accuracy=1))
    evaluation.main([str(rows), "--bars", "x.png"])
    (ax,) = axes.pop()  # there is no panel for a model without rows
    assert [round(bar.get_height(), 3) for bar in ax.patches] == [51, 50, 99.96, 100, 100]
    assert [x.get_text() for x in ax.texts] == ["51", "50", "99.9", "100", "100"]
    assert "other" in capfd.readouterr().err
    runs = [str(fake_run(tmp_path / str(deg), deg=deg, reverse=deg == 3)) for deg in (2, 3)]
    evaluation.main([runs[1], "--plot", "x.png"])
    evaluation.main([*runs, "--plot", "x.png"])
    one, both = ([line.get_label() for line in x.lines] for (x,) in axes)
    assert one == ["start", "node 1", "node 2", "goal", "whole path", "chance, 1/3"]
    assert both == [*runs, "chance, 1/2", "chance, 1/3"]
    assert axes[0][0].lines[0].get_ydata()[0] == pytest.approx(33)

# train.py ------------------------------------------------------------------------------------------------
@BOTH_MODELS
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("ahead, teacherless", [(0, False), (0.5, True)])
def test_loss_equals_a_plain_loop(model, deep, ahead, teacherless):
    """Over pairs of positions, by the map of their distance; deep: over models cut off at each layer."""
    run = new_run(model=model, deep=deep, ahead=ahead, teacherless=teacherless)
    shaken(run.model)
    (prefix, target), s, layers = run.batches(0), run.settings, list(run.model.layers())
    l, d, answers, later = run.task.target_len, s["n_embd"], [], []
    for depth in (1, 2) if deep else (2,):
        cut = copy.copy(run.model)
        cut.layers = lambda: layers[:depth]
        x = cut.features(inputs(run.task, prefix, target, teacherless))[:, -l:]
        answers.append(F.cross_entropy(cut.head(x).transpose(1, 2), target))
        for i, j in ((i, j) for i in range(l) for j in range(i + 1, l) if ahead):
            mapped = x[:, i] @ run.maps.weight[(j - i - 1) * d:(j - i) * d].T
            later.append(F.cross_entropy(cut.head(mapped), target[:, j]))
    want = torch.stack(answers).mean(), ahead * torch.stack(later or answers).mean()
    got = train.loss(run.model, run.maps, run.task, prefix, target, s)
    torch.testing.assert_close(got, want)
    parameters = [*run.model.parameters(), *run.maps.parameters()]
    for a, b in zip(*(torch.autograd.grad(sum(x), parameters) for x in (got, want))):
        assert_close(a, b, 1e-4)
    before = [p.clone() for p in run.maps.parameters()]
    run.iterate(prefix, target)
    assert len(before) == bool(ahead) and not any(map(torch.equal, before, run.maps.parameters()))

@pytest.mark.parametrize("average, warmup, decay", [(0, 0, 0), (0.5, 1, 1), (0.9, 5, 0.5)])
def test_the_average_and_the_rate_equal_a_plain_loop(average, warmup, decay):
    """b = min(average, 1 - 1/step); the average is what is measured and saved as "model"."""
    run, want = new_run(average=average, warmup=warmup, decay=decay, muon_lr=0.02), None
    for step in range(1, 16):
        run.train_step()
        b, t = min(average, 1 - 1 / step), step / max(1, warmup)
        rates = [float(o.param_groups[0]["lr"]) for o in run.optimizers]
        assert rates == pytest.approx([rate * min(t, t ** -decay) for rate in (0.02, 0.01)])
        weights = [p.detach().double() for p in run.model.parameters()]
        want = [b * a + (1 - b) * w for a, w in zip(want or weights, weights)]
        for got, a, weight in zip(run.average.parameters(), want, run.model.parameters(), strict=True):
            assert_close(got, a, 1e-5)
            assert torch.equal(got, weight) == (b == 0)
    state, line = run.state_dict(), run.evaluate(run.validation, "validation")
    assert same(state["model"], run.average.state_dict()) and same(state["weights"], run.model.state_dict())
    a, b = (evaluation.evaluate(x, TASK, run.validation, False)["loss"] for x in (run.average, run.model))
    assert a in line.values() and (average == 0 or b not in line.values())

@pytest.mark.parametrize("accuracies, stop_at, steps", [
    ([0.5, 0.9, 0.4, 0.9, 0.9, 1], 0.9, 5), ([1, 0.8, 1, 0.8, 1, 0.8], 0.9, 6), ([1, 1, 1, 1, 1, 1], 0, 6)])
def test_a_run_stops_after_two_good_evaluations_in_a_row(tmp_path, monkeypatch, accuracies, stop_at, steps):
    """By validation graphs alone; the test set is read once, at the end, and no checkpoint knows of it."""
    def evaluate(model, task, graphs, teacherless):
        seen.append(edge_sets(graphs))
        accuracy = [*accuracies, 0.123][len(seen) - 1 if len(graphs.prefix) != 32 else -1]
        return dict(n_graphs=len(graphs.prefix), loss=1.0, accuracy=accuracy, token_accuracy=[accuracy] * 3)
    seen, sets = [], [edge_sets(graphs) for graphs in held_out(TASK, 32)]
    monkeypatch.setattr(train, "evaluate", evaluate)
    state = trained(tmp_path / "run", eval_every=1, max_steps=6, stop_at=stop_at)
    *validation, test = log(tmp_path / "run")
    assert state["step"] == steps and [line["accuracy"] for line in validation] == accuracies[:steps]
    assert {line["graphs"] for line in validation} == {"validation"} and state["log"] == validation
    assert (test["graphs"], test["accuracy"]) == ("test", 0.123) and seen == steps * [sets[0]] + [sets[1]]

@pytest.mark.parametrize("given", [dict(), dict(num_nodes=5), dict(num_nodes=5, n_train=0), dict(n_train=0)])
def test_no_graph_that_is_held_out_is_trained_on(given):
    """Also where there are but 60 graphs: then fresh ones are all the others."""
    run = new_run(**given)
    seen = set().union(*(edge_sets(run.batches(step)) for step in range(60)))
    validation, test = edge_sets(run.validation), edge_sets(run.test)
    assert validation and test and not validation & test and not (validation | test) & seen
    assert len(given) < 2 or len(seen) == 60 - 6 - 6

def test_graphs_of_a_training_file_that_are_held_out_are_left_out(tmp_path):
    """--train_file: the same promise, also for the edges in another order and for the other goal."""
    (tmp_path / "train").write_text("\n".join(OFFICIAL) + "\n")
    other_goal = OFFICIAL[1].replace("/49,7=49,9,24,13,7", "/49,28=49,17,12,22,28")
    (tmp_path / "test").write_text(OFFICIAL[0].replace("32,3|16,12", "16,12|32,3") + f"\n{other_goal}\n")
    given = dict(train_file=tmp_path / "train", test_file=tmp_path / "test", path_len=5, num_nodes=50)
    run = new_run(batch_size=4, **given)
    graphs, test = edge_sets(run.batches(0)), edge_sets(run.test)
    assert len(graphs) == 4 and len(test) == 2 and not graphs & test
    with pytest.raises(UserError, match="batch_size 5.* 4 "):
        new_run(batch_size=5, **given)

@BOTH_MODELS
@pytest.mark.parametrize("teacherless", [False, True])
def test_overfits_one_batch(model, teacherless):
    """The loss, the gradients and both optimisers: the answers to eight graphs are learnt by heart."""
    run = new_run(model=model, teacherless=teacherless, n_train=8)
    for _ in range(60):
        run.train_step()
    prefix, target = run.batches(0)
    result = evaluation.evaluate(run.model, run.task, Graphs(prefix, target, target), teacherless)
    assert result["accuracy"] == 1 and result["loss"] < 0.1

def interrupt(monkeypatch, folder, step, act=lambda run: signal.raise_signal(signal.SIGINT), **given):
    """A run in whose step something happens -> its exit code."""
    def train_step(run, original=train.Run.train_step):
        original(run)
        if run.step == step:
            act(run)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train.Run, "train_step", train_step)
        trained(folder, **given)
    return stop.value.code

@pytest.mark.parametrize("given", [dict(model="gpt", optimizer="adamw", max_steps=20),
    dict(model="mamba", teacherless=True, n_train=0, ahead=1.0, deep=True)], ids=["gpt", "mamba"])
def test_resume_is_exact(tmp_path, monkeypatch, given):
    """Stopped in mid-interval and resumed, a run ends with the same bits: weights, optimisers, log."""
    whole, folder, spoilt = trained(tmp_path / "whole", **given), tmp_path / "again", tmp_path / "spoilt"
    step = whole["step"] // 2 + 1
    assert interrupt(monkeypatch, folder, step, **given) == 130 and checkpoint(folder)["step"] == step
    shutil.copytree(folder, spoilt)
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # as a crash between two files leaves it
    train.main(["--resume", f"--out_dir={folder}"])
    assert same(checkpoint(folder), whole) and same(log(folder), log(tmp_path / "whole"))
    # the control: the same weights with optimisers that forgot must not come out the same
    state = checkpoint(spoilt)
    for moments in (x for optimizer in state["optimizers"] for x in optimizer["state"].values()):
        for value in moments.values():
            value.zero_()
    torch.save(state, spoilt / "ckpt.pt")
    train.main(["--resume", f"--out_dir={spoilt}"])
    assert not same(checkpoint(spoilt)["model"], whole["model"])

GOLDEN = {"gpt": [2.4536, 2.4061, 2.3038, 2.2623, 2.1658, 2.1713, 2.1040, 2.0739, 2.0054, 2.0096],
          "mamba": [2.4458, 2.3630, 2.3352, 2.3248, 2.2288, 2.2616, 2.1315, 2.1024, 1.9089, 1.9295]}

@BOTH_MODELS
def test_the_first_ten_losses_are_the_same_however_often_it_is_measured(tmp_path, model):
    """The values they had when this was written, the same bits in every run, and others with another seed."""
    given = dict(model=model, teacherless=model == "mamba", max_steps=10, muon_lr=0.01)
    a, other, rare = (trained(tmp_path / f"{seed}-{n}", seed=seed, eval_every=n, **given)
                      for seed, n in ((0, 1), (1, 1), (0, 10)))
    losses = [line["loss"] for line in a["log"]]
    assert losses == pytest.approx(GOLDEN[model], rel=1e-3)
    assert same(a["weights"], rare["weights"]) and rare["log"][0]["loss"] == pytest.approx(sum(losses) / 10)
    assert all(line["loss"] not in losses for line in other["log"])

@pytest.mark.parametrize("step, number", [(8, None), (6, signal.SIGTERM)])
def test_a_weight_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capfd, step, number):
    """One line with the step, exit code 1, the checkpoint before it kept, whatever made the run save."""
    def act(run):
        next(run.model.parameters()).data.fill_(math.nan)
        number and signal.raise_signal(number)
    assert interrupt(monkeypatch, tmp_path / "run", step, act) == 1
    error, state = capfd.readouterr().err, checkpoint(tmp_path / "run")
    assert f"step {step}" in error and error.count("\n") == 1
    assert state["step"] == 4 and all(p.isfinite().all() for p in state["model"].values())

@pytest.mark.parametrize("place, name", [(torch.Tensor, "backward"), (train, "evaluate")])
def test_a_compiler_that_fails_late_costs_no_step(tmp_path, monkeypatch, capfd, place, name):
    """With gradients there already, or in an evaluation: one line, and on it goes to the same end."""
    want, calls, original = trained(tmp_path / "want"), [], getattr(place, name)
    def fails(*arguments):
        calls.append(torch._dynamo.eval_frame._stance.stance)
        result = original(*arguments)
        if len(calls) == 2:
            raise RuntimeError("the cache is full")
        return result
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)  # nothing is, for speed
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null/no")
    monkeypatch.setattr(place, name, fails)
    got, error = trained(tmp_path / "run", compile=True), capfd.readouterr().err
    assert re.fullmatch(".*/dev/null/no: .*default\n.*the cache is full.*uncompiled.*\n", error), error
    assert same(got, want) and calls[0] == "default" and calls[-1] == "force_eager"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ

def test_settings_are_the_presets_unless_a_flag_is_given():
    """The presets' rules; what has no effect is refused; a folder is named after what changes a result."""
    flags = lambda line: train.parse(line.split())[1]
    settle = lambda line: train.settle(flags(line))
    for line, want in {
        "--deg 10": dict(optimizer="muon", mimetic=False), "--teacherless --reverse": dict(n_layer=8),
        **dict.fromkeys(("--reverse --deg 10", "--teacherless --deg 10", "--teacherless --plain",
            "--teacherless --ahead 0 --no-deep"), dict(optimizer="adamw", lr=3e-3, decay=0.0,
            batch_size=64, n_embd=64, mimetic=True)), "--model mamba --teacherless --plain": dict(lr=0.01),
        "--reverse --deg 20": dict(n_layer=3, batch_size=64), "--model mamba --reverse": dict(n_layer=6),
        "--model mamba --teacherless": dict(lr=0.02, muon_lr=0.02, n_layer=6, ahead=1, deep=False),
        "--model mamba --teacherless --deg 3": dict(d_state=64, deep=True, max_steps=10_000),
        "--ahead 1": dict(max_steps=10_000, optimizer="muon"), "--model mamba": dict(lr=0.01, max_steps=2000),
        "--preset paper --teacherless": dict(ahead=0, deep=False, n_layer=12, n_embd=384, average=0),
        "--preset paper --n_layer 2": dict(n_layer=2, n_embd=384), "--path_len 20": dict(n_layer=23),
        **{x: dict(batch_size=256) for x in ("--path_len 11", "--deg 16", "--model mamba --deg 8")}}.items():
        assert settle(line).items() >= want.items(), line
    for line in ("--n_head 2 --model mamba", "--mimetic --model mamba", "--d_state 4", "--plain",
                 "--plain --ahead 1", "--plain --teacherless --deep", "--plain --teacherless --ahead 1",
                 "--muon_lr 0.1 --reverse", "--n_train 5 --train_file x", "--n_test 5 --test_file x"):
        with pytest.raises(UserError, match=line.split()[0]):
            settle(line)
    name = lambda line: train.default_folder(flags(line), settle(line))
    lines = (",--model mamba,--reverse,--teacherless,--teacherless --plain,--teacherless --no-deep,--deg 3,"
             "--teacherless --ahead 0.5,--path_len 4,--num_nodes 60,--lr 0.1,--seed 1").split(",")
    assert len(set(map(name, lines))) == len(lines) and name("").parent == Path("out")
    assert name("--teacherless --plain") == name("--teacherless --ahead 0 --no-deep")
    assert name("") == name("--max_steps 5 --device cpu --stop_at 0.5 --no-compile --eval_every 9")

def test_objectives_have_honest_names_and_only_the_papers_own_have_its_figure():
    """Those of train.py's flags: --teacherless alone is the cure, with --plain it is the paper's."""
    for line, ahead, deep, name, paper in (
            ("", 0, False, "standard", 0.49), ("--reverse", 0, False, "reverse", 0.97),
            ("--teacherless --plain", 0, False, "teacherless", 0), ("--teacherless", 1, True, CURE, None),
            ("--teacherless --ahead 0", 0, True, "teacherless + deep", None),
            ("--teacherless --no-deep", 1, False, "teacherless + look-ahead", None),
            ("--reverse --deep", 0, True, "reverse + deep", None),
            ("--ahead 1", 1, False, "standard + look-ahead", None)):
        settings = train.settle(train.parse(line.split())[1])
        assert (settings["ahead"], settings["deep"], evaluation.objective(settings)) == (ahead, deep, name)
        assert evaluation.paper_accuracy("mamba", "G(2,20), N = 50", name) == paper

@pytest.mark.parametrize("left", [[], ["ckpt.pt.tmp"]])
def test_an_empty_folder_is_filled_in_place(tmp_path, left):
    """--out_dir: a mount point, a link, a folder with a mode of its own; and what a killed start has left."""
    (tmp_path / "real").mkdir()
    (folder := tmp_path / "link").symlink_to("real")
    os.chmod(folder, 0o2770)
    for name in left:
        (folder / name).write_text("half")
    before, _ = folder.stat(), trained(folder, max_steps=1)
    assert folder.is_symlink() and {path.name for path in folder.iterdir()} == FILES
    assert (folder.stat().st_ino, folder.stat().st_mode) == (before.st_ino, before.st_mode)

def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch, call):
    """What was made for the run goes, what was there stays; a folder with something else is refused."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes" / "config.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for flags in (dict(num_nodes=4), dict(n_head=5), dict(test_file="notes"), dict(device="abacus")):
        for out in ({}, *(dict(out_dir=name) for name in ("notes", "empty", "a/new/one", "b/" + 300 * "c"))):
            error = call("train.py", *command(**flags | out), refused=True)[1]
            assert ("holds" in error) == ("notes" in out.values())
            assert sorted(tmp_path.rglob("*")) == before, (flags, out)
    assert (tmp_path / "notes" / "config.json").read_text() == "mine"

def test_a_disk_that_refuses_ends_the_run_in_one_line(tmp_path, monkeypatch, call):
    """What stays is the last checkpoint, and no half-written file."""
    def fill(run):
        original(run)
        if run.step == 6:  # files may grow to a size far below a checkpoint's
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    folder, original, resource = tmp_path / "run", train.Run.train_step, pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(train.Run, "train_step", fill)
    try:
        assert str(folder) in call("train.py", *command(out_dir=folder), refused=True)[1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in folder.iterdir()} == FILES
    assert evaluation.load_model(folder)[1]["step"] == 4

@pytest.mark.parametrize("name", sorted(FILES))
def test_a_resumed_run_killed_between_its_files_goes_on(tmp_path, monkeypatch, name):
    """What a file still says of the time before does no harm: a limit that the resume has raised stays so."""
    folder = tmp_path / "run"
    trained(folder, max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        killed = lambda path: sys.exit() if path.name == name else data.whole_file(path)
        patch.setattr(train, "whole_file", killed)
        train.main(["--resume", f"--out_dir={folder}", "--max_steps=8"])
    train.main(["--resume", f"--out_dir={folder}"] + ["--max_steps=8"] * (name == "ckpt.pt"))
    assert checkpoint(folder)["step"] == log(folder)[-1]["step"] == 8

@pytest.mark.parametrize("flag", ["train_file", "test_file"])
def test_a_file_of_graphs_is_known_by_its_content(tmp_path, monkeypatch, call, flag):
    """Moved: the flag names it anew, from any folder; changed between stop and resume: one line."""
    monkeypatch.chdir(tmp_path)
    file, run, resume = tmp_path / "graphs.txt", tmp_path / "run", ["--resume", f"--out_dir={tmp_path}/run"]
    data.save(file, TASK, TASK.sample(64, random_stream(1)))
    whole = trained(tmp_path / "whole", **{flag: "graphs.txt"})
    interrupt(monkeypatch, run, 6, **{flag: "graphs.txt"})
    monkeypatch.chdir("/")
    moved = file.rename(tmp_path / "moved.txt")
    assert "graphs.txt" in call("train.py", *resume, refused=True)[1]
    data.save(file, TASK, TASK.sample(64, random_stream(2)))
    assert f"--{flag}" in call("train.py", *resume, refused=True)[1]
    assert flag == "train_file" or "--test_file" in call("eval.py", run, refused=True)[1]
    train.main([*resume, f"--{flag}={moved}"])
    assert same(checkpoint(run), whole) and same(log(run), log(tmp_path / "whole"))
    assert json.loads(call("eval.py", run, "--json")[0])["accuracy"] == log(run)[-1]["accuracy"]

def test_a_run_can_be_resumed_again_and_from_a_thread(tmp_path, call):
    """As in a notebook: folder and signal handlers are free; flags are checked against the run."""
    handlers = lambda: [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    before, folder, given = handlers(), tmp_path / "run", dict(model="mamba", d_state=8)
    trained(folder, max_steps=4, **given)
    resume = lambda *flags: train.main(["--resume", f"--out_dir={folder}", *flags])
    thread = threading.Thread(target=resume, args=["--max_steps=8"])
    thread.start(), thread.join()
    for steps in (2, 12):
        resume(f"--max_steps={steps}", "--d_state=8", "--n_layer=2", "--model=mamba", "--no-deep")
        assert checkpoint(folder)["step"] == max(8, steps) == log(folder)[-1]["step"] and handlers() == before
    assert same(checkpoint(folder), trained(tmp_path / "whole", max_steps=12, **given))
    for flag, words in (("--d_state=32", "d_state 32.* 8"), ("--seed=7", "seed 7.* 0"),
                        ("--deep", "deep.*False"), ("--model=gpt", "gpt.*mamba"), ("--test_file=x", "None")):
        assert re.search(words, call("train.py", "--resume", f"--out_dir={folder}", flag, refused=True)[1])

# The command lines ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("line, words", [
    ("data.py --num_nodes 8", "num_nodes 8.*9"), ("data.py --write run", "run.*(exists|already)"),
    ("model.py --layers 3", "layers"), ("mamba.py 3", "3"), ("train.py --teacherles", "teacherles"),
    ("train.py --model rnn", "rnn.*gpt.*mamba"), ("train.py --num_nodes 8", "num_nodes 8.*9"),
    ("train.py --n_head 3", "n_head 3.*64"), ("train.py --batch_size 65 --n_train 64", "65.*64"),
    ("train.py --lr nan", "lr.*nan"), ("train.py --plain", "--plain"), ("train.py --test_file run", "run"),
    ("train.py --n_train 0 --out_dir run", "run.*--resume"), ("train.py --resume", "out/"),
    ("train.py --n_train 0 --out_dir run/config.json/deeper", "run/config.json/deeper"),
    ("train.py --resume --out_dir nowhere", "nowhere"), ("eval.py run --n_test 61", "--n_test 61.*60"),
    ("train.py --resume --out_dir damaged", "damaged/ckpt.pt"), ("eval.py damaged", "damaged/ckpt.pt"),
    ("eval.py", "RUN"), ("eval.py nowhere", "nowhere"), ("eval.py run --plot no/x.png", "plot"),
    ("eval.py run --device abacus", "abacus.*cpu"), ("eval.py run --test_file missing", "test_file.*missing"),
    ("eval.py run --test_file run/config.json", "config.json, line 1")])
def test_a_mistake_ends_in_one_line(tmp_path, monkeypatch, call, run, line, words):
    """Exit code 2, one line on stderr that names what is wrong, not a file touched."""
    whole = (shutil.copytree(run, tmp_path / "damaged") / "ckpt.pt").read_bytes()
    middle = len(whole) // 2  # in the weights: only a checksum can tell
    (tmp_path / "damaged" / "ckpt.pt").write_bytes(whole[:middle] + b"damaged" + whole[middle + 7:])
    files = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    before, (script, *argv) = files(), line.split()
    monkeypatch.chdir(tmp_path)
    assert re.search(words, call(script, *argv, refused=True)[1])
    assert files() == before

# script -> what it calls next, and the flags with a value; of these those that take 0, or a name
NEXT = {"train.py": (train.Run, "state_dict"), "data.py": (data, "draw"), "eval.py": (evaluation, "measure")}
VALUED = {"train.py": re.findall(r"^  --(\w+) [A-Z{]", train.parse([])[0].format_help(), re.M),
          "data.py": ["deg", "path_len", "num_nodes", "seed", "n", "write"],
          "eval.py": ["show", "test_file", "n_test", "plot", "bars", "device"]}
ZERO = set("ahead n_train short_conv lr muon_lr weight_decay warmup decay average stop_at seed".split())
NAME = {"out_dir", "write", "plot", "bars"}

@pytest.mark.parametrize("script, flag", [(script, flag) for script in VALUED for flag in VALUED[script]])
def test_every_flag_takes_a_value_or_refuses_it_by_name(tmp_path, monkeypatch, call, run, script, flag):
    """-1, 0, 1e99, a letter, nothing: as the lists above say, or one line, and nothing is written."""
    def taken(*_, **__):
        raise ZeroDivisionError
    monkeypatch.chdir(tmp_path)
    given = dict(model="mamba") if flag in ("d_state", "a_scale") else {flag: "x"} if "file" in flag else {}
    own = {"train.py": command(**given), "data.py": ["--n=3"], "eval.py": [run]}[script]
    before = sorted(tmp_path.rglob("*"))
    for value in ("-1", "0", "1e99", "x", ""):
        if value and flag in NAME or value == "0" and flag in ZERO:
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(*NEXT[script], taken)
                call(script, *own, f"--{flag}={value}")
        else:
            assert f"--{flag}" in call(script, *own, f"--{flag}={value}", refused=True)[1], value
    assert sorted(tmp_path.rglob("*")) == before

# The whole program ---------------------------------------------------------------------------------------
def test_the_scripts_run_one_after_the_other(tmp_path, monkeypatch, call):
    """data.py shows and writes graphs, train.py trains and is tested on them, eval.py measures the same."""
    monkeypatch.chdir(tmp_path)
    assert any(line.startswith("official text") for line in call("data.py", "--deg", 3, "--path_len", 4))
    call("data.py", "--write", "test.txt", "--n", 40, "--path_len", 3, "--num_nodes", 7)
    *_, found, then = call("train.py", *command(test_file="test.txt", dtype="bfloat16"))
    (run,) = (tmp_path / "out").iterdir()  # the folder's default name
    assert "40 unseen graphs" in found and then == f"python eval.py out/{run.name}"
    line, record = log(run)[-1], json.loads((run / "config.json").read_text())["record"]
    (row,), layers = (call("eval.py", run, flag) for flag in ("--json", "--layers"))
    assert json.loads(row).items() >= (record | dict(loss=line["unseen_loss"], n_graphs=40)).items()
    assert layers[-1].endswith("tokens % " + " ".join(map(evaluation.percent, line["token_accuracy"])))
    assert record.keys() >= RECORD.keys() and record["command"].startswith("python train.py --preset=paper ")
    assert record["torch"] == torch.__version__

def start(folder, script, *argv, **streams):
    """A script in a process of its own, in `folder`."""
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | streams
    return subprocess.Popen([sys.executable, Path(__file__).with_name(script), *argv], cwd=folder, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"), **streams)

@pytest.mark.parametrize("number, streams", [
    (signal.SIGINT, "read"), (signal.SIGHUP, "gone"), pytest.param(signal.SIGUSR1, "closed", marks=slow)])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, monkeypatch, call, number, streams):
    """Whether anybody reads it or not; and while it runs nobody else may write into its folder."""
    closed = dict(preexec_fn=lambda: (os.close(1), os.close(2))) if streams == "closed" else {}
    folder, argv = tmp_path / "a run", ["--resume", "--out_dir", "a run"]
    process = start(tmp_path, "train.py", *command(max_steps=10**6, out_dir="a run"), **closed)
    try:
        if streams == "gone":
            process.stdout.close(), process.stderr.close()
        while not (folder / "log.jsonl").exists() or not log(folder):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        assert "another process" in call("train.py", "--resume", f"--out_dir={folder}", refused=True)[1]
        process.send_signal(number)
        said = process.communicate(timeout=60)[0] if streams == "read" else process.wait(60)
    finally:
        process.kill()
    step = checkpoint(folder)["step"]
    assert process.returncode == 128 + number and step > 0
    if streams == "read":
        assert f"saved at step {step:,}" in said
        assert shlex.split(said.split("to go on: ")[1]) == ["python", "train.py", *argv]
    monkeypatch.chdir(tmp_path)
    train.main([*argv, f"--max_steps={step + 3}"])
    assert checkpoint(folder)["step"] == step + 3

@pytest.mark.parametrize("script, stream", [("data.py", "pipe"), ("train.py", "/dev/full"),
                                            pytest.param("train.py", "pipe", marks=slow)])
def test_output_that_nobody_takes_changes_nothing(tmp_path, script, stream):
    """`| head`, a full disk under the log: a run goes on to its end, and its exit code is 0."""
    read, write = os.pipe() if stream == "pipe" else (os.open(stream, 0), os.open(stream, os.O_WRONLY))
    os.close(read)
    process = start(tmp_path, script, *(command(out_dir="run") if script == "train.py" else []), stdout=write)
    os.close(write)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
    assert script == "data.py" or log(tmp_path / "run")[-1]["graphs"] == "test"

@slow
def test_the_claim_on_a_small_graph(tmp_path):
    """Standard training (Muon: AdamW starts late) learns the cheat, stays at 1/d; the cure finds paths."""
    given = dict(preset="quick", path_len=4, num_nodes=10, n_layer=4, n_train=0, n_test=1000, batch_size=64,
                 optimizer="adamw", lr=3e-3, average=0.99, eval_every=100, warmup=100, max_steps=1000)
    trained(tmp_path / "standard", **given | dict(optimizer="muon", muon_lr=0.01, max_steps=700))
    trained(tmp_path / "cure", stop_at=0.993, teacherless=True, **given | dict(ahead=1.0, deep=True))
    standard, cure = (log(tmp_path / name)[-1] for name in ("standard", "cure"))
    assert abs(standard["accuracy"] - 0.5) < 0.06 and standard["clever_hans"] > 0.9
    assert [x > 0.99 for x in standard["token_accuracy"]] == [1, 0, 1, 1] and cure["accuracy"] > 0.9

@slow
@BOTH_MODELS
def test_a_compiled_run_is_an_uncompiled_one(tmp_path, capfd, model):
    """train.py's default against --no-compile: every loss of 24 steps, and the weights."""
    with compiling():
        given = dict(model=model, teacherless=True, ahead=1.0, deep=True, max_steps=24, eval_every=1)
        want, got = (trained(tmp_path / str(x), compile=x, **given) for x in (False, True))
    assert not capfd.readouterr().err
    assert [x["loss"] for x in got["log"]] == pytest.approx([x["loss"] for x in want["log"]], rel=2e-3)
    for name in want["model"]:
        assert_close(got["model"][name], want["model"][name], 0.1)
    assert not same(got["model"], want["model"]), "nothing was compiled"
