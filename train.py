"""Train a GPT or a Mamba to find the path in a star graph, in one of three ways.

    python train.py --model mamba --teacherless     # the cure: finds the paths of G(2,5)
    python train.py --model mamba                   # standard training: stays at a coin flip, 1/d
    python train.py --teacherless --plain           # the paper's teacherless objective, nothing added
    python train.py --reverse --deg 5               # the path written goal first, on another graph

A run is a folder: config.json (its settings), ckpt.pt and log.jsonl (a JSON object an evaluation). Ctrl-C
saves; --resume goes on, on a CPU to the bit.
"""
import argparse
import contextlib
import copy
import datetime
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (TRAIN, Batches, Parser, UserError, draw, held_out, identities, inputs, number, run_script,
                  some_path, whole_file, without)
from eval import FREE, build, evaluate, load_file, load_run, objective, percent, pick_device
from model import compiler_failed, configure_optimizers


def preset(s):
    """What no flag says, by the graph, the model and the objective in the settings s (dict)."""
    if s["preset"] == "paper":  # GPT-Mini and its AdamW (sections 5 and B): an hour on a GPU
        return dict(n_layer=12, n_embd=384, n_head=6, short_conv=0, d_state=16, a_scale=1.0, ahead=0.0,
                    deep=False, batch_size=256, max_steps=390_500, optimizer="adamw", lr=5e-4,
                    weight_decay=0.01, warmup=100, average=0.0)
    cure, mamba = s["teacherless"] and not s["plain"], s["model"] == "mamba"
    many, long = s["num_nodes"] > 64, s["path_len"] > 10
    return dict(
        ahead=1.0 if cure else 0.0,    # the two additions that make teacherless training work
        deep=cure,
        n_layer=s["path_len"] + 3,     # a look-up takes a layer, and a path path_len - 2 of them
        n_embd=128 if many else 64,    # room for the codes of all node values
        n_head=4,
        short_conv=4,                  # so that a GPT, too, sees an edge as a whole from the first step on
        d_state=64 if many else 32,    # a Mamba looks a node up by this many numbers
        a_scale=0.01,                  # slow decay: edges read early are still there when the goal comes
        batch_size=256 if many or long else 64,  # on the larger graphs 64 say too little of the next hop
        optimizer="muon" if mamba or long else "adamw",  # AdamW is slow on a Mamba and on many layers
        lr=1e-2 if mamba else 3e-3,    # the highest at which every graph was learnt
        weight_decay=0.0,              # 200,000 graphs are seen a few times at most
        warmup=100,
        average=0.995 if mamba else 0.99,  # over about the last 200 and 100 steps
        max_steps=10_000)


# -------------------------------------------------------------------------------------------------------
# The loss: what all of this is about.


def loss(model, maps, task, prefix, target, s):
    """The training loss of a batch: prefix (b, prefix_len), target (b, l), settings s -> two scalars, the
    cross-entropy of the answer and of what is added to it, in nats a token.

    With `s["ahead"]` 0 and `s["deep"]` False it is the paper's objective: next-token prediction (eq. 2), or
    with `s["teacherless"]` multi-token prediction from dummies (eq. 5).
    """
    cross_entropy = lambda x, y: F.cross_entropy(model.head(x).float().flatten(0, -2), y.flatten())

    # Standard training feeds the true path, so that each next node can be looked up from the one before it:
    # the Clever Hans cheat. Teacherless training feeds `$`: nothing but the prefix tells the path.
    fed = inputs(task, prefix, target, s["teacherless"])  # (b, seq_len - 1)

    # What the head reads at the answer's positions, (b, l, d). Deep: behind every layer, (n_layer, b, l, d),
    # or else the last layers learn the first look-ups, and then there is no layer left for the next one.
    x = model.features(fed, s["deep"], task.target_len)
    target = target.expand(x.shape[:-1])
    answer = cross_entropy(x, target)
    if not s["ahead"]:
        return answer, answer.new_zeros(())

    # Look-ahead: position i also predicts each node j > i, through a map for the distance j - i that is
    # thrown away after training (multi-token prediction, Gloeckle et al. 2024). The path is found by look-ups
    # from the goal backwards; what one finds must be kept for the next one where it is no answer yet.
    l = task.target_len
    i, j = torch.triu_indices(l, l, 1, device=x.device)  # all pairs i < j
    later = maps(x).unflatten(-1, (l - 1, -1))            # (..., l, distance - 1, d)
    return answer, s["ahead"] * cross_entropy(later[..., i, j - i - 1, :], target[..., j])


