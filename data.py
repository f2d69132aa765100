"""The task: path-star graphs, as graphs, as tokens, as the official text, as training batches.

A path-star graph G(d, l) has d arms of l - 1 nodes that all leave one start node. Given the shuffled edges,
the start and the goal (the last node of one arm), a model must write the path, l nodes (Bachmann & Nagarajan,
"The pitfalls of next-token prediction", ICML 2024, section 4).

    python data.py                             # a graph, its text, its tokens, what a model is fed
    python data.py --write test.txt --seed 1   # 20,000 graphs as official text; another seed: other graphs
"""
import contextlib
import math
import os
import re
import signal
import sys
import timeit
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

class UserError(ValueError):
    """A user's mistake: one line that names the setting, its value and what would work."""

class Graphs(NamedTuple):
    """n graphs of one task, integer tensors. `arms[:, 0]` is the arm that ends in the goal."""
    prefix: torch.Tensor  # (n, prefix_len): the shuffled edges, the start, the goal, `=`
    target: torch.Tensor  # (n, target_len): the path, goal first if the task is reversed
    arms: torch.Tensor    # (n, deg, path_len - 1): the nodes of every arm, from the start outwards

@dataclass(frozen=True)
class PathStar:
    """The graph G(deg, path_len) with labels drawn from `num_nodes` values, and its tokens. Raises UserError
    (a ValueError), naming the smallest value that works, where there is no such graph."""
    deg: int
    path_len: int
    num_nodes: int
    reverse: bool = False

    def __post_init__(self):
        for name, least in (("deg", 1), ("path_len", 2), ("num_nodes", 1 + self.num_edges)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: {self.graph} needs at least {least}")

    __str__ = lambda self: f"{self.graph}, N = {self.num_nodes}"
    graph = property(lambda self: f"G({self.deg},{self.path_len})")
    num_edges = property(lambda self: self.deg * (self.path_len - 1))
    prefix_len = property(lambda self: 3 * self.num_edges + 3)
    target_len = property(lambda self: self.path_len)
    seq_len = property(lambda self: self.prefix_len + self.target_len)
    vocab_size = property(lambda self: self.num_nodes + 4)
    # node v is token v; then come `|`, `=`, `/` and the dummy `$` of teacherless training
    bar, equals, slash, dollar = (property(lambda self, i=i: self.num_nodes + i) for i in range(4))

    def sample(self, n, generator):
        """Draw n graphs with, and on the device of, a torch.Generator -> Graphs, long."""
        random = lambda size: torch.rand(n, size, generator=generator, device=generator.device)
        # sorting random numbers draws a permutation; its head is the start and the nodes of the arms
        nodes = random(self.num_nodes).argsort(1)[:, :1 + self.num_edges]               # (n, 1 + E)
        start, arms = nodes[:, :1], nodes[:, 1:].view(n, self.deg, self.path_len - 1)   # (n, d, l - 1)
        # a node's parent is the node before it in its arm; an edge is three tokens: parent, child, `|`
        parents = torch.cat([start[:, None].expand(n, self.deg, 1), arms[:, :, :-1]], 2)
        edges = torch.stack([parents, arms, torch.full_like(arms, self.bar)], 3)        # (n, d, l - 1, 3)
        # in random order, so that nothing tells which arm an edge is of; the last `|` is a `/`
        shuffle = random(self.num_edges).argsort(1)[:, :, None].expand(-1, -1, 3)       # (n, E, 3)
        edges = edges.view(n, self.num_edges, 3).gather(1, shuffle).flatten(1)          # (n, 3 E)
        edges[:, -1] = self.slash
        # the arms are alike, so the first one may be the answer: its last node is the goal
        prefix = torch.cat([edges, start, arms[:, 0, -1:], torch.full_like(start, self.equals)], 1)
        target = torch.cat([start, arms[:, 0]], 1)                                      # (n, l)
        return Graphs(prefix, target.flip(1) if self.reverse else target, arms)

    def encode(self, text):
        """One line of official text, from start to goal whatever the task -> prefix (prefix_len,), target
        (target_len,), long. Raises ValueError, and says why, if it is no graph of this task."""
        return self._parse(text)[:2]

    def decode(self, prefix, target):
        """Inverse of `encode`: prefix (prefix_len,), target (target_len,) -> a line of official text."""
        prefix, path = prefix.tolist(), target.tolist()[::-1 if self.reverse else 1]
        edges = "|".join(f"{u},{v}" for u, v in zip(prefix[:-3:3], prefix[1:-3:3]))
        return f"{edges}/{prefix[-3]},{prefix[-2]}={','.join(map(str, path))}"

    def _parse(self, text):
        """A line of official text -> its prefix, target and arms."""
        E, numbers = self.num_edges, [int(digits) for digits in re.findall("[0-9]+", text)]
        if max(numbers, default=0) >= self.num_nodes:
            raise ValueError(f"node {max(numbers)} is out of range: num_nodes is {self.num_nodes}")
        # write the numbers down as they should stand: the text must be the same to the letter
        edges, ends = list(zip(numbers[:2 * E:2], numbers[1:2 * E:2])), numbers[2 * E:2 * E + 2]
        tokens, path = [x for edge in edges for x in (self.bar, *edge)][1:], numbers[2 * E + 2:]
        prefix = torch.tensor([*tokens, self.slash, *ends, self.equals])
        target = torch.tensor(path[::-1] if self.reverse else path)
        if len(numbers) != 2 * E + 2 + self.path_len or self.decode(prefix, target) != text:
            raise ValueError(f"not u,v|...|u,v/start,goal=path with {E} edges and {self.path_len} nodes")
        following, arms = dict(edges), [[v] for u, v in edges if u == ends[0]]
        for _ in range(self.path_len - 2):  # every arm grows by a node (-1: it has ended before)
            for arm in arms:
                arm.append(following.get(arm[-1], -1))
        if len(arms) != self.deg or len({ends[0], -1}.union(*arms)) != 2 + E:  # each node once, no -1
            raise ValueError(f"the edges do not form {self.graph} around node {ends[0]}")
        arms.sort(key=lambda arm: arm[-1] != ends[1])  # the others stay as they appear
        if path != [ends[0], *arms[0]] or path[-1] != ends[1]:
            raise ValueError(f"the path is not the one from {ends[0]} to {ends[1]}")
        return prefix, target, torch.tensor(arms)

def load(path, task):
    """A file of official text -> Graphs. Raises UserError naming the file and the first wrong line."""
    rows = []
    try:
        for line in Path(path).read_text("ascii", "replace").removesuffix("\n").split("\n"):
            rows.append(task._parse(line))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}, line {len(rows) + 1}: {error}") from None
    return Graphs(*map(torch.stack, zip(*rows)))

