"""A compact GPT, with GPT-2's layout and parameter names; what it shares with a Mamba; the optimisers.

    python model.py  # count the parameters of a GPT and time a training step, eager and compiled

Source: Radford et al. 2019 (GPT-2). The paper's GPT-Mini: 12 layers, width 384, 6 heads.
"""
import contextlib
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from data import Parser, PathStar, UserError, inputs, median_ms, random_stream, run_script

# -------------------------------------------------------------------------------------------------------
# The block. Where the fastest way differs between processors, the function that does the work chooses; a
# way of its own for a CPU stays only if it takes at least 5 % off a training step.


def compiled_for_cpu(x):
    return x.device.type == "cpu" and torch.compiler.is_compiling()


def causal_conv(x, conv):
    """A causal depthwise nn.Conv1d along t: x (b, t, d) -> (b, t, d), each from x_t and the k - 1 before."""
    t, k = x.shape[1], conv.kernel_size[0]
    x = F.pad(x, (0, 0, k - 1, 0))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # the library's kernel is fast on an image of one row with channels last, (b, d, 1, t)
        y = F.conv2d(x.mT[:, :, None], conv.weight[:, :, None], conv.bias, groups=x.shape[2])
        return y[:, :, 0].mT
    # shifted products, which a compiler fuses into one loop
    y = sum(x[:, i:i + t] * conv.weight[:, 0, i] for i in range(k))
    return y if conv.bias is None else y + conv.bias


def causal_attention(q, k, v):
    """Queries, keys and values (b, h, t, d) -> what the heads read, (b, h, t, d)."""
    t, d = q.shape[2:]
    missing = -t % 16
    if not compiled_for_cpu(q) or t > 32 and missing > 2:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # A CPU computes 16 keys at once, and the rest of a row one by one. So fill the row up; nothing before
    # what is added reads it.
    q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    if t > 32:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, :t]
    # This short, plain products are faster than the library's kernel, which the compiler would put back if
    # it were the scores that are scaled.
    later = q.new_full((t + missing, t + missing), -math.inf).triu(1)
    return (((q / math.sqrt(d)) @ k.mT + later).softmax(-1) @ v)[:, :, :t]


def gelu(x):
    """GPT-2's activation, x (1 + tanh z) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    if compiled_for_cpu(x):  # a CPU's tanh is slow; (1 + tanh z) / 2 = sigmoid(2 z)
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        # optional: with it a key can hold an edge's child and its value the parent from the first step on,
        # and no layer has to learn to look one token back; a Mamba block has one in the same place
        d, k = 3 * config.n_embd, config.short_conv
        self.conv = nn.Conv1d(d, d, k, groups=d, bias=False) if k else None

    def forward(self, x):
        qkv = self.c_attn(x)  # (b, t, 3 d)
        if self.conv is not None:
            qkv = qkv + causal_conv(qkv, self.conv)
        q, k, v = (rearrange(x, "b t (h d) -> b h t d", h=self.n_head) for x in qkv.chunk(3, dim=-1))
        return self.c_proj(rearrange(causal_attention(q, k, v), "b h t d -> b t (h d)"))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


# -------------------------------------------------------------------------------------------------------
# The model.


class LanguageModel(nn.Module):
    """What a GPT and a Mamba share: token ids (b, t) -> logits (b, t, vocab_size).

    A subclass has `embed(idx)`, ids -> (b, t, d); `layers()`, its blocks in order; `final_norm`, the module
    before the head; and `token_embedding`, the nn.Embedding whose weight the head is tied to.
    """

    def features(self, idx, every=False, last=0):
        """Token ids (b, t) -> what the head reads, (b, t, d); `every`: behind each layer, (n_layer, b, t, d);
        `last`: at so many last positions, not at all t."""
        x, outputs = self.embed(idx), []
        for block in self.layers():
            x = block(x)
            if every:
                outputs.append(x[:, -last:])
        return self.final_norm(torch.stack(outputs) if every else x[:, -last:])

    def head(self, x):
        """Features (..., d) -> logits (..., vocab_size)."""
        return F.linear(x, self.token_embedding.weight)

    def forward(self, idx):
        return self.head(self.features(idx))


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int       # the longest input, in tokens
    n_layer: int = 8
    n_head: int = 4
    n_embd: int = 64
    short_conv: int = 4   # taps of the causal convolution on q, k and v; 0: none, the paper's GPT


class GPT(LanguageModel):
    """GPT-2 for inputs of up to block_size tokens. Raises UserError if n_head does not divide n_embd."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"n_head {config.n_head}: must divide n_embd {config.n_embd}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():  # GPT-2's initialisation; the convolution has PyTorch's
            if name.endswith("c_proj.weight"):  # the 2 n_layer branches added to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    token_embedding = property(lambda self: self.wte)
    final_norm = property(lambda self: self.ln_f)

    def embed(self, idx):
        return self.wte(idx) + self.wpe.weight[:idx.shape[1]]

    def layers(self):
        return self.h


@torch.no_grad()
def generate(model, task, prefix, teacherless):
    """The model's own answer by greedy decoding: prefix (n, prefix_len) -> (n, target_len), long.

    A standard model writes a token a pass and reads it back; a teacherless one writes all in one pass.
    """
    if teacherless:
        blank = prefix.new_zeros(len(prefix), task.target_len)
        return model(inputs(task, prefix, blank, teacherless))[:, -task.target_len:].argmax(-1)
    tokens = prefix
    for _ in range(task.target_len):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[:, task.prefix_len:]


