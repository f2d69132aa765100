"""Evaluate runs of train.py: rebuild each model from its folder, measure it, print a line a run.

    python eval.py out/RUN [out/RUN ...]              # exact match, the paper's, accuracy of each token
    python eval.py out/RUN --show 4 --layers          # answers, right and wrong; what each layer has found
    python eval.py out/RUN ... --plot curves.png      # accuracy against graphs seen (needs matplotlib)
    python eval.py out/RUN ... --json >> runs.jsonl   # a row a run, to be kept
    python eval.py assets/runs.jsonl --bars bars.png  # from kept rows: the README's table and figure
"""
import contextlib
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Graphs, Parser, PathStar, UserError, held_out, inputs, load, number, run_script, some_path
from mamba import Mamba, MambaConfig, set_compile
from model import GPT, GPTConfig, generate, out_of_memory, precision

# The paper's exact match from scratch, read off its charts (+-0.015): standard, teacherless, reverse.
PAPER = {"gpt": {"G(2,5)": (0.50, 1.00, 1.00), "G(2,20)": (0.49, 0.00, 1.00), "G(5,5)": (0.19, 0.00, 1.00),
                 "G(10,5)": (0.08, 0.00, 1.00), "G(20,5)": (0.00, 0.00, 0.00)},
         "mamba": {"G(2,5)": (0.49, 0.00, 0.99), "G(2,20)": (0.49, 0.00, 0.97), "G(5,5)": (0.20, 0.00, 1.00),
                   "G(10,5)": (0.09, 0.00, 1.00), "G(20,5)": (0.00, 0.00, 0.00)}}
TITLES = {"gpt": "GPT", "mamba": "Mamba"}
COLOURS = {"standard": "#d55e00", "teacherless": "#e69f00", "teacherless + look-ahead": "#56b4e9",
           "teacherless + look-ahead + deep": "#0072b2", "reverse": "#009e73"}  # in the figure, in this order

def objective(settings):
    """The name of what a run is trained on: the paper's objective, and what is added to it."""
    name = " ".join(x for x in ("teacherless", "reverse") if settings[x]) or "standard"
    return name + " + look-ahead" * bool(settings["ahead"]) + " + deep" * settings["deep"]

def paper_accuracy(model, task, name):
    """The paper's figure for the objective of this very name (or None), on a task as "G(2,5), N = 50"."""
    cells = PAPER[model].get(task.split(", N")[0], ())
    return dict(zip(("standard", "teacherless", "reverse"), cells)).get(name)

def percent(x):
    """A fraction in %, one decimal, cut off and not rounded: 100.0 says that nothing is wrong."""
    return "-" if x is None else f"{int(1000 * x + 1e-4) / 10:.1f}"

# -------------------------------------------------------------------------------------------------------
# Exact match, and the Clever Hans cheat.

@torch.no_grad()
def predict(model, task, prefix, target, teacherless, batch_size=None):
    """Greedy predictions behind the true tokens (or `$`), long, and their cross-entropies, float, both
    (n, target_len) on the CPU; prefix and target may be of any integer type, on any device."""
    # large ones for a GPU; all of one shape, the last one padded, so that a compiled model compiles once
    device, found = next(model.parameters()).device, []
    size = min(len(target), batch_size or (125 if device.type == "cpu" else 1000))
    for x, y in zip(prefix.to(device).split(size), target.to(device).split(size)):
        x, y = inputs(task, x.long(), y.long(), teacherless), y.long()
        logits = model(F.pad(x, (0, 0, 0, size - len(x))))   # (size, seq_len - 1, vocab)
        logits = logits[:len(y), -task.target_len:].float()  # (b, l, vocab)
        found.append((logits.argmax(-1), F.cross_entropy(logits.transpose(1, 2), y, reduction="none")))
    return [torch.cat(pieces).cpu() for pieces in zip(*found)]

