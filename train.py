"""Train a GPT or a Mamba to find the path in a star graph: by teacher forcing, teacherless, or reversed.

    python train.py --model mamba --teacherless          # from scratch: solves G(2,5)
    python train.py --model mamba                        # standard training: stays at a coin flip, 1/d
    python train.py --preset paper                       # the paper's sizes and optimiser, for a GPU

A run is a folder: config.json (its settings), ckpt.pt and log.jsonl (one JSON object an evaluation:
step, samples, loss, accuracy, token_accuracy, seconds, lr, ...; accuracies are fractions of 1). Ctrl-C
saves; --resume goes on, to the bit.
"""
import argparse
import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import mamba
from data import (Batches, Parser, UserError, identities, inputs, number, sample_train_set,
                  some_path, without)
from eval import (FREE, build, evaluate, full_objective, load_flag, load_run, objective, percent,
                  pick_device, test_graphs)

PRESETS = {
    # minutes on two CPU cores: one recipe for every objective; a dict holds what differs between models
    "quick": dict(n_layer=8, n_embd=64, n_head=4, short_conv=4, d_state=32, a_scale=0.01, ahead=1.0,
                  batch_size=64, optimizer=dict(gpt="adamw", mamba="muon"), lr=dict(gpt=5e-3, mamba=1e-2),
                  weight_decay=0.0, warmup=100, max_steps=10_000, cooldown=dict(gpt=1000, mamba=2000)),
    # the paper's GPT-Mini and its AdamW (sections 5 and B): hours on one GPU
    "paper": dict(n_layer=12, n_embd=384, n_head=6, short_conv=0, d_state=16, a_scale=1.0, ahead=0.0,
                  batch_size=256, optimizer="adamw", lr=5e-4, weight_decay=0.01,
                  warmup=100, max_steps=390_500, cooldown=0),
}
CHECK_EVERY = 50   # steps between looks at the losses and at the share of training graphs solved, and
SOLVED = 0.7       # the share from which the learning rate is brought down
QUICK_TEST = 500   # test graphs of an evaluation on the way; the whole set decides if a run is solved


# -------------------------------------------------------------------------------------------------------
# Settings.


def flags():
    """name -> default (None: the preset's), argparse options."""
    whole = lambda least, most=10**9: dict(type=number(int, least, most))
    real = lambda least, most: dict(type=number(float, least, most))
    switch, path = dict(action="store_true"), dict(type=some_path)
    return {
        "preset": ("quick", dict(choices=PRESETS), "settings to start from; any flag given beside it wins"),
        "model": ("gpt", dict(choices=("gpt", "mamba")), "the architecture"),
        "teacherless": (False, switch, "feed `$` in place of the answer and predict all of it in one pass"),
        "reverse": (False, switch, "write the path goal first"),
        "ahead": (None, real(0, 100),
                  "weight of a second loss: each answer position also predicts the nodes after its own; "
                  "0, as without --teacherless unless given: the paper's objective"),
        "deep": (False, switch, "take both losses behind every layer, not the last alone"),
        "deg": (2, whole(1, 10_000), "arms of the graph, d"),
        "path_len": (5, whole(2, 10_000), "nodes of the path, l"),
        "num_nodes": (50, whole(2, 10_000), "node values, N"),
        "n_train": (200_000, whole(0, 10**8), "training graphs; 0: fresh ones at every step"),
        "n_test": (10_000, whole(1, 10**7), "test graphs"),
        "train_file": (None, path, "train on this file of official text"),
        "test_file": (None, path, "test on this file of official text"),
        "n_layer": (None, whole(1, 1000), "blocks"),
        "n_embd": (None, whole(1, 10_000), "width of the residual stream"),
        "n_head": (None, whole(1, 10_000), "attention heads (gpt)"),
        "short_conv": (None, whole(0, 100), "taps of the causal convolution on q, k and v (gpt); 0: none"),
        "d_state": (None, whole(1, 10_000), "states of a channel (mamba)"),
        "a_scale": (None, real(1e-6, 1e6),
                    "decay rates of the states at the start: -X, -2X, ... (mamba); 1: the reference's"),
        "batch_size": (None, whole(1, 10**6), "graphs a step"),
        "max_steps": (None, whole(1), "steps at most"),
        "optimizer": (None, dict(choices=("muon", "adamw")),
                      "muon (with AdamW for all but the hidden matrices) or adamw"),
        "lr": (None, real(0, 10), "learning rate of AdamW"),
        "muon_lr": (0.01, real(0, 10), "learning rate of Muon"),
        "weight_decay": (None, real(0, 10), "weight decay of the hidden matrices"),
        "warmup": (None, whole(0), "steps of linear warm-up"),
        "cooldown": (None, whole(0),
                     f"steps of decay at the end, which comes when {SOLVED:.0%}% of the training "
                     "graphs are answered right, at the latest at max_steps; 0: a constant rate"),
        "eval_every": (250, whole(1), "steps between evaluations"),
        "stop_at": (0.999, real(0, 1), "exact match on the test set at which to stop; 0: never"),
        "seed": (0, whole(0, 2**32 - 1), "seed of the weights and of the training graphs"),
        "device": ("auto", {}, "cuda, mps or cpu; auto: the first one there"),
        "dtype": ("auto", dict(choices=("auto", "float32", "bfloat16")),
                  "of the matrix products; auto: bfloat16 on CUDA"),
        "compile": (True, dict(action=argparse.BooleanOptionalAction),
                    "torch.compile the blocks and the scan"),
        "out_dir": (None, path, "the run's folder (default: out/ and a name made from the settings)"),
        "resume": (False, switch, "go on with the run in the folder"),
    }


