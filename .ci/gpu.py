"""Does all of it work on this machine's GPU, and how fast? One command, eight minutes at most.

    python .ci/gpu.py                    # every stage
    python .ci/gpu.py scan train_gpt     # some of them
    python .ci/gpu.py --cpu              # the same code in tiny sizes on a CPU, to test the script itself

Each stage is a process of its own with a time limit, so one that fails or hangs loses nothing else. All of
it is printed as it comes, a summary last; the exit code is 1 if a stage failed.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CPU = "--cpu" in sys.argv
DEVICE = torch.device("cpu" if CPU else "cuda")
TINY = ["--n_layer", "2", "--n_embd", "48", "--batch_size", "16", "--n_train", "256", "--n_test", "64"] * CPU


def say(*words):
    print(*words, flush=True)


def wait():
    if not CPU:
        torch.cuda.synchronize()


def seconds(function, repeats):
    """Mean time of a call, the device's work included."""
    function()
    wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - begin) / repeats


def far(x, y):
    """The largest difference, as a share of the largest value."""
    x, y = (z.detach().double().cpu() for z in (x, y))
    return ((x - y).abs().max() / y.abs().max()).item()


def new_run(*flags):
    import train
    return train.Run(train.settle(train.parse([*TINY, *flags, "--device", str(DEVICE)])[1]))


# -------------------------------------------------------------------------------------------------------
# The stages.


def versions():
    """What this machine is, and what it can do at best."""
    say("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)
    if CPU:
        return
    say(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).multi_processor_count, "SMs")
    a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    say(f"bf16 product: {2e-12 * 4096**3 / seconds(lambda: a @ a, 20):.0f} TFLOP/s")
    b, c = torch.randn(2, 2**28, device=DEVICE)
    say(f"copy: {8e-12 * 2**28 / seconds(lambda: b.copy_(c), 20):.2f} TB/s, read and written")
    x = torch.zeros(8, device=DEVICE)
    say(f"an eager launch: {1e6 * seconds(lambda: x.add_(1), 2000):.1f} us")


def scan():
    """The compiled scan and all its gradients beside the loop in fp64."""
    from mamba import forward_and_gradients, selective_scan, selective_scan_ref
    names = ("y", "u", "delta", "A", "B", "C", "D")
    for shape in ((2, 19, 16, 4),) if CPU else ((64, 31, 128, 64), (16, 31, 768, 16), (3, 17, 40, 5)):
        b, l, d, n = shape
        sizes = (b, l, d), (b, l, d), (d, n), (b, l, n), (b, l, n), (d,)
        u, delta, A, B, C, D = (torch.randn(size, device=DEVICE, dtype=torch.float64) for size in sizes)
        double = [x.requires_grad_() for x in (u, F.softplus(delta - 3), -A.exp(), B, C, D)]
        want = forward_and_gradients(selective_scan_ref, double)
        single = [x.detach().float().requires_grad_() for x in double]
        begin = time.perf_counter()
        got = forward_and_gradients(selective_scan, single)
        wait()
        say(shape, f"first call {time.perf_counter() - begin:.1f} s;",
            ", ".join(f"{name} {far(x, y):.1e}" for name, x, y in zip(names, got, want)))
        assert all(far(x, y) < 1e-4 for x, y in zip(got, want)), "the scan is wrong"
        again = forward_and_gradients(selective_scan, single)
        say(shape, "the same bits a second time:", all(map(torch.equal, got, again)))


