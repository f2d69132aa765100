"""The tests: pytest test_repro.py. About a minute on two CPU cores; no GPU, no downloads."""
import copy
import errno
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
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
import train
from data import (Batches, Graphs, PathStar, UserError, inputs, random_stream, sample_test_set,
                  sample_train_set)
from mamba import Mamba, MambaConfig, selective_scan, selective_scan_ref
from model import GPT, GPTConfig, generate

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)
slow = pytest.mark.slow  # left out by -m "not slow"; there is no pytest.ini to declare it in

torch.set_num_threads(1)  # sums in one order, so that equal means equal to the bit

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
TINY = dict(preset="paper", deg=2, path_len=3, num_nodes=10, n_layer=2, n_embd=32, batch_size=8,
            n_train=64, n_test=32, max_steps=12, eval_every=4, warmup=5, cooldown=4, stop_at=0,
            optimizer="muon", lr=1e-2, weight_decay=0.0, device="cpu", dtype="float32", compile=False)
BOTH_MODELS = pytest.mark.parametrize("model", ["gpt", "mamba"])
BOTH_MODES = pytest.mark.parametrize("teacherless", [False, True], ids=["standard", "teacherless"])


@pytest.fixture(autouse=True)
def put_back():
    """A run leaves signal handlers and the scan's compiler switch behind; no test may see another's."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mamba.Kernel.enabled = False
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def tiny(model="gpt", **given):
    """The flags of a run that takes a second."""
    own = dict(n_head=4, short_conv=4) if model == "gpt" else dict(d_state=16, a_scale=1.0)
    return TINY | own | dict(model=model) | given


def new_run(**given):
    return train.Run(train.settle(tiny(**dict(max_steps=1000, cooldown=0) | given)))


def new_model(model, **given):
    torch.manual_seed(0)
    return evaluation.build(train.settle(tiny(model, **given)))[1]


def command(**given):
    """Settings -> the command line that asks for them."""
    switch = {True: "--{}", False: "--no-{}"}
    return [switch[x].format(name) if isinstance(x, bool) else f"--{name}={x}"
            for name, x in tiny(**given).items() if x is not False or name == "compile"]


def checkpoint(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def trained(folder, **given):
    """Run train.py in this process -> its last checkpoint."""
    train.main(command(out_dir=folder, **given))
    return checkpoint(folder)


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


# -----------------------------------------------------------------------------------------------------------
# data.py


def edges_of(prefix):
    return list(zip(prefix[:-3:3], prefix[1:-3:3]))


def edge_sets(graphs):
    return {frozenset(edges_of(prefix)) for prefix in graphs.prefix.tolist()}


def assert_path_star(task, prefix, target):
    """Check every property of one graph, from its tokens alone, in plain Python."""
    assert len(prefix) == task.prefix_len == 3 * task.num_edges + 3 and len(target) == task.path_len
    assert prefix[2:-3:3] == [task.bar] * (task.num_edges - 1) + [task.slash] and prefix[-1] == task.equals
    edges, (start, goal) = edges_of(prefix), prefix[-3:-1]
    nodes, parent = {v for edge in edges for v in edge}, {v: u for u, v in edges}
    assert len(nodes) == 1 + task.num_edges and min(nodes) >= 0 and max(nodes) < task.num_nodes
    assert len(parent) == task.num_edges and start not in parent
    leaves = nodes - set(parent.values())
    assert len(leaves) == task.deg and goal in leaves
    for leaf in leaves:
        path = [leaf]
        while path[-1] != start:
            path.append(parent[path[-1]])
        assert len(path) == task.path_len
        assert leaf != goal or target == (path if task.reverse else path[::-1])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("deg, path_len, num_nodes",
                         [(2, 5, 50), (1, 2, 2), (5, 5, 21), (3, 2, 300), (20, 5, 100), (2, 20, 50)])
def test_every_sampled_graph_is_a_path_star(tmp_path, deg, path_len, num_nodes, reverse):
    """The sampler: separators, distinct labels, d arms of l - 1 nodes, the path; and a file holds it all."""
    task = PathStar(deg, path_len, num_nodes, reverse)
    graphs = task.sample(50, random_stream(7))
    assert [x.shape for x in graphs] == [(50, task.prefix_len), (50, path_len), (50, deg, path_len - 1)]
    assert all(x.dtype == torch.long for x in graphs)
    assert task.vocab_size == num_nodes + 4 and task.seq_len == task.prefix_len + path_len
    data.save(tmp_path / "text", task, graphs)
    again = data.load(tmp_path / "text", task)
    assert torch.equal(again.prefix, graphs.prefix) and torch.equal(again.target, graphs.target)
    for prefix, target, arms, read in zip(*(x.tolist() for x in graphs), again.arms.tolist()):
        assert_path_star(task, prefix, target)
        path = target[::-1] if reverse else target
        assert arms[0] == path[1:] == read[0] and sorted(arms) == sorted(read)
        assert set(edges_of(prefix)) == {edge for arm in arms for edge in zip([path[0], *arm], arm)}


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
    """encode, decode, load, save: the authors' text, there and back."""
    task, official = PathStar(2, 5, 50, reverse), tmp_path / "official"
    for line in OFFICIAL:
        prefix, target = task.encode(line)
        assert_path_star(task, prefix.tolist(), target.tolist())
        assert task.decode(prefix, target) == line
    official.write_text("\n".join(OFFICIAL) + "\n")
    data.save(tmp_path / "again", task, data.load(official, task))
    assert official.read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("old, new", [
    (OFFICIAL[0], ""), (OFFICIAL[0], "a graph"), ("16,12", "16"), ("16,12|", ""), ("=32", "= 32"),
    ("=32", "=32,32"), ("32,3|", "32,03|"), ("|", ";"), ("6,16,12", "6,16,12é"), ("47,28", "47,50"),
    ("47,28", "47,12"), ("47,28", "3,28"), ("47,28", "47,32"), ("/32,12", "/32,28"), ("/32,12", "/34,12"),
    ("=32,34,6", "=32,6,34"),
    ("=32,34,6,16,12", "=32,3,19,47,28"), ("=32,34,6,16,12", "=12,16,6,34,32")])
