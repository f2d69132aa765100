"""Mamba (Gu & Dao 2023, arXiv 2312.00752) in pure PyTorch: selective scan, block, model, one-token step.

    python mamba.py                  # check the scan against the loop, time both, time a training step

Symbols, paper -> here: x -> u (b, l, d), Delta -> delta (b, l, d), A (d, n), B and C (b, l, n), D (d),
h (b, d, n), with b sequences, l tokens, d = expand * d_model channels and n = d_state states a channel.
Parameter names are those of the reference implementation (state-spaces/mamba), so weights move 1:1.
"""
import math
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum

from data import PathStar, median_ms
from model import causal_conv, time_step

# -------------------------------------------------------------------------------------------------------
# The selective scan, twice: as the definition, and fast.


def selective_scan_ref(u, delta, A, B, C, D):
    """The recurrence as a plain loop over time: the definition that everything else is tested against.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t    (Mamba paper, algorithm 2 and eq. 2a, 2b)
    y_t = C_t . h_t + D u_t
    u, delta (b, l, d); A (d, n); B, C (b, l, n); D (d) -> y (b, l, d), in the dtype of u.
    """
    h = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype, device=u.device)
    y = []
    for t in range(u.shape[1]):
        decay = torch.exp(einsum(delta[:, t], A, "b d, d n -> b d n"))
        h = decay * h + einsum(delta[:, t] * u[:, t], B[:, t], "b d, b n -> b d n")
        y.append(einsum(h, C[:, t], "b d n, b n -> b d") + D * u[:, t])
    return torch.stack(y, dim=1)


# Time is walked in chunks of this many steps. Inside a chunk the loop is unrolled and compiled into ONE
# kernel, which keeps the state h in registers and writes nothing of size (b, l, d, n). On a GPU longer
# chunks spill, and shorter ones move the state more often; on a CPU 16 steps save up to a tenth of the
# scan's time, and take twice as long to compile.
CHUNK = dict(cpu=8, cuda=16)


def exp(x):
    """torch.exp of x <= 0, to 2e-7. Most of a CPU's time in the scan goes into it, so there, in fp32,
    compiled: 2^(i + f), |f| <= 1/2, with the integer i in a float's exponent and a polynomial for 2^f."""
    if not torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return torch.exp(x)
    x = x * math.log2(math.e)
    i = x.round()
    f, power = x - i, 0
    for c in (0.0013300265, 0.009669709, 0.0555056, 0.24022281, 0.69314718, 1):  # minimax; exact at 0
        power = power * f + c
    return power * ((i.int() + 127).clamp(min=0) << 23).view(torch.float32)  # below 2^-126: 0


def walk(x, delta, A, B, h):
    """States before and after each step of a chunk, [h_0 .. h_T], and the decays [a_1 .. a_T];
    x[:, t] etc. broadcast to h."""
    h, decay = [h], []
    for t in range(x.shape[1]):
        decay.append(exp(delta[:, t] * A))
        h.append(decay[t] * h[t] + x[:, t] * B[:, t])
    return h, decay


def chunk_forward(x, delta, A, B, C, h):
    """One chunk, x = delta * u, from state h -> y (b, T, d) without the skip D u, and the last state."""
    x, delta = x[..., None], delta[..., None]  # (b, T, d, 1)
    B, C = B[:, :, None], C[:, :, None]        # (b, T, 1, n)
    h, _ = walk(x, delta, A, B, h)
    return torch.stack([(h[t + 1] * C[:, t]).sum(2) for t in range(x.shape[1])], dim=1), h[-1]


# The gradient walks each chunk forwards again and then back: recomputing h costs one exp, storing it
# costs memory and bandwidth. It is cut in two because a kernel can keep its sums in registers along one
# axis only: over the states n (for x and delta), or over the channels d (for B and C).


def chunk_backward_n(x, delta, A, B, C, h, dy, dh, dA):
    """Gradients that sum over n -> dx, ddelta (b, T, d), dh of the state before and dA so far (b, d, n)."""
    x, delta, dy, B, C = x[..., None], delta[..., None], dy[..., None], B[:, :, None], C[:, :, None]
    h, decay = walk(x, delta, A, B, h)
    dx, ddelta = [], []
    for t in reversed(range(x.shape[1])):
        dh = dh + dy[:, t] * C[:, t]
        dx.append((dh * B[:, t]).sum(2))
        dh = dh * decay[t]
        dlog = dh * h[t]  # gradient of delta_t A, the logarithm of the decay
        ddelta.append((dlog * A).sum(2))
        dA = dA + dlog * delta[:, t]
    return torch.stack(dx[::-1], 1), torch.stack(ddelta[::-1], 1), dh, dA