def parse(argv=None):
    """The command line -> parser, the flags that were given (dict)."""
    parser = Parser(__doc__)
    for name, (default, options, text) in flags().items():
        shown = "the preset's" if default is None and name in PRESETS["quick"] else default
        if "type" in options:
            options["metavar"] = "X"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS,
                            help=f"{text} (default {shown})", **options)
    return parser, vars(parser.parse_args(argv))


def settle(given):
    """The flags given -> every setting (dict). Raises UserError for flags that contradict each other."""
    settings = {name: default for name, (default, _, _) in flags().items()}
    settings |= given
    for name, value in PRESETS[settings["preset"]].items():
        value = value[settings["model"]] if isinstance(value, dict) else value
        settings[name] = given.get(name, value)
    if not settings["teacherless"] and "ahead" not in given:
        settings["ahead"] = 0.0  # standard training is the paper's
    without_effect = [("n_head", "model", "mamba"), ("short_conv", "model", "mamba"),
                      ("d_state", "model", "gpt"), ("a_scale", "model", "gpt"),
                      ("muon_lr", "optimizer", "adamw")]
    for name, other, value in without_effect:
        if name in given and settings[other] == value:
            raise UserError(f"--{name} {given[name]}: has no effect with --{other} {value}; leave it out")
    for name, other in (("n_train", "train_file"), ("n_test", "test_file")):
        if name in given and other in given:
            raise UserError(f"--{name} {given[name]}: has no effect with --{other}; leave one of them out")
    if 0 < settings["n_train"] < settings["batch_size"] and not settings["train_file"]:
        raise UserError(f"--batch_size {settings['batch_size']}: "
                        f"at most the {settings['n_train']} graphs of --n_train")
    return settings


def default_folder(given, settings):
    """out/MODEL-OBJECTIVE-GRAPH-..., with every given flag that the name does not hold yet."""
    said = ("preset", "model", "teacherless", "reverse", "deg", "path_len", "num_nodes",
            "seed", "resume", *FREE)
    extra = [f"{name}_{Path(str(given[name])).name}" for name in sorted(given) if name not in said]
    preset = [] if settings["preset"] == "quick" else [settings["preset"]]
    graph = f"G{settings['deg']},{settings['path_len']}-N{settings['num_nodes']}"
    parts = [settings["model"], objective(settings).replace(" ", "_"), graph, *preset, *extra]
    return Path("out", "-".join([*parts, f"seed{settings['seed']}"]))


def pick_dtype(name, device):
    """--dtype -> dtype of the matrix products."""
    bf16 = device.type == "cpu" or device.type == "cuda" and torch.cuda.is_bf16_supported()
    if name == "bfloat16" and not bf16:
        raise UserError(f"--dtype bfloat16: not on this {device.type} device; float32 works")
    chosen = name == "bfloat16" or name == "auto" and device.type == "cuda" and bf16
    return torch.bfloat16 if chosen else torch.float32


