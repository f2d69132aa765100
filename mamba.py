"""Mamba (Gu & Dao 2023, arXiv 2312.00752), a language model without attention, in pure PyTorch.

    python mamba.py   # compare the scan with its definition, time both, time a training step

Where attention looks back at all tokens, a Mamba remembers: each of its d channels has a state h of n
numbers. At every token the state fades, the token is written into it, and the output is read from it; how
much, where and from where depends on the token. That is the selective scan (algorithm 2, equation 2):

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        fade, and write
    y_t = C_t . h_t + D u_t                               read

    paper    here     shape        meaning (b sequences, l tokens, d = expand * d_model, n = d_state)
    x, y     u, y     (b, l, d)    input and output
    Delta    delta    (b, l, d)    step size, above 0: the larger, the more is written and the more fades
    A        A        (d, n)       how fast each number of the state fades, below 0
    B, C     B, C     (b, l, n)    where in the state the token is written, and what is read
    D        D        (d,)         skip: how much of the input goes straight to the output

Parameter names are those of the reference implementation (state-spaces/mamba), but for its lm_head.weight,
which is the embedding.
"""
import math
import os
import sys
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from data import Parser, PathStar, median_ms, run_script
from model import LanguageModel, causal_conv, or_uncompiled, time_step

def selective_scan_ref(u, delta, A, B, C, D):
    """The definition, as a plain loop over time, which everything else is tested against.
    u, delta (b, l, d); A (d, n); B, C (b, l, n); D (d,) -> y (b, l, d), in the dtype of u."""
    h = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype, device=u.device)
    y = []
    for t in range(u.shape[1]):
        a = torch.exp(einsum(delta[:, t], A, "b d, d n -> b d n"))
        h = a * h + einsum(delta[:, t] * u[:, t], B[:, t], "b d, b n -> b d n")
        y.append(einsum(h, C[:, t], "b d n, b n -> b d") + D * u[:, t])
    return torch.stack(y, dim=1)

# -------------------------------------------------------------------------------------------------------
# The same scan, fast. With x_t = delta_t u_t and a_t = exp(delta_t A) it is
#     h_t = a_t h_{t-1} + x_t B_t        y_t = C_t . h_t
#
# Write dv for the gradient of the loss with respect to v, and g_t for dh_t. The loss depends on h_t through
# y_t and through h_{t+1}, so g is a recurrence too, one that runs back in time, and the rest follows from it:
#
#     g_t      = C_t dy_t + a_{t+1} g_{t+1}
#     dx_t     = sum over n of g_t B_t
#     dB_t     = sum over d of g_t x_t            dC_t = sum over d of h_t dy_t
#     dlog_a_t = g_t a_t h_{t-1}                  (log a_t = delta_t A)
#     ddelta_t = sum over n of A dlog_a_t         dA = sum over b and t of delta_t dlog_a_t
#
# (The products delta u and D u are left to autograd.) Autograd on the loop above would store h_t and a_t for
# all t, and memory is slower than arithmetic. So time is cut into chunks, only the state before each chunk is
# stored, and the backward pass computes the states within it again. A chunk function unrolls its steps, so
# that the compiler can make one loop over b, d and n of them, a kernel, in which h stays in registers. 16
# steps would take two to three times as long to compile, gain a tenth at most on a CPU, and fill the
# registers of a GPU.
CHUNK = 8

def exp2(x):
    """torch.exp2 for finite x <= 0, to a relative 2e-7. Most of the scan's time is spent here, so compiled
    for a CPU in fp32 it is a faster one: 2^x = 2^(i + f), i in a float's exponent, a polynomial for 2^f."""
    if not torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return torch.exp2(x)
    i = x.round()
    f, power = x - i, 0  # |f| <= 1/2
    for c in (0.0013300265, 0.009669709, 0.0555056, 0.24022281, 0.69314718, 1):  # minimax; exact at 0
        power = power * f + c
    return power * ((i.int() + 127).clamp(min=0) << 23).view(torch.float32)  # 0 from i = -127 down

# In a chunk of T steps x, delta, y and dy are (b, T, d, 1), B and C (b, T, 1, n), A is (d, n), and h, a, g
# and dh are (b, d, n): they broadcast. Time counts from 0: step t leads from h[t] to h[t + 1], decay a[t].

