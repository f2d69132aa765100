"""Train a GPT or a Mamba to find the path in a star graph, in one of four ways.

    python train.py --model mamba --teacherless     # the cure: finds the paths of G(2,5)
    python train.py --model mamba                   # standard training: stays at a coin flip, 1/d
    python train.py --teacherless --plain           # the paper's teacherless objective, nothing added
    python train.py --reverse --deg 5               # the path written goal first, on another graph

A run is a folder: ckpt.pt is all of it; config.json (its settings) and log.jsonl are to read. Ctrl-C saves.
"""
import contextlib
import copy
import fcntl
import io
import json
import os
import shlex
import sys
import time
from argparse import SUPPRESS, BooleanOptionalAction
from pathlib import Path

import torch
import torch.nn.functional as F

from data import (TRAIN, Batches, Parser, UserError, draw, held_out, identities, inputs, noted, number,
                  run_script, some_path, tell, whole_file, without)
from eval import (FREE, build, evaluate, load_file, objective, percent, pick_device, provenance, readable,
                  reopen)
from mamba import set_compile
from model import configure_optimizers, or_uncompiled, out_of_memory, precision

def preset(s):
    """What no flag says, by the graph, the model and the objective in the settings s (dict). `ahead` and
    `deep` are there only if a flag has set them."""
    if s["preset"] == "paper":  # GPT-Mini, AdamW at its rate (sections 5 and B), 500 epochs: for a GPU
        return dict(ahead=0.0, deep=False, n_layer=12, n_embd=384, n_head=6, short_conv=0, mimetic=False,
                    d_state=16, a_scale=1.0, batch_size=256, optimizer="adamw", lr=5e-4, muon_lr=0.01,
                    warmup=100, decay=0.0, weight_decay=0.01, average=0.0, max_steps=390_500)
    path_len, edges, mamba = s["path_len"], s["deg"] * (s["path_len"] - 1), s["model"] == "mamba"
    deep = s["teacherless"] and not (mamba and edges < 10)  # on few edges a Mamba is quicker without
    standard = not (s["teacherless"] or s["reverse"])  # here a GPT needs GPT-2's first weights and Muon
    shallow = s["reverse"] and not (s["teacherless"] or mamba)  # one look-up a token; deeper took longer
    large = not shallow and (path_len > 10 or edges > (30 if mamba else 60))  # batches of 64 found less
    common = dict(  # to both models
        ahead=float(s["teacherless"]), deep=deep,  # the two additions that make teacherless training work
        n_layer=3 if shallow else path_len + (1 if mamba else 3),  # for path_len - 2 look-ups, one by one
        n_embd=128 if s["num_nodes"] > 64 else 64,  # room for the codes of all node values
        short_conv=4, mimetic=not standard,  # from the first step on a GPT sees an edge whole, and its like
        d_state=64,                    # a Mamba's memory of the edges; with 32 it took more steps
        a_scale=0.01,                  # slow decay: edges read early are still there when the goal comes
        batch_size=256 if large else 64, weight_decay=0.0, n_head=4,
        max_steps=2000 if standard and not s.get("ahead") else 10_000)
    if mamba:  # falling rates need fewer steps; without the cure 0.02 diverged on large graphs
        rate = 0.02 if s["teacherless"] and (s.get("ahead", 1) or s.get("deep", deep)) else 0.01
        return common | dict(optimizer="muon", lr=rate, muon_lr=rate, warmup=250 if edges < 10 else 500,
                             decay=0.5, average=0.995)  # of the last 200 steps or so
    return common | dict(optimizer="muon" if standard else "adamw", lr=3e-3, muon_lr=0.01, warmup=100,
                         decay=0.0, average=0.99)  # a constant rate; of the last 100 steps or so

# The loss: what all of this is about.
def loss(model, maps, task, prefix, target, s):
    """The training loss of a batch: prefix (b, prefix_len), target (b, l), settings s -> two scalars in nats
    a token, the answer's cross-entropy (deep: its mean over the layers) and the weighted look-ahead's. With
    neither it is the paper's: next-token prediction (eq. 2), or `teacherless`, from dummies (eq. 5)."""
    cross_entropy = lambda x, y: F.cross_entropy(model.head(x).float().flatten(0, -2), y.flatten())

    # Standard training feeds the true path, so that each next node can be looked up from the one before it:
    # the Clever Hans cheat. Teacherless training feeds `$`: nothing but the prefix tells the path.
    fed = inputs(task, prefix, target, s["teacherless"])  # (b, seq_len - 1)

    # What the head reads at the answer's positions, (b, l, d). Deep: behind every layer, (n_layer, b, l, d),
    # or else the last layers learn the first look-ups, and then there is no layer left for the next one.
    x = model.features(fed, every=s["deep"], last=task.target_len)
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