def test_a_malformed_line_is_refused_with_file_and_line_number(tmp_path, old, new):
    """load: text that is not a graph of the task never becomes training data."""
    bad = OFFICIAL[0].replace(old, new)
    assert bad != OFFICIAL[0]
    (tmp_path / "text").write_text("\n".join([*OFFICIAL[1:3], bad, OFFICIAL[4]]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{tmp_path / 'text'}, line 3: "):
        data.load(tmp_path / "text", PathStar(2, 5, 50))


@pytest.mark.parametrize("impossible, works", [((0, 5, 50), (1, 5, 50)), ((2, 1, 50), (2, 2, 50)),
                                               ((2, 5, 8), (2, 5, 9)), ((20, 5, 50), (20, 5, 81))])
def test_impossible_graphs_are_refused_with_the_least_that_works(impossible, works):
    """PathStar: the official generator loops for ever here."""
    wrong, right = next((a, b) for a, b in zip(impossible, works) if a != b)
    with pytest.raises(ValueError, match=rf"\b{wrong}\b.*\b{right}\b"):
        PathStar(*impossible)
    for prefix, target, _ in zip(*(x.tolist() for x in PathStar(*works).sample(5, random_stream(0)))):
        assert_path_star(PathStar(*works), prefix, target)


def test_training_and_test_graphs_are_disjoint_and_seeded():
    """sample_train_set: no test graph in it, even where there are but 60 graphs; seeds draw their own."""
    tiny = PathStar(2, 3, 5)  # 5! labellings, two to a graph
    test = sample_test_set(tiny, 20)
    drawn = edge_sets(sample_train_set(tiny, 2000, 0, test))
    assert not edge_sets(test) & drawn and len(edge_sets(test) | drawn) == 60
    with pytest.raises(UserError):  # every graph is in the test set
        sample_train_set(tiny, 10, 0, sample_test_set(tiny, 2000))
    task = PathStar(2, 5, 50)
    test = sample_test_set(task, 100)
    a, b, other = (sample_train_set(task, 100, seed, test) for seed in (0, 0, 1))
    assert same(a, b) and not edge_sets(a) & edge_sets(other) and same(test, sample_test_set(task, 100))


def test_graphs_of_a_training_file_that_are_test_graphs_are_left_out(tmp_path):
    """--train_file: the same promise, also for the edges in another order and for the other goal."""
    (tmp_path / "train").write_text("\n".join(OFFICIAL) + "\n")
    other_order = OFFICIAL[0].replace("32,3|16,12", "16,12|32,3")
    other_goal = OFFICIAL[1].replace("/49,7=49,9,24,13,7", "/49,28=49,17,12,22,28")
    (tmp_path / "test").write_text(f"{other_order}\n{other_goal}\n")
    settings = train.settle(dict(train_file=tmp_path / "train", test_file=tmp_path / "test", batch_size=4))
    train_graphs, test_graphs = train.load_graphs(PathStar(2, 5, 50), settings)
    assert len(train_graphs.prefix) == 4 and len(test_graphs.prefix) == 2
    assert not edge_sets(train_graphs) & edge_sets(test_graphs)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "fresh"])
def test_batches_depend_on_seed_and_step_alone(fixed):
    """Batches: any order of calls, any object; an epoch of a fixed set holds every graph once."""
    task = PathStar(2, 5, 50)
    graphs = task.sample(64, random_stream(3)) if fixed else None
    a, b, other = (Batches(task, 8, seed, "cpu", graphs) for seed in (5, 5, 6))
    forwards, backwards = [a(step) for step in range(20)], [b(step) for step in reversed(range(20))][::-1]
    assert same(forwards, backwards) and same(a(4), forwards[4]) and not same(other(4), forwards[4])
    rows = torch.cat([prefix for prefix, _ in forwards[:16]])
    assert len(rows.unique(dim=0)) == (64 if fixed else 128)
    if fixed:
        assert same(rows[:64].unique(dim=0), graphs.prefix.unique(dim=0)) and not same(rows[:64], rows[64:])


def test_inputs_hide_the_target_from_a_teacherless_model():
    """inputs(): teacherless, another target gives the same input; standard, the target shifted by one."""
    task = PathStar(2, 5, 50)
    prefix, target, _ = task.sample(6, random_stream(0))
    fed = inputs(task, prefix, target, True)
    assert fed.shape == (6, task.seq_len - 1) and torch.equal(fed, inputs(task, prefix, target.flip(0), True))
    assert (fed[:, task.prefix_len:] == task.dollar).all() and torch.equal(fed[:, :task.prefix_len], prefix)
    assert torch.equal(inputs(task, prefix, target, False), torch.cat([prefix, target], 1)[:, :-1])


# -----------------------------------------------------------------------------------------------------------
# mamba.py


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


@pytest.mark.parametrize("decay", [0.99, 0.5, 1e-10])
@pytest.mark.parametrize("l", [1, 2, 3, 5, 31, 32, 33, 67])
def test_scan_equals_the_loop_with_every_gradient(l, decay):
    """selective_scan: both sides of every chunk border, any decay; its gradient is written by hand."""
    fp64, fp32 = torch.float64, torch.float32
    for d, dtype, tolerance in ((6, fp64, 1e-12), (32, fp64, 1e-12), (32, fp32, 1e-5)):
        want = with_gradients(selective_scan_ref, scan_arguments(l, d, decay))
        got = with_gradients(selective_scan, scan_arguments(l, d, decay, dtype))
        for name in want:
            assert got[name].dtype == dtype
            assert_close(got[name], want[name], tolerance)


@pytest.mark.parametrize("scale", [0, 1e-6, 1e2, 1e6])
def test_scan_stays_finite_at_any_step_size(scale):
    """cumsum and log-space forms of the scan overflow here."""
    arguments = scan_arguments(300, 6, 0.1, torch.float32, scale)
    got, want = (with_gradients(scan, arguments) for scan in (selective_scan, selective_scan_ref))
    for name in want:
        assert got[name].isfinite().all()
        assert_close(got[name], want[name], 1e-5)


def test_compiled_scan_equals_the_loop(monkeypatch):
    """What the compiler makes of the chunk functions, forwards and back, and their exponential."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2))
    except Exception as error:
        pytest.skip(f"torch.compile, which needs a C++ compiler on a CPU, fails: {type(error).__name__}")
    monkeypatch.setitem(mamba.CHUNK, "cpu", 4)  # compiles faster
    mamba.Kernel.enabled = True
    for decay in (0.99, 0.5, 1e-10):
        want = with_gradients(selective_scan_ref, scan_arguments(10, 32, decay))
        got = with_gradients(selective_scan, scan_arguments(10, 32, decay, torch.float32))
        assert mamba.Kernel.enabled, "the scan fell back to eager"
        for name in want:
            assert_close(got[name], want[name], 1e-5)
    for least in (-200, -0.01):
        x = torch.linspace(least, 0, 100_001)
        got, want = torch.compile(mamba.exp)(x), torch.exp(x.double())
        assert got[-1] == 1  # a step size of 0 keeps the state as it is
        assert (got - want).abs().max() < 2e-7
    assert (got - want).mean().abs() < 1e-8  # what the slowest decays share adds up over the steps


def test_mamba_initialisation_of_the_finished_model():
    """Part of the method: no sweep over the whole model may overwrite it."""
    torch.manual_seed(0)
    for layer in Mamba(MambaConfig(vocab_size=54, n_layer=4, d_model=64, d_state=16)).backbone.layers:
        m, dt = layer.mixer, F.softplus(layer.mixer.dt_proj.bias).detach()
        assert m.dt_rank == 4 and torch.equal(m.A_log, torch.arange(1, 17).float().log().expand(128, 16))
        assert torch.equal(m.D, torch.ones(128))
        assert 0.999e-3 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 0.1001
        assert abs(dt.log().mean() - math.log(1e-2)) < 0.5  # log-uniform
        assert 0.9 * 4 ** -0.5 < m.dt_proj.weight.abs().max() <= 4 ** -0.5
        bound = 128 ** -0.5 / 4 ** 0.5  # PyTorch's own, rescaled by 1/sqrt(n_layer)
        assert 0.95 * bound < m.out_proj.weight.abs().max() <= 1.0001 * bound
    scaled = Mamba(MambaConfig(vocab_size=9, n_layer=1, d_model=8, d_state=4, a_scale=0.01))
    rates = scaled.backbone.layers[0].mixer.A_log.exp()
    assert_close(rates, torch.tensor([0.01, 0.02, 0.03, 0.04]).expand(16, 4), 1e-6)


def test_mamba_has_the_names_and_shapes_of_the_reference():
    """Weights move 1:1 between this file and state-spaces/mamba (its lm_head is the embedding)."""
    state, layer = Mamba(MambaConfig(vocab_size=54, n_layer=1, d_model=64)).state_dict(), "backbone.layers.0."
    assert {name: tuple(p.shape) for name, p in state.items()} == {
        "backbone.embedding.weight": (54, 64), layer + "norm.weight": (64,),
        layer + "mixer.in_proj.weight": (256, 64),
        layer + "mixer.conv1d.weight": (128, 1, 4), layer + "mixer.conv1d.bias": (128,),
        layer + "mixer.x_proj.weight": (36, 128), layer + "mixer.dt_proj.weight": (128, 4),
        layer + "mixer.dt_proj.bias": (128,), layer + "mixer.A_log": (128, 16), layer + "mixer.D": (128,),
        layer + "mixer.out_proj.weight": (64, 128), "backbone.norm_f.weight": (64,)}


def shaken(model):
    """Every parameter moved at random, so that none is at a value (0, 1) which hides a mistake."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g)
    return model.eval()


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