def models():
    """Both models on a CPU and here; a step in bf16, compiled, beside one in fp32, eager."""
    from data import inputs
    from train import loss
    for kind in ("gpt", "mamba"):
        run = new_run("--model", kind, "--teacherless")
        run.average.cpu()
        prefix, target = run.batches(0)
        fed = inputs(run.task, prefix, target, True)
        gradients = {}
        for name, dtype, stance in (("fp32, eager", torch.float32, "force_eager"),
                                    ("fp32, compiled", torch.float32, "default"),
                                    ("bf16, compiled", torch.bfloat16, "default")):
            torch.compiler.set_stance(stance)
            torch.set_float32_matmul_precision("highest")
            begin = time.perf_counter()
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                answer, added = loss(run.model, run.maps, run.task, prefix, target, run.settings)
            (answer + added).backward()
            wait()
            gradients[name] = {n: p.grad.clone() for n, p in run.model.named_parameters()}
            run.model.zero_grad()
            want = gradients["fp32, eager"]
            cosine = min(F.cosine_similarity(g.flatten(), want[n].flatten(), 0).item()
                         for n, g in gradients[name].items())
            say(f"{kind}, {name}: {time.perf_counter() - begin:.1f} s, loss {answer.item():.5f}; "
                f"gradients' least cosine to fp32, eager {cosine:.5f}")
            assert cosine > (0.99 if dtype == torch.bfloat16 else 0.9999), "the gradients differ"
        torch.compiler.set_stance("force_eager")
        with torch.no_grad():
            difference = far(run.model(fed), run.average(fed.cpu()))
        say(f"{kind}: logits here beside a CPU's, fp32: {difference:.1e}")
        assert difference < 1e-3, "the models differ"