@contextlib.contextmanager
def whole_file(path):
    """A binary file to write that replaces `path` whole at the end, or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def save(path, task, graphs):
    """Write Graphs as official text, one line a graph. Raises FileExistsError if there is such a file."""
    if os.path.lexists(path):
        raise FileExistsError(17, "there is such a file already", str(path))
    with whole_file(path) as file:
        file.writelines(f"{task.decode(*graph)}\n".encode() for graph in zip(graphs.prefix, graphs.target))

def inputs(task, prefix, target, teacherless):
    """The tokens a model is fed: prefix (n, prefix_len), target (n, target_len) -> (n, seq_len - 1). Teacher
    forcing (eq. 2): the target, but for its last token. Teacherless (eq. 5): the dummy `$` in its place."""
    fed = torch.full_like(target[:, 1:], task.dollar) if teacherless else target[:, :-1]
    return torch.cat([prefix, fed], 1)  # the loss is on the last target_len positions

# -------------------------------------------------------------------------------------------------------
# Sets of graphs and batches. Every draw has a key of its own and is made on the CPU: the graphs of step s
# depend on the seed and s alone, so that a resumed run sees what it would have seen, on every device.
TRAIN, TEST, FRESH, SHUFFLE, VALIDATION, WRITE = range(6)  # the first integer of a key

def random_stream(*key):
    """A torch.Generator on the CPU that depends on the integers of `key` alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