def states(x, delta, A, B, h):
    """From the state h before a chunk -> its T + 1 states, h first, and its T decays, as lists."""
    h, a = [h], []
    log2_a = A * math.log2(math.e)  # of a step size of 1: exp(delta A) = 2^(delta log2_a), the faster one
    for t in range(x.shape[1]):
        a.append(exp2(delta[:, t] * log2_a))
        h.append(a[t] * h[t] + x[:, t] * B[:, t])
    return h, a

def chunk_forward(x, delta, A, B, C, h):
    """From the state h before a chunk -> y without the skip D u, and the state after the chunk."""
    h, _ = states(x, delta, A, B, h)
    y = [(C[:, t] * h[t + 1]).sum(2, keepdim=True) for t in range(x.shape[1])]
    return torch.stack(y, dim=1), h[-1]

def chunk_backward_n(x, delta, A, B, C, h, dy, dh):
    """The sums over n. (One kernel keeps sums in registers along one axis only; those over d have another.)
    dh: what later chunks add to the gradient of the chunk's last state, a_{t+1} g_{t+1} at its last t
    -> dx, ddelta, dA (b, d, n), not yet summed over b, and dh for the chunk before."""
    h, a = states(x, delta, A, B, h)
    dx, ddelta, dA = [], [], 0
    for t in reversed(range(x.shape[1])):
        g = C[:, t] * dy[:, t] + dh
        dh = a[t] * g
        dlog_a = dh * h[t]
        dx.append((g * B[:, t]).sum(2, keepdim=True))
        ddelta.append((A * dlog_a).sum(2, keepdim=True))
        dA = dA + delta[:, t] * dlog_a
    return torch.stack(dx[::-1], 1), torch.stack(ddelta[::-1], 1), dA, dh

def chunk_backward_d(x, delta, A, B, C, h, dy, dh):
    """The sums over d -> dB, dC. A reduction inside the loop would split it into many kernels, so four
    channels are added up one by one; a second kernel sums the d / 4 groups (d, if 4 does not divide d)."""
    steps, group = range(x.shape[1]), 4 if x.shape[2] % 4 == 0 else 1
    dB, dC = [0] * len(steps), [0] * len(steps)
    for i in range(group):  # channels i, i + 4, ...
        x_i, delta_i, A_i, h_i, dy_i, dh_i = (v[..., i::group, :] for v in (x, delta, A, h, dy, dh))
        h_i, a = states(x_i, delta_i, A_i, B, h_i)
        for t in steps:
            dC[t] = dC[t] + h_i[t + 1] * dy_i[:, t]
        for t in reversed(steps):
            g = C[:, t] * dy_i[:, t] + dh_i
            dh_i = a[t] * g
            dB[t] = dB[t] + g * x_i[:, t]
    return tuple(torch.stack(v, 1).sum(2, keepdim=True) for v in (dB, dC))

@cache  # at the first call, not on import: importing the compiler takes seconds
def compiled(function):
    """A chunk function, compiled. Inductor, the compiler, makes a loop of each operation, and fuses loops
    over the same elements: what one hands to the next is not stored. Here it may fuse any number."""
    no_limit = 10**6
    return torch.compile(function, dynamic=False, options={
        "max_fusion_size": no_limit, "cpp.max_horizontal_fusion_size": no_limit,  # not the usual 64 loops, 16
        "cpp.enable_floating_point_contract_flag": "fast"})  # a * b + c may be one instruction

def set_compile(on):
    """Turn torch.compile on or off in this process."""
    # importing the compiler, even to leave it off, makes its kernels' folder; if it cannot, the run ends
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        folder and os.makedirs(folder, exist_ok=True)
    except OSError as error:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        print(f"TORCHINDUCTOR_CACHE_DIR {folder}: {error.strerror}; taking the default", file=sys.stderr)
    torch.compiler.set_stance("default" if on else "force_eager")

def run(function, *tensors):
    """function(*tensors), compiled; where no compiler works, as it is."""
    # detached: it would be compiled anew for each mix of requires_grad
    return or_uncompiled(compiled(function), *map(Tensor.detach, tensors))