# -----------------------------------------------------------------------------------------------------------
# model.py, and both models


def published_gpt(model, idx):
    """GPT-2 in fp64 with an explicit softmax, and the short convolution of q, k, v."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])
    linear = lambda x, name: x @ w[name + ".weight"].T + w[name + ".bias"]
    gelu = lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
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
        x = x + linear(gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize("model, config, published", [
    (GPT, GPTConfig(20, block_size=37, n_layer=2, n_head=4, n_embd=32, short_conv=0), published_gpt),
    (GPT, GPTConfig(20, block_size=37, n_layer=2, n_head=4, n_embd=32, short_conv=4), published_gpt),
    (Mamba, MambaConfig(20, n_layer=2, d_model=32, d_state=4), published_mamba)], ids=["gpt", "conv", "ssm"])
def test_models_equal_the_published_formulas(model, config, published):
    """Blocks, norms, positions, tied head: against implementations that share no line with the scripts."""
    torch.manual_seed(0)
    model = shaken(model(config))
    for t in (19, 37):  # attention takes another way from 33 on
        idx = torch.randint(20, (3, t))
        with torch.no_grad():
            assert_close(model(idx), published(model, idx), 1e-5)


def test_gpt_has_the_names_and_initialisation_of_gpt2():
    """Names, and the scaled c_proj: the official code scales a name that does not exist."""
    torch.manual_seed(0)
    weights = GPT(GPTConfig(54, block_size=40, n_layer=4, n_head=4, n_embd=64, short_conv=0)).state_dict()
    layer = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    modules = ["ln_f", *(f"h.{i}.{name}" for i in range(4) for name in layer)]
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert set(weights) == {"wte.weight", "wpe.weight"} | names
    for name, p in weights.items():
        if p.ndim == 2:
            std = 0.02 / math.sqrt(2 * 4) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std() / std - 1) < 0.06, name
        else:
            assert (p == float(name.endswith("weight"))).all(), name


@BOTH_MODES
@pytest.mark.parametrize("model, given",
                         [("gpt", dict(short_conv=0)), ("gpt", dict(short_conv=4)), ("mamba", {})])
def test_no_token_reaches_an_output_before_it(model, given, teacherless):
    """Attention, scan and convolutions: change token t, and the outputs before t stay, that at t moves."""
    task = PathStar(2, 5, 50)
    net = shaken(new_model(model, path_len=5, num_nodes=50, **given))
    prefix, target, _ = task.sample(2, random_stream(0))
    fed = inputs(task, prefix, target, teacherless)
    with torch.no_grad():
        before = net(fed)
        for t in range(fed.shape[1]):
            changed = fed.clone()
            changed[:, t] = (changed[:, t] + 1) % task.vocab_size
            after = net(changed)
            assert torch.allclose(after[:, :t], before[:, :t], atol=1e-6)
            assert (after[:, t] - before[:, t]).abs().max() > 1e-4


# -----------------------------------------------------------------------------------------------------------
# eval.py


class Reader(nn.Module):
    """A hand-made model that looks up the edges in its prefix. `first` says how it finds the first arm node:
    "cheat", the first-listed child of the start; "plan", back from the goal; "recite", so too, and then it
    writes that path to its end, whatever it is fed."""

    def __init__(self, task, first):
        super().__init__()
        self.task, self.first, self.unused = task, first, nn.Parameter(torch.zeros(()))

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
        return 9.0 * F.one_hot(answer, self.task.vocab_size)


@pytest.mark.parametrize("deg", [2, 5])
def test_clever_hans_tells_cheaters_from_planners(deg):
    """Models whose answers are known: a cheater is at 1/d and follows every wrong arm to its end."""
    task = PathStar(deg, 5, 50)
    graphs, chance = task.sample(1000, random_stream(0)), pytest.approx(1 / deg, abs=0.06)
    for first, accuracy, clever_hans in (("cheat", chance, 1), ("plan", 1, 1), ("recite", 1, 0)):
        result = evaluation.evaluate(Reader(task, first), task, graphs, False)
        assert result["accuracy"] == accuracy and result["clever_hans"] == clever_hans
        assert result["token_accuracy"] == [1, result["accuracy"], 1, 1, 1]


@BOTH_MODES
@pytest.mark.parametrize("model", ["gpt", "mamba", "cheat"])
def test_one_pass_counts_the_same_answers_as_generation(model, teacherless):
    """A greedy path equals the target exactly when every argmax behind true tokens does: graph by graph."""
    if model == "cheat":
        task = PathStar(2, 5, 50)
        net, graphs = Reader(task, "recite" if teacherless else "cheat"), task.sample(300, random_stream(0))
    else:
        given = dict(num_nodes=6, batch_size=32, n_train=100, n_test=300)
        run = new_run(model=model, teacherless=teacherless, **given)
        for _ in range(50):  # enough for some right answers, not for all
            run.train_step()
        task, net, graphs = run.task, run.model, run.test
    answer, _ = evaluation.predict(net, task, graphs.prefix, graphs.target, teacherless, 128)
    right = (generate(net, task, graphs.prefix, teacherless) == graphs.target).all(1)
    assert torch.equal((answer == graphs.target).all(1), right)
    accuracy = evaluation.evaluate(net, task, graphs, teacherless)["accuracy"]
    assert accuracy == pytest.approx(right.float().mean().item())
    assert 0 < right.sum() < len(right) or (model, teacherless) == ("cheat", True)


# -----------------------------------------------------------------------------------------------------------
# train.py


@BOTH_MODELS
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_parameter_groups_are_disjoint_and_complete(model, optimizer):
    """"What has two dimensions decays" takes A_log and the embeddings along; Muon would too."""
    net = new_model(model)
    groups = train.parameter_groups(net)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    maps = ("c_attn", "c_proj", "c_fc") if model == "gpt" else ("in_proj", "x_proj", "dt_proj", "out_proj")
    assert set(groups["matrices"]) == {x for x in names if x.endswith("weight") and x.split(".")[-2] in maps}
    optimizers = train.make_optimizers(net, train.settle(tiny(optimizer=optimizer, weight_decay=0.5)))
    matrices, seen = {id(p) for p in groups["matrices"].values()}, []
    for opt in optimizers:
        for group in opt.param_groups:
            seen += map(id, group["params"])
            decayed = group["weight_decay"] == 0.5
            assert decayed or group["weight_decay"] == 0
            assert all((id(p) in matrices) == decayed for p in group["params"])
            assert isinstance(opt, torch.optim.Muon) == (decayed and optimizer == "muon")
    assert sorted(seen) == sorted(map(id, net.parameters()))


def test_muon_in_batches_is_torchs():
    """Tall, wide and square matrices, two of each and one alone, with weight decay and a rate that changes."""
    torch.manual_seed(0)
    start = [torch.randn(s) for s in ((24, 8), (8, 24), (24, 8), (8, 8), (8, 24), (8, 8), (5, 7))]
    moved = []
    for kind in (torch.optim.Muon, train.Muon):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = kind(params, weight_decay=0.1)
        for lr in (0.1, 0.2, 0.05):
            optimizer.param_groups[0]["lr"] = lr
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        moved.append([p.detach() - p_0 for p, p_0 in zip(params, start)])
    for want, got in zip(*moved):
        assert (want - got).norm() < 0.01 * want.norm()  # both compute in bfloat16


def test_rate_warms_up_stays_and_falls_to_zero_after_the_task_is_solved():
    """rate(): the schedule, by hand."""
    settings = dict(warmup=10, max_steps=100, cooldown=20)
    rate = lambda step, solved_at=None, **given: train.rate(step, settings | given, solved_at)
    half, quarter = 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)  # with these shares of the decay left
    assert [rate(step) for step in (0, 4, 9, 50, 80, 90, 100)] == pytest.approx([0.1, 0.5, 1, 1, 1, half, 0])
    assert [rate(step, 30) for step in (30, 40, 45, 50)] == pytest.approx([1, half, quarter, 0])
    assert [rate(step, 95) for step in (95, 100)] == pytest.approx([quarter, 0])  # never beyond max_steps
    assert [rate(99, cooldown=0), rate(60, 30, cooldown=0)] == [1, 1]
    assert [train.last_step(settings, solved_at) for solved_at in (None, 30, 95)] == [100, 50, 100]


def test_training_ends_after_the_cooldown_that_follows_the_solution(tmp_path, monkeypatch):
    """The decay starts when the training graphs are answered right, the run ends with it; or at stop_at."""
    monkeypatch.setattr(train, "CHECK_EVERY", 10)
    easy = dict(path_len=2, num_nodes=6, max_steps=400)
    state = trained(tmp_path / "cooled", **easy, cooldown=7, eval_every=1000)
    assert state["solved_at"] % 10 == 0 and state["step"] == state["solved_at"] + 7 < 400
    assert 0 < state["log"][-1]["lr"] < TINY["lr"] / 6  # one step before 0
    state = trained(tmp_path / "stopped", **easy, eval_every=2, stop_at=0.3)
    assert state["step"] < 400 and state["log"][-1]["accuracy"] >= 0.3 > state["log"][-2]["accuracy"]


def test_look_ahead_scores_each_later_node_by_the_map_of_its_distance():
    """Against a plain loop over pairs of positions; the maps learn, and are no part of the model."""
    run = new_run(teacherless=True, ahead=0.5)
    _, target = run.batches(0)
    l, d = run.task.target_len, run.settings["n_embd"]
    x = torch.randn(len(target), l, d)
    losses = [F.cross_entropy(run.model.head(x[:, i] @ run.ahead.weight[(j - i - 1) * d:(j - i) * d].T),
                              target[:, j]) for i in range(l) for j in range(i + 1, l)]
    torch.testing.assert_close(run.look_ahead(x, target), 0.5 * torch.stack(losses).mean())
    before = run.ahead.weight.clone()
    run.train_step()
    assert not torch.equal(run.ahead.weight, before)
    assert run.model.state_dict().keys() == new_run(teacherless=True).model.state_dict().keys()


@BOTH_MODELS
def test_deep_takes_both_losses_behind_every_layer(model):
    """Each layer's output is that of the model cut off there; the gradient is that of the mean."""
    run = new_run(model=model, teacherless=True, ahead=0.5, deep=True, num_nodes=6, batch_size=256, n_train=0)
    for _ in range(40):  # until some graphs are answered right
        run.train_step()
    run.optimizers = []  # nothing moves, the gradients stay
    run.hits.zero_()
    (prefix, target), l, total, hits = run.batches(run.step), run.task.target_len, 0, []
    for depth in range(1, TINY["n_layer"] + 1):
        cut = copy.copy(run.model)
        cut.layers = lambda: list(run.model.layers())[:depth]
        x = cut.features(inputs(run.task, prefix, target, True))[:, -l:]
        logits = run.model.head(x)
        total += F.cross_entropy(logits.transpose(1, 2), target) + run.look_ahead(x, target)
        hits.append((logits.argmax(-1) == target).all(1).sum())
    parameters = [*run.model.parameters(), *run.ahead.parameters()]
    want = torch.autograd.grad(total / TINY["n_layer"], parameters)
    run.train_step()
    for p, gradient in zip(parameters, want, strict=True):
        assert_close(p.grad, gradient, 1e-5)
    assert run.hits == hits[-1] != hits[0]