def identities(graphs):
    """One bytes value per graph, the same for the same edges in any order: their codes, sorted."""
    edges = (graphs.prefix[:, :-3:3].long() << 32) + graphs.prefix[:, 1:-3:3]  # (n, E)
    return edges.sort(1).values.numpy().view(f"V{8 * edges.shape[1]}")[:, 0].tolist()

def without(graphs, taken):
    """The graphs whose identity is not in the set `taken`."""
    keep = torch.tensor([identity not in taken for identity in identities(graphs)], dtype=torch.bool)
    return Graphs(*(x[keep] for x in graphs))

def draw(task, n, taken, *key, piece=10_000):
    """n graphs whose identity is not in the set `taken` -> Graphs on the CPU, in the smallest integer type
    that holds the vocabulary. Raises UserError where `taken` leaves none."""
    size, pieces, missing = task.vocab_size, [], n
    dtype = torch.uint8 if size <= 256 else torch.int16 if size <= 2 ** 15 else torch.int32
    while missing > 0:
        graphs = without(task.sample(piece, random_stream(*key, len(pieces))), taken)
        pieces.append([x.to(dtype) for x in graphs])
        missing -= len(graphs.prefix)
        if missing == n and len(pieces) * piece >= 100_000:  # none in so many draws
            raise UserError(f"num_nodes {task.num_nodes}: the test graphs are all there are; take more nodes")
    return Graphs(*(torch.cat(column)[:n] for column in zip(*pieces)))

def held_out(task, n_test, test=None):
    """The graphs that no run trains on, the same for every seed -> validation (1,000) and test, Graphs, long.
    `test`: a given test set. Of a tiny task a set takes a tenth of all graphs; none is a UserError."""
    most = math.perm(task.num_nodes, 1 + task.num_edges) // math.factorial(task.deg) // 10
    if not most:
        raise UserError(f"num_nodes {task.num_nodes}: there are not ten {task.graph}; take more node values")
    test = test or draw(task, min(n_test, most), set(), TEST)
    validation = draw(task, min(1000, most), set(identities(test)), VALIDATION)
    return [Graphs(*(x.long() for x in graphs)) for graphs in (validation, test)]

class Batches:
    """batches(step) -> prefix (batch_size, prefix_len), target (batch_size, target_len), long, on the device:
    from `graphs`, a fixed set, in a new order every epoch, or fresh ones whose identity is not `taken`."""
    def __init__(self, task, batch_size, seed, device, graphs=None, taken=frozenset()):
        self.task, self.batch_size, self.seed, self.device, self.taken = task, batch_size, seed, device, taken
        self.graphs, self.epoch = graphs and Graphs(*(x.to(device) for x in graphs)), None

    def __call__(self, step):
        graphs, size, index = self.graphs, self.batch_size, slice(None)
        if graphs is None:
            graphs = draw(self.task, size, self.taken, FRESH, self.seed, step, piece=size)
        else:
            epoch, batch = divmod(step, len(graphs.prefix) // size)  # what fills no batch is left out
            if epoch != self.epoch:
                order = torch.randperm(len(graphs.prefix), generator=random_stream(SHUFFLE, self.seed, epoch))
                self.epoch, self.order = epoch, order.to(self.device).split(size)
            index = self.order[batch]
        return [x[index].long().to(self.device) for x in graphs[:2]]

# -------------------------------------------------------------------------------------------------------
# What the scripts share: the command line, signals, output, a clock.

class Parser(ArgumentParser):
    """A parser whose errors are one line; the scripts report every mistake of a user through it."""
    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)

    error = lambda self, message: self.exit(2, f"{self.prog}: error: {message}\n")