# The model around the scan is compiled too. So that its compiler does not unroll these loops into the model,
# both directions are operators, which it calls as they are; "fakes" tell it the shapes of the outputs. (A
# torch.autograd.Function kept from the compiler cuts every block in pieces: a step takes 5 to 8 % longer.)
@torch.library.custom_op("pitfalls::scan_chunk", mutates_args=())
def scan_chunk(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> list[Tensor]:
    return list(run(chunk_forward, x, delta, A, B, C, h))

@torch.library.custom_op("pitfalls::scan_chunk_backward", mutates_args=())
def scan_chunk_backward(inputs: list[Tensor]) -> list[Tensor]:
    """[x, delta, A, B, C, h, dy, dh] -> the gradients of the first six"""
    dx, ddelta, dA, dh = run(chunk_backward_n, *inputs)
    dB, dC = run(chunk_backward_d, *inputs)
    return [dx, ddelta, dA.sum(0), dB, dC, dh]

scan_chunk.register_fake(lambda x, delta, A, B, C, h: [torch.empty_like(x), torch.empty_like(h)])
scan_chunk_backward.register_fake(lambda inputs: [torch.empty_like(v) for v in inputs[:6]])
scan_chunk.register_autograd(
    lambda ctx, grads: tuple(scan_chunk_backward([*ctx.saved_tensors, *(g.contiguous() for g in grads)])),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

def at_least_fp32(x):
    return x if x.dtype == torch.float64 else x.float()

def selective_scan(u, delta, A, B, C, D):
    """`selective_scan_ref`, fast: same arguments, same result, any length l >= 1, in the dtype of u.
    Computes in fp32 (in fp64 for fp64 inputs) whatever autocast says."""
    dtype, l = u.dtype, u.shape[1]
    u, delta, A, B, C, D = map(at_least_fp32, (u, delta, A, B, C, D))
    # into c chunks of one shape for all l; zeros fill the last one, and their y is cut off below
    cut = lambda v, axes: rearrange(F.pad(v, (0, 0, 0, -l % CHUNK)), f"b (c t) {axes}", t=CHUNK).contiguous()
    x, delta = (cut(v, "d -> c b t d 1") for v in (delta * u, delta))
    B, C = (cut(v, "n -> c b t 1 n") for v in (B, C))
    # the state goes from chunk to chunk, and its gradient, dh, comes back through autograd
    y, h = [], u.new_zeros(len(u), *A.shape)
    for x_c, delta_c, B_c, C_c in zip(x, delta, B, C):
        y_c, h = scan_chunk(x_c, delta_c, A, B_c, C_c, h)
        y.append(y_c)
    return (torch.cat(y, dim=1)[:, :l, :, 0] + D * u).to(dtype)

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
    """gate * scan(conv(x)), between two projections (Mamba paper, figure 3, section 3.4)."""

    def __init__(self, config):
        super().__init__()
        d, n = config.expand * config.d_model, config.d_state
        self.dt_rank = math.ceil(config.d_model / 16)
        self.in_proj = nn.Linear(config.d_model, 2 * d, bias=False)
        self.conv1d = nn.Conv1d(d, d, config.d_conv, groups=d)
        self.x_proj = nn.Linear(d, self.dt_rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d)
        self.A_log = nn.Parameter((config.a_scale * torch.arange(1, n + 1).float()).log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = nn.Linear(d, config.d_model, bias=False)
        # step sizes log-uniform in [1e-3, 1e-1]; the bias inverts softplus (Mamba paper, section 3.6)
        dt = torch.exp(torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-self.dt_rank ** -0.5, self.dt_rank ** -0.5)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.out_proj.weight /= math.sqrt(config.n_layer)  # one residual branch a layer

    def scan_inputs(self, u):
        """From u (..., d), behind the convolution -> delta (..., d), A (d, n), B and C (..., n)."""
        n = self.A_log.shape[1]
        dt, B, C = self.x_proj(u).split([self.dt_rank, n, n], dim=-1)
        delta = F.softplus(at_least_fp32(self.dt_proj(dt)))
        return delta, -torch.exp(at_least_fp32(self.A_log)), B, C

    def forward(self, x):
        u, gate = self.in_proj(x).chunk(2, dim=-1)  # (b, l, d) each
        u = F.silu(causal_conv(u, self.conv1d))
        y = selective_scan(u, *self.scan_inputs(u), self.D)
        return self.out_proj(y * F.silu(gate))

    def step(self, x, state=None):
        """One token: x (b, d_model), state (last d_conv - 1 conv inputs, h (b, d, n)) -> y, state."""
        d, _, k = self.conv1d.weight.shape
        past, h = state or (x.new_zeros(len(x), k - 1, d), x.new_zeros(len(x), *self.A_log.shape))
        u, gate = self.in_proj(x).chunk(2, dim=-1)     # (b, d) each
        window = torch.cat([past, u[:, None]], dim=1)  # (b, d_conv, d)
        u = F.silu(einsum(window, self.conv1d.weight[:, 0], "b k d, d k -> b d") + self.conv1d.bias)
        delta, A, B, C = self.scan_inputs(u)
        h = torch.exp(delta[:, :, None] * A) * h + (delta * u)[:, :, None] * B[:, None, :]
        y = einsum(h, C, "b d n, b n -> b d") + self.D * u
        return self.out_proj(y * F.silu(gate)), (window[:, 1:], h)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.mixer = Mixer(config)

    def forward(self, x):
        return x + self.mixer(self.norm(x))

class Mamba(LanguageModel):
    token_embedding = property(lambda self: self.backbone.embedding)
    final_norm = property(lambda self: self.backbone.norm_f)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = nn.ModuleDict(dict(
            embedding=nn.Embedding(config.vocab_size, config.d_model),
            layers=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            norm_f=nn.RMSNorm(config.d_model, eps=1e-5)))
        # the projections keep PyTorch's initialisation, as in the reference; the embedding is redrawn
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def layers(self):
        return self.backbone.layers

    def embed(self, idx):
        return self.token_embedding(idx)

    def step(self, token, states=None):
        """One token in constant time and memory: token (b,), states of the last call (None: at the start)
        -> logits (b, vocab_size), states. Equal to the last position of `forward`."""
        x, new_states = self.embed(token), []
        for layer, state in zip(self.layers(), states or [None] * len(self.layers())):
            y, state = layer.mixer.step(layer.norm(x), state)
            x = x + y
            new_states.append(state)
        return self.head(self.final_norm(x)), new_states

# -------------------------------------------------------------------------------------------------------
# The check and the timing.

def forward_and_gradients(function, arguments):
    y = function(*arguments)
    return y.detach(), *torch.autograd.grad(y, arguments, torch.ones_like(y))

def device_ms(function):
    """Median time of a call. On a GPU as ten calls in a CUDA graph, without Python, which takes longer."""
    if not torch.cuda.is_available():
        return median_ms(function)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            function()
    return median_ms(graph.replay) / 10

def main():
    Parser(__doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = dict(cpu=[(64, 31, 128, 64), (64, 31, 256, 16), (16, 127, 256, 16), (16, 247, 256, 16)],
                  cuda=[(64, 31, 128, 64), (256, 31, 768, 16), (64, 247, 768, 16)])
    torch._dynamo.config.recompile_limit = 64  # more shapes than a model has
    block_scan = torch.compile(selective_scan, dynamic=False)  # as in a compiled block
    source, target = torch.empty(2, 2**26, device=device)
    copied = 8 * len(source) / device_ms(lambda: target.copy_(source)) / 1e9
    print(f"selective scan, forward and backward, fp32, {device}; a plain copy: {copied:.4f} TB/s\n"
          "(b, l, d, n)           loop, ms   scan, ms   loop / scan     TB/s   largest difference")
    for b, l, d, n in shapes[device]:
        sizes = (b, l, d), (b, l, d), (d, n), (b, l, n), (b, l, n), (d,)
        u, delta, A, B, C, D = (torch.randn(size, device=device) for size in sizes)
        arguments = [v.requires_grad_() for v in (u, F.softplus(delta - 3), -A.exp(), B, C, D)]
        loop = partial(forward_and_gradients, selective_scan_ref, arguments)
        scan = partial(or_uncompiled, forward_and_gradients, block_scan, arguments)
        difference = max((v - w).abs().max() / w.abs().max() for v, w in zip(scan(), loop()))
        loop_ms, scan_ms = median_ms(loop, repeats=3), device_ms(scan)
        # what must move: forward x, delta, B, C and y; backward the first four, dy, and their gradients
        scan_bytes = 4 * (8 * b * l * d + 6 * b * l * n)
        print(f"{(b, l, d, n)!s:<20}{loop_ms:11.0f}{scan_ms:11.2f}{loop_ms / scan_ms:14.1f}"
              f"{scan_bytes / scan_ms / 1e9:9.4f}{difference:21.1e}", flush=True)

    task = PathStar(2, 5, 50)
    time_step(Mamba(MambaConfig(task.vocab_size, d_state=64)).to(device), task, batch_size=64)

if __name__ == "__main__":
    run_script(main)
