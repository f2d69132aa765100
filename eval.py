"""Evaluate runs of train.py: rebuild each model from its folder and print one table.

    python eval.py out/RUN [out/RUN ...]          # the table, beside the paper's figures
    python eval.py out/RUN --show 4               # test graphs with the model's answer, right and wrong
    python eval.py out/RUN --layers               # what the head reads behind each layer
    python eval.py out/RUN ... --plot curves.png  # accuracy against samples seen (needs matplotlib)
    python eval.py out/* --json > runs.jsonl      # rows to keep; eval.py reads them in place of folders

Exact match: the whole path right under greedy decoding. It takes one forward pass, not l: a path that is
generated token by token equals the target exactly when every prediction behind the true tokens does.
"""
import argparse
import itertools
import json
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Graphs, Parser, PathStar, UserError, inputs, load, number, sample_test_set, some_path
from mamba import Mamba, MambaConfig
from model import GPT, GPTConfig, generate

# Exact match in % from scratch, read off the authors' charts (+-1.5): standard, teacherless, reverse.
PAPER = {
    "gpt": {"G(2,5)": (50, 100, 100), "G(2,20)": (49, 0, 100), "G(5,5)": (19, 0, 100),
            "G(10,5)": (8, 0, 100), "G(20,5)": (0, 0, 0)},
    "mamba": {"G(2,5)": (49, 0, 99), "G(2,20)": (49, 0, 97), "G(5,5)": (20, 0, 100),
              "G(10,5)": (9, 0, 100), "G(20,5)": (0, 0, 0)},
}


def objective(settings):
    names = {(False, False): "standard", (True, False): "teacherless",
             (False, True): "reverse", (True, True): "teacherless reverse"}
    return names[settings["teacherless"], settings["reverse"]]


def full_objective(settings):
    """`objective`, and the losses that without teacherless inputs make it another one than the paper's."""
    extras = (("ahead", " + look-ahead"), ("deep", " + deep")) if not settings["teacherless"] else ()
    return objective(settings) + "".join(extra for name, extra in extras if settings.get(name))


def paper_accuracy(settings, name):
    """The paper's exact match for this graph, model and named objective, a fraction of 1 or None."""
    cells = PAPER[settings["model"]].get(f"G({settings['deg']},{settings['path_len']})")
    names = ("standard", "teacherless", "reverse")
    return cells[names.index(name)] / 100 if cells and name in names else None


# -------------------------------------------------------------------------------------------------------
# Measuring a model.


@torch.no_grad()
def predict(model, task, prefix, target, teacherless, batch_size, enough=None):
    """Greedy predictions behind the true tokens (or `$`) and cross-entropies, both (n, target_len).

    enough(seen, wrong), asked after each batch, ends it early: then there are `seen` rows.
    """
    device, n, wrong, answers, losses = next(model.parameters()).device, len(target), 0, [], []
    for i in range(0, n, batch_size):
        y = target[i:i + batch_size].to(device)
        x = inputs(task, prefix[i:i + batch_size].to(device), y, teacherless)
        if len(x) < batch_size < n:  # one shape for all batches: a compiled model compiles once
            x = torch.cat([x, x[:1].expand(batch_size - len(x), -1)])
        logits = model(x)[:len(y), -task.target_len:].float()
        answers.append(logits.argmax(-1).cpu())
        losses.append(F.cross_entropy(logits.transpose(1, 2), y, reduction="none").cpu())
        if enough:
            seen = i + len(y)
            wrong += (answers[-1] != target[i:seen]).any(1).sum().item()
            if enough(seen, wrong):
                break
    return torch.cat(answers), torch.cat(losses)


def evaluate(model, task, graphs, teacherless, batch_size=256, enough=None):
    """One forward pass over Graphs, or over the first of them (see `predict`) -> dict of test_graphs
    (how many), loss (nats a token), accuracy (exact match) and token_accuracy (a list along the target),
    fractions of 1; for standard training also what `clever_hans` says, where there is a wrong arm."""
    answer, loss = predict(model, task, graphs.prefix, graphs.target, teacherless, batch_size, enough)
    graphs = Graphs(*(x[:len(answer)] for x in graphs))
    right = answer == graphs.target
    result = dict(test_graphs=len(answer), loss=loss.mean().item(),
                  accuracy=right.all(1).float().mean().item(),
                  token_accuracy=right.float().mean(0).tolist())
    if not teacherless and not task.reverse and task.deg > 1 and task.path_len > 3:
        result |= clever_hans(model, task, graphs, batch_size)
    return result