# -------------------------------------------------------------------------------------------------------
# Optimisation.


def parameter_groups(model):
    """Named, disjoint and complete: the matrices of the blocks, which Muon takes and weight decay
    shrinks, and the rest (embeddings, norms, biases, convolutions, and Mamba's A_log and D, which have
    two and one dimension but are no maps)."""
    groups = {"matrices": {}, "rest": {}}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    for name, p in model.named_parameters():
        groups["matrices" if id(p) in linear else "rest"][name] = p
    return groups


class Muon(torch.optim.Muon):
    """torch.optim.Muon with all matrices of one shape as one batch: one by one, a Mamba's 33 small ones
    are 759 operations in place of 100, a tenth of its step on a CPU, and launches on a GPU."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = {}
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                batches.setdefault(p.shape, []).append(p)
            for (rows, columns), params in batches.items():
                grads = [p.grad for p in params]
                momenta = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                update = self.orthogonal(torch.stack(nesterov), group).to(params[0].dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                lr = group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(params, update.unbind(), alpha=-lr)

    @staticmethod
    def orthogonal(x, group):
        """x (k, rows, columns) -> about the nearest matrices with orthonormal rows or columns, bfloat16:
        Newton-Schulz iteration on the side that is shorter."""
        a, b, c = group["ns_coefficients"]
        tall = x.shape[1] > x.shape[2]
        x = (x.mT if tall else x).bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


def make_optimizers(model, settings):
    """The optimisers of a run; `base_lr` in each group is its rate before the schedule."""
    matrices, rest = (list(group.values()) for group in parameter_groups(model).values())
    adamw = [dict(params=rest, lr=settings["lr"], weight_decay=0.0)]
    optimizers = []
    if settings["optimizer"] == "muon":
        muon = Muon(matrices, lr=settings["muon_lr"], weight_decay=settings["weight_decay"])
        optimizers.append(muon)
    else:
        adamw.append(dict(params=matrices, lr=settings["lr"], weight_decay=settings["weight_decay"]))
    optimizers.append(torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def last_step(settings, solved_at):
    """The step at which training ends: max_steps, or `cooldown` steps after its graphs were solved."""
    if solved_at is None or not settings["cooldown"]:
        return settings["max_steps"]
    return min(settings["max_steps"], solved_at + settings["cooldown"])


def rate(step, settings, solved_at):
    """The learning rate at a step, a share of its base: warm-up, plateau, decay to 0 at the end.

    The paths are learnt hop by hop from the goal, each as a sharp jump, at steps that nobody knows
    beforehand: a rate that decays by the clock starves the last hop, one that never decays stays at
    about 95 %. So the decay follows the progress. Its shape, 1 - sqrt, spends most of it at low rates.
    """
    warm = min(1, (step + 1) / max(1, settings["warmup"]))
    cooldown = min(settings["cooldown"], settings["max_steps"] // 2)
    if not cooldown:
        return warm
    done = 1 - (last_step(settings, solved_at) - step) / cooldown
    return warm * (1 - math.sqrt(max(0, min(1, done))))


# -------------------------------------------------------------------------------------------------------
# The run's folder. It appears whole, by renaming, and every file in it is replaced whole: so whenever a
# run is killed, what lies there can be resumed and evaluated.


@contextlib.contextmanager
def disk(folder):
    """Turn what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out_dir {folder}: cannot write there ({error.strerror}); "
                        "nothing there was overwritten") from None


def write_whole(path, content):
    """Write a file so that it holds, at every moment, all of the old content or all of the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_settings(folder, settings):
    write_whole(folder / "config.json", (json.dumps(settings, indent=1) + "\n").encode())


def save_checkpoint(folder, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(folder / "ckpt.pt", buffer.getvalue())


def lock(folder):
    """Hold the folder until this process ends, however it ends. Where there is no flock, do without."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out_dir {folder}: another process is writing this run") from None


