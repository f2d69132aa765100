"""A compact GPT with GPT-2's layout and parameter names, what it shares with a Mamba, and the optimisers.

    python model.py  # count the parameters, time a training step, eager and compiled

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

# On a CPU causal_conv takes a path of its own if uncompiled, causal_attention if compiled: each makes a
# training step 5 % faster or more.

def causal_conv(x, conv):
    """A causal depthwise nn.Conv1d along t: x (b, t, d) -> (b, t, d)."""
    t, k = x.shape[1], conv.kernel_size[0]
    x = F.pad(x, (0, 0, k - 1, 0))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # the library's kernel is fast on an image of one row with channels last, (b, d, 1, t)
        return F.conv2d(x.mT[:, :, None], conv.weight[:, :, None], conv.bias, groups=x.shape[2])[:, :, 0].mT
    # shifted products, which a compiler fuses into one loop
    y = sum(x[:, i:i + t] * conv.weight[:, 0, i] for i in range(k))
    return y if conv.bias is None else y + conv.bias

def causal_attention(q, k, v):
    """Queries, keys and values (b, h, t, d) -> (b, h, t, d)."""
    t, d = q.shape[2:]
    if t > 32 or q.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # Plain products are faster here. Rows of 16 keys fill a CPU's vectors; the keys added come last, so no
    # token reads them. (Were the scores scaled, not q, the compiler would put the library's kernel back.)
    q, k, v = (F.pad(x, (0, 0, 0, -t % 16)) for x in (q, k, v))
    later = q.new_full((q.shape[2],) * 2, -math.inf).triu(1)  # (t, t), rounded up
    return (((q / math.sqrt(d)) @ k.mT + later).softmax(-1) @ v)[:, :, :t]

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

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.ln_1 = nn.LayerNorm(d)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(d)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(d, 4 * d), c_proj=nn.Linear(4 * d, d)))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))

class LanguageModel(nn.Module):
    """What a GPT and a Mamba share: token ids (b, t) -> logits (b, t, vocab_size). A subclass has embed(idx),
    ids -> (b, t, d); layers(), its blocks; final_norm, the module before the head; and token_embedding, the
    nn.Embedding that the head is tied to."""

    def features(self, idx, every=False, last=0):
        """Token ids (b, t) -> what the head reads, (b, t, d); `every`: of each layer, (n_layer, b, t, d);
        `last`: at so many last positions; 0: at all t."""
        x, outputs = self.embed(idx), []
        for block in self.layers():
            x = block(x)
            if every:
                outputs.append(x[:, -last:])  # [-0:] is all
        return self.final_norm(torch.stack(outputs) if every else x[:, -last:])

    def head(self, x):
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
    mimetic: bool = False  # queries and keys start as equal maps; GPT-2's and the paper's do not

class GPT(LanguageModel):
    """GPT-2 with the exact GELU, short_conv, mimetic. Raises UserError if n_head does not divide n_embd."""
    token_embedding = property(lambda self: self.wte)
    final_norm = property(lambda self: self.ln_f)

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"n_head {config.n_head}: must divide n_embd {config.n_embd}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's initialisation; 2 n_layer branches add to the residual stream, each by its c_proj
        for name, p in self.named_parameters():
            if p.ndim == 2:
                branches = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(branches))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # A look-up asks where else a token stands. Equal queries and keys ask just that from the first step
        # on; otherwise it has to be learnt (half of mimetic initialisation, Trockman & Kolter 2023).
        for block in self.h if config.mimetic else ():
            q, k, _ = block.attn.c_attn.weight.data.chunk(3)
            nn.init.normal_(q, std=1 / math.sqrt(config.n_embd))
            k.copy_(q)

    def embed(self, idx):
        return self.wte(idx) + self.wpe.weight[:idx.shape[1]]

    def layers(self):
        return self.h

@torch.no_grad()
def generate(model, task, prefix, teacherless):
    """The model's own answer by greedy decoding: prefix (n, prefix_len) -> (n, target_len), long. A standard
    model writes a token a pass and reads it back; a teacherless one writes all in one pass."""
    if teacherless:
        blank = prefix.new_zeros(len(prefix), task.target_len)
        return model(inputs(task, prefix, blank, teacherless))[:, -task.target_len:].argmax(-1)
    tokens = prefix
    for _ in range(task.target_len):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[:, task.prefix_len:]

def precision(dtype, device):
    """The context in which a run trains and is evaluated: --dtype; TF32 where the hardware has it."""
    torch.set_float32_matmul_precision("high")
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

# -------------------------------------------------------------------------------------------------------
# The optimisers. A rate may be a tensor, and nothing waits for the device: so a GPU can record a step.

def parameter_groups(modules):
    """Named, disjoint and complete: the matrices of the linear layers, which Muon takes and weight decay
    shrinks, and the rest (embeddings, norms, biases, convolutions, Mamba's D and A_log, a matrix too)."""
    groups = {"matrices": {}, "rest": {}}
    linear = {id(m.weight) for m in modules.modules() if isinstance(m, nn.Linear)}
    for name, p in modules.named_parameters():
        groups["matrices" if id(p) in linear else "rest"][name] = p
    return groups

class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) with all matrices of one shape as one batch: one by one, a
    Mamba's 25 (6 layers) are 575 operations in place of 100."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = {}
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                batches.setdefault(p.shape, []).append((p, p.grad, self.state[p]["momentum_buffer"]))
            for (rows, columns), batch in batches.items():
                params, grads, momenta = zip(*batch)
                lr, scale = group["lr"], math.sqrt(max(1, rows / columns))  # tall matrices move further
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                update = self.orthogonal(torch.stack(nesterov), group).to(params[0].dtype)
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_sub_(params, (lr * scale * update).unbind())

    @staticmethod
    def orthogonal(x, group):
        """x (k, rows, columns) -> about the nearest matrices with orthonormal rows or columns, bfloat16:
        Newton-Schulz iteration on the side that is shorter."""
        a, b, c = group["ns_coefficients"]
        tall = x.shape[1] > x.shape[2]
        x = F.normalize((x.mT if tall else x).bfloat16(), dim=(1, 2), eps=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x

def configure_optimizers(modules, optimizer, lr, muon_lr, weight_decay):
    """A list of optimisers: AdamW, or with `optimizer` "muon" Muon for the matrices and AdamW for the rest.
    Weight decay is for the matrices alone. `base_lr` in each group is its highest rate."""
    matrices, rest = (list(group.values()) for group in parameter_groups(modules).values())
    groups = [dict(params=rest, weight_decay=0.0), dict(params=matrices, weight_decay=weight_decay)]
    optimizers = [Muon([groups.pop()], lr=muon_lr)] if optimizer == "muon" else []
    optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True, capturable=True))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["base_lr"] = group["lr"]
    return optimizers