def clever_hans(model, task, graphs, batch_size=256):
    """What a standard model does when it is fed a WRONG arm, node by node (section 4.3) -> dict of
    follows, a list: shares of graphs where it names that arm's second node, ..., its last, and
    clever_hans: the share where it names all but the last, and so has planned nothing. (In training the
    last node always was the goal, which a model may as well copy from the prefix.)"""
    wrong = torch.cat([graphs.target[:, :1], graphs.arms[:, 1]], 1)
    answer, _ = predict(model, task, graphs.prefix, wrong, False, batch_size)
    follows = (answer[:, 2:] == wrong[:, 2:]).float()
    return dict(clever_hans=follows[:, :-1].amin(1).mean().item(), follows=follows.mean(0).tolist())


# -------------------------------------------------------------------------------------------------------
# Runs: a folder with config.json (the settings), ckpt.pt and log.jsonl.


# Settings that may change when a run is resumed: they decide where and for how long, not what is computed.
FREE = ("max_steps", "stop_at", "eval_every", "device", "compile", "out_dir")


def pick_device(name):
    """--device -> torch.device; "auto" is the first of cuda, mps and cpu that is there."""
    backends = (("cuda", torch.cuda), ("mps", torch.backends.mps))
    there = [d for d, backend in backends if backend.is_available()] + ["cpu"]
    name = there[0] if name == "auto" else name
    if name.split(":")[0] not in there:
        raise UserError(f"--device {name!r}: not on this machine, which has {', '.join(there)}")
    try:
        return torch.empty(1, device=name).device
    except RuntimeError as error:
        raise UserError(f"--device {name!r}: {str(error).splitlines()[0]}") from None


def build(settings):
    """The task and a freshly initialised model of a run's settings (dict)."""
    task = PathStar(settings["deg"], settings["path_len"], settings["num_nodes"], settings["reverse"])
    if settings["model"] == "gpt":
        kind, config = GPT, GPTConfig
        names, fixed = ("n_head", "n_embd", "short_conv"), dict(block_size=task.seq_len - 1)
    else:
        kind, config = Mamba, MambaConfig
        names, fixed = ("d_state", "a_scale"), dict(d_model=settings["n_embd"])
    shared = {name: settings[name] for name in ("n_layer", *names)}
    return task, kind(config(vocab_size=task.vocab_size, **fixed, **shared))


def load_run(folder):
    """A run's settings and checkpoint (dicts).

    Raises UserError naming the file that is missing, damaged or foreign.
    """
    config, ckpt = Path(folder, "config.json"), Path(folder, "ckpt.pt")
    for file in (config, ckpt):
        if not file.is_file():
            raise UserError(f"{folder}: not a run of train.py (it has no {file.name})")
    fixed = lambda s: {name: value for name, value in s.items() if name not in FREE}
    file = config
    try:
        settings = json.loads(config.read_text())
        wanted, file = fixed(settings), ckpt
        with zipfile.ZipFile(ckpt) as archive:  # torch.load compares no checksums, and reads no "folders"
            damaged = archive.testzip() or any(entry.external_attr for entry in archive.infolist())
        if damaged:
            raise zipfile.BadZipFile("a checksum or an attribute is wrong")
        checkpoint = torch.load(ckpt, map_location="cpu", weights_only=True)
        same = fixed(checkpoint["settings"]) == wanted
    except Exception as error:  # whatever a damaged file makes the readers raise
        reason = str(error).split("\n")[0][:100]
        raise UserError(f"{file}: cannot be read, damaged or not of this program ({reason})") from None
    if not same:
        raise UserError(f"{ckpt}: belongs to a run with other settings than {config}")
    return checkpoint["settings"] | settings, checkpoint