def create_folder(folder, settings, state):
    """Make the folder of a new run, with its settings and its first checkpoint."""
    with disk(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "a run already" if (folder / "config.json").exists() else "something else"
            raise UserError(f"--out_dir {folder}: holds {what}; --resume goes on with a run, "
                            "another folder starts a new one")
        new = folder.absolute().with_name(f".{folder.name}.{os.getpid()}")
        new.mkdir(parents=True)
        try:
            lock(new)
            write_settings(new, settings)
            save_checkpoint(new, state)
            write_whole(new / "log.jsonl", b"")
            os.rename(new, folder)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise


# -------------------------------------------------------------------------------------------------------
# The run.


def load_graphs(task, settings):
    """The training graphs (None: fresh ones at every step) and the test graphs; they share none."""
    test = test_graphs(settings, task)
    if settings["train_file"]:
        everything = load_flag("train_file", settings["train_file"], task)
        train = without(everything, set(identities(test)))
        left_out = len(everything.prefix) - len(train.prefix)
        if left_out > 0:
            print(f"left out of the training set: {left_out:,} graphs that are test graphs")
        if len(train.prefix) < settings["batch_size"]:
            raise UserError(f"--train_file {settings['train_file']}: has {len(train.prefix)} graphs "
                            f"to train on, fewer than --batch_size {settings['batch_size']}")
        return train, test
    if not settings["n_train"]:
        return None, test
    return sample_train_set(task, settings["n_train"], settings["seed"], test), test


def check_memory(settings):
    """Refuse, before anything is allocated, a model that this machine's memory cannot train."""
    with torch.device("meta"):
        _, model = build(settings)
    needed = 16 * sum(p.numel() for p in model.parameters())  # weight, gradient and two moments, fp32
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > there:
        raise UserError(f"--n_embd {settings['n_embd']}, --n_layer {settings['n_layer']}: the model needs "
                        f"{needed / 2**30:.0f} GiB, this machine has {there / 2**30:.0f}")


def compiler_works(device):
    """Whether torch.compile has what it needs here (on a CPU: a C++ compiler)."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
        return True
    except Exception as error:  # what the compiler raises differs by back end
        print(f"no working compiler ({type(error).__name__}): running uncompiled, which is slower",
              file=sys.stderr)
        return False


def minutes(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def reopen(folder, given):
    """Settings and checkpoint of the run to resume, now locked.

    Raises UserError if the flags given ask for another run.
    """
    if not folder.is_dir():
        raise UserError(f"--resume: there is no run {folder}; name its folder with --out_dir")
    lock(folder)
    settings, state = load_run(folder)
    for name in given.keys() - {"resume", *FREE}:
        if given[name] != settings[name]:
            raise UserError(f"--{name} {given[name]}: the run in {folder} has {settings[name]}; "
                            "leave the flag out to resume it")
    return settings | {name: given[name] for name in FREE if name in given}, state


def restore(run, state, folder):
    """Put a run back to its checkpoint, and its log file with it: lines behind it are written again."""
    try:
        run.load_state_dict(state)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / 'ckpt.pt'}: does not fit its settings ({reason})") from None
    with disk(folder):
        write_settings(folder, run.settings)
        write_whole(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in run.log).encode())


class Run:
    """Everything that a checkpoint holds or the settings rebuild, and the two things done with it."""

    def __init__(self, settings):
        self.settings = settings
        self.device = pick_device(settings["device"])
        self.dtype = pick_dtype(settings["dtype"], self.device)
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA; nothing changes on a CPU
        torch.manual_seed(settings["seed"])
        check_memory(settings)
        self.task, self.model = build(settings)
        self.model.to(self.device)
        # the look-ahead: a map for each distance, which training alone needs, so no part of the model
        width, distances = settings["n_embd"], self.task.target_len - 1
        self.ahead = (torch.nn.Linear(width, distances * width, bias=False, device=self.device)
                      if settings["ahead"] else torch.nn.Identity())
        self.optimizers = make_optimizers(torch.nn.ModuleList([self.model, self.ahead]), settings)
        train_graphs, self.test = load_graphs(self.task, settings)
        size, seed = settings["batch_size"], settings["seed"]
        self.batches = Batches(self.task, size, seed, self.device, train_graphs)
        self.step, self.seconds, self.solved_at, self.log = 0, 0.0, None, []
        self.loss_sum = torch.zeros((), device=self.device)  # since the last evaluation
        self.hits = torch.zeros((), device=self.device)      # graphs answered right since the last check
        self.losses = torch.zeros(CHECK_EVERY, device=self.device)  # of the steps since the last check
        mamba.Kernel.enabled = settings["compile"]
        if settings["compile"] and compiler_works(self.device):
            for block in self.model.layers():
                block.compile(dynamic=False)

    SAVED = ("step", "seconds", "solved_at", "log", "loss_sum", "hits")

    def state_dict(self):
        return {name: getattr(self, name) for name in self.SAVED} | dict(
            settings=self.settings, model=self.model.state_dict(), ahead=self.ahead.state_dict(),
            optimizers=[o.state_dict() for o in self.optimizers])

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.ahead.load_state_dict(state["ahead"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in self.SAVED:
            value = state[name]
            setattr(self, name, value.to(self.device) if torch.is_tensor(value) else value)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def look_ahead(self, x, target):
        """The loss of what each answer position says of the nodes after its own: x (..., l, d),
        target (..., l).

        A node that is found in several look-ups from the goal needs those between at its own position,
        where they are no answers: this keeps them there (multi-token prediction, Gloeckle et al. 2024).
        """
        l = self.task.target_len
        i, j = torch.triu_indices(l, l, 1, device=x.device)  # a position, and each one after it
        x = self.ahead(x).unflatten(-1, (l - 1, -1))          # (..., l, distance - 1, d)
        logits = self.model.head(x[..., i, j - i - 1, :]).float()
        return self.settings["ahead"] * F.cross_entropy(logits.flatten(0, -2), target[..., j].flatten())

    def train_step(self):
        """One step of gradient descent on the batch of this step. Nothing in it waits for the device."""
        prefix, target = self.batches(self.step)
        with self.autocast():
            fed = inputs(self.task, prefix, target, self.settings["teacherless"])
            x = self.model.features(fed, self.settings["deep"])[..., -self.task.target_len:, :]
            logits = self.model.head(x).float()
            target = target.expand(logits.shape[:-1])  # --deep: the same behind every layer
            loss = F.cross_entropy(logits.flatten(0, -2), target.flatten())
            ahead = self.look_ahead(x, target) if self.settings["ahead"] else 0
        (loss + ahead).backward()
        share = rate(self.step, self.settings, self.solved_at)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["base_lr"]
            optimizer.step()
            optimizer.zero_grad()
        self.losses[self.step % CHECK_EVERY] = loss.detach()
        self.loss_sum += loss.detach()
        right = (logits.argmax(-1) == target).all(-1)
        self.hits += right.view(-1, len(prefix))[-1].sum()  # of the last layer
        self.step += 1
        if self.step % CHECK_EVERY == 0:
            self.check()

    def check(self):
        """Look at the losses of the last steps, and at how many graphs were answered right in them."""
        steps = self.step % CHECK_EVERY or CHECK_EVERY
        for i, loss in enumerate(self.losses[:steps].tolist()):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss was {loss} at step {self.step - steps + i + 1}")
        for name, p in self.model.named_parameters():
            if not p.isfinite().all():
                raise FloatingPointError(f"{name} was not finite after step {self.step}")
        if steps == CHECK_EVERY:
            enough = SOLVED * CHECK_EVERY * self.settings["batch_size"]
            if self.solved_at is None and self.hits.item() > enough:
                self.solved_at = self.step
            self.hits.zero_()

    def evaluate(self):
        """Measure the model -> a log line (dict): on all test graphs at its end, and if it may be solved."""
        teacherless, size, stop_at = (self.settings[s] for s in ("teacherless", "batch_size", "stop_at"))

        def enough(seen, wrong):
            """Whether these graphs do: one more wrong than in a solved run may yet be chance, two not."""
            hopeless = not stop_at or wrong > (1 - stop_at) * seen + 1
            return seen >= QUICK_TEST and hopeless and not self.at_end()

        with self.autocast():
            result = evaluate(self.model, self.task, self.test, teacherless, size, enough)
        if not math.isfinite(result["loss"]):
            raise FloatingPointError(f"the weights gave a loss of {result['loss']} after step {self.step}")
        since = self.step - (self.log[-1]["step"] if self.log else 0)
        lr = self.settings["lr"] * rate(self.step - 1, self.settings, self.solved_at)
        line = dict(step=self.step, samples=self.step * size, loss=self.loss_sum.item() / since,
                    accuracy=result["accuracy"], token_accuracy=result["token_accuracy"],
                    seconds=round(self.seconds, 1), lr=lr, test_loss=result["loss"],
                    test_graphs=result["test_graphs"])
        line |= {k: v for k, v in result.items() if k in ("clever_hans", "follows")}
        self.loss_sum.zero_()
        self.log.append(line)
        return line

    def at_end(self):
        return self.step >= last_step(self.settings, self.solved_at)

    def finished(self):
        """At the end, or solved as the whole test set says (a run has been evaluated when this is asked)."""
        last = self.log[-1]
        solved = 0 < self.settings["stop_at"] <= last["accuracy"]
        return self.at_end() or solved and last["test_graphs"] == len(self.test.target)


def describe(run, folder):
    """What a run will do, in two lines."""
    s, parameters = run.settings, sum(p.numel() for p in run.model.parameters())
    data = f"{s['n_train']:,} training graphs" if s["n_train"] else "fresh graphs at every step"
    extra = f" --ahead {s['ahead']:g}" * bool(s["ahead"]) + " --deep" * s["deep"]
    yield (f"{run.task}: {s['model']}, {full_objective(s)}{extra}, {parameters:,} parameters, "
           f"{s['optimizer']}, {s['train_file'] or data}, {len(run.test.target):,} test graphs; "
           f"chance 1/d = {percent(1 / s['deg'])} %")
    yield (f"{run.device.type}, {str(run.dtype)[6:]}, {'compiled' if s['compile'] else 'not compiled'}, "
           f"at most {s['max_steps']:,} steps of {s['batch_size']} graphs; into {folder}")


def report(run, line):
    """One line for an evaluation."""
    speed = run.step / run.seconds  # in steps a second
    left = (last_step(run.settings, run.solved_at) - run.step) / speed
    exact, chance = percent(line["accuracy"]), percent(1 / run.task.deg)
    tokens = " ".join(percent(x) for x in line["token_accuracy"])
    return (f"step {line['step']:6,} | loss {line['loss']:.4f} | exact {exact:>5} % (chance {chance}) | "
            f"tokens {tokens} | {speed * run.settings['batch_size']:,.0f} samples/s | "
            f"{minutes(line['seconds'])}, {minutes(left)} left")


def train(run, folder, signals):
    """Train until solved, to the end, or until a signal has come in; saves at each evaluation and then."""
    begin, first_seconds = time.perf_counter(), run.seconds
    while True:
        evaluated = bool(run.log) and run.log[-1]["step"] == run.step
        due = run.at_end() or run.step > 0 and run.step % run.settings["eval_every"] == 0
        if signals or due and not evaluated:
            run.check()
            run.seconds = first_seconds + time.perf_counter() - begin
            if not signals:
                line = run.evaluate()
                with disk(folder), open(folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(report(run, line), flush=True)
            with disk(folder):
                save_checkpoint(folder, run.state_dict())
        if signals or due and run.finished():
            return
        run.train_step()


def main(argv=None):
    parser, given = parse(argv)
    signals = []

    def on_signal(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        print(f"{signal.Signals(number).name}: saving ...", file=sys.stderr, flush=True)

    try:
        settings = settle(given)
        folder = Path(settings["out_dir"] or default_folder(given, settings))
        state = None
        if given.get("resume"):
            settings, state = reopen(folder, given)
        run = Run(settings)
        if state:
            restore(run, state, folder)
        else:
            create_folder(folder, settings, run.state_dict())
        print(*describe(run, folder), sep="\n", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        train(run, folder, signals)
    except UserError as error:
        flag = "--" if str(error).split()[0] in flags() else ""
        parser.error(f"{flag}{error}")
    except KeyboardInterrupt:  # before there was anything to save
        parser.exit(130)
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: stopped: {error}; {folder / 'ckpt.pt'} keeps the state before\n")
    if signals:
        print(f"saved at step {run.step:,}; to go on: python train.py --resume --out_dir {folder}")
        sys.exit(128 + signals[0])
    line = run.log[-1]
    found = "solved" if line["accuracy"] >= 0.99 else "not solved"
    print(f"{found}: {percent(line['accuracy'])} % exact match on {line['test_graphs']:,} unseen graphs "
          f"after {run.step:,} steps, {line['samples']:,} samples, {minutes(run.seconds)} minutes\n"
          f"python eval.py {folder}")


if __name__ == "__main__":
    main()
