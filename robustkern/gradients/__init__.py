r"""The first-order engine: parameter gradients of penalties on input gradients, from plain passes.

A penalty is a function R of the input gradients g_j at a few points X_j. With V_j = dR/dg_j,

.. math:: \frac{dR}{d\theta} = \sum_j \frac{d}{d\theta} \langle V_j, g_j \rangle
    = \sum_j \lim_{e \to 0} \frac{G(X_j + e V_j) - G(X_j)}{e}

where G(X) is the parameter gradient of the summed loss at X. So the passes are ordinary ones:
one at each X_j, which gives g_j and G(X_j) at once, and one at each X_j + e V_j. One e serves the
whole batch, which makes the result a weighted sum of training gradients. Losses are batch means
here, so the weight is c = N / e; it is rounded to a power of two, for which scaling a loss is exact
in every dtype.
"""

from robustkern.gradients.steps import Step, backward, loss_term

__all__ = ["Step", "backward", "loss_term"]
