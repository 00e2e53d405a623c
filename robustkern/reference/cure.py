"""CURE as its authors' code computes it: the baseline of the benchmarks, in plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.reference.samples import per_sample


def authors_cure_backward(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    weight: float,
    h: float,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    r"""One training step's gradient in the structure of the authors' code, added to `.grad`.

    Five forward passes and three calls of autograd: the direction is found by a full backward
    pass whose parameter gradients are thrown away, the network's outputs at the inputs are computed
    twice more, the regularizer runs in eval mode, and its gradient is taken by double backward.
    The penalty is the norm, not its square, of per-sample gradients, averaged over the batch.

    Args:
        model: the network; its training mode is restored afterwards.
        inputs: (N, \*D), any floating dtype the model takes.
        targets: (N, ...), as `loss_fn` takes them.
        weight: of the penalty.
        h: L2 length of the finite difference, in input units.
        loss_fn: returns the batch mean.

    Returns:
        The training loss, 0-dimensional and detached.
    """
    modes = {module: module.training for module in model.modules()}
    outputs = model(inputs)
    loss = loss_fn(outputs, targets)
    model.eval()
    held = [p.grad for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None

    x = inputs.detach().clone().requires_grad_()
    samples = x.shape[0]
    model(x)
    (samples * loss_fn(model(x), targets)).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    sign = x.grad.sign()
    norm = sign.flatten(1).norm(dim=1)
    z = h * sign / per_sample(norm.clamp_min(1), sign)
    for parameter, grad in zip(model.parameters(), held, strict=True):
        parameter.grad = grad
    x.grad = None

    shifted = samples * loss_fn(model(x + z), targets)
    original = samples * loss_fn(model(x), targets)
    (difference,) = torch.autograd.grad(shifted - original, x, create_graph=True)
    penalty = weight * difference.flatten(1).norm(dim=1).mean()
    for module, mode in modes.items():
        module.training = mode
    (loss + penalty).backward()
    return loss.detach()