# -------------------------------------------------------------------------------------------------------
# Settings: a flag that is given beats the preset.

DEFAULTS = dict(preset="quick", model="gpt", teacherless=False, reverse=False, plain=False, deg=2, path_len=5,
                num_nodes=50, n_train=200_000, n_test=10_000, train_file=None, test_file=None, muon_lr=0.01,
                eval_every=250, stop_at=0.993, seed=0, device="auto", dtype="float32", compile=True,
                cuda_graph=True, out_dir=None, resume=False)


def parse(argv=None):
    """The command line -> parser, the flags that were given (dict)."""
    parser = Parser(__doc__)
    whole = lambda least, most=10**9: dict(type=number(int, least, most), metavar="X")
    real = lambda least, most: dict(type=number(float, least, most), metavar="X")
    path, yes = dict(type=some_path, metavar="PATH"), dict(action="store_true")
    yes_or_no = dict(action=argparse.BooleanOptionalAction)

    def add(flag, text, **options):
        default = DEFAULTS.get(flag[2:], "the preset's")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=f"{text} (default {default})", **options)

    add("--preset", "what flags not given are set to", choices=("quick", "paper"))
    add("--model", "the architecture", choices=("gpt", "mamba"))
    add("--teacherless", "feed `$` in place of the answer and predict all of it in one pass", **yes)
    add("--reverse", "write the path goal first", **yes)
    add("--plain", "teacherless training as in the paper: the same as --ahead 0 --no-deep", **yes)
    add("--ahead", "weight of the look-ahead; 1 in teacherless training, else 0", **real(0, 100))
    add("--deep", "take the losses behind every layer; so in teacherless training", **yes_or_no)
    add("--deg", "arms of the graph, d", **whole(1, 10_000))
    add("--path_len", "nodes of the path, l", **whole(2, 10_000))
    add("--num_nodes", "node values, N", **whole(2, 10_000))
    add("--n_train", "training graphs; 0: fresh ones at every step", **whole(0, 10**7))
    add("--n_test", "test graphs", **whole(1, 10**6))
    add("--train_file", "train on this file of official text", **path)
    add("--test_file", "test on this file of official text", **path)
    add("--n_layer", "blocks", **whole(1, 1000))
    add("--n_embd", "width of the residual stream", **whole(1, 10_000))
    add("--n_head", "attention heads (gpt)", **whole(1, 10_000))
    add("--short_conv", "taps of the causal convolution on q, k and v (gpt); 0: none", **whole(0, 100))
    add("--d_state", "states of a channel (mamba)", **whole(1, 10_000))
    add("--a_scale", "decay rates of the states at the start: -X, -2X, ... (mamba)", **real(1e-6, 1e6))
    add("--batch_size", "graphs a step", **whole(1, 10**6))
    add("--max_steps", "steps at most", **whole(1))
    add("--optimizer", "muon (AdamW for all but the blocks' matrices) or adamw", choices=("muon", "adamw"))
    add("--lr", "learning rate of AdamW", **real(0, 10))
    add("--muon_lr", "learning rate of Muon", **real(0, 10))
    add("--weight_decay", "of the blocks' matrices", **real(0, 10))
    add("--warmup", "steps of linear warm-up; then the rate is constant", **whole(0))
    add("--average", "what stays of the average of the weights at a step; 0: no average", **real(0, 1))
    add("--eval_every", "steps between evaluations", **whole(1))
    add("--stop_at", "exact match, twice in a row, at which to stop; 0: never", **real(0, 1))
    add("--seed", "seed of the weights and of the training graphs", **whole(0, 2**32 - 1))
    add("--device", "cuda, mps or cpu; auto: the first one there")
    add("--dtype", "of the matrix products", choices=("float32", "bfloat16"))
    add("--compile", "torch.compile the blocks and the scan", **yes_or_no)
    add("--cuda_graph", "on CUDA, record a step once and replay it", **yes_or_no)
    add("--out_dir", "the run's folder; else out/ and a name made from the settings", **path)
    add("--resume", "go on with the run in the folder", **yes)
    return parser, vars(parser.parse_args(argv))