def evaluate(model, task, graphs, teacherless, batch_size=None):
    """Measure a model on Graphs -> dict of n_graphs, loss (nats a token), accuracy (of whole paths, greedy),
    token_accuracy (list); in standard training, fed a wrong arm (section 4.3), also follows: shares of graphs
    with its second, ..., last node named; clever_hans: with all but the last (it may name the goal there)."""
    answer, loss = predict(model, task, graphs.prefix, graphs.target, teacherless, batch_size)
    right = (answer == graphs.target).double()  # (n, l); a path written greedily is right if a whole row is
    result = dict(n_graphs=len(right), loss=loss.mean().item(),
                  accuracy=right.amin(1).mean().item(), token_accuracy=right.mean(0).tolist())
    if not teacherless and not task.reverse and task.deg > 1 and task.path_len > 3:
        wrong = torch.cat([graphs.target[:, :1], graphs.arms[:, 1]], 1)  # (n, l)
        answer, _ = predict(model, task, graphs.prefix, wrong, False, batch_size)
        follows = (answer[:, 2:] == wrong[:, 2:]).double()  # (n, l - 2)
        result |= dict(clever_hans=follows[:, :-1].amin(1).mean().item(), follows=follows.mean(0).tolist())
    return result

# -------------------------------------------------------------------------------------------------------
# A run's folder read back. All of it stands in ckpt.pt; config.json and log.jsonl are for people to read.
# The settings that may change when a run is resumed, and all that a checkpoint holds.
FREE = {*"max_steps stop_at eval_every device compile cuda_graph out_dir train_file test_file".split()}
NEEDED = FREE | {*"""preset model teacherless reverse plain ahead deep deg path_len num_nodes n_train n_test
    seed dtype n_layer n_embd n_head short_conv mimetic d_state a_scale batch_size optimizer lr muon_lr
    warmup decay weight_decay average record""".split()}

def pick_device(name):
    """--device -> torch.device; "auto" is the first of cuda, mps and cpu that is there."""
    there = [d for d in ("cuda", "mps", "cpu") if d == "cpu" or getattr(torch, d).is_available()]
    with contextlib.suppress(RuntimeError, AssertionError):
        device = torch.empty(1, device=there[0] if name == "auto" else name).device
        if device.type == "cuda":  # what names no device, as a CUDA graph, is to use this one too
            torch.cuda.set_device(device)
        if device.type in there:
            return device
    raise UserError(f"--device {name!r}: not on this machine, which has {', '.join(there)}")

def build(s):
    """The task and a freshly initialised model of a run's settings (dict)."""
    task = PathStar(s["deg"], s["path_len"], s["num_nodes"], s["reverse"])
    if s["model"] == "gpt":
        sizes = s["n_layer"], s["n_head"], s["n_embd"], s["short_conv"], s["mimetic"]
        return task, GPT(GPTConfig(task.vocab_size, task.seq_len - 1, *sizes))
    sizes = s["n_layer"], s["n_embd"], s["d_state"]
    return task, Mamba(MambaConfig(task.vocab_size, *sizes, a_scale=s["a_scale"]))

@contextlib.contextmanager
def readable(file):
    """Turn whatever a damaged or foreign file makes its readers raise into one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{file}: cannot be read, damaged or not a run's ({str(error)[:99]!r})") from None

def load_run(folder):
    """A run's settings and checkpoint (dicts)."""
    ckpt = Path(folder, "ckpt.pt")
    with readable(ckpt), zipfile.ZipFile(ckpt) as archive:
        # torch.load compares no checksums, and leaves the memory of what is marked as a folder as it was
        if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
            raise zipfile.BadZipFile("a checksum or an attribute is wrong")
        checkpoint = torch.load(ckpt, map_location="cpu", weights_only=True)
        settings = checkpoint["settings"]
        # what is missing, or of another type, is to raise here
        [settings[name] for name in NEEDED], checkpoint["step"] + checkpoint["seconds"], [*checkpoint["log"]]
    return settings, checkpoint

def load_model(folder, device="cpu"):
    """settings, checkpoint, task and trained model of a run: the average of its weights, if it has one."""
    settings, checkpoint = load_run(folder)
    with readable(Path(folder, "ckpt.pt")):
        task, model = build(settings)
        model.load_state_dict(checkpoint["model"])
    return settings, checkpoint, task, model.to(device).eval()

def reopen(folder, given):
    """Settings and checkpoint of a run to go on with. Raises UserError if the flags given ask for another."""
    settings, checkpoint = load_run(folder)
    for name in given.keys() - {"resume", "out_dir"}:  # a file may have moved, but not come or gone
        if given[name] != settings[name] and (name not in FREE or settings[name] is None):
            raise UserError(f"--{name} {given[name]}: the run has {settings[name]}; leave the flag out")
    return settings | {name: given[name] for name in FREE if name in given}, checkpoint