def chunk_backward_d(x, delta, A, B, C, h, dy, dh):
    """Gradients that sum over d -> dB, dC (b, T, n): over groups of 16 channels, in a GPU's registers,
    then over groups."""
    group = 16 if x.shape[2] % 16 == 0 else 1
    # x, delta, dy: (b, T, d / group, group, 1); A, h, dh: (..., d / group, group, n)
    x, delta, dy = (v.unflatten(2, (-1, group))[..., None] for v in (x, delta, dy))
    A, h, dh = (v.unflatten(-2, (-1, group)) for v in (A, h, dh))
    B, C = B[:, :, None, None], C[:, :, None, None]
    h, decay = walk(x, delta, A, B, h)
    dB, dC = [], []
    for t in reversed(range(x.shape[1])):
        dh = dh + dy[:, t] * C[:, t]
        dB.append((dh * x[:, t]).sum(2))
        dC.append((h[t + 1] * dy[:, t]).sum(2))
        dh = dh * decay[t]
    return torch.stack(dB[::-1] + dC[::-1], 1).sum(2).chunk(2, dim=1)


class Kernel:
    """A chunk function, compiled at its first call; where there is no compiler, run as it is."""
    enabled = True  # train.py --no-compile clears it
    # Beyond these counts Inductor stops fusing: never here. Its C++ makes no fused multiply-adds unless told.
    FUSE = dict.fromkeys(("max_fusion_size", "cpp.max_horizontal_fusion_size"), 10**6)
    FUSE["cpp.enable_floating_point_contract_flag"] = "fast"
    # Beyond these it stores a value that several others need, where it can in a few vectors of the kernel's
    # own. With INLINE it never does, and each output repeats all that leads to it: compiling then takes
    # the square of the time.
    INLINE = dict.fromkeys(("realize_opcount_threshold", "realize_reads_threshold",
                            "realize_acc_reads_threshold"), 10**6)

    def __init__(self, function, options=FUSE):
        self.function, self.options = function, options
        self.compiled = None

    def __call__(self, *tensors):
        if Kernel.enabled:
            try:
                if self.compiled is None:  # importing the compiler takes seconds: not before it is needed
                    self.compiled = torch.compile(self.function, dynamic=False, options=self.options)
                return self.compiled(*tensors)
            except Exception as error:  # what the compiler raises differs by back end
                Kernel.enabled = False
                print(f"selective_scan: no working compiler ({type(error).__name__}), running uncompiled",
                      file=sys.stderr)
        return self.function(*tensors)


forward_kernel = Kernel(chunk_forward)
backward_n_kernel = Kernel(chunk_backward_n)
# for its sums over channels a CPU would store every state, and take half as long again
backward_d_kernel = Kernel(chunk_backward_d, Kernel.FUSE | Kernel.INLINE)


def chunks(n_chunks, *tensors):
    """Cut (b, l, ...) tensors, n_chunks dividing l, into (b, l / n_chunks, ...) views; one tuple a chunk."""
    return zip(*(x.chunk(n_chunks, dim=1) for x in tensors))


# An operator, so that a compiled model calls the scan instead of tracing through its loops.
@torch.library.custom_op("pitfalls::scan", mutates_args=())
def scan(x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
         n_chunks: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x = delta * u -> y (b, l, d) without the skip, the state before each chunk, (b, d, n).

    The length l is a multiple of n_chunks.
    """
    h = x.new_zeros(x.shape[0], *A.shape)
    y, starts = [], []
    for x_t, delta_t, B_t, C_t in chunks(n_chunks, x, delta, B, C):
        starts.append(h)
        y_t, h = forward_kernel(x_t, delta_t, A, B_t, C_t, h)
        y.append(y_t)
    return torch.cat(y, dim=1), starts


@torch.library.custom_op("pitfalls::scan_backward", mutates_args=())
def scan_backward(dy: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
                  C: torch.Tensor, starts: list[torch.Tensor]
                  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, delta, A, B, C from that of y."""
    dh, dA = torch.zeros_like(starts[0]), torch.zeros_like(starts[0])
    grads = []
    parts = zip(chunks(len(starts), dy, x, delta, B, C), starts)
    for (dy_t, x_t, delta_t, B_t, C_t), h in reversed(list(parts)):
        inputs = (x_t, delta_t, A, B_t, C_t, h, dy_t, dh)
        dx, ddelta, dh, dA = backward_n_kernel(*inputs, dA)
        grads.append((dx, ddelta, *backward_d_kernel(*inputs)))
    dx, ddelta, dB, dC = (torch.cat(g[::-1], dim=1) for g in zip(*grads))
    return dx, ddelta, dA.sum(0), dB, dC


@scan.register_fake
def _(x, delta, A, B, C, n_chunks):
    return torch.empty_like(x), [x.new_empty(x.shape[0], *A.shape) for _ in range(n_chunks)]


@scan_backward.register_fake
def _(dy, x, delta, A, B, C, starts):
    return tuple(torch.empty_like(g) for g in (x, delta, A, B, C))


def scan_autograd(ctx, dy, _):
    x, delta, A, B, C, *starts = ctx.saved_tensors
    return *scan_backward(dy.contiguous(), x, delta, A, B, C, starts), None


scan.register_autograd(
    scan_autograd,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:5], *output[1]))