def out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)

def compiler_failed(error):
    """Turn torch.compile off in this process, and say why in one line on stderr. Raises `error` itself if
    that is no help: it was off already, memory or the device failed, or it is a user's mistake."""
    off = torch._dynamo.eval_frame._stance.stance == "force_eager"  # there is no public way to ask
    if off or out_of_memory(error) or isinstance(error, (UserError, torch.AcceleratorError)):
        raise error
    torch.compiler.set_stance("force_eager")
    # the compiler wraps what happened; of what a C++ compiler says take the line that tells what is wrong
    error = getattr(error, "inner_exception", None) or error
    lines = str(error).strip().splitlines() or [""]
    reason = next((line for line in lines if "error: " in line), lines[0])
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"failed under torch.compile ({type(error).__name__}: {reason}): trying uncompiled, which is "
              "slower", file=sys.stderr, flush=True)

def or_uncompiled(function, *args):
    """Call a function, and where it is the compiler that fails once more without one."""
    try:
        return function(*args)
    except Exception as error:
        compiler_failed(error)
        return function(*args)

def time_step(model, task, batch_size):
    """Print a model's parameters and the time of a training step, eager and compiled (medians of 15)."""
    graphs = task.sample(batch_size, random_stream(0))
    prefix, target, _ = (x.to(model.token_embedding.weight.device) for x in graphs)
    optimizer, = configure_optimizers(model, "adamw", 1e-3, 0.0, 0.0)

    def step():
        x = model.features(inputs(task, prefix, target, teacherless=True), last=task.target_len)
        F.cross_entropy(model.head(x).flatten(0, 1), target.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    times = [median_ms(step)]
    for block in model.layers():
        block.compile(dynamic=False)
    try:
        times.append(median_ms(step))
    except Exception as error:  # what the compiler raises differs by back end
        compiler_failed(error)
    print(f"{task}, batch {batch_size}, {sum(p.numel() for p in model.parameters()):,} parameters: a step "
          f"takes {', compiled '.join(f'{ms:.1f} ms' for ms in times)}", flush=True)

def main():
    Parser(__doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for deg, n_embd in ((2, 64), (5, 128), (10, 64)):
        task = PathStar(deg, 5, 50)
        time_step(GPT(GPTConfig(task.vocab_size, task.seq_len - 1, n_embd=n_embd)).to(device), task, 64)

if __name__ == "__main__":
    run_script(main)