def provenance(argv, device):
    """How a run is made -> dict, its record; a "+" behind the commit says that files were changed since."""
    ask = lambda shell: subprocess.getoutput(f"({shell}) 2>/dev/null") or None
    git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --exclude='*' --dirty=+"
    processor = ask("sed -n '/^model name/{s/.*: //p;q}' /proc/cpuinfo") or ask("uname -m")
    return dict(command=f"python train.py {shlex.join(sys.argv[1:] if argv is None else argv)}",
                commit=ask(git), torch=str(torch.__version__), python=sys.version.split()[0], resumed_at=[],
                device=device.type, threads=torch.get_num_threads(), date=time.strftime("%Y-%m-%d"),
                device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else processor)

def load_file(s, flag, task):
    """The Graphs of the file that a setting names, or None. s (dict) keeps its full path and a checksum."""
    if s[flag]:
        path = s[flag] = str(Path(s[flag]).absolute())
        try:
            graphs = load(path, task)
        except UserError as error:
            raise UserError(f"--{flag} {error}") from None
        content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if s.setdefault(flag.replace("file", "sha"), content) != content:
            raise UserError(f"--{flag} {path}: is not the file that the run began with; name that one")
        return graphs

def test_graphs(settings, task, test_file=None, n_test=None):
    """A run's own test graphs or those of another file, all or the first n_test of them -> Graphs."""
    graphs = load_file(dict(test_file=test_file) if test_file else settings, "test_file", task)
    graphs = graphs or held_out(task, settings["n_test"])[1]
    if n_test and n_test > len(graphs.target):
        raise UserError(f"--n_test {n_test}: there are {len(graphs.target)} test graphs")
    return Graphs(*(x[:n_test] for x in graphs))

# -------------------------------------------------------------------------------------------------------
# The table, the examples, the layers, the plots.

def measure(folder, s, checkpoint, task, model, graphs):
    """Evaluate a run -> dict, its row (accuracies as fractions of 1)."""
    result, name = evaluate(model, task, graphs, s["teacherless"]), objective(s)
    return dict(
        run=str(folder), task=str(task), model=s["model"], objective=name, seed=s["seed"], **result,
        **s["record"], settings={key: s[key] for key in s if key != "record"},
        minutes=round(checkpoint["seconds"] / 60, 2), steps=checkpoint["step"],
        samples=checkpoint["step"] * s["batch_size"], note=None, table=False, chance=1 / task.deg,
        solved=result["accuracy"] >= 0.99, paper=paper_accuracy(s["model"], str(task), name))

def report(row):
    """A row as a line of text."""
    return (f"{row['task']}  {TITLES[row['model']]:5}  {row['objective']:31}  seed {row['seed']}  exact "
            f"{percent(row['accuracy']):>5} % (paper {percent(row.get('paper')):>5})  tokens "
            f"{' '.join(map(percent, row.get('token_accuracy') or []))} %  Clever Hans "
            f"{percent(row.get('clever_hans')):>5} %  {row.get('run') or row['command']}")

def cell(rows, *key):
    """The rows of a task, an objective and a model: its seeds."""
    return [row for row in rows if (row["task"], row["objective"], row["model"]) == key]

def summary(rows):
    """Rows -> the README's table, lines of Markdown: the mean over the seeds, their range, median minutes."""
    yield "|graph|objective|GPT, %|paper|seeds|minutes|Mamba, %|paper|seeds|minutes|"
    yield "|---" * 10 + "|"
    for task, name in dict.fromkeys((row["task"], row["objective"]) for row in rows):
        line = [task.removesuffix(", N = 50"), name]
        for model in PAPER:
            seeds, paper = cell(rows, task, name, model), percent(paper_accuracy(model, task, name))
            exact, devices = [row["accuracy"] for row in seeds], sorted({row["device"] for row in seeds})
            took = [(x, statistics.median(r["minutes"] for r in seeds if r["device"] == x)) for x in devices]
            mean, low, high = (percent(f(exact)) if seeds else "-" for f in (statistics.fmean, min, max))
            line += [mean + f" ({low}-{high})" * (low != high), paper.removesuffix(".0"), str(len(seeds)),
                     ", ".join(f"{minutes:.1f} {device}" for device, minutes in took) or "-"]
        yield f"|{'|'.join(line)}|"