DEFAULTS = dict(preset="quick", model="gpt", teacherless=False, reverse=False, plain=False, deg=2,
                path_len=5, num_nodes=50, n_train=200_000, n_test=10_000, train_file=None, test_file=None,
                eval_every=250, stop_at=0.993, seed=0, device="auto", dtype="float32",
                compile=True, cuda_graph=True, out_dir=None, resume=False)

def parse(argv=None):
    """The command line -> parser, the flags that were given (dict)."""
    parser, yes, yes_or_no = Parser(__doc__), dict(action="store_true"), dict(action=BooleanOptionalAction)
    whole = lambda least, most=10**9: dict(type=number(int, least, most), metavar="X")
    real = lambda least, most: dict(type=number(float, least, most), metavar="X")
    def add(flag, text, **options):
        text += f" (default {DEFAULTS.get(flag[2:], 'by the preset')})"
        parser.add_argument(flag, default=SUPPRESS, help=text, **options)

    add("--preset", "what flags not given are set to", choices=("quick", "paper"))
    add("--model", "the architecture", choices=("gpt", "mamba"))
    add("--teacherless", "feed `$` in place of the answer and predict all of it in one pass", **yes)
    add("--reverse", "write the path goal first", **yes)
    add("--plain", "the paper's loss: --ahead 0 --no-deep; a Mamba takes half the rates", **yes)
    add("--ahead", "weight of the look-ahead; 1 in the cure, else 0", **real(0, 100))
    add("--deep", "take the losses behind every layer; in the cure, not a Mamba's on few edges", **yes_or_no)
    add("--deg", "arms of the graph, d", **whole(1, 10_000))
    add("--path_len", "nodes of the path, l", **whole(2, 10_000))
    add("--num_nodes", "node values, N", **whole(2, 10_000))
    add("--n_train", "training graphs; 0: fresh ones at every step", **whole(0, 10**7))
    add("--n_test", "test graphs", **whole(1, 10**6))
    add("--train_file", "train on this file of official text", type=some_path)
    add("--test_file", "test on this file of official text", type=some_path)
    add("--n_layer", "blocks", **whole(1, 1000))
    add("--n_embd", "width of the residual stream", **whole(1, 10_000))
    add("--n_head", "attention heads (gpt)", **whole(1, 10_000))
    add("--short_conv", "taps of the causal convolution on q, k and v (gpt); 0: none", **whole(0, 100))
    add("--mimetic", "queries and keys start equal (gpt)", **yes_or_no)
    add("--d_state", "states of a channel (mamba)", **whole(1, 10_000))
    add("--a_scale", "decay rates of the states at the start: -X, -2X, ... (mamba)", **real(1e-6, 1e6))
    add("--batch_size", "graphs a step", **whole(1, 10**6))
    add("--max_steps", "steps at most", **whole(1))
    add("--optimizer", "muon (for linear layers; AdamW for the rest) or adamw", choices=("muon", "adamw"))
    add("--lr", "learning rate of AdamW", **real(0, 10))
    add("--muon_lr", "learning rate of Muon", **real(0, 10))
    add("--weight_decay", "of the linear layers' matrices", **real(0, 10))
    add("--warmup", "steps of linear warm-up of the rates, W", **whole(0))
    add("--decay", "then, at step t, they fall as (W / t) to the power of X; 0: not at all", **real(0, 10))
    add("--average", "share of the old average of the weights that a step keeps; 0: no average", **real(0, 1))
    add("--eval_every", "steps between evaluations", **whole(1))
    add("--stop_at", "exact match, twice in a row, at which to stop; 0: never", **real(0, 1))
    add("--seed", "seed of the weights and of the training graphs", **whole(0, 2**32 - 1))
    add("--device", "cuda, mps or cpu; auto: the first one there")
    add("--dtype", "of the matrix products; a GPU takes float32 as TF32", choices=("float32", "bfloat16"))
    add("--compile", "torch.compile the blocks and the scan", **yes_or_no)
    add("--cuda_graph", "on CUDA, record a step once and replay it", **yes_or_no)
    add("--out_dir", "the run's folder; else out/ and a name made from the settings", type=some_path)
    add("--resume", "go on with the run in the folder", **yes)
    return parser, vars(parser.parse_args(argv))