def attention():
    """PyTorch's attention kernels, forward and backward, by shape, in us of launched calls."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    warnings.simplefilter("ignore")  # they say why a kernel cannot take a shape or a dtype: "-" below
    backends = [SDPBackend.MATH] if CPU else [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
                                              SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((4, 2, 32, 16),) if CPU else ((64, 4, 31, 16), (64, 4, 247, 32), (256, 6, 31, 64)):
            q, k, v, dy = (torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(4))
            for x in (q, k, v):
                x.requires_grad_()
            times = {}
            for backend in backends:
                def both():
                    with sdpa_kernel(backend):
                        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    torch.autograd.grad(y, (q, k, v), dy)
                try:
                    times[backend.name] = f"{1e6 * seconds(both, 3 if CPU else 50):.0f}"
                except RuntimeError:
                    times[backend.name] = "-"
            say(shape, str(dtype)[6:], times)


def train_until_solved(kind):
    """The quick run: what compiles (the first steps, the first evaluation) and all the rest, apart."""
    import train
    marks, step = [], train.Run.train_step

    def timed_step(run):
        first = run.settings["eval_every"]
        if run.step in (0, 4, first):  # before it: the beginning, all compiled, the evaluation done
            wait()
            marks.append(time.perf_counter())
        step(run)
        if run.step == first:
            wait()
            marks.append(time.perf_counter())
    train.Run.train_step = timed_step
    folder = Path(tempfile.mkdtemp(), "run")
    begin = time.perf_counter()
    train.main(["--model", kind, "--teacherless", "--out_dir", str(folder), "--device", str(DEVICE), *TINY,
                *["--max_steps", "60", "--eval_every", "30"] * CPU])
    end = time.perf_counter()
    start, compiled, full, evaluated = marks
    say(f"{kind}: set-up {start - begin:.1f} s, four steps that compile {compiled - start:.1f} s, "
        f"an evaluation that compiles {evaluated - full:.1f} s, "
        f"all the rest {end - evaluated + full - compiled:.1f} s, in all {end - begin:.1f} s")


def step(preset, kind):
    """A training step: recorded beside launched, equal or not, where its time goes."""
    flags = ["--preset", preset, "--model", kind, "--teacherless", "--n_train", "20000"]
    names = {"launched": "--no-cuda_graph", "recorded": "--cuda_graph", "launched again": "--no-cuda_graph"}
    runs = {name: new_run(*flags, flag) for name, flag in names.items()}
    losses = {}
    for name, run in runs.items():
        losses[name] = []
        for _ in range(4 if CPU else 40):
            run.train_step()
            losses[name].append(run.loss_sum.item())
    a, b, c = (list(run.model.parameters()) for run in runs.values())
    say(f"{preset} {kind}, {len(losses['launched'])} steps, weights: recorded beside launched, equal to the "
        f"bit: {all(map(torch.equal, a, b))}, largest difference {max(map(far, b, a)):.1e}; launched twice: "
        f"{all(map(torch.equal, a, c))}, {max(map(far, c, a)):.1e}")
    assert all(map(torch.equal, a, b)) or not all(map(torch.equal, a, c)), "a recorded step is another one"
    size = runs["launched"].settings["batch_size"]
    for name in ("launched", "recorded"):
        run = runs[name]
        n = 2 if CPU else 50
        per_step = seconds(run.train_step, n)
        begin = time.perf_counter()
        for _ in range(n):
            run.train_step()
        host = (time.perf_counter() - begin) / n
        wait()
        say(f"{preset} {kind} {name}: {1e3 * per_step:.2f} ms a step ({1 / per_step:.0f} steps, "
            f"{size / per_step:,.0f} graphs a second), of it the host's {1e3 * host:.2f} ms")
        profile(run, name)
    if not CPU:
        say(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def profile(run, name, n=20):
    """Kernels, launches and synchronisations of a step, and the share of the time that the GPU is busy."""
    if CPU:
        return
    from torch.profiler import ProfilerActivity
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        wait()
        begin = time.perf_counter()
        for _ in range(n):
            run.train_step()
        wait()
        wall = time.perf_counter() - begin
    kernels = [e for e in p.events() if str(e.device_type).endswith("CUDA") and not e.is_user_annotation
               and not e.name.startswith(("## ", "Optimizer.", "Torch-Compiled", "CompiledFunction"))]
    spent = {}
    for e in kernels:
        count, total = spent.get(e.name, (0, 0))
        spent[e.name] = count + 1, total + e.device_time_total
    busy = sum(total for _, total in spent.values())
    waits = sum(e.count for e in p.key_averages() if "Synchronize" in e.key) - 2
    say(f"  {name}, profiled: {1e3 * wall / n:.2f} ms a step, kernels {busy / n / 1e3:.2f} ms, busy "
        f"{100 * busy / 1e6 / wall:.0f} %, {len(kernels) / n:.0f} kernels a step, {waits} waits in {n} steps")
    for kernel, (count, total) in sorted(spent.items(), key=lambda item: -item[1][1])[:8]:
        say(f"    {total / n / 1e3:7.3f} ms {count / n:6.1f} x  {kernel[:80]}")


def script(name):
    if not CPU:
        subprocess.run([sys.executable, "-u", ROOT / name], check=True)


STAGES = {  # name: (limit in seconds, function)
    "versions": (40, versions), "train_gpt": (110, lambda: train_until_solved("gpt")),
    "train_mamba": (150, lambda: train_until_solved("mamba")), "scan": (80, scan), "models": (100, models),
    "step_gpt": (60, lambda: step("quick", "gpt")), "step_mamba": (80, lambda: step("quick", "mamba")),
    "mamba.py": (100, lambda: script("mamba.py")), "model.py": (60, lambda: script("model.py")),
    "attention": (30, attention), "paper_gpt": (80, lambda: step("paper", "gpt")),
    "paper_mamba": (110, lambda: step("paper", "mamba"))}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=" ".join(STAGES))
    parser.add_argument("--cpu", action="store_true", help="a dry run in tiny sizes")
    parser.add_argument("--seconds", type=float, default=480, help="limit of all stages (default 480)")
    parser.add_argument("--one", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return STAGES[args.one][1]()
    if not CPU and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --cpu is a dry run")
    begin, results = time.perf_counter(), {}
    for stage in args.stages or STAGES:
        left = args.seconds - (time.perf_counter() - begin)
        say(f"\n=== {stage}, at {time.perf_counter() - begin:.0f} s")
        start = time.perf_counter()
        command = [sys.executable, "-u", __file__, "--one", stage, *["--cpu"] * CPU]
        try:
            code = subprocess.run(command, timeout=max(1, min(left, STAGES[stage][0]))).returncode
        except subprocess.TimeoutExpired:
            code = "its limit"
        results[stage] = f"{'ok' if code == 0 else f'FAILED ({code})'}, {time.perf_counter() - start:.0f} s"
    say("\n=== summary")
    for stage, result in results.items():
        say(f"{stage:<12}{result}")
    sys.exit(any("FAILED" in result for result in results.values()))


if __name__ == "__main__":
    main()
