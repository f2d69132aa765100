"""The task: path-star graphs, as graphs, as tokens, as the official text, as training batches.

A path-star graph G(d, l) has d arms of l - 1 nodes that all leave one start node. The model reads the
shuffled edges, the start and the goal (the last node of one arm), and must write the path: l nodes.

    python data.py                             # a graph, its text, its tokens, what a model is fed
    python data.py --write test.txt --n 20000  # official text, for --test_file of train.py and eval.py

Source: Bachmann & Nagarajan, "The pitfalls of next-token prediction", ICML 2024, section 4.
"""
import argparse
import contextlib
import math
import os
import re
import statistics
import sys
import time
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
    """The graph G(deg, path_len) with labels drawn from `num_nodes` values, and its tokens.

    Node v is token v, then `|`, `=`, `/` and the dummy `$` of teacherless training; commas have none.
    Raises UserError (a ValueError), naming the smallest value that works, where there is no such graph.
    """
    deg: int
    path_len: int
    num_nodes: int
    reverse: bool = False

    def __post_init__(self):
        for name, least in (("deg", 1), ("path_len", 2), ("num_nodes", 1 + self.num_edges)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: {self.graph} needs at least {least}")

    graph = property(lambda self: f"G({self.deg},{self.path_len})")
    num_edges = property(lambda self: self.deg * (self.path_len - 1))
    prefix_len = property(lambda self: 3 * self.num_edges + 3)
    target_len = property(lambda self: self.path_len)
    seq_len = property(lambda self: self.prefix_len + self.target_len)
    vocab_size = property(lambda self: self.num_nodes + 4)
    bar = property(lambda self: self.num_nodes)
    equals = property(lambda self: self.num_nodes + 1)
    slash = property(lambda self: self.num_nodes + 2)
    dollar = property(lambda self: self.num_nodes + 3)

    def __str__(self):
        return f"{self.graph}, N = {self.num_nodes}"

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
        """One line of official text -> prefix (prefix_len,), target (target_len,), long.

        The text has the path from start to goal whatever the task; a reversed task's target mirrors it.
        Raises ValueError if the line is not, to the letter, a graph of this task with its path.
        """
        prefix, target, _ = self._parse(text)
        return torch.tensor(prefix), torch.tensor(target)

    def decode(self, prefix, target):
        """Inverse of `encode`: prefix (prefix_len,), target (target_len,) -> a line of official text."""
        prefix, path = prefix.tolist(), target.tolist()[::-1 if self.reverse else 1]
        edges = "|".join(f"{u},{v}" for u, v in zip(prefix[:-3:3], prefix[1:-3:3]))
        return f"{edges}/{prefix[-3]},{prefix[-2]}={','.join(map(str, path))}"

    def _parse(self, text):
        """A line of official text -> its prefix, target and arms as lists."""
        node, E = "(?:0|[1-9][0-9]*)", self.num_edges
        if not re.fullmatch(rf"{node},{node}(?:\|{node},{node}){{{E - 1}}}/{node},{node}={node}"
                            rf"(?:,{node}){{{self.path_len - 1}}}", text):
            raise ValueError(f"not `u,v|...|u,v/start,goal=path` with {E} edges "
                             f"and {self.path_len} nodes in the path")
        numbers = [int(x) for x in re.findall("[0-9]+", text)]
        if max(numbers) >= self.num_nodes:
            raise ValueError(f"node {max(numbers)} is out of range: num_nodes is {self.num_nodes}")
        edges, (start, goal, *path) = list(zip(numbers[:2 * E:2], numbers[1:2 * E:2])), numbers[2 * E:]
        following = dict(edges)  # within an arm every node has one successor
        arms = [[v] for u, v in edges if u == start]
        for arm in arms:
            while arm[-1] in following and len(arm) < self.path_len:
                arm.append(following[arm[-1]])
        arms.sort(key=lambda arm: arm[-1] != goal)  # the goal's arm first; the others as they appear
        lengths = [len(arm) for arm in arms]
        if len({start}.union(*arms)) != 1 + E or lengths != [self.path_len - 1] * self.deg:
            raise ValueError(f"the edges do not form {self.graph} around node {start}")
        if path != [start] + arms[0] or path[-1] != goal:
            raise ValueError(f"the path is not the one from {start} to {goal}")
        prefix = [token for u, v in edges for token in (u, v, self.bar)]
        prefix[-1] = self.slash
        return prefix + [start, goal, self.equals], path[::-1] if self.reverse else path, arms


def load(path, task):
    """A file of official text -> Graphs. Raises UserError naming the file and the first wrong line."""
    rows = []
    try:
        with open(path, encoding="ascii", errors="replace", newline="\n") as file:
            for line in file:
                rows.append(task._parse(line.rstrip("\r\n")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}, line {len(rows) + 1}: {error}") from None
    if not rows:
        raise UserError(f"{path}: holds no graphs")
    return Graphs(*(torch.tensor(column) for column in zip(*rows)))


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
    if Path(path).exists():
        raise FileExistsError(17, "there is such a file already", str(path))
    with whole_file(path) as file:
        for prefix, target in zip(graphs.prefix, graphs.target):
            file.write(f"{task.decode(prefix, target)}\n".encode())


def inputs(task, prefix, target, teacherless):
    """The tokens a model is fed: prefix (n, prefix_len), target (n, target_len) -> (n, seq_len - 1).

    Standard (teacher forcing, eq. 2 of the paper): the target, shifted; its last token is never fed.
    Teacherless (eq. 5): the dummy `$` in its place. The loss is on the last target_len positions.
    """
    fed = torch.full_like(target[:, 1:], task.dollar) if teacherless else target[:, :-1]
    return torch.cat([prefix, fed], 1)


# -------------------------------------------------------------------------------------------------------
# Sets of graphs and batches. Every random draw has a key of its own: the graphs of step s depend on the
# seed and s alone, so a resumed run sees what it would have seen, and evaluation draws nothing from the
# training stream. All are drawn on the CPU, so that they are the same on every device.

TRAIN, TEST, FRESH, SHUFFLE, VALIDATION = range(5)  # the first integer of a key


def random_stream(*key):
    """A torch.Generator on the CPU that depends on the integers of `key` alone."""
    seed = np.random.SeedSequence(key).generate_state(1)[0]  # 32 bits: all that the generator takes
    return torch.Generator().manual_seed(int(seed))


def identities(graphs):
    """A bytes value a graph, the same for the same edges in any order, whichever arm holds the goal."""
    by_first_node = graphs.arms[:, :, 0].argsort(1)
    arms = graphs.arms.gather(1, by_first_node[:, :, None].expand_as(graphs.arms)).flatten(1)
    rows = torch.cat([graphs.prefix[:, -3:-2], arms], 1).to(torch.int32).numpy()
    return rows.view(f"V{4 * rows.shape[1]}")[:, 0].tolist()


def without(graphs, taken):
    """The graphs whose identity is not in the set `taken`."""
    keep = torch.tensor([identity not in taken for identity in identities(graphs)], dtype=torch.bool)
    return graphs if keep.all() else Graphs(*(x[keep] for x in graphs))


def draw(task, n, taken, *key, piece=10_000):
    """n graphs, none of which is in the set of identities `taken` -> Graphs on the CPU, in the smallest
    integer type that holds the vocabulary. Raises UserError where `taken` leaves none."""
    size, pieces, missing = task.vocab_size, [], n
    dtype = torch.uint8 if size <= 256 else torch.int16 if size <= 2 ** 15 else torch.int32
    while missing > 0:
        graphs = without(task.sample(piece, random_stream(*key, len(pieces))), taken)
        pieces.append(Graphs(*(x.to(dtype) for x in graphs)))
        missing -= len(graphs.prefix)
        if len(pieces) == 10 and missing == n:
            raise UserError(f"num_nodes {task.num_nodes}: the test graphs are every {task.graph} there is; "
                            "take more node values or fewer test graphs")
    return Graphs(*(torch.cat(column)[:n] for column in zip(*pieces)))


def held_out(task, n_test, test=None):
    """The graphs that no run trains on, the same for every seed -> validation (1,000) and test, Graphs, long.

    `test` is a given test set in place of n_test sampled ones. Of a tiny task a set takes at most a tenth of
    the graphs there are; raises UserError where that is not one.
    """
    labels, orders = math.perm(task.num_nodes, 1 + task.num_edges), math.factorial(task.deg)
    most = labels // orders // 10
    if not most:
        raise UserError(f"num_nodes {task.num_nodes}: there are not ten {task.graph}; take more node values")
    test = test or draw(task, min(n_test, most), set(), TEST)
    validation = draw(task, min(1000, most), set(identities(test)), VALIDATION)
    return [Graphs(*(x.long() for x in graphs)) for graphs in (validation, test)]


class Batches:
    """batches(step) -> prefix (batch_size, prefix_len), target (batch_size, target_len), long, on the device.

    From `graphs`, a fixed set, reshuffled every epoch; with `graphs` None fresh ones at every step, none of
    them in `taken`, a set of identities.
    """

    def __init__(self, task, batch_size, seed, device, graphs=None, taken=frozenset()):
        self.task, self.batch_size, self.seed, self.device = task, batch_size, seed, device
        self.fixed = graphs and Graphs(*(x.to(device) for x in graphs))
        self.taken, self.epoch, self.order = taken, None, None

    def __call__(self, step):
        size = self.batch_size
        if self.fixed is None:
            graphs = draw(self.task, size, self.taken, FRESH, self.seed, step, piece=size)
            return graphs.prefix.long().to(self.device), graphs.target.long().to(self.device)
        n = len(self.fixed.prefix)
        epoch, batch = divmod(step, n // size)  # what fills no batch is left out
        if epoch != self.epoch:
            order = torch.randperm(n, generator=random_stream(SHUFFLE, self.seed, epoch))
            self.epoch, self.order = epoch, order.to(self.device)
        index = self.order[batch * size:(batch + 1) * size]
        return self.fixed.prefix[index].long(), self.fixed.target[index].long()


# -------------------------------------------------------------------------------------------------------
# What the scripts share: the command line, a clock.


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; the scripts report every mistake of a user through it."""

    def __init__(self, doc):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, least, most):
    """An argparse type: an int or float in [least, most]."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        what = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r}: must be {what} from {least} to {most}")
    return parse


def some_path(text):
    """An argparse type: a path."""
    if not text:
        raise argparse.ArgumentTypeError("'': must be a path")
    return text


def run_script(main):
    """Run a script's main function; Ctrl-C and a reader that has gone (`| head`) end it quietly."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # of what was printed: a script turns those of its files into its own words
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more
        sys.exit(None if isinstance(error, BrokenPipeError) else f"cannot print: {error.strerror}")


def median_ms(*functions, repeats=15):
    """Median times of a call of each function in milliseconds, after one call each to warm up; called in
    turn, so that a machine that slows down does so for all of them."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, its_times in zip(functions, times):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            its_times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(its_times[1:]) for its_times in times]


def main():
    parser = Parser(__doc__)
    for flag, default, least, most, text in (
            ("--deg", 2, 1, 10**4, "arms, d"), ("--path_len", 5, 2, 10**4, "nodes of the path, l"),
            ("--num_nodes", 50, 2, 10**4, "node values, N"), ("--seed", 0, 0, 2**32 - 1, "seed"),
            ("--n", 20_000, 1, 10**7, "graphs to write")):
        parser.add_argument(flag, type=number(int, least, most), default=default, metavar="X",
                            help=f"{text} (default {default})")
    parser.add_argument("--write", metavar="FILE", type=some_path,
                        help="write official text to this new file, and do nothing else")
    args = parser.parse_args()
    try:
        task = PathStar(args.deg, args.path_len, args.num_nodes)
        graphs = draw(task, args.n if args.write else 1, set(), TRAIN, args.seed)
        if args.write:
            save(args.write, task, graphs)
            return print(f"{args.write}: {args.n:,} graphs, {task}")
    except UserError as error:
        parser.error(f"--{error}")
    except OSError as error:
        parser.error(f"--write {args.write}: {error.strerror}")

    prefix, target, arms = (x[0] for x in graphs)
    print(f"{task}\n")
    for arm in arms.tolist():
        mark = "   <- the goal" * (arm[-1] == prefix[-2])
        print(f"{prefix[-3]:>6} -> {' -> '.join(f'{v:2}' for v in arm)}{mark}")
    print(f"\nofficial text   {task.decode(prefix, target)}\nprefix tokens   {prefix.tolist()}\n"
          f"                |={task.bar} =={task.equals} /={task.slash} $={task.dollar}")
    for name, answer in (("standard", target), ("teacherless", target), ("reverse", target.flip(0))):
        fed = inputs(task, prefix[None], answer[None], name == "teacherless")[0, task.prefix_len:]
        print(f"{name:<16}fed after the prefix: {fed.tolist()}, to predict: {answer.tolist()}")


if __name__ == "__main__":
    run_script(main)