def settle(given):
    """The flags given -> every setting (dict). Raises UserError for a flag without an effect."""
    s = DEFAULTS | (dict(ahead=0.0, deep=False) if given.get("plain") else {}) | given  # what it stands for
    s = preset(s) | s
    mamba, adamw = s["model"] == "mamba", s["optimizer"] == "adamw"
    useless = dict(n_head=mamba, short_conv=mamba, mimetic=mamba, d_state=not mamba, a_scale=not mamba,
                   muon_lr=adamw, n_train=s["train_file"], n_test=s["test_file"],
                   plain=not s["teacherless"] or s["ahead"] or s["deep"])
    for name in filter(useless.get, given):
        raise UserError(f"--{name} {given[name]}: contradicts the other flags or has no effect; leave it out")
    return s

def default_folder(given, s):
    """out/MODEL-OBJECTIVE-GRAPH-..., with every given flag that the name does not hold yet."""
    named = {*"model teacherless reverse plain ahead deep deg path_len num_nodes seed resume".split(), *FREE}
    named -= {"train_file", "test_file"} | ({"ahead"} if s["ahead"] not in (0, 1) else set())
    extra = "".join(f"-{name}_{Path(str(given[name])).name}" for name in sorted(given.keys() - named))
    task = f"{s['model']}-{objective(s).replace(' ', '')}-G{s['deg']},{s['path_len']}-N{s['num_nodes']}"
    return Path("out", f"{task}{extra}-seed{s['seed']}")

