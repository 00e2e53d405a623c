"""Curvature along training: what CURE makes small, and the accuracy that it buys, by the epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkern.analysis import InputHessian, frobenius_norm, sign_curvature
from robustkern.analysis.samples import check_count, check_length, check_rows
from robustkern.evaluation import accuracy, evaluating, pgd


@dataclass(frozen=True)
class Curvature:
    r"""Of the cross entropy at a sample of images; H is the Hessian in the input, of length h.

    Attributes:
        frobenius_squared: mean of :math:`\|H_i\|_F^2`, estimated.
        frobenius_error: standard error of that estimate for these images, of its random draws.
        sign_curvature: mean of :math:`\|H_i z_i\|_2` along CURE's z = sign(g) / \|\|sign(g)\|\|_2.
        pgd_accuracy: fraction classified right under PGD.
    """

    frobenius_squared: float
    frobenius_error: float
    sign_curvature: float
    pgd_accuracy: float


class CurvatureMonitor:
    r"""Measures a network in training, between steps: call it with the network after each epoch.

    Its three figures are those of Moosavi-Dezfooli et al. 2019, Fig. 10 and 14, who take 1,000
    images, 100 draws and PGD-20 (SVHN: PGD-10). The defaults are for every epoch: 17 forward and 16
    backward passes an image, the latter to the inputs alone, which for 64 images is below 2% of the
    passes of a plain epoch on 60,000. The same images, draws and starts each time make the epochs
    comparable; as a figure of the network the accuracy of so few is coarse.

    The network is measured in eval mode, outside autocast and uncompiled. Its modes, `.grad`,
    buffers and the random state are afterwards as they were: training goes on as it would have
    done.

    Args:
        inputs: (N, \*D) floating point, values in [0, 1], such as the test images.
        targets: (N,) int64, their labels.
        eps: L-infinity radius of PGD, in input units.
        samples: use the first so many.
        h: L2 length of the finite differences, in input units.
        draws: Gaussian vectors for the Frobenius norm, at least 2.
        steps: of PGD.

    Raises:
        TypeError: `inputs` or `targets` no tensor of their kind, or a number of another type.
        ValueError: no samples, `targets` of another length, a number out of range.

    Example:
        >>> monitor = CurvatureMonitor(torch.rand(8, 4), torch.arange(8) % 3, eps=0.1)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> for epoch in range(2):  # train, then
        ...     curvature = monitor(model)
        >>> curvature.sign_curvature > 0
        True
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        eps: float,
        *,
        samples: int = 64,
        h: float = 1.5,
        draws: int = 4,
        steps: int = 10,
    ) -> None:
        caller = "CurvatureMonitor"
        check_rows(caller, "inputs", inputs)
        if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
            came = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise TypeError(f"{caller}: targets must be an int64 tensor, got {came}")
        if targets.shape != inputs.shape[:1]:
            raise ValueError(
                f"{caller}: targets must be (N,), one for each of inputs, "
                f"got {tuple(targets.shape)} and {tuple(inputs.shape)}"
            )
        for name, value in (("samples", samples), ("draws", draws), ("steps", steps)):
            check_count(caller, name, value)
        if draws < 2:
            raise ValueError(f"{caller}: draws must be at least 2, got {draws}")
        for name, length in (("eps", eps), ("h", h)):
            check_length(caller, name, length)
        self._inputs, self._targets = inputs[:samples].clone(), targets[:samples].clone()
        self._eps, self._h, self._draws, self._steps = eps, h, draws, steps

    def __call__(self, model: nn.Module) -> Curvature:
        r"""Measure a network.

        Args:
            model: maps (N, \*D) to (N, classes), each sample on its own in eval mode; of DDP's
                wrapper its `module`.

        Returns:
            The figures.

        Raises:
            TypeError: the model returns no tensor.
            ValueError: inputs outside [0, 1], targets that the model has no output for, or outputs
                that are not (N, classes) or not finite.
        """
        example = next(model.parameters(), self._inputs)
        inputs, targets = self._inputs.to(example), self._targets.to(example.device)
        with (
            evaluating(model),
            torch.autocast(example.device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),  # compiling costs more than the few passes
        ):
            robust = accuracy(model, inputs, targets, attack=self._attack)
            hessian = InputHessian(model, inputs, targets, h=self._h)
            frobenius = frobenius_norm(hessian, inputs, self._draws)
            along_sign = sign_curvature(hessian)
        return Curvature(frobenius.mean, frobenius.mean_error, float(along_sign.mean()), robust)

    def _attack(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return pgd(model, inputs, targets, self._eps, steps=self._steps)