def load_model(folder, device="cpu"):
    """settings, task and trained model of a run."""
    settings, checkpoint = load_run(folder)
    try:
        task, model = build(settings)
        model.load_state_dict(checkpoint["model"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: the checkpoint does not fit its settings ({reason})") from None
    return settings, checkpoint, task, model.to(device).eval()


def percent(x):
    return "-" if x is None else f"{100 * x:.1f}"


# -------------------------------------------------------------------------------------------------------
# The table, the examples, the plots.


def measure(folder, device, test_file=None, n_test=None):
    """Evaluate one run -> dict, the row of the table (accuracies as fractions of 1)."""
    settings, checkpoint, task, model = load_model(folder, device)
    graphs = test_graphs(settings, task, test_file, n_test)
    result = evaluate(model, task, graphs, settings["teacherless"])
    first_node = result["token_accuracy"][-2 if task.reverse else 1]
    samples = checkpoint["step"] * settings["batch_size"]
    name = full_objective(settings)
    return dict(run=str(folder), model=settings["model"], objective=name, task=str(task),
                seed=settings["seed"], step=checkpoint["step"], samples=samples,
                seconds=checkpoint["seconds"], first_node=first_node, chance=1 / task.deg,
                paper=paper_accuracy(settings, name), **result)


def read_rows(file):
    """Rows of `measure` that --json printed into a file."""
    try:
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        if not rows:
            raise ValueError("it is empty")
        list(table(rows))  # a row that lacks something has no line in the table
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not the output of eval.py --json ({error!r})"[:200]) from None
    return rows


def load_flag(flag, path, task):
    """The Graphs of the file that a flag names, which its errors name too."""
    try:
        return load(path, task)
    except UserError as error:
        raise UserError(f"--{flag} {error}") from None


def test_graphs(settings, task, test_file=None, n_test=None):
    """The test set of a run's settings, or of what is asked for in their place -> Graphs."""
    path = test_file or settings["test_file"]
    if path:
        return load_flag("test_file", path, task)
    return sample_test_set(task, n_test or settings["n_test"])


def table(rows):
    """Rows of `measure` -> lines of text."""
    columns = ["run", "task", "model", "objective", "samples", "exact %", "paper %",
               "first node %", "chance %", "Clever Hans %", "follows %", "tokens %"]
    cells = [[r["run"], r["task"], r["model"], r["objective"], f"{r['samples']:,}",
              percent(r["accuracy"]), percent(r["paper"]),
              percent(r["first_node"]), percent(r["chance"]), percent(r.get("clever_hans")),
              " ".join(map(percent, r.get("follows", [None]))),
              " ".join(map(percent, r["token_accuracy"]))] for r in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    for row in [columns, *cells]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def load_examples(folder, device, test_file=None):
    """model, task, teacherless, and the prefixes and targets of 1,000 test graphs, on the device."""
    settings, _, task, model = load_model(folder, device)
    graphs = test_graphs(settings, task, test_file)
    return model, task, settings["teacherless"], *(x[:1000].to(device) for x in graphs[:2])


def show(folder, device, k, test_file=None):
    """k test graphs with the model's own answer (generated), the wrong ones first if there are any."""
    model, task, teacherless, prefix, target = load_examples(folder, device, test_file)
    answer = generate(model, task, prefix, teacherless)
    right = (answer == target).all(1)
    wrong, correct = (~right).nonzero()[:, 0].tolist(), right.nonzero()[:, 0].tolist()
    chosen = wrong[:max((k + 1) // 2, k - len(correct))] + correct
    yield f"{folder}: {len(wrong):,} of {len(right):,} test graphs are answered wrong; some of both kinds:"
    for i in chosen[:k]:
        text = task.decode(prefix[i], target[i])
        said = ",".join(map(str, (answer[i].flip(0) if task.reverse else answer[i]).tolist()))
        yield f"{'right' if right[i] else 'WRONG'}  {text}   model: {said}"


@torch.no_grad()
def read_layers(folder, device, test_file=None):
    """Accuracy of each token, as the head reads it behind each layer: where in the model it is found."""
    model, task, teacherless, prefix, target = load_examples(folder, device, test_file)
    x = model.features(inputs(task, prefix, target, teacherless), every=True)
    right = model.head(x[:, :, -task.target_len:]).argmax(-1) == target
    for layer, tokens in enumerate(right.float().mean(1).tolist(), 1):
        yield f"{folder}: layer {layer:2}: tokens % {' '.join(map(percent, tokens))}"


def read_log(folder):
    """The evaluations of a run, oldest first; a last line that a crash cut short is left out."""
    lines = []
    try:
        for line in Path(folder, "log.jsonl").read_text().splitlines():
            lines.append(json.loads(line))
    except OSError:
        raise UserError(f"{folder}: has no log.jsonl") from None
    except ValueError:
        pass
    return lines


def picture(text):
    """An argparse type: the name of a file that matplotlib can write."""
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must end in .png, .svg or .pdf")
    return text


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot and --bars need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def plot_curves(folders, file):
    """Accuracy against samples seen: of each token for one run, exact match for several."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for folder in folders:
        settings, log = load_run(folder)[0], read_log(folder)
        samples, name = [line["samples"] for line in log], f"{settings['model']}, {full_objective(settings)}"
        exact = [100 * line["accuracy"] for line in log]
        if len(folders) > 1:
            axes.plot(samples, exact, label=Path(folder).name)
            continue
        for i, accuracy in enumerate(zip(*(line["token_accuracy"] for line in log))):
            axes.plot(samples, [100 * x for x in accuracy], label=f"token {i}")
        axes.plot(samples, exact, "k--", label="whole path")
        if log and "clever_hans" in log[0]:
            axes.plot(samples, [100 * line["clever_hans"] for line in log], "k:", label="Clever Hans share")
        axes.set_title(f"{name}, G({settings['deg']},{settings['path_len']}), N = {settings['num_nodes']}")
    axes.axhline(100 / settings["deg"], color="grey", linewidth=1, linestyle=":", label="chance, 1/d")
    axes.set(xlabel="training graphs seen", ylabel="accuracy on unseen graphs, %", ylim=(-2, 102))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=150)


def plot_bars(rows, file):
    """The paper's main figure, redrawn: exact match by model, graph and objective, ours beside theirs.

    Ours is the mean of the seeds, with their range.
    """
    plt = pyplot()
    objectives = ("standard", "teacherless", "reverse")
    models = sorted({row["model"] for row in rows})
    tasks = sorted({(row["chance"], row["task"]) for row in rows}, reverse=True)
    figure, grid = plt.subplots(len(tasks), len(models), sharey=True, squeeze=False, layout="constrained",
                                figsize=(1.6 + 3.2 * len(models), 0.8 + 2.3 * len(tasks)))
    for ((chance, task), model), ax in zip(itertools.product(tasks, models), grid.flat):
        for x, name in enumerate(objectives):
            cell = [row for row in rows
                    if (row["model"], row["task"], row["objective"]) == (model, task, name)]
            if not cell:
                ax.text(x, 2, "not run", ha="center", fontsize="small", color="grey")
                continue
            ours = [100 * row["accuracy"] for row in cell]
            mean = sum(ours) / len(ours)
            spread = [[mean - min(ours)], [max(ours) - mean]]
            ax.bar(x - 0.2, mean, 0.38, color="#1f77b4", yerr=spread, label="this repository")
            ax.text(x - 0.2, max(ours) + 2, f"{mean:.0f}", ha="center", fontsize="small")
            paper = cell[0]["paper"]
            if paper is not None:
                ax.bar(x + 0.2, 100 * paper, 0.38, color="#bbbbbb", label="paper")
                ax.text(x + 0.2, 100 * paper + 2, f"{100 * paper:.0f}", ha="center", fontsize="small")
        ax.axhline(100 * chance, color="black", linewidth=1, linestyle=":", label="chance, 1/d")
        ax.set(title=f"{model}, {task}", xlim=(-0.6, 2.6), xticks=range(3), xticklabels=objectives,
               ylim=(0, 115))
    figure.supylabel("exact match on unseen graphs, %", fontsize="medium")
    labelled = dict(itertools.chain(*(zip(*ax.get_legend_handles_labels()[::-1]) for ax in grid.flat)))
    figure.legend(labelled.values(), labelled.keys(), fontsize="small", loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=150)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a run's folder, or a .jsonl file of what --json printed for some")
    parser.add_argument("--show", type=number(int, 1, 1000), metavar="K",
                        help="print K test graphs with the model's answer")
    parser.add_argument("--layers", action="store_true",
                        help="print what the head reads behind each layer: accuracy of each token")
    parser.add_argument("--test_file", type=some_path, metavar="FILE",
                        help="evaluate on this file of official text")
    parser.add_argument("--n_test", type=number(int, 1, 10**8), metavar="N",
                        help="test graphs (default: the run's)")
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object a run instead of the table")
    parser.add_argument("--plot", type=picture, metavar="FILE.png",
                        help="draw accuracy against samples seen: each token's for one run, "
                             "the exact match for several")
    parser.add_argument("--bars", type=picture, metavar="FILE.png",
                        help="draw the exact match of the runs beside the paper's")
    parser.add_argument("--device", default="cpu", help="cuda, mps or cpu (default cpu)")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        if args.plot or args.bars:
            pyplot()
        kept = [run for run in args.runs if run.endswith(".jsonl")]
        if kept and (args.test_file or args.n_test or args.show or args.layers or args.plot):
            raise UserError(f"{kept[0]}: all but the table, --json and --bars need a run's folder")
        if args.plot:
            plot_curves(args.runs, args.plot)
        rows = []
        for run in args.runs:
            rows += read_rows(run) if run in kept else [measure(run, device, args.test_file, args.n_test)]
        if args.bars:
            plot_bars(rows, args.bars)
        print(*([json.dumps(row) for row in rows] if args.json else table(rows)), sep="\n")
        for folder in args.runs if args.layers else []:
            print("", *read_layers(folder, device, args.test_file), sep="\n")
        for folder in args.runs if args.show else []:
            print("", *show(folder, device, args.show, args.test_file), sep="\n")
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