def at_least_fp32(x):
    return x if x.dtype == torch.float64 else x.float()


def selective_scan(u, delta, A, B, C, D):
    """`selective_scan_ref`, fast: same arguments, same result, any length l >= 1.

    Computes in fp32 (in fp64 for fp64 inputs) whatever autocast says; returns the dtype of u.
    """
    dtype, l = u.dtype, u.shape[1]
    u, delta, A, B, C, D = map(at_least_fp32, (u, delta, A, B, C, D))
    # zeros fill the last chunk: delta 0 keeps the state. Here, not in `scan`, a compiled model fuses it
    chunk = CHUNK.get(u.device.type, CHUNK["cuda"])
    whole = lambda v: F.pad(v, (0, 0, 0, -l % chunk)).contiguous()
    y, _ = scan(whole(delta * u), whole(delta), A, whole(B), whole(C), -(-l // chunk))
    return (y[:, :l] + D * u).to(dtype)


# -------------------------------------------------------------------------------------------------------
# The block and the model.


@dataclass
class MambaConfig:
    vocab_size: int
    n_layer: int = 8
    d_model: int = 64
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    a_scale: float = 1.0  # A = -a_scale (1 .. d_state) at the start; 1: S4D-real, as in the reference


class Mixer(nn.Module):
    """The block (Mamba paper, figure 3, section 3.4): gate x SSM(conv(x)), between two projections."""

    def __init__(self, config):
        super().__init__()
        d, n = config.expand * config.d_model, config.d_state
        self.dt_rank = math.ceil(config.d_model / 16)
        self.in_proj = nn.Linear(config.d_model, 2 * d, bias=False)
        self.conv1d = nn.Conv1d(d, d, config.d_conv, groups=d)
        self.x_proj = nn.Linear(d, self.dt_rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d)
        rates = config.a_scale * torch.arange(1, n + 1).float()
        self.A_log = nn.Parameter(rates.log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = nn.Linear(d, config.d_model, bias=False)
        # step sizes log-uniform in [1e-3, 1e-1]; the bias inverts softplus (Mamba paper, section 3.6)
        dt = torch.exp(torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-self.dt_rank ** -0.5, self.dt_rank ** -0.5)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.out_proj.weight /= math.sqrt(config.n_layer)  # one residual branch a layer

    def ssm_inputs(self, u):
        """The scan's input-dependent parameters: delta (..., d), B and C (..., n) from u (..., d)."""
        n = self.A_log.shape[1]
        dt, B, C = self.x_proj(u).split([self.dt_rank, n, n], dim=-1)
        return F.softplus(at_least_fp32(self.dt_proj(dt))), B, C

    def forward(self, x):
        u, gate = self.in_proj(x).chunk(2, dim=-1)  # (b, l, d) each
        u = F.silu(causal_conv(u, self.conv1d))
        delta, B, C = self.ssm_inputs(u)
        y = selective_scan(u, delta, -torch.exp(at_least_fp32(self.A_log)), B, C, self.D)
        return self.out_proj(y * F.silu(gate))

    def step(self, x, state):
        """One token: x (b, d_model), state (last d_conv - 1 conv inputs, h (b, d, n)) -> y, state."""
        past, h = state
        u, gate = self.in_proj(x).chunk(2, dim=-1)  # (b, d) each
        window = torch.cat([past, u[:, None]], dim=1)
        u = F.silu(einsum(window, self.conv1d.weight[:, 0], "b k d, d k -> b d") + self.conv1d.bias)
        delta, B, C = self.ssm_inputs(u)
        decay = torch.exp(delta[:, :, None] * -torch.exp(at_least_fp32(self.A_log)))
        h = decay * h + (delta * u)[:, :, None] * B[:, None, :]
        y = einsum(h, C, "b d n, b n -> b d") + self.D * u
        return self.out_proj(y * F.silu(gate)), (window[:, 1:], h)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.mixer = Mixer(config)

    def forward(self, x):
        return x + self.mixer(self.norm(x))


class Mamba(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = nn.ModuleDict(dict(
            embedding=nn.Embedding(config.vocab_size, config.d_model),
            layers=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            norm_f=nn.RMSNorm(config.d_model, eps=1e-5)))
        # the projections keep PyTorch's initialisation, as in the reference; the embedding is redrawn
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)

    def layers(self):
        return self.backbone.layers

    def features(self, idx, every=False):
        """Token ids (b, l) -> what the head reads, (b, l, d_model); `every`: behind each layer, a stack."""
        x = self.backbone.embedding(idx)
        outputs = []
        for layer in self.layers():
            x = layer(x)
            if every:
                outputs.append(x)
        return self.backbone.norm_f(torch.stack(outputs) if every else x)

    def head(self, x):
        return F.linear(x, self.backbone.embedding.weight)

    def forward(self, idx):
        """Token ids (b, l) -> logits (b, l, vocab_size); the head is tied to the embedding."""
        return self.head(self.features(idx))

    def step(self, token, state=None):
        """One token in constant time and memory: token (b,), state of the last call (None: at the start)
        -> logits (b, vocab_size), state. Equal to the last position of `forward`."""
        x = self.backbone.embedding(token)
        new_state = []
        for i, layer in enumerate(self.layers()):
            if state is None:
                d, n = layer.mixer.A_log.shape
                taps = layer.mixer.conv1d.kernel_size[0]
                past = x.new_zeros(len(x), taps - 1, d), x.new_zeros(len(x), d, n)
            else:
                past = state[i]
            y, past = layer.mixer.step(layer.norm(x), past)
            x = x + y
            new_state.append(past)
        return self.head(self.backbone.norm_f(x)), new_state


# -------------------------------------------------------------------------------------------------------
# The check and the benchmark.


def example(b, l, d, n, device="cpu", dtype=torch.float32):
    """Random arguments of the scan, in the range of a fresh model, that take gradients."""
    random = torch.Generator(device).manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=random, device=device, dtype=dtype)
    u, delta, A = normal(b, l, d), F.softplus(normal(b, l, d) - 3), -normal(d, n).exp()
    B, C, D = normal(b, l, n), normal(b, l, n), normal(d)
    return [x.requires_grad_() for x in (u, delta, A, B, C, D)]


def forward_and_gradients(function, arguments):
    y = function(*arguments)
    return y, *torch.autograd.grad(y, arguments, torch.ones_like(y))


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"selective scan, forward and backward, ms (medians of 15; {device}, fp32)\n"
          "(b, l, d, n)              compile, s   one exp pass   loop   scan   scan/exp   loop/scan   "
          "largest difference")
    torch._dynamo.config.recompile_limit = 64  # more shapes than a model has
    compiled = torch.compile(selective_scan, dynamic=False)  # as in a compiled model
    for shape in ((64, 31, 128, 16), (64, 31, 256, 16), (16, 127, 256, 16), (16, 247, 256, 16)):
        arguments = example(*shape, device)
        begin = time.perf_counter()
        got = forward_and_gradients(compiled, arguments)  # the first call compiles
        seconds = time.perf_counter() - begin
        pairs = zip(got, forward_and_gradients(selective_scan_ref, arguments))
        difference = max((x - y).abs().max() / y.abs().max() for x, y in pairs)
        x, y = torch.randn(2, *shape, device=device)
        bare, fast = median_ms(lambda: torch.exp(x, out=y),  # into memory that is there: no page faults
                               lambda: forward_and_gradients(compiled, arguments))
        loop, = median_ms(lambda: forward_and_gradients(selective_scan_ref, arguments))
        print(f"{str(shape):<25}{seconds:11.1f}{bare:15.1f}{loop:7.0f}{fast:7.1f}"
              f"{fast / bare:11.1f}{loop / fast:12.1f}{difference:21.1e}", flush=True)

    task, batch_size = PathStar(2, 5, 50), 64
    model = Mamba(MambaConfig(task.vocab_size, d_state=32)).to(device)  # the quick preset
    print(f"\na training step on {task} (medians of 15; {device})")
    d, n = model.config.expand * model.config.d_model, model.config.d_state
    arguments = example(batch_size, task.seq_len - 1, d, n, device)
    scans = lambda: [forward_and_gradients(compiled, arguments) for _ in model.layers()]
    time_step(model, task, batch_size, scans)


if __name__ == "__main__":
    main()