def number(kind, least, most):
    """An argparse type: an int or float in [least, most]."""
    def parse(text):
        if least <= kind(text) <= most:
            return kind(text)
        raise ValueError
    parse.__name__ = f"{kind.__name__} from {least} to {most}"  # argparse says: invalid (name) value: (text)
    return parse

def some_path(text):
    """An argparse type: a path."""
    if not text:
        raise ArgumentTypeError("an empty path")
    return text

def noted(stack):
    """Only note signals that ask to stop, until the ExitStack closes -> the list that they are noted in."""
    signals = []
    def note(kind, frame):
        signals.append(kind)
        signal.signal(kind, signal.SIG_DFL)  # a second one ends the process at once
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        with contextlib.suppress(ValueError):  # Python lets no thread but the main one do this
            if kind != signal.SIGHUP or signal.getsignal(kind) != signal.SIG_IGN:  # as under nohup
                stack.callback(signal.signal, kind, signal.signal(kind, note))
    return signals

def tell(text, live=False):
    """Print a line, on a terminal over the live one; a reader that has gone or a full disk ends no run."""
    clear = "\r\x1b[K" if sys.stdout and sys.stdout.isatty() else ""
    try:
        print(clear + text, end="" if live and clear else "\n", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def run_script(main):
    """Run a script's main function; Ctrl-C and a reader that has gone (`| head`) end it quietly."""
    sys.stdout and sys.stdout.reconfigure(errors="backslashreplace")  # else a name could end a run
    for kind in (signal.SIGTERM, signal.SIGHUP):  # unless ignored: so that no half-written file stays
        signal.getsignal(kind) or signal.signal(kind, lambda kind, _: sys.exit(128 + kind))
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # of stdout: a script's main reports those of its files
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more
        sys.exit(None if isinstance(error, BrokenPipeError) else f"cannot print: {error.strerror}")

def median_ms(function, repeats=15):
    """Median time of a call in milliseconds, after one call to warm up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = timeit.repeat(lambda: (function(), wait()), number=1, repeat=repeats + 1)
    return 1e3 * float(np.median(times[1:]))

def main():
    parser = Parser(__doc__)
    for name, own, least, most in (("deg", 2, 1, 10**4), ("path_len", 5, 2, 10**4),
            ("num_nodes", 50, 2, 10**4), ("seed", 0, 0, 2**32 - 1), ("n", 20_000, 1, 10**7)):
        parser.add_argument(f"--{name}", type=number(int, least, most), default=own, help=f"default {own}")
    parser.add_argument("--write", type=some_path, metavar="FILE", help="write n graphs to this new file")
    args = parser.parse_args()
    try:
        task = PathStar(args.deg, args.path_len, args.num_nodes)
        graphs = draw(task, n := args.n if args.write else 1, set(), WRITE, args.seed, piece=min(n, 10_000))
        if args.write:
            save(args.write, task, graphs)
            return tell(f"{args.write}: {args.n:,} graphs, {task}")
    except UserError as error:
        parser.error(f"--{error}")
    except (OSError, MemoryError, RuntimeError) as error:  # the last two: out of memory
        parser.error(f"--write {args.write}: {getattr(error, 'strerror', f'no memory for {args.n} graphs')}")
    prefix, target, arms = (x[0] for x in graphs)
    print(f"{task}; the first arm leads to the goal", *arms.tolist(), sep=f"\n    {prefix[-3]} -> ")
    print(f"official text   {task.decode(prefix, target)}\ntokens: | {task.bar}, = {task.equals}, "
          f"/ {task.slash}, $ {task.dollar}\nprefix          {prefix.tolist()}")
    for name, answer in (("standard", target), ("teacherless", target), ("reverse", target.flip(0))):
        fed = inputs(task, prefix[None], answer[None], name == "teacherless")[0, task.prefix_len:]
        print(f"{name:<16}fed after the prefix: {fed.tolist()}, to predict: {answer.tolist()}")

if __name__ == "__main__":
    run_script(main)
