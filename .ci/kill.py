"""Kill a run at random moments, resume it each time, and compare it with a run that nobody disturbed.

    python .ci/kill.py [--kills 20] [--seed 0]

Prints one line a kill and exits with 1 unless the weights, the optimiser states and the log (but for its
seconds) are equal to the bit. Every folder that a kill leaves behind must also be one that eval.py can
read.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ["train.py", "--no-compile", "--teacherless", "--path_len", "3", "--num_nodes", "10",
         "--n_layer", "2", "--n_embd", "16", "--n_test", "100", "--n_train", "1000",
         "--max_steps", "600", "--eval_every", "7", "--stop_at", "0", "--device", "cpu"]


def start(*command):
    # the order of sums, and with it the last bit, follows the threads
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*command):
    process = start(*command)
    out, err = process.communicate()
    if process.returncode:
        sys.exit(f"failed: {' '.join(command)}\n{out}{err}")
    return out


def same(x, y):
    if torch.is_tensor(x):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x if k not in ("seconds", "settings"))
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


def contents(folder):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return dict(checkpoint=torch.load(folder / "ckpt.pt", weights_only=True), log=log)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        whole, killed = Path(root, "whole"), Path(root, "killed")
        begin = time.time()
        finish(*TRAIN, "--out_dir", str(whole))
        duration = time.time() - begin
        kills = 0
        while kills < args.kills:
            resume = ["--resume"] if (killed / "ckpt.pt").exists() else []
            process = start(*TRAIN, "--out_dir", str(killed), *resume)
            while process.poll() is None and not (killed / "ckpt.pt").exists():
                time.sleep(0.01)
            # start-up takes most of a short run, so the moment is drawn from its last line of output on
            while process.poll() is None and "parameters" not in process.stdout.readline():
                pass
            time.sleep(draw.uniform(0, 0.5 * duration / args.kills))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if process.returncode != -signal.SIGKILL:
                print(f"kill {kills}: came after the end")
                break
            left = sorted(path.name for path in killed.iterdir())
            finish("eval.py", str(killed))
            step = torch.load(killed / "ckpt.pt", weights_only=True)["step"]
            print(f"kill {kills}: at step {step}, leaving {' '.join(left)}", flush=True)
        finish(*TRAIN, "--out_dir", str(killed), "--resume")
        if not same(contents(whole), contents(killed)):
            sys.exit("the killed run differs from the undisturbed one")
        print(f"after {kills} kills: weights, optimiser states and log equal to the bit")


if __name__ == "__main__":
    main()