def test_the_look_ahead_is_of_teacherless_training_unless_asked_for():
    """The quick preset's standard and reverse cells are the paper's objective; --ahead brings it to them."""
    for given, ahead in ((dict(teacherless=True), 1), ({}, 0), (dict(reverse=True), 0), (dict(ahead=0.5), 0.5),
                         (dict(teacherless=True, ahead=0.0), 0), (dict(preset="paper", teacherless=True), 0)):
        assert train.settle(given)["ahead"] == ahead


@BOTH_MODELS
@BOTH_MODES
def test_overfits_one_batch(model, teacherless):
    """The loss, the gradients and both optimisers: the answers to eight graphs are learnt by heart."""
    run = new_run(model=model, teacherless=teacherless, n_train=8)
    graphs = Graphs(*(x.long() for x in run.batches.fixed))
    for _ in range(60):
        run.train_step()
    result = evaluation.evaluate(run.model, run.task, graphs, teacherless)
    assert result["accuracy"] == 1 and result["loss"] < 0.1


def interrupted(monkeypatch, folder, step, **given):
    """A run that gets SIGINT while it does a step."""
    with monkeypatch.context() as patch:
        def train_step(run, original=train.Run.train_step):
            original(run)
            if run.step == step:
                signal.raise_signal(signal.SIGINT)
        patch.setattr(train.Run, "train_step", train_step)
        with pytest.raises(SystemExit) as stop:
            trained(folder, **given)
    assert stop.value.code == 128 + signal.SIGINT and checkpoint(folder)["step"] == step


@pytest.mark.parametrize("given", [
    dict(model="gpt", optimizer="adamw", path_len=2, n_train=8, max_steps=40),
    dict(model="mamba", teacherless=True, n_train=0, ahead=1)], ids=["gpt-adamw-fixed", "mamba-muon-fresh"])