def settle(given):
    """The flags given -> every setting (dict). Raises UserError for flags that contradict each other."""
    s = DEFAULTS | given
    s |= preset(s) | given
    useless = dict.fromkeys(("n_head", "short_conv"), s["model"] == "mamba")  # flags without an effect
    useless |= dict.fromkeys(("d_state", "a_scale"), s["model"] == "gpt")
    useless |= dict(muon_lr=s["optimizer"] == "adamw", n_train=s["train_file"], n_test=s["test_file"],
                    plain=not s["teacherless"] or s["ahead"] or s["deep"])
    for name in useless.keys() & given.keys():
        if useless[name]:
            raise UserError(f"--{name} {given[name]}: has no effect beside the other flags; leave it out")
    if 0 < s["n_train"] < s["batch_size"] and not s["train_file"]:
        raise UserError(f"--batch_size {s['batch_size']}: at most the {s['n_train']} graphs of --n_train")
    return s


def default_folder(given, s):
    """out/MODEL-OBJECTIVE-GRAPH-..., with every given flag that the name does not hold yet."""
    said = {"model", "teacherless", "reverse", "plain", "ahead", "deep", "deg", "path_len", "num_nodes", "seed",
            "resume", "out_dir", "max_steps", "stop_at", "eval_every", "device", "compile", "cuda_graph"}
    extra = [f"{name}_{Path(str(given[name])).name}" for name in sorted(given.keys() - said)]
    parts = [s["model"], objective(s).replace(" ", ""), f"G{s['deg']},{s['path_len']}-N{s['num_nodes']}"]
    return Path("out", "-".join([*parts, *extra, f"seed{s['seed']}"]))


# -------------------------------------------------------------------------------------------------------
# A run: what a checkpoint holds or the settings rebuild, and one iteration.


