"""devinterp's own LLC estimates, in an interpreter that has it, on losses of the process that started it.

`llc_bridge.py` starts it with the number of a socket, and sends what is wanted. The losses are JAX functions, which stay
where they are: every forward pass here sends the weights and gets loss and gradient back. All else (chains, noise, steps,
localization, estimate) is devinterp's.
"""

import sys
import warnings
from multiprocessing.connection import Connection

import numpy as np
import torch
from devinterp.optim.sgmcmc import SGMCMC
from devinterp.slt.sampler import estimate_learning_coeff_with_summary
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ASKED = Connection(int(sys.argv[1]))


class Loss(torch.autograd.Function):
    """The loss at the other end of the socket."""

    @staticmethod
    def forward(ctx, weights):
        """Ask for loss and gradient, and keep the gradient."""
        ASKED.send_bytes(weights.detach().numpy().tobytes())
        answer = torch.from_numpy(np.frombuffer(ASKED.recv_bytes(), np.float32).copy())
        ctx.save_for_backward(answer[1:])
        # devinterp divides the loss in place, which a view does not allow.
        return answer[0].clone()

    @staticmethod
    def backward(ctx, *gradients):
        """Hand out the gradient that came with the loss."""
        return gradients[0] * ctx.saved_tensors[0]


class Model(nn.Module):
    """All weights in one vector, which is the same to SGLD."""

    def __init__(self, center):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(center))

    def forward(self, batch):
        """Compute the loss; the other end knows the data."""
        return Loss.apply(self.weights)


def estimate(request):
    """Run devinterp as its documentation does, and keep what `llc_accuracy.py` scores."""
    draws = request["num_gradients"] // 2
    found = estimate_learning_coeff_with_summary(
        Model(request["center"]),
        DataLoader(TensorDataset(torch.zeros(2 * draws, 1))),
        evaluate=lambda model, batch: model(batch),
        sampling_method=SGMCMC.sgld,
        optimizer_kwargs={name: request[name] for name in ("lr", "localization", "nbeta")},
        num_draws=draws,
        num_burnin_steps=draws,
        num_chains=request["num_chains"],
        seed=request["seed"],
        verbose=False,
    )
    return {"per_chain": [found[f"llc-chain/{i}"] for i in range(request["num_chains"])]}


def main():
    """Answer requests until the other end closes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    while True:
        try:
            request = ASKED.recv()
        except EOFError:
            return
        try:
            answer = estimate(request)
        except RuntimeError as error:
            if "NaN detected" not in str(error):
                raise
            answer = {"error": str(error)}
        ASKED.send_bytes(b"")
        ASKED.send(answer)


if __name__ == "__main__":
    main()