def test_resume_is_exact(tmp_path, monkeypatch, given):
    """Stopped in mid-interval and resumed, a run ends with the same bits: weights, optimisers, log."""
    whole = trained(tmp_path / "whole", **given)
    assert whole["hits"] > 0 or given["model"] == "mamba"  # or else the counter is not compared
    interrupted(monkeypatch, tmp_path / "cut", whole["step"] // 2 + 1, **given)
    for name in ("again", "spoilt"):  # copies, as a folder stays locked for as long as this process lives
        shutil.copytree(tmp_path / "cut", tmp_path / name)
    with open(tmp_path / "again" / "log.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # as a crash between the line and the checkpoint leaves it
    train.main(["--resume", f"--out_dir={tmp_path / 'again'}"])
    assert same(checkpoint(tmp_path / "again"), whole) and whole["step"] == tiny(**given)["max_steps"]
    lines = (tmp_path / "again" / "log.jsonl").read_text().splitlines()
    assert same([json.loads(line) for line in lines], whole["log"]) and len(lines) == whole["step"] / 4
    # the control: the same weights with optimisers that forgot, or another seed, must not come out the same
    state = checkpoint(tmp_path / "spoilt")
    for moments in (m for optimizer in state["optimizers"] for m in optimizer["state"].values()):
        for value in moments.values():
            value.zero_()
    torch.save(state, tmp_path / "spoilt" / "ckpt.pt")
    train.main(["--resume", f"--out_dir={tmp_path / 'spoilt'}"])
    assert not same(checkpoint(tmp_path / "spoilt")["model"], whole["model"])
    assert not same(trained(tmp_path / "other", seed=1, **given)["model"], whole["model"])


def test_evaluation_does_not_change_the_training(tmp_path):
    """However often it is measured, the model is the same."""
    weights = [trained(tmp_path / f"every{n}", eval_every=n)["model"] for n in (1, 5, 1000)]
    assert same(weights[0], weights[1]) and same(weights[0], weights[2])


GOLDEN = {"gpt": [2.6577, 2.6782, 2.6029, 2.6107, 2.5469, 2.5501, 2.4979, 2.4092, 2.3854, 2.3738],
          "mamba": [2.6537, 2.5927, 2.6359, 2.5922, 2.6021, 2.4849, 2.5064, 2.4515, 2.3655, 2.3092]}


@BOTH_MODELS
def test_the_first_ten_losses(tmp_path, model):
    """The same bits in every run, others with another seed; and the values they had when this was written."""
    given = dict(model=model, teacherless=model == "mamba", max_steps=10, eval_every=1, muon_lr=0.01)
    a, b, other = ([line["loss"] for line in trained(tmp_path / f"run{i}", seed=seed, **given)["log"]]
                   for i, seed in enumerate((0, 0, 1)))
    assert a == b and all(x != y for x, y in zip(a, other))
    assert a == pytest.approx(GOLDEN[model], rel=1e-3)


@pytest.mark.parametrize("step, message", [(6, "at step 7"), (8, "after step 8")])
def test_a_weight_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capfd, step, message):
    """One line with the step, exit code 1, the checkpoint before it kept; also where no loss shows it yet."""
    def train_step(run, original=train.Run.train_step):
        original(run)
        if run.step == step:
            next(run.model.parameters()).data.fill_(math.nan)
    monkeypatch.setattr(train.Run, "train_step", train_step)
    with pytest.raises(SystemExit) as stop:
        trained(tmp_path / "run")
    error = capfd.readouterr().err
    assert stop.value.code == 1 and message in error and error.count("\n") == 1
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 4 and all(p.isfinite().all() for p in state["model"].values())


# -----------------------------------------------------------------------------------------------------------
# The command lines.


def shell(folder, script, *argv):
    """Run a script in a process of its own, in `folder` -> its standard output."""
    done = subprocess.run([sys.executable, Path(__file__).with_name(script), *map(str, argv)], cwd=folder,
                          timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_run_one_after_the_other(tmp_path):
    """data.py shows and writes graphs, train.py trains and is tested on them, eval.py measures the same."""
    assert "official text" in shell(tmp_path, "data.py", "--deg", 3, "--path_len", 4)
    shell(tmp_path, "data.py", "--write", "test.txt", "--n", 40, "--path_len", 3, "--num_nodes", 10)
    assert len(data.load(tmp_path / "test.txt", PathStar(2, 3, 10)).prefix) == 40
    argv = [x for x in command(test_file="test.txt") if not x.startswith("--n_test")]
    assert "40 unseen graphs" in shell(tmp_path, "train.py", *argv)
    (run,) = (tmp_path / "out").iterdir()  # the folder's default name
    line = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    output = shell(tmp_path, "eval.py", run, "--json", "--show", 2, "--layers").splitlines()
    assert json.loads(output[0])["accuracy"] == line["accuracy"] and line["test_graphs"] == 40
    layers = [text.split(": ") for text in output if ": layer" in text]
    assert len(layers) == TINY["n_layer"] and layers[0][2] != layers[-1][2]
    assert layers[-1][2] == "tokens % " + " ".join(map(evaluation.percent, line["token_accuracy"]))
    assert sum(text.startswith(("right  ", "WRONG  ")) for text in output) == 2


MAIN = {"data.py": data.main, "train.py": train.main, "eval.py": evaluation.main}


def refusal(monkeypatch, capfd, script, *argv):
    """Run a script in this process; it must end with exit code 2 and one line on stderr -> stdout, stderr."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        MAIN[script]()
    output, error = capfd.readouterr()
    assert stop.value.code == 2 and error.startswith(f"{script}: error: ") and error.endswith("\n")
    assert error.count("\n") == 1, error
    return output, error


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=slow)])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, monkeypatch, capfd, number):
    """Ctrl-C or kill on a running train.py: exit code, a checkpoint, a command that goes on from it; and
    while it runs nobody else may write into its folder."""
    argv = [sys.executable, Path(__file__).with_name("train.py"), *command(max_steps=10**6, out_dir="run")]
    process = subprocess.Popen(argv, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while not (line := process.stdout.readline()).startswith("step"):
            assert line, process.stderr.read()
        _, error = refusal(monkeypatch, capfd, "train.py", "--resume", f"--out_dir={tmp_path / 'run'}")
        assert "another process" in error and process.poll() is None
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    step = checkpoint(tmp_path / "run")["step"]
    assert process.returncode == 128 + number and f"saved at step {step:,}" in output
    _, script, *argv = output.split("to go on: ")[1].split()
    shell(tmp_path, script, *argv, "--max_steps", step + 3)
    assert checkpoint(tmp_path / "run")["step"] == step + 3


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main(command(out_dir=folder, max_steps=1))
    return folder


@pytest.mark.parametrize("line, words", [
    ("data.py --num_nodes 8", "num_nodes 8.*9"), ("data.py --deg 0", "deg.*'0'.*1"),
    ("data.py --write run", "run.*exists"),
    ("train.py --model rnn", "rnn.*gpt.*mamba"), ("train.py --num_nodes 8", "num_nodes 8.*9"),
    ("train.py --n_head 3", "n_head 3.*64"), ("train.py --batch_size 65 --n_train 64", "65.*64"),
    ("train.py --lr nan", "lr.*nan"), ("train.py --model mamba --n_head 2", "n_head 2.*mamba"),
    ("train.py --test_file missing", "missing"), ("train.py --test_file run", "run"),
    ("train.py --device abacus", "abacus.*cpu"), ("train.py --teacherles", "teacherles"),
    ("train.py --n_train 0 --out_dir run", "run.*--resume"),
    ("train.py --n_train 0 --out_dir run/log.jsonl/deeper", "run/log.jsonl/deeper"),
    ("train.py --resume --out_dir nowhere", "nowhere"),
    ("train.py --resume --out_dir run --seed 7", "seed 7.*0"),
    ("train.py --resume --out_dir damaged", "damaged/ckpt.pt"),
    ("eval.py", "RUN"), ("eval.py nowhere", "nowhere"), ("eval.py damaged", "damaged/ckpt.pt"),
    ("eval.py run --show 0", "show.*'0'"),
    ("eval.py run --test_file run/config.json", "config.json, line 1")])
def test_a_mistake_ends_in_one_line(tmp_path, monkeypatch, capfd, a_run, line, words):
    """Exit code 2, one line on stderr that names what is wrong, nothing on stdout, not a file touched."""
    for name in ("run", "damaged"):
        shutil.copytree(a_run, tmp_path / name)
    whole = (tmp_path / "damaged" / "ckpt.pt").read_bytes()
    middle = len(whole) // 2  # in the weights: only a checksum can tell
    (tmp_path / "damaged" / "ckpt.pt").write_bytes(whole[:middle] + b"damaged" + whole[middle + 7:])
    files = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    before, (script, *argv) = files(), line.split()
    monkeypatch.chdir(tmp_path)
    output, error = refusal(monkeypatch, capfd, script, *argv)
    assert not output and re.search(words, error), error
    assert files() == before


# -----------------------------------------------------------------------------------------------------------
# A bad day: full disks, damaged files, senseless flags.


@pytest.mark.parametrize("fault, step", [("limit", 0), ("fsync", 0), ("replace", 0), ("rename", 0),
                                         ("limit", 6), ("fsync", 6), ("replace", 6), ("deleted", 6)])
def test_a_disk_that_refuses_ends_the_run_in_one_line(tmp_path, monkeypatch, capfd, fault, step):
    """No space at the start leaves nothing behind, later the last checkpoint and no half-written file."""
    folder, original = tmp_path / "run", train.Run.train_step

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def break_disk():
        if fault == "limit":  # on the size of a file, far below that of a checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        elif fault == "deleted":
            shutil.rmtree(folder)
        else:
            monkeypatch.setattr(os, fault, no_space)

    def train_step(run):
        original(run)
        if run.step == step:
            break_disk()

    monkeypatch.setattr(train.Run, "train_step", train_step)
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if step == 0:
            break_disk()
        _, error = refusal(monkeypatch, capfd, "train.py", *command(out_dir=folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(folder) in error and "cannot write" in error
    if step == 0 or fault == "deleted":
        assert not any(tmp_path.iterdir())
    else:
        assert {path.name for path in folder.iterdir()} == {"config.json", "ckpt.pt", "log.jsonl"}
        assert evaluation.load_model(folder)[1]["step"] == 4


def refused_or_equal(folder, want):
    """Reading a run with a damaged checkpoint: a UserError that names the file, or the very same content."""
    try:
        got = evaluation.load_model(folder)[1]
    except UserError as error:
        assert "ckpt.pt" in str(error)
    else:
        assert same(got, want) and all(got[name] == want[name] for name in ("seconds", "settings"))


@pytest.mark.parametrize("damage", ["cut", "anywhere", "directory", "attribute"])
def test_a_damaged_checkpoint_never_gives_other_numbers(tmp_path, a_run, damage):
    """load_model: cut off, a byte changed anywhere, in the zip archive's directory, or there the attribute
    that makes an entry a folder, for which PyTorch's reader leaves the memory of the tensor as it was."""
    folder, draw = shutil.copytree(a_run, tmp_path / "run"), random.Random(0)
    whole, want = (folder / "ckpt.pt").read_bytes(), evaluation.load_model(a_run)[1]
    with zipfile.ZipFile(folder / "ckpt.pt") as archive:
        begin = archive.start_dir
    attributes = [match.start() + 38 for match in re.finditer(b"PK\1\2", whole)]
    least = begin if damage == "directory" else 0
    positions = [draw.randrange(least, len(whole)) for _ in range(40)] + [least, len(whole) - 1]
    for at in attributes[::10] if damage == "attribute" else positions:
        flip = 16 if damage == "attribute" else draw.randrange(1, 256)
        rest = b"" if damage == "cut" else bytes([whole[at] ^ flip]) + whole[at + 1:]
        (folder / "ckpt.pt").write_bytes(whole[:at] + rest)
        refused_or_equal(folder, want)


@pytest.mark.parametrize("given", [dict(model="mamba"), dict(path_len=2), dict(seed=1)])
def test_the_checkpoint_of_another_run_is_refused(tmp_path, a_run, given):
    """load_run: another model, task or seed than config.json says."""
    folder = shutil.copytree(a_run, tmp_path / "run")
    trained(tmp_path / "other", max_steps=1, **given)
    shutil.copy(tmp_path / "other" / "ckpt.pt", folder)
    with pytest.raises(UserError, match="ckpt.pt: belongs to a run with other settings"):
        evaluation.load_run(folder)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("write", [
    torch.save, lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
    lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["zip", "legacy", "pickle"])
def test_a_checkpoint_runs_no_code(tmp_path, a_run, write):
    """load_run: a pickle is a program, and a run's folder may come from anywhere."""
    folder, mark = shutil.copytree(a_run, tmp_path / "run"), tmp_path / "mark"
    write(checkpoint(a_run) | dict(model=Bomb(mark)), folder / "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt"):
        evaluation.load_model(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the control


@pytest.mark.parametrize("content", ["", "{", "[]", "[1]", "null", "1", '"deg"', "\xff"])
def test_a_damaged_config_is_refused_by_name(tmp_path, a_run, content):
    """load_run: not JSON, or JSON that is not an object; the checkpoint beside it is not to blame."""
    folder = shutil.copytree(a_run, tmp_path / "run")
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="config.json: "):
        evaluation.load_run(folder)


def test_no_setting_may_be_missing_from_a_config(tmp_path, a_run):
    """load_run: refused, or put back; what reads the settings later must find every one."""
    folder = shutil.copytree(a_run, tmp_path / "run")
    whole = json.loads((folder / "config.json").read_text())
    for name in whole:
        (folder / "config.json").write_text(json.dumps({k: v for k, v in whole.items() if k != name}))
        try:
            assert evaluation.load_run(folder)[0].keys() == whole.keys(), name
        except UserError as error:
            assert "config.json" in str(error)


def test_a_log_whose_last_line_is_cut_off_is_read(tmp_path, a_run):
    """read_log: whatever part of the last line a crash has written, the lines before count."""
    line = (a_run / "log.jsonl").read_text()
    for length in range(len(line)):
        (tmp_path / "log.jsonl").write_text(line + line + line[:length])
        count = 2 if length < len(line) - 1 else 3  # all but the line's end
        assert evaluation.read_log(tmp_path) == count * [json.loads(line)]


def test_rows_that_were_kept_give_the_same_table(tmp_path, monkeypatch, capfd, a_run):
    """eval.py --json > rows.jsonl: the file stands for the run's folder; another file is refused."""
    evaluation.main([str(a_run), "--json"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text(capfd.readouterr().out)
    outputs = []
    for run in (a_run, rows):
        evaluation.main([str(run)])
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1] and str(a_run) in outputs[1]
    assert "need a run's folder" in refusal(monkeypatch, capfd, "eval.py", rows, "--n_test", 5)[1]
    for content in ("", "{", "[1]", "{}", rows.read_text().replace('"samples"', '"simples"')):
        rows.write_text(content)
        assert "rows.jsonl" in refusal(monkeypatch, capfd, "eval.py", rows)[1]


def test_a_run_is_compared_with_the_papers_figure_for_its_own_objective(tmp_path):
    """The look-ahead makes of teacher forcing another objective; no figure may count it as standard."""
    for given, name, paper in (({}, "standard", 0.5), (dict(ahead=1.0), "standard + look-ahead", None),
                               (dict(deep=True), "standard + deep", None),
                               (dict(ahead=1.0, teacherless=True), "teacherless", 1.0)):
        trained(tmp_path / name, path_len=5, max_steps=1, cooldown=0, **given)
        row = evaluation.measure(tmp_path / name, "cpu")
        assert (row["objective"], row["paper"]) == (name, paper)


# script -> the flags that take a value; and those of them that take 0, or any name
VALUED = {"train.py": [name for name, (_, options, _) in train.flags().items() if "action" not in options],
          "data.py": ["deg", "path_len", "num_nodes", "seed", "n", "write"],
          "eval.py": ["show", "test_file", "n_test", "plot", "bars", "device"]}
ZERO = {"ahead", "n_train", "short_conv", "lr", "muon_lr", "weight_decay", "warmup",
        "cooldown", "stop_at", "seed"}
NAME = {"out_dir", "write"}


@pytest.mark.parametrize("script", VALUED)
def test_help_is_printed_and_names_every_flag(monkeypatch, capsys, script):
    """A % in a help text once crashed it; and no flag with a value is missing from the list above."""
    monkeypatch.setattr(sys, "argv", [script, "-h"])
    with pytest.raises(SystemExit) as stop:
        MAIN[script]()
    output = capsys.readouterr().out
    valued = set(re.findall(r"^  --(\w+) [A-Z{]", output, re.M))
    assert stop.value.code == 0 and valued == set(VALUED[script])


@pytest.mark.parametrize("script, flag", [(script, flag) for script in VALUED for flag in VALUED[script]])
def test_every_flag_takes_a_value_or_refuses_it_by_name(tmp_path, monkeypatch, capfd, a_run, script, flag):
    """-1, 0, 1e99, a letter, nothing: as the lists above say, or one line, and nothing is written."""
    class Taken(Exception):
        pass

    def taken(*_):
        raise Taken

    monkeypatch.chdir(tmp_path)
    own = [x for x in command(model="mamba" if flag in ("d_state", "a_scale") else "gpt")
           if "file" not in flag or not x.startswith("--n_t")]
    for value in ("-1", "0", "1e99", "x", ""):
        argv = {"train.py": own, "data.py": ["--n=3"], "eval.py": [a_run]}[script] + [f"--{flag}={value}"]
        if value and flag in NAME or value == "0" and flag in ZERO:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [script, *argv])
                for module, name in ((train, "create_folder"), (data, "save"), (data, "draw")):  # comes next
                    patch.setattr(module, name, taken)
                with pytest.raises(Taken):
                    MAIN[script]()
        else:
            assert f"--{flag}" in refusal(monkeypatch, capfd, script, *argv)[1], value
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("max_steps", [2, 4, 7])
def test_resume_with_another_limit_can_be_repeated_and_evaluated(tmp_path, capfd, max_steps):
    """--resume --max_steps: below, at and above where the run stands; then 12, as if it had always been."""
    free = dict(cooldown=0, eval_every=1)
    trained(tmp_path / "0", max_steps=4, **free)
    for i, limit in enumerate((max_steps, max_steps, 12)):
        folder = shutil.copytree(tmp_path / str(i), tmp_path / str(i + 1))  # the old one stays locked
        train.main(["--resume", f"--max_steps={limit}", f"--out_dir={folder}"])
        settings, state = evaluation.load_run(folder)
        assert state["step"] == max(4, limit) and settings["max_steps"] == limit
        assert all(settings[k] == v for k, v in state["settings"].items() if k not in evaluation.FREE)
        capfd.readouterr()
        evaluation.main([str(folder), "--json"])
        row, last = json.loads(capfd.readouterr().out), evaluation.read_log(folder)[-1]
        assert row["step"] == last["step"] == state["step"] and row["accuracy"] == last["accuracy"]
    assert same(checkpoint(folder), trained(tmp_path / "whole", max_steps=12, **free))


# -----------------------------------------------------------------------------------------------------------
# Properties, on random tasks and on a trained model.


def random_tasks(n):
    """n tasks of all sizes, whether teacherless, and a source of randomness."""
    draw = random.Random(0)
    for _ in range(n):
        deg, path_len = draw.randint(1, 5), draw.randint(2, 6)
        num_nodes = 1 + deg * (path_len - 1) + draw.choice([0, 1, 5, 40])
        yield PathStar(deg, path_len, num_nodes, draw.random() < 0.5), draw.random() < 0.5, draw


def solve(task, prefix):
    """The answer, from the prefix alone: from the goal along the edges back to the start."""
    *edges, start, goal, _ = prefix
    parent, path = dict(zip(edges[1::3], edges[::3])), [goal]
    while path[-1] != start:
        path.append(parent[path[-1]])
    return path if task.reverse else path[::-1]


def test_any_task_can_be_solved_written_and_read_but_not_peeked_at():
    """On 60 random tasks: the answer is unique, text goes there and back, teacherless inputs hide it."""
    for i, (task, teacherless, _) in enumerate(random_tasks(60)):
        prefix, target, _ = task.sample(20, random_stream(i))
        assert [solve(task, p) for p in prefix.tolist()] == target.tolist()
        for p, t in zip(prefix, target):
            assert same(task.encode(task.decode(p, t)), (p, t))
        fed, other = (inputs(task, prefix, t, teacherless) for t in (target, target.roll(1, 1)))
        assert torch.equal(fed, other) == teacherless and torch.equal(fed[:, :task.prefix_len], prefix)


class Blend(nn.Module):
    """Logits that are partly right, partly random."""

    def __init__(self, task, first, noise):
        super().__init__()
        self.reader, self.scale = Reader(task, first), noise
        self.noise = shaken(GPT(GPTConfig(task.vocab_size, task.seq_len - 1, n_layer=1, n_embd=16)))

    def forward(self, idx):
        return self.reader(idx) + self.scale * self.noise(idx)


def test_evaluate_equals_a_slow_computation_in_plain_python():
    """On 100 random tasks and batch sizes: loss, exact match, tokens, Clever Hans, graph by graph."""
    n, found = 12, []
    for i, (task, teacherless, draw) in enumerate(random_tasks(100)):
        torch.manual_seed(i)
        graphs, l = task.sample(n, random_stream(i)), task.target_len
        model = Blend(task, draw.choice(["cheat", "plan", "recite"]), draw.choice([2, 3, 4]))

        def answer(prefix, target):
            fed = prefix + (task.path_len - 1) * [task.dollar] if teacherless else prefix + target[:-1]
            with torch.no_grad():
                logits = model(torch.tensor([fed]))[0].tolist()[-l:]
            return logits, [max(range(len(row)), key=row.__getitem__) for row in logits]

        losses, right, hans = [], [], []
        for prefix, target, arms in zip(*(x.tolist() for x in graphs)):
            logits, said = answer(prefix, target)
            losses += [math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(logits, target)]
            right.append([a == b for a, b in zip(said, target)])
            if task.deg > 1 and task.path_len > 3 and not task.reverse and not teacherless:
                wrong = [target[0], *arms[1]]
                hans.append([a == b for a, b in zip(answer(prefix, wrong)[1][2:], wrong[2:])])
        got = evaluation.evaluate(model, task, graphs, teacherless, draw.randint(1, n + 2))
        want = dict(test_graphs=n, loss=sum(losses) / len(losses), accuracy=sum(map(all, right)) / n,
                    token_accuracy=[sum(column) / n for column in zip(*right)])
        if hans:
            want |= dict(clever_hans=sum(all(x[:-1]) for x in hans) / n,
                         follows=[sum(column) / n for column in zip(*hans)])
        assert got.keys() == want.keys()
        for name in want:
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), (task, name)
        asked, first = [], Graphs(*(x[:10] for x in graphs))
        enough = lambda *counts: asked.append(counts) or counts[0] == 10
        part = evaluation.evaluate(model, task, graphs, teacherless, 5, enough)
        assert part == evaluation.evaluate(model, task, first, teacherless, 5)
        assert asked == [(k, k - sum(map(all, right[:k]))) for k in (5, 10)]
        found.append((want["accuracy"], want.get("clever_hans", 0)))
    assert all(sum(0 < x < 1 for x in column) >= 2 for column in zip(*found))  # some right, some wrong


@pytest.mark.parametrize("share_wrong, stop_at, max_steps, want", [
    (0, 0.99, 99, 2000), (0.01, 0.99, 99, 2000), (0.015, 0.99, 99, 500), (0.5, 0.99, 99, 500),
    (0, 0, 99, 500), (0.5, 0.99, 1, 2000)])
def test_the_whole_test_set_is_asked_where_a_run_may_be_solved_or_ends(
        monkeypatch, share_wrong, stop_at, max_steps, want):
    run = new_run(n_test=2000, stop_at=stop_at, max_steps=max_steps)

    def evaluate(model, task, graphs, teacherless, size, enough):
        seen = next((seen for seen in range(50, len(graphs.target), 50)
                     if enough(seen, int(share_wrong * seen))), len(graphs.target))
        return dict(test_graphs=seen, loss=1.0, accuracy=1 - share_wrong, token_accuracy=[])
    monkeypatch.setattr(train, "evaluate", evaluate)
    run.step = 1
    assert run.evaluate()["test_graphs"] == want


@pytest.fixture(scope="module")
def solved():
    """A tiny GPT that has learnt the easy task: the path written goal first."""
    run = new_run(reverse=True, num_nodes=8, batch_size=64, n_train=0, n_test=1000)
    for _ in range(300):
        run.train_step()
    return run


@slow
def test_a_trained_model_knows_nothing_but_its_prefix(solved):
    """No leak: given the prefixes of other graphs, with the true targets behind them, it is at chance."""
    measure = lambda graphs: evaluation.evaluate(solved.model, solved.task, graphs, False)
    assert measure(solved.test)["accuracy"] > 0.95
    shuffled = measure(Graphs(solved.test.prefix.roll(1, 0), *solved.test[1:]))
    # 8 nodes: the goal is a guess, 1/8; the path, 1/336, is as likely as a second graph that has it
    assert abs(shuffled["token_accuracy"][0] - 1 / 8) < 5 * (7 / 64 / 1000) ** 0.5
    assert shuffled["accuracy"] < 1 / 336 + 5 * (1 / 336 / 1000) ** 0.5


@slow
def test_precision_and_compiler_do_not_change_the_result(solved):
    """bfloat16: the loss within 10 %, accuracies within 1 %; compiled: logits and loss within 1e-4."""
    measure = lambda model: evaluation.evaluate(model, solved.task, solved.test, False)
    want = measure(solved.model)
    with torch.autocast("cpu", torch.bfloat16):
        got = measure(solved.model)
    assert got["loss"] != want["loss"] and got["loss"] == pytest.approx(want["loss"], rel=0.1)
    assert [got["accuracy"], *got["token_accuracy"]] == pytest.approx(
        [want["accuracy"], *want["token_accuracy"]], abs=0.01)
    if not train.compiler_works(torch.device("cpu")):
        pytest.skip("no compiler")
    model = copy.deepcopy(solved.model)
    for block in model.layers():
        block.compile(dynamic=False)
    idx = inputs(solved.task, *solved.test[:2], False)[:256]
    with torch.no_grad():
        assert_close(model(idx), solved.model(idx), 1e-4)
    assert measure(model)["loss"] == pytest.approx(want["loss"], rel=1e-4)


@slow
def test_scan_equals_the_loop_over_a_long_sequence_of_extremes():
    """4096 steps in fp64: delta from 1e-9 to 1e3, A from -1e-6 to -1e3, inputs of 1e4; every gradient."""
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.rand(shape, generator=g).double()
    spread = lambda least, most, *shape: 10 ** (least + (most - least) * random(*shape))
    normal = lambda *shape: torch.randn(shape, generator=g).double()
    arguments = [1e4 * normal(1, 4096, 16), spread(-9, 3, 1, 4096, 16), -spread(-6, 3, 16, 4),
                 normal(1, 4096, 4), normal(1, 4096, 4), normal(16)]
    arguments = [x.requires_grad_() for x in arguments]
    got, want = (with_gradients(scan, arguments) for scan in (selective_scan, selective_scan_ref))
    for name in want:
        assert got[name].isfinite().all()
        assert_close(got[name], want[name], 1e-9)


@BOTH_MODELS
def test_a_hundred_steps_repeat_to_the_bit(model):
    """Every loss; and with another seed every one is another."""
    losses = []
    for seed in (0, 0, 1):
        run = new_run(model=model, seed=seed, n_layer=1)
        for _ in range(100):
            run.train_step()
            losses.append(run.losses[(run.step - 1) % train.CHECK_EVERY].item())
    assert losses[:100] == losses[100:200] and all(a != b for a, b in zip(losses, losses[200:]))


@slow
def test_memory_does_not_grow(tmp_path, monkeypatch):
    """Steps, evaluations, saving: what 2,000 steps leave in memory is within 5 % of what 200 do."""
    statm, pages = Path("/proc/self/statm"), {}
    if not statm.exists():
        pytest.skip("no /proc here")

    def train_step(run, original=train.Run.train_step):
        original(run)
        pages[run.step] = int(statm.read_text().split()[1])

    monkeypatch.setattr(train.Run, "train_step", train_step)
    trained(tmp_path / "run", max_steps=2000, eval_every=20, n_layer=1, n_test=200, cooldown=0)
    assert abs(pages[2000] - pages[200]) < 0.05 * pages[200]


@slow
def test_scan_without_a_compiler_says_so_once_and_is_right(tmp_path):
    """CXX that is not there: one line on stderr, whatever is called how often, and the loop's result."""
    program = """
import test_repro as t
t.mamba.Kernel.enabled = True
for length in (40, 7):
    got, want = (t.with_gradients(f, t.scan_arguments(length, 6, 0.5))
                 for f in (t.selective_scan, t.selective_scan_ref))
    for name in want:
        t.assert_close(got[name], want[name], 1e-12)
print("right", t.mamba.Kernel.enabled)"""
    environment = os.environ | dict(CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, env=environment,
                          timeout=300, capture_output=True, text=True)
    assert done.stdout == "right False\n", done.stderr
    assert done.stderr.startswith("selective_scan: no working compiler") and done.stderr.count("\n") == 1