def show(task, model, graphs, teacherless, k):
    """k test graphs with the model's own answer (generated): half of them wrong, if there are as many."""
    right = (predict(model, task, graphs.prefix, graphs.target, teacherless)[0] == graphs.target).all(1)
    order = right.int().argsort()  # the wrong ones first
    chosen = torch.cat([order[:k - k // 2], order[len(order) - k // 2:]]).unique().tolist()
    prefix = graphs.prefix[chosen].long().to(next(model.parameters()).device)
    for i, answer in zip(chosen, generate(model, task, prefix, teacherless)):
        text, said = (task.decode(graphs.prefix[i], path) for path in (graphs.target[i], answer))
        yield f"{'right' if right[i] else 'WRONG'}  {text}   model: {said.split('=')[1]}"

@torch.no_grad()
def read_layers(task, model, graphs, teacherless):
    """Accuracy of each token, as the head reads it behind each layer: where in the model it is found."""
    device, right = next(model.parameters()).device, 0
    for prefix, target in zip(*(x.long().to(device).split(125) for x in graphs[:2])):
        fed = inputs(task, prefix, target, teacherless)
        x = model.features(fed, every=True, last=task.target_len)  # (n_layer, b, l, d)
        right += (model.head(x).argmax(-1) == target).sum(1)       # (n_layer, l)
    for layer, tokens in enumerate((right / len(graphs.target)).tolist(), 1):
        yield f"layer {layer:2}: tokens % {' '.join(map(percent, tokens))}"

def plot_curves(runs, file):
    """Against graphs seen: each node's accuracy for one run (folder, settings, log), else exact match."""
    import matplotlib.figure
    ax = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained").subplots()
    for folder, s, log in runs:
        seen, exact = [line["samples"] for line in log], [100 * line["accuracy"] for line in log]
        if len(runs) > 1:
            # matplotlib hides a label that begins with _, and reads what stands between $ as mathematics
            ax.plot(seen, exact, label="./" * (folder[0] == "_") + folder.replace("$", r"\$"))
            continue
        l = s["path_len"]
        for i, node in enumerate(["start", *(f"node {i}" for i in range(1, l - 1)), "goal"]):
            tokens = [100 * line["token_accuracy"][l - 1 - i if s["reverse"] else i] for line in log]
            ax.plot(seen, tokens, color=matplotlib.colormaps["viridis"](0.95 * i / (l - 1)), label=node)
        ax.plot(seen, exact, "k--", label="whole path")
        ax.set_title(f"G({s['deg']},{l}), N = {s['num_nodes']}: {TITLES[s['model']]}, {objective(s)}, "
                     f"{s['n_layer']} layers x {s['n_embd']}, batch {s['batch_size']}", fontsize="medium")
    for deg in sorted({s["deg"] for _, s, _ in runs}):
        ax.axhline(100 / deg, color="grey", linewidth=1, linestyle=":", label=f"chance, 1/{deg}")
    ax.set(xlabel="training graphs seen", ylabel="accuracy on unseen graphs, %", ylim=(-2, 102))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.figure.legend(fontsize="small", loc=f"outside {'right' if len(runs) == 1 else 'lower'} center")
    ax.figure.savefig(file, dpi=150)

def plot_bars(rows, file):
    """The paper's main figure redrawn: exact match by graph and objective, a line of bars a model; ours is
    the mean over the seeds with their range, and beside it stands the paper's for the same objective."""
    import matplotlib.figure
    if others := {row["objective"] for row in rows} - COLOURS.keys():
        print(f"--bars: leaves out the rows of {', '.join(sorted(others))}", file=sys.stderr)
    rows = [row for row in rows if row["objective"] in COLOURS]
    models, legend = [model for model in PAPER if any(row["model"] == model for row in rows)], {}
    figure = matplotlib.figure.Figure(figsize=(12.5, 1 + 1.8 * len(models)), layout="constrained")
    for model, ax in zip(models, figure.subplots(len(models), squeeze=False)[:, 0]):
        x, ticks = 0, {}
        for task in dict.fromkeys(row["task"] for row in rows if row["model"] == model):
            left, chance = x, 100 / int(task[2:task.index(",")])
            for name, colour in COLOURS.items():
                ours = [row["accuracy"] for row in cell(rows, task, name, model)]
                paper = [paper_accuracy(model, task, name)] if ours else []
                for values, hue, text in ((ours, colour, name), (paper, "#c4c4c4", "the paper's")):
                    if values and None not in values:
                        mean, low, high = (100 * f(values) for f in (statistics.fmean, min, max))
                        bar = ax.bar(x, mean, 0.9, yerr=[[mean - low], [high - mean]], color=hue, label=text)
                        ax.bar_label(bar, [percent(mean / 100).removesuffix(".0")], fontsize=8, padding=1)
                        x += 1
            ax.hlines(chance, left - 0.6, x - 0.4, "black", ":", linewidth=1, label="chance, 1/d")
            ticks[task], x = (left + x - 1) / 2, x + 1
        ax.set(xticks=[*ticks.values()], xticklabels=[*ticks], xlim=(-1, x - 1), ylim=(0, 116),
               ylabel=f"{TITLES[model]}: exact match, %")
        legend |= dict(zip(*ax.get_legend_handles_labels()[::-1]))
    figure.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, dpi=150)

def main(argv=None):
    parser = Parser(__doc__)
    flag, yes = parser.add_argument, dict(action="store_true")
    flag("runs", nargs="+", metavar="RUN", help="a run's folder, or a .jsonl file of rows of --json")
    flag("--show", type=number(int, 1, 1000), metavar="K", help="print K test graphs with the model's answer")
    flag("--layers", **yes, help="print what the head reads behind each layer: accuracy of each token")
    flag("--test_file", type=some_path, metavar="FILE", help="evaluate on this file of official text")
    flag("--n_test", type=number(int, 1, 10**8), metavar="N", help="evaluate on the first N test graphs")
    flag("--json", **yes, help="print the rows as JSON objects")
    flag("--plot", type=some_path, metavar="FILE.png", help="draw accuracy against graphs seen")
    flag("--bars", type=some_path, metavar="FILE.png", help="draw the exact match beside the paper's")
    flag("--device", type=some_path, help="cuda, mps or cpu (default: the first one there)")
    flag("--no-compile", **yes, help="run nothing compiled (default: as the run did)")
    args = parser.parse_args(argv)
    kept = [run for run in args.runs if run.endswith(".jsonl") and not Path(run).is_dir()]
    if kept and any(vars(args)[x] for x in "show layers test_file n_test plot device no_compile".split()):
        parser.error(f"{kept[0]}: all but the table, --json and --bars need a run's folder")
    rows, curves, out, errors = [], [], [], []
    for run in args.runs:  # a bad one is named, and does not keep the others from the table
        try:
            if run in kept:
                with readable(run):  # as one array, so that an error names the line
                    found = json.loads("[%s]" % ",\n".join(Path(run).read_text().splitlines()))
                    found = [row for row in found if row["table"]] or found
                    list(summary(found)), list(map(report, found))[0]  # raises where a row lacks something
                    rows += found
                continue
            s, checkpoint, task, model = load_model(run, device := pick_device(args.device or "auto"))
            s["model"] == "mamba" and set_compile(s["compile"] and not args.no_compile)  # a GPT needs none
            graphs = test_graphs(s, task, args.test_file, args.n_test)
            with precision(s["dtype"], device):
                rows.append(measure(run, s, checkpoint, task, model, graphs))
                out += ["", run, *read_layers(task, model, graphs, s["teacherless"])] if args.layers else []
                out += ["", run, *show(task, model, graphs, s["teacherless"], args.show)] if args.show else []
            curves += [(run, s, checkpoint["log"])] if args.plot else []
        except Exception as error:
            if not (memory := out_of_memory(error)) and not isinstance(error, (UserError, OSError)):
                raise
            error = "takes more memory than there is; a smaller --n_test works" if memory else str(error)
            errors.append(error if error.startswith(run) else f"{run}: {error}")
    try:
        for draw, what, file in ((plot_curves, curves, args.plot), (plot_bars, rows, args.bars)):
            if what and file:
                draw(what, file)
    except Exception as error:  # of matplotlib: no such format, no such folder, no LaTeX for it
        errors.append(f"--plot or --bars: {' '.join(str(error).split())}")
    readme = kept == args.runs and rows and not args.json
    sys.stderr.write("".join(f"{parser.prog}: error: {error}\n" for error in errors))
    for line in summary(rows) if readme else map(json.dumps if args.json else report, rows):
        print(line, flush=True)
    print(*out, sep="\n", end="\n" * bool(out), file=sys.stderr if args.json else sys.stdout)
    errors and sys.exit(2)

if __name__ == "__main__":
    run_script(main)