class Run:  # what a checkpoint holds or the settings rebuild, and one iteration
    def __init__(self, settings):
        self.settings = s = settings
        self.device = pick_device(s["device"])
        set_compile(s["compile"])

        # the weights are drawn on the CPU, so that a seed means the same on every device
        torch.manual_seed(s["seed"])
        self.task, model = build(s)
        width, distances = s["n_embd"], self.task.target_len - 1  # the look-ahead's maps, if any
        maps = torch.nn.Linear(width, distances * width, bias=False) if s["ahead"] else torch.nn.Identity()
        self.average = copy.deepcopy(model).requires_grad_(False).to(self.device)
        self.model, self.maps = model.to(self.device), maps.to(self.device)
        for block in [*self.model.layers(), *self.average.layers()]:
            block.compile(dynamic=False)

        # what one iteration changes; on a GPU it is recorded at its fourth call, and replayed from then on
        self.optimizers = configure_optimizers(torch.nn.ModuleList([self.model, self.maps]), s["optimizer"],
                                               s["lr"], s["muon_lr"], s["weight_decay"])
        self.step, self.seconds, self.log, self.recent_loss = 0, 0.0, [], 0.0
        self.count = torch.zeros((), device=self.device)     # steps, as a tensor
        self.loss_sum = torch.zeros((), device=self.device)  # since the last evaluation
        self.call = Recorded(self.iterate) if s["cuda_graph"] and self.device.type == "cuda" else self.iterate

        # the training graphs are neither those that decide when to stop nor those that tell what was learnt
        test, graphs = (load_file(s, flag, self.task) for flag in ("test_file", "train_file"))
        self.validation, self.test = held_out(self.task, s["n_test"], test)
        taken = {*identities(self.validation), *identities(self.test)}
        if graphs:
            graphs = without(graphs, taken)
        elif s["n_train"]:
            graphs = draw(self.task, s["n_train"], taken, TRAIN, s["seed"])
        if graphs and len(graphs.prefix) < s["batch_size"]:
            raise UserError(f"--batch_size {s['batch_size']}: {len(graphs.prefix)} graphs left to train on")
        self.batches = Batches(self.task, s["batch_size"], s["seed"], self.device, graphs, taken)

    def iterate(self, prefix, target):
        """One iteration: the loss, its gradient, the optimisers, the average. Only tensors of fixed places
        and shapes, and nothing that waits for the device, so that a GPU can record it."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with precision(self.settings["dtype"], self.device):
            answer, added = loss(self.model, self.maps, self.task, prefix, target, self.settings)
        (answer + added).backward()

        # a linear warm-up, then (step / warmup) ** -decay: constant, or with 1/2 that of Vaswani et al. 2017
        t = (self.count + 1) / max(1, self.settings["warmup"])
        rate = torch.minimum(t, t ** -self.settings["decay"])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["base_lr"]
            optimizer.step()

        # A moving average of the weights, which is what is evaluated: avg <- b avg + (1 - b) w. At first b is
        # 1 - 1/step, the plain mean; with b = 0 it is the weights themselves.
        b = (1 - 1 / (self.count + 1)).clamp(max=self.settings["average"])
        averages, weights = list(self.average.parameters()), [p.detach() for p in self.model.parameters()]
        torch._foreach_mul_(averages, b)
        torch._foreach_add_(averages, torch._foreach_mul(weights, 1 - b))
        self.count += 1
        self.loss_sum += answer.detach()

    def train_step(self):
        self.call(*self.batches(self.step))
        self.step += 1

    def evaluate(self, graphs, name):
        """Measure the average -> a line of the log (dict): loss is that of training since the last one
        (deep: the layers' mean), without the look-ahead's; unseen_loss that of these graphs."""
        with precision(self.settings["dtype"], self.device):
            result = evaluate(self.average, self.task, graphs, self.settings["teacherless"])
        return dict(step=self.step, samples=self.step * self.settings["batch_size"], loss=self.recent_loss,
                    seconds=round(self.seconds, 1), unseen_loss=result.pop("loss"), graphs=name, **result)

    def check(self):
        """Set recent_loss, the mean since an evaluation; FloatingPointError: it or a weight is not finite."""
        if since := self.step - (self.log[-1]["step"] if self.log else 0):
            self.recent_loss = self.loss_sum.item() / since
        norms = torch._foreach_norm([self.loss_sum, *self.model.parameters()])
        if not torch.stack(norms).isfinite().all():
            raise FloatingPointError(f"the loss or a weight was not finite at or before step {self.step}")

    def finished(self):
        """At the last step, or solved as two evaluations in a row say."""
        solved = [line["accuracy"] >= self.settings["stop_at"] > 0 for line in self.log[-2:]]
        return self.step >= self.settings["max_steps"] or solved == [True, True]

    def state_dict(self):
        model, weights, maps = (module.state_dict() for module in (self.average, self.model, self.maps))
        plain = ("settings", "step", "seconds", "log", "recent_loss")
        return dict({name: getattr(self, name) for name in plain}, model=model, weights=weights, maps=maps,
                    loss_sum=self.loss_sum.item(), optimizers=[o.state_dict() for o in self.optimizers])

    def load_state_dict(self, state):
        saved = [state["model"], state["weights"], state["maps"], *state["optimizers"]]
        for part, values in zip([self.average, self.model, self.maps, *self.optimizers], saved, strict=True):
            part.load_state_dict(values)
        for name in ("step", "seconds", "log", "recent_loss"):
            setattr(self, name, state[name])
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
            self.tensors, graph = [x.clone() for x in tensors], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.function(*self.tensors)
            self.graph = graph  # recording has run nothing: the replay below is this call
        for place, x in zip(self.tensors, tensors):
            place.copy_(x)
        self.graph.replay()

# A run's folder. Every file in it is replaced whole, the checkpoint first: whenever a run is killed, what
# lies there can be resumed and evaluated, or is free for another start.
@contextlib.contextmanager
def hold(folder, resume):
    """Have a run's folder, alone where there are locks -> a list of the signals that have asked to stop. A
    new run gets a new folder or a free one, which is left as it was if the start fails."""
    made = [path for path in (folder, *folder.parents) if not resume and not path.exists()]
    with contextlib.ExitStack() as stack:
        signals = noted(stack)
        @stack.callback
        def unmake():  # what is empty in the end
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
        made and folder.mkdir(parents=True)
        lock = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out_dir {folder}: another process is writing this run") from None
        except OSError:
            pass  # a file system without locks
        if not resume and {*os.listdir(folder)} - {"ckpt.pt.tmp"}:
            raise UserError(f"--out_dir {folder}: holds files already; --resume goes on with a run")
        yield signals

def save(run, folder, *last_line):
    """Write a run; `last_line` of its log is of the test set, which no checkpoint knows."""
    torch.save(run.state_dict(), ckpt := io.BytesIO())  # not into the file: torch hides why a disk refuses
    config, log = json.dumps(run.settings, indent=1), map(json.dumps, [*run.log, *last_line])
    for name, content in (("ckpt.pt", ckpt.getvalue()), ("config.json", f"{config}\n".encode()),
                          ("log.jsonl", "".join(f"{line}\n" for line in log).encode())):
        with whole_file(folder / name) as file:
            file.write(content)

def train(run, folder, signals):
    """Train until solved or to the last step -> the result on the test set; None if a signal stops it."""
    s, begin = run.settings, time.perf_counter() - run.seconds
    while True:
        # what is due now; the first save comes after the step that compiles and takes the memory
        run.seconds, stop, first = time.perf_counter() - begin, bool(signals), run.step == 1
        end = run.step % s["eval_every"] == 0 or run.step >= s["max_steps"]
        due = end and run.step > (run.log[-1]["step"] if run.log else 0)
        look = run.step % 50 == 0

        # measure and save, only if all is finite
        if due or stop or first or look:
            run.check()
        if due:
            run.log.append(or_uncompiled(run.evaluate, run.validation, "validation"))
            run.loss_sum.zero_()
        if due or stop or first:
            save(run, folder)

        # tell how it goes
        text = f"step {run.step:6,} | loss {run.recent_loss or '-':.4} | {run.seconds / 60:.2f} min"
        if due:
            x, left = run.log[-1], (s["max_steps"] / run.step - 1) * run.seconds / 60
            tell(f"{text}, at most {left:.1f} left | {x['samples'] / run.seconds:.0f} graphs/s | exact "
                 f"{percent(x['accuracy'])} %, tokens {' '.join(map(percent, x['token_accuracy']))}")
        elif look:
            tell(text, live=True)

        # the test graphs are read here only
        if stop or run.finished():
            return None if stop else or_uncompiled(run.evaluate, run.test, "test")
        or_uncompiled(run.train_step)

def main(argv=None):
    parser, given = parse(argv)
    settings, resume = {}, given.get("resume", False)
    try:
        if not resume or "out_dir" not in given:
            settings = settle(given)
        folder = Path(given.get("out_dir") or default_folder(given, settings))
        with hold(folder, resume) as signals:
            if resume:
                settings, state = reopen(folder, given)
            s, name = settings, shlex.quote("./" * (str(folder)[0] == "-") + str(folder))
            tell(f"{s['model']}, {objective(s)}: making the model and the graphs ...")
            run = Run(s)
            record = s["record"] = s.get("record") or provenance(argv, run.device)
            if resume:
                with readable(folder / "ckpt.pt"):
                    run.load_state_dict(state)
                record["resumed_at"].append(run.step)
            tell(f"{run.task}, chance {percent(1 / s['deg'])} %; {record['device_name']}, {s['dtype']};\n"
                 f"{sum(p.numel() for p in run.model.parameters()):,} parameters in {s['n_layer']} layers of "
                 f"{s['n_embd']}; at most {s['max_steps']:,} steps of {s['batch_size']} graphs, into {name}"
                 + "\ncompiling, a minute or two the first time, then seconds ..." * s["compile"])
            line = train(run, folder, signals)
            if line is None:
                tell(f"saved at step {run.step:,}; to go on: python train.py --resume --out_dir {name}")
                sys.exit(128 + signals[0])
            save(run, folder, line)
            tell(f"{'solved' if line['accuracy'] >= 0.99 else 'not solved'}: {percent(line['accuracy'])} % "
                 f"exact match on {line['n_graphs']:,} unseen graphs after {run.step:,} steps, "
                 f"{line['samples']:,} graphs, {run.seconds / 60:.1f} minutes\npython eval.py {name}")
    except UserError as error:
        parser.error(f"{'--' if str(error).split()[0] in settings else ''}{error}")
    except OSError as error:
        parser.error(f"--out_dir {folder}: {error}" + "; the files there are whole" * folder.is_dir())
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: stopped: {error}; {folder} keeps what was saved before\n")
    except (MemoryError, RuntimeError) as error:
        if not settings or not out_of_memory(error):
            raise
        sizes, usual = "n_train n_test batch_size n_embd n_layer num_nodes deg path_len d_state", settle({})
        name = max(sizes.split(), key=lambda name: (settings[name] / usual[name], name in given))
        parser.error(f"--{name} {settings[name]}: takes more memory than there is; a smaller one works")

if __name__ == "__main__":
    run_script(main)
