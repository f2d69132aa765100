"""A compact GPT, with GPT-2's layout and parameter names, and greedy decoding for any model.

    python model.py  # count the parameters, time a training step beside its bare matrix products

Source: Radford et al. 2019 (GPT-2). The paper's GPT-Mini: 12 layers, width 384, 6 heads.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from data import PathStar, UserError, inputs, median_ms, random_stream


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int       # the longest input, in tokens
    n_layer: int = 8
    n_head: int = 4
    n_embd: int = 64
    short_conv: int = 4   # taps of the causal convolution on q, k and v; 0: none, the paper's GPT


def causal_conv(x, conv):
    """A causal depthwise nn.Conv1d along t of x (b, t, d), as shifted products that a compiler fuses."""
    t, k = x.shape[1], conv.kernel_size[0]
    x = F.pad(x, (0, 0, k - 1, 0))
    # contiguous taps: with the weight's own stride a CPU's compiler leaves the whole loop scalar
    taps = [tap.contiguous() for tap in conv.weight[:, 0].unbind(1)]
    y = sum(x[:, i:i + t] * taps[i] for i in range(k))
    return y if conv.bias is None else y + conv.bias


def causal_attention(q, k, v):
    """Queries, keys and values (b, h, t, d) -> (b, h, t, d)."""
    t, d = q.shape[-2:]
    if q.device.type != "cpu" or t > 32:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # on a CPU, this short, plain products take a tenth off a training step; at length 128 they add a fifth
    # (q is scaled, not the product: that is a pattern in which Inductor puts the library's kernel back)
    mask = q.new_full((t, t), -math.inf).triu(1)
    return ((q / math.sqrt(d)) @ k.mT + mask).softmax(-1) @ v


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
        t = x.shape[1]
        qkv = self.c_attn(x)
        if self.conv is not None:
            qkv = qkv + causal_conv(qkv, self.conv)
        # whole vectors of keys: a CPU's kernels leave the rest of a row scalar; nothing reads the additions
        qkv = F.pad(qkv, (0, 0, 0, -t % 16))
        q, k, v = (rearrange(z, "b t (h d) -> b h t d", h=self.n_head).contiguous()
                   for z in qkv.chunk(3, dim=-1))
        y = causal_attention(q, k, v)[:, :, :t]
        return self.c_proj(rearrange(y, "b h t d -> b t (h d)"))


def gelu(x):
    """F.gelu(x, approximate="tanh"), GPT-2's, by (1 + tanh z) / 2 = sigmoid(2 z): a CPU's tanh is slow."""
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


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


class GPT(nn.Module):
    """Token ids (b, t), t <= block_size -> logits (b, t, vocab_size); the head is tied to the embedding.

    Raises UserError if n_head does not divide n_embd.
    """

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

    def layers(self):
        return self.h

    def features(self, idx, every=False):
        """Token ids (b, t) -> what the head reads, (b, t, n_embd); `every`: behind each layer, a stack."""
        x = self.wte(idx) + self.wpe.weight[:idx.shape[1]]
        outputs = []
        for block in self.layers():
            x = block(x)
            if every:
                outputs.append(x)
        return self.ln_f(torch.stack(outputs) if every else x)

    def head(self, x):
        return F.linear(x, self.wte.weight)

    def forward(self, idx):
        return self.head(self.features(idx))


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


# -------------------------------------------------------------------------------------------------------
# The benchmark.


def step_function(model, x, y):
    """A training step as a function without arguments: forward, the loss of the answer y, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        logits = model.head(model.features(x)[:, -y.shape[1]:])
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def linear_products(model, tokens):
    """The products of activations and weights in such a step, as a function without arguments."""
    weights = [m.weight.detach() for m in model.layers().modules() if isinstance(m, nn.Linear)]
    pairs = [(w, w.new_ones(tokens, w.shape[1]), w.new_ones(tokens, w.shape[0])) for w in weights]

    def products():
        for w, x, dy in pairs:
            x @ w.T, dy @ w, dy.T @ x
    return products


def attention_products(model, batch_size, t):
    """The products inside the attention of such a step: two forward, four backward, in every layer."""
    n_head, n_layer = model.config.n_head, model.config.n_layer
    heads = model.wte.weight.new_ones(batch_size * n_head, t, model.config.n_embd // n_head)
    scores = heads.new_ones(batch_size * n_head, t, t)

    def products():
        for _ in range(n_layer):
            heads @ heads.mT, scores @ heads  # scores, output
            scores.mT @ heads, heads @ heads.mT, scores @ heads, scores.mT @ heads  # dv, dscores, dq, dk
    return products


def time_step(model, task, batch_size, inner):
    """Print a training step, eager and compiled, beside its arithmetic alone: the products of its linear
    layers and `inner`, a function that does those of its attention or its scans."""
    device, config = next(model.parameters()).device, model.config
    graphs = task.sample(batch_size, random_stream(0, device=device))
    x = inputs(task, graphs.prefix, graphs.target, True)
    products = linear_products(model, x.numel())
    step = step_function(model, x, graphs.target)
    eager, = median_ms(step)
    for layer in model.layers():
        layer.compile(dynamic=False)
    compiled, bare = median_ms(step, lambda: (products(), inner()))
    width = getattr(config, "n_embd", None) or config.d_model
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{config.n_layer} layers x {width}, batch {batch_size}: {parameters:,} parameters; "
          f"step {eager:.1f} ms, compiled {compiled:.1f} ms; "
          f"its products and scans alone {bare:.1f} ms; ratio {compiled / bare:.2f}", flush=True)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = PathStar(2, 5, 50)
    print(f"a training step on {task} (medians of 15; {device})")
    for n_layer, n_embd, batch_size in ((8, 64, 64), (8, 256, 128)):
        config = GPTConfig(task.vocab_size, task.seq_len - 1, n_layer, 4, n_embd)
        model = GPT(config).to(device)
        time_step(model, task, batch_size, attention_products(model, batch_size, task.seq_len - 1))


if __name__ == "__main__":
    main()