def compiler_failed(error):
    """Go on without torch.compile in this process, and say why in one line on stderr.

    Raises `error` itself where that would not help: memory or the device failed, or nothing is compiled.
    """
    no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
    off = torch._dynamo.eval_frame._stance.stance == "force_eager"  # there is no public way to ask
    if no_memory or off or isinstance(error, torch.AcceleratorError):
        raise error
    torch.compiler.set_stance("force_eager")
    # the compiler wraps what happened; of what a C++ compiler says, the line that says what is wrong
    error = getattr(error, "inner_exception", None) or error
    lines = str(error).strip().splitlines() or [""]
    reason = next((line for line in lines if "error: " in line), lines[0])
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"torch.compile failed ({type(error).__name__}: {reason}): running uncompiled, which is slower",
              file=sys.stderr, flush=True)


class Recorded:
    """A function of tensors as a CUDA graph, recorded once and replayed: a small model's step is some 600
    kernels of a few microseconds, and launched by Python one by one they take ten times as long."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *tensors):
        self.calls += 1
        if self.calls <= 3:  # these compile and allocate what lasts, on a stream of their own, as PyTorch asks
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function(*tensors)
            return torch.cuda.current_stream().wait_stream(stream)
        if self.graph is None:
            self.tensors, self.graph = [x.clone() for x in tensors], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.function(*self.tensors)
        for place, x in zip(self.tensors, tensors):
            place.copy_(x)
        self.graph.replay()


# -------------------------------------------------------------------------------------------------------
# The optimisers. Nothing in a step waits for the device, and a rate may be a float or a tensor with one
# number on the device: so a GPU can record a step, and replay it at another rate.


def parameter_groups(model):
    """Named, disjoint and complete: the matrices of the blocks, which Muon takes and weight decay
    shrinks, and the rest (embeddings, norms, biases, convolutions, and Mamba's A_log and D, which have
    two and one dimension but are no maps)."""
    groups = {"matrices": {}, "rest": {}}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for name, p in model.named_parameters():
        groups["matrices" if id(p) in linear else "rest"][name] = p
    return groups


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) with all matrices of one shape as one batch: one by one, a
    Mamba's 33 small ones are 759 operations in place of 100, a tenth of its step on a CPU."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
            batches = {}
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                batches.setdefault(p.shape, []).append(p)
            for (rows, columns), params in batches.items():
                # the mean of the gradients so far, then Nesterov's step ahead of it
                grads = [p.grad for p in params]
                momenta = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - momentum)
                nesterov = torch._foreach_lerp(grads, momenta, momentum)
                # every direction alike; tall matrices move further, as torch's do
                update = self.orthogonal(torch.stack(nesterov), group).to(params[0].dtype)
                update *= math.sqrt(max(1, rows / columns))
                if decay:
                    torch._foreach_mul_(params, 1 - lr * decay)
                torch._foreach_sub_(params, (lr * update).unbind())

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


def configure_optimizers(modules, optimizer, lr, muon_lr, weight_decay):
    """The optimisers of all parameters of `modules`, a list; `optimizer` is "adamw" or "muon", which is
    Muon for the matrices and AdamW for the rest. `base_lr` in each group is its rate after the warm-up."""
    matrices, rest = (list(group.values()) for group in parameter_groups(modules).values())
    adamw, optimizers = [dict(params=rest, lr=lr, weight_decay=0.0)], []
    if optimizer == "muon":
        optimizers.append(Muon(matrices, lr=muon_lr, weight_decay=weight_decay))
    else:
        adamw.append(dict(params=matrices, lr=lr, weight_decay=weight_decay))
    optimizers.append(torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=True, capturable=True))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["base_lr"] = group["lr"]
    return optimizers


# -------------------------------------------------------------------------------------------------------
# Count and time.


def time_step(model, task, batch_size):
    """Print how many parameters a model has and what a training step takes, eager and compiled: forward,
    the loss of the answer, backward, AdamW (medians of 15)."""
    device = model.token_embedding.weight.device
    graphs = task.sample(batch_size, random_stream(0))
    fed = inputs(task, graphs.prefix, graphs.target, teacherless=True).to(device)
    target = graphs.target.to(device)
    optimizer, = configure_optimizers(model, "adamw", 1e-3, 0.0, 0.0)

    def step():
        logits = model.head(model.features(fed)[:, -task.target_len:])
        F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    eager, = median_ms(step)
    for block in model.layers():
        block.compile(dynamic=False)
    try:
        compiled, = median_ms(step)
    except Exception as error:  # what the compiler raises differs by back end
        compiler_failed(error)
        compiled = math.nan
    width, parameters = model.token_embedding.embedding_dim, sum(p.numel() for p in model.parameters())
    print(f"{task}, batch {batch_size}, {model.config.n_layer} layers x {width}: {parameters:,} parameters; "
          f"a step takes {eager:.1f} ms, compiled {compiled:.1f} ms", flush=True)


def main():
    Parser(__doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"a GPT's training step on {device}, medians of 15")
    for deg, n_embd in ((2, 64), (5, 128), (10, 64)):
        task = PathStar(deg, 5, 50)
        model = GPT(GPTConfig(task.vocab_size, task.seq_len - 1, n_embd=n_embd)).to(device)
        time_step(model, task, batch_size=64)


if __name__ == "__main__":
    run_script(main)
