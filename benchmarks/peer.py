"""Bare torch and devinterp on the workloads of `workloads.py`, in an interpreter that has them.

`measure.py` starts it and asks over its standard input, one JSON object per line, so that the rivals take turns.
"""

import json
import math
import os
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from devinterp.optim.sgmcmc import SGMCMC
from devinterp.slt.llc import LLCEstimator
from devinterp.slt.sampler import sample
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    """A layer of the transformer."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """Add attention and MLP to the residual stream."""
        batch, length, width = x.shape
        parts = self.query_key_value(self.attention_norm(x)).split(width, dim=-1)
        q, k, v = (part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.attention_out(found)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    """The transformer of `workloads.transformer`."""

    def __init__(self, vocab=64, length=16, layers=2, width=64, heads=4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab)

    def forward(self, tokens):
        """Compute the logits."""
        stream = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(stream)))


def squared_error(output, y):
    """Half the squared error, as in `workloads.deep_linear`."""
    return 0.5 * ((output - y) ** 2).sum(dim=-1).mean()


def cross_entropy(output, y):
    """Mean cross-entropy over examples, and positions if there are any."""
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), y.reshape(-1))


def deep_linear():
    """Make the model, its loss and data."""
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(4)])
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    x = torch.randn(10_000, 32)
    return model, squared_error, x, model(x).detach() + torch.randn(10_000, 32)


def mlp():
    """Make the model, its loss and data."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    x = torch.randn(20_000, 16)
    return model, cross_entropy, x, (x[:, 0] * x[:, 1] > 0).long()


def transformer():
    """Make the model, its loss and data."""
    tokens = torch.randint(0, 64, (4096, 17))
    return Transformer(), cross_entropy, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


MAKE = {"deep_linear": deep_linear, "mlp": mlp, "transformer": transformer}


class Clock:
    """Time from the first draw of each chain to its last."""

    def __init__(self):
        self.times = {}

    def __call__(self, chain, draw, **kwargs):
        """Note when a draw was made."""
        self.times.setdefault(chain, []).append(time.perf_counter())


def run_torch(model, loss_fn, x, y, request):
    """Time forward and backward passes on random batches, without any sampler."""

    def step():
        indices = torch.randint(0, len(x), (request["batch_size"],))
        for parameter in model.parameters():
            parameter.grad = None
        loss_fn(model(x[indices]), y[indices]).backward()

    step()
    start = time.perf_counter()
    for _ in range(request["num_gradients"]):
        step()
    return request["num_gradients"], time.perf_counter() - start


def run_devinterp(model, loss_fn, x, y, request):
    """Time devinterp's own chains, without their set-up."""
    chains, clock = request["num_chains"], Clock()
    draws = max(2, math.ceil(request["num_gradients"] / chains))
    loader = DataLoader(TensorDataset(x, y), batch_size=request["batch_size"], shuffle=True)

    def evaluate(model, batch):
        return loss_fn(model(batch[0]), batch[1])

    sample(
        model,
        loader,
        [LLCEstimator(chains, draws, init_loss=torch.tensor(1.0), nbeta=request["nbeta"]), clock],
        evaluate=evaluate,
        sampling_method=SGMCMC.sgld,
        optimizer_kwargs={"lr": request["step_size"], "localization": 100.0, "nbeta": request["nbeta"]},
        num_draws=draws,
        num_chains=chains,
        init_loss=torch.tensor(1.0),
        verbose=False,
    )
    return (draws - 1) * chains, sum(times[-1] - times[0] for times in clock.times.values())


def main():
    """Answer requests until the input ends."""
    warnings.simplefilter("ignore")
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    made = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["workload"]
        if name not in made:
            torch.manual_seed(0)
            made[name] = MAKE[name]()
        run = {"torch": run_torch, "devinterp": run_devinterp}[request["rival"]]
        num_gradients, seconds = run(*made[name], request)
        print(json.dumps({"gradients": num_gradients, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