class Run:
    def __init__(self, settings):
        self.settings = s = settings
        self.device = pick_device(s["device"])
        dtype = getattr(torch, s["dtype"])
        self.autocast = lambda: torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        torch.compiler.set_stance("default" if s["compile"] else "force_eager")
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA; nothing changes on a CPU

        # the weights are drawn on the CPU, so that a seed means the same on every device
        torch.manual_seed(s["seed"])
        self.task, model = build(s)
        width, distances = s["n_embd"], self.task.target_len - 1
        maps = nn.Linear(width, distances * width, bias=False) if s["ahead"] else nn.Identity()
        self.average = copy.deepcopy(model).requires_grad_(False).to(self.device)
        self.model, self.maps = model.to(self.device), maps.to(self.device)
        for block in [*self.model.layers(), *self.average.layers()]:
            block.compile(dynamic=False)
        self.optimizers = configure_optimizers(nn.ModuleList([self.model, self.maps]), s["optimizer"],
                                               s["lr"], s["muon_lr"], s["weight_decay"])
        self.step, self.seconds, self.log, self.recent_loss = 0, 0.0, [], 0.0
        self.count = torch.zeros((), device=self.device)     # of steps, for the rate and the average
        self.loss_sum = torch.zeros((), device=self.device)  # of the answer, since the last evaluation
        recorded = self.device.type == "cuda" and s["cuda_graph"]
        self.iterate_ = Recorded(self.iterate) if recorded else self.iterate

        # the training graphs, those that decide when to stop, and those that tell what was learnt: all others
        test, graphs = (load_file(s, flag, self.task) for flag in ("test_file", "train_file"))
        self.validation, self.test = held_out(self.task, s["n_test"], test)
        taken = {*identities(self.validation), *identities(self.test)}
        if graphs:
            graphs = without(graphs, taken)
            if len(graphs.prefix) < s["batch_size"]:
                raise UserError(f"--train_file {s['train_file']}: has {len(graphs.prefix)} graphs that are no "
                                f"test graphs, fewer than --batch_size {s['batch_size']}")
        elif s["n_train"]:
            graphs = draw(self.task, s["n_train"], taken, TRAIN, s["seed"])
        self.batches = Batches(self.task, s["batch_size"], s["seed"], self.device, graphs, taken)

    def iterate(self, prefix, target):
        """One iteration: the loss, its gradient, the optimisers, the average. Only tensors of fixed places
        and shapes, and nothing that waits for the device, so that a GPU can record it."""
        with self.autocast():
            answer, added = loss(self.model, self.maps, self.task, prefix, target, self.settings)
        (answer + added).backward()

        # a linear warm-up, then a constant rate
        rate = ((self.count + 1) / max(1, self.settings["warmup"])).clamp(max=1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["base_lr"]
            optimizer.step()
            optimizer.zero_grad()

        # In place of a decay of the rate an average of the weights (Polyak): avg <- b avg + (1 - b) w. At
        # first b is 1 - 1/step, the plain mean; with b = 0 it is the weights themselves.
        b = (1 - 1 / (self.count + 1)).clamp(max=self.settings["average"])
        averages, weights = list(self.average.parameters()), [p.detach() for p in self.model.parameters()]
        torch._foreach_mul_(averages, b)
        torch._foreach_add_(averages, torch._foreach_mul(weights, 1 - b))
        self.count += 1
        self.loss_sum += answer.detach()

    def train_step(self):
        self.iterate_(*self.batches(self.step))
        self.step += 1

    def evaluate(self, graphs, name):
        """Measure the average -> a line of the log (dict)."""
        with self.autocast():
            result = evaluate(self.average, self.task, graphs, self.settings["teacherless"])
        return dict(step=self.step, samples=self.step * self.settings["batch_size"], loss=self.recent_loss,
                    accuracy=result.pop("accuracy"), token_accuracy=result.pop("token_accuracy"),
                    seconds=round(self.seconds, 1), test_loss=result.pop("loss"), graphs=name, **result)

    def check(self):
        """Look at the loss; raise FloatingPointError if it, or a weight, is not finite any more."""
        if since := self.step - (self.log[-1]["step"] if self.log else 0):
            self.recent_loss = self.loss_sum.item() / since
        norms = torch.stack(torch._foreach_norm(list(self.model.parameters())))
        if not (math.isfinite(self.recent_loss) and norms.isfinite().all()):
            raise FloatingPointError(f"the loss or a weight was not finite at or before step {self.step}")

    def finished(self):
        """At the last step, or solved as two evaluations in a row say."""
        solved = [line["accuracy"] >= self.settings["stop_at"] > 0 for line in self.log[-2:]]
        return self.step >= self.settings["max_steps"] or solved == [True, True]

    MODULES = dict(model="average", weights="model", maps="maps")  # name in the checkpoint -> here

    def state_dict(self):
        return dict({name: getattr(self, here).state_dict() for name, here in self.MODULES.items()},
                    optimizers=[o.state_dict() for o in self.optimizers], loss_sum=self.loss_sum.item(),
                    step=self.step, seconds=self.seconds, log=self.log, settings=self.settings)

    def load_state_dict(self, state):
        for name, here in self.MODULES.items():
            getattr(self, here).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        self.count.fill_(self.step)
        self.loss_sum.fill_(state["loss_sum"])


class Recorded:
    """A function of tensors as a CUDA graph, recorded once and replayed: a small model's step is some 600
    kernels of a few microseconds, and launched by Python one by one they take ten times as long."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *tensors):
        self.calls += 1
        if self.calls <= 3:  # they compile and allocate what lasts; on a side stream, as PyTorch asks
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function(*tensors)
            return torch.cuda.current_stream().wait_stream(stream)
        if self.graph is None:
            self.tensors, self.graph = [x.clone() for x in tensors], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.function(*self.tensors)
        for place, x in zip(self.tensors, tensors):
            place.copy_(x)
        self.graph.replay()


# -------------------------------------------------------------------------------------------------------
# The run's folder. Every file in it is replaced whole, and it is a run once it has a checkpoint: whenever
# a run is killed, what lies there can be resumed and evaluated, or is free for another start.

FILES = ("config.json", "ckpt.pt", "log.jsonl")


def check_free(folder):
    """Raise UserError if a folder holds more than what a start that was killed may have left."""
    names = set(os.listdir(folder)) if folder.exists() else set()
    if "ckpt.pt" in names or names - {name + end for name in FILES for end in ("", ".tmp")}:
        what = "a run" if "ckpt.pt" in names else "something else"
        raise UserError(f"--out_dir {folder}: holds {what} already; --resume goes on with a run, "
                        "another folder starts a new one")


@contextlib.contextmanager
def hold(folder):
    """Have a folder, made if need be, where the system has locks alone; without a checkpoint in the end it is
    left as it was."""
    made, lock = not folder.exists(), None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.suppress(ImportError, PermissionError, NotImplementedError):
            import fcntl
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"--out_dir {folder}: another process is writing this run") from None
    finally:
        if lock is not None:
            os.close(lock)
        if not (folder / "ckpt.pt").exists():
            (folder / "config.json").unlink(missing_ok=True)
            if made:
                folder.rmdir()


def save(run, folder, *last_line):
    """Write a run; `last_line` of its log is of the test set, which no checkpoint knows."""
    with whole_file(folder / "config.json") as file:
        file.write((json.dumps(run.settings, indent=1) + "\n").encode())
    with whole_file(folder / "ckpt.pt") as file:
        torch.save(run.state_dict(), file)
    with whole_file(folder / "log.jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in [*run.log, *last_line]).encode())


def provenance(argv, device):
    """Where a result comes from -> dict, for the rows of eval.py --json."""
    commit, name = None, platform.processor()
    with contextlib.suppress(OSError):  # there may be no git; "+": with changes that are not committed
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--exclude=*", "--dirty=+"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    with contextlib.suppress(OSError, IndexError):  # Linux alone has this file
        name = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    return dict(command=f"python train.py {shlex.join(sys.argv[1:] if argv is None else argv)}", commit=commit,
                torch=str(torch.__version__), python=platform.python_version(), device=device.type,
                device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else name,
                threads=torch.get_num_threads(), date=str(datetime.date.today()), resumed_at=[])


def reopen(folder, given):
    """Settings and checkpoint of the run to resume. Raises UserError if the flags ask for another run."""
    settings, state = load_run(folder)
    for name in given.keys() - {"resume", *FREE}:
        if given[name] != settings[name]:
            raise UserError(f"--{name} {given[name]}: the run in {folder} has {settings[name]}; "
                            "leave the flag out to resume it")
    return settings | {name: given[name] for name in FREE if name in given}, state


# -------------------------------------------------------------------------------------------------------
# The loop, and what is said on the way.


@contextlib.contextmanager
def noted(signals):
    """Note the signals that ask a run to stop in a list; a second one of a kind ends the run at once."""
    def note(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python lets no other thread do this
    before = {n: signal.signal(n, note) for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell(text, live=False):
    """Print a line, on a terminal over the live one; a reader that has gone or a full disk ends no run."""
    clear = "\r\x1b[K" if sys.stdout.isatty() else ""
    try:
        print(clear + text, end="" if live and clear else "\n", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


LOOK_EVERY = 50  # steps between looks at the loss


def minutes(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def train(run, folder, signals):
    """Train until solved, to the last step, or until a signal has come in; save at each evaluation and then."""
    s, begin, said = run.settings, time.perf_counter() - run.seconds, 0
    if s["compile"]:
        tell(f"step {run.step:,}: compiling, a minute or two the first time, then seconds ...", live=True)
    while True:
        run.seconds = time.perf_counter() - begin
        end = run.step % s["eval_every"] == 0 or run.step >= s["max_steps"]
        due = end and run.step > (run.log[-1]["step"] if run.log else 0)
        if due or signals or run.step % LOOK_EVERY == 0:
            run.check()
            if run.step and run.seconds > said + 5:
                said = run.seconds
                tell(f"step {run.step:6,} | loss {run.recent_loss:.4f} | {minutes(run.seconds)}", live=True)
        if due:
            run.log.append(run.evaluate(run.validation, "validation"))
            run.loss_sum.zero_()
        if due or signals:
            save(run, folder)
        if due:
            line, left = run.log[-1], (s["max_steps"] - run.step) * run.seconds / run.step
            tell(f"step {run.step:6,} | loss {line['loss']:.4f} | exact {percent(line['accuracy']):>5} % | "
                 f"tokens {' '.join(map(percent, line['token_accuracy']))} | "
                 f"{line['samples'] / run.seconds:,.0f} graphs/s | {minutes(run.seconds)}, "
                 f"at most {minutes(left)} left")
        if signals or run.finished():
            return
        try:
            run.train_step()
        except Exception as error:
            compiler_failed(error)  # raises it, unless it is the compiler's: then the same step without one
            for optimizer in run.optimizers:
                optimizer.zero_grad()


def describe(run, folder):
    """What a run will do, in two lines."""
    s, size = run.settings, sum(p.numel() for p in run.model.parameters())
    data = s["train_file"] or (f"{s['n_train']:,} graphs" if s["n_train"] else "fresh graphs")
    return (f"{size:,} parameters in {s['n_layer']} layers of {s['n_embd']}, {s['optimizer']}, batches of "
            f"{s['batch_size']} of {data}; chance 1/d = {percent(1 / s['deg'])} %\n"
            f"{run.task}; {s['record']['device_name']}, {s['dtype']}, at most {s['max_steps']:,} steps; into {folder}")


def main(argv=None):
    parser, given = parse(argv)
    signals, settings, resume = [], {}, given.get("resume", False)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that cannot be printed ends no run
    try:
        if not (resume and "out_dir" in given):
            settings = settle(given)
        folder = Path(given.get("out_dir") or default_folder(given, settings))
        if not resume:
            check_free(folder)
        elif not folder.is_dir():
            raise UserError(f"--resume: there is no run {folder}; name its folder with --out_dir")
        with hold(folder), noted(signals):
            if resume:
                settings, state = reopen(folder, given)
            tell(f"{settings['model']}, {objective(settings)}: making the model and the graphs ...")
            run = Run(settings)
            settings.setdefault("record", provenance(argv, run.device))
            if resume:
                run.load_state_dict(state)
                settings["record"]["resumed_at"].append(run.step)
            save(run, folder)
            tell(describe(run, folder))
            train(run, folder, signals)
            if signals:
                tell(f"saved at step {run.step:,}; to go on: "
                     f"python train.py --resume --out_dir {shlex.quote(str(folder))}")
                sys.exit(128 + signals[0])
            line = run.evaluate(run.test, "test")  # the test set is read once
            save(run, folder, line)
    except UserError as error:
        parser.error(f"{'--' if str(error).split()[0] in settings else ''}{error}")
    except OSError as error:
        parser.error(f"--out_dir {folder}: {error.strerror}; nothing there was overwritten")
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: stopped: {error}; {folder / 'ckpt.pt'} keeps the state before\n")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        sizes, usual = ("n_train", "n_test", "batch_size", "n_embd", "n_layer", "num_nodes"), settle({})
        name = max(sizes, key=lambda name: settings[name] / usual[name])
        parser.error(f"--{name} {settings[name]}: takes more memory than there is; a smaller one works")
    found = "solved" if line["accuracy"] >= 0.99 else "not solved"
    tell(f"{found}: {percent(line['accuracy'])} % exact match on {line['n_graphs']:,} unseen graphs after "
         f"{run.step:,} steps, {line['samples']:,} graphs, {minutes(run.seconds)} minutes\n"
         f"python eval.py {shlex.quote(str(folder))}")


if __name__ == "__main__":
    run_script(main)
