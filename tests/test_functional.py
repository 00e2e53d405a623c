import re
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

import robustkern
from robustkern import functional

OPS = torch.ops.robustkern
G = torch.arange(1.0, 121.0).reshape(2, 3, 4, 5).sin()
K = torch.ones(3, 3, 7, 9)
HALF = G.half()

BAD = [
    (
        functional.perturb,
        (None, G, 1.0),
        TypeError,
        "perturb: inputs must be a Tensor, got NoneType",
    ),
    (
        functional.perturb,
        (G, G.int(), 1.0),
        TypeError,
        "perturb: gradient must be float64, float32, bfloat16 or float16, got torch.int32",
    ),
    (
        functional.perturb,
        (G, HALF, 1.0),
        TypeError,
        "perturb: gradient must have inputs's dtype, got torch.float32 and torch.float16",
    ),
    (
        functional.perturb,
        (G, G[:1], 1.0),
        ValueError,
        "perturb: gradient must have inputs's shape, got (2, 3, 4, 5) and (1, 3, 4, 5)",
    ),
    (
        functional.perturb,
        (G, G.to("meta"), 1.0),
        ValueError,
        f"perturb: gradient must be on inputs's device, got {G.device} and meta",
    ),
    (functional.perturb, (G, G, "1"), TypeError, "perturb: length must be a number, got str"),
    (functional.perturb, (G, G, torch.inf), ValueError, "perturb: length must be finite, got inf"),
    (
        functional.perturb,
        (G, G, 1.0, "up"),
        ValueError,
        "perturb: direction must be one of ('sign', 'gradient'), got 'up'",
    ),
    (
        functional.gradient_norm,
        (G[0, 0, 0], 2),
        ValueError,
        "gradient_norm: gradient must be (N, *D), got (5,)",
    ),
    (
        functional.gradient_norm,
        (G.cfloat(), 2),
        TypeError,
        "gradient_norm: gradient must be float64, float32, bfloat16 or float16, "
        "got torch.complex64",
    ),
    (functional.gradient_norm, (G, 3), ValueError, "gradient_norm: p must be 1, 2 or inf, got 3"),
    (
        functional.gradient_difference,
        (G, 1),
        TypeError,
        "gradient_difference: b must be a Tensor, got int",
    ),
    (
        functional.gradient_difference,
        (G, G[..., :-1]),
        ValueError,
        "gradient_difference: b must have a's shape, got (2, 3, 4, 5) and (2, 3, 4, 4)",
    ),
    (
        functional.gradient_difference,
        (G, G.double()),
        TypeError,
        "gradient_difference: b must have a's dtype, got torch.float32 and torch.float64",
    ),
    (
        functional.gradient_difference,
        (G, G.to("meta")),
        ValueError,
        f"gradient_difference: b must be on a's device, got {G.device} and meta",
    ),
    (
        functional.autocovariance,
        (G[0],),
        ValueError,
        "autocovariance: perturbation must be (N, C, H, W), got (3, 4, 5)",
    ),
    (
        functional.autocovariance,
        (G[:, :0],),
        ValueError,
        "autocovariance: perturbation must have at least one channel and pixel, got (2, 0, 4, 5)",
    ),
    (
        functional.autocovariance,
        (G, 1),
        TypeError,
        "autocovariance: unbiased must be a bool, got int",
    ),
]
for covariance_op in (functional.covariance_product, functional.covariance_form):
    name = covariance_op.__name__
    BAD += [
        (
            covariance_op,
            (G[0], K),
            ValueError,
            f"{name}: gradient must be (N, C, H, W), got (3, 4, 5)",
        ),
        (
            covariance_op,
            (G, K.long()),
            TypeError,
            f"{name}: covariance must be float64, float32, bfloat16 or float16, got torch.int64",
        ),
        (
            covariance_op,
            (G, K.double()),
            TypeError,
            f"{name}: covariance must have gradient's dtype or torch.float32, "
            "got torch.float32 and torch.float64",
        ),
        (
            covariance_op,
            (G, K[..., 1:]),
            ValueError,
            f"{name}: covariance must be (C, C, 2P-1, 2Q-1), at most (3, 3, 7, 9) for gradient "
            "(2, 3, 4, 5), got (3, 3, 7, 8)",
        ),
        (
            covariance_op,
            (G, torch.ones(3, 3, 7, 11)),
            ValueError,
            f"{name}: covariance must be (C, C, 2P-1, 2Q-1), at most (3, 3, 7, 9) for gradient "
            "(2, 3, 4, 5), got (3, 3, 7, 11)",
        ),
        (
            covariance_op,
            (G, K.to("meta")),
            ValueError,
            f"{name}: covariance must be on gradient's device, got {G.device} and meta",
        ),
        (
            covariance_op,
            (G, K.clone().requires_grad_()),
            ValueError,
            f"{name}: covariance must not require grad (only gradient is differentiated), "
            "got requires_grad=True",
        ),
    ]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(*arguments)


DIFFERENTIABLE = {
    "perturb": (lambda f, x: f(x, G, 1.0), 0),
    "gradient_norm": (lambda f, x: f(x, 2.0), 0),
    "gradient_difference": (lambda f, x: f(x, G.flip(0)), 0),
    "covariance_product": (lambda f, x: f(x, K), 0),
    "covariance_form": (lambda f, x: f(x, K), 0),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_right_in_functions_and_refused_by_the_ops(name):
    call, _ = DIFFERENTIABLE[name]
    function = partial(call, getattr(functional, name))
    op = partial(call, getattr(OPS, name))
    tangent = G.cos()
    h = 1e-3
    _, derivative = torch.func.jvp(function, (G,), (tangent,))
    difference = (function(G + h * tangent) - function(G - h * tangent)) / (2 * h)
    torch.testing.assert_close(derivative, difference, rtol=1e-2, atol=1e-2)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(G, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, derivative)
        with pytest.raises(NotImplementedError, match="must implement the jvp"):
            op(forward_ad.make_dual(G, tangent))
    with pytest.raises(RuntimeError, match="must override the setup_context"):
        torch.func.jvp(op, (G,), (tangent,))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functional_transforms(name):
    call, _ = DIFFERENTIABLE[name]
    function = partial(call, getattr(functional, name))
    x = G.clone().requires_grad_()
    function(x).sum().backward()
    found = torch.func.grad(lambda x: function(x).sum())(G)
    torch.testing.assert_close(found, x.grad)


@pytest.mark.setting("torch.compile of robustkern.functional", group="compiled models")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiles_to_one_graph(name):
    call, _ = DIFFERENTIABLE[name]
    function = partial(call, getattr(functional, name))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, traced = G.clone().requires_grad_(), G.clone().requires_grad_()
    function(eager).square().sum().backward()
    compiled(traced).square().sum().backward()
    torch.testing.assert_close(traced.grad, eager.grad)


@pytest.mark.parametrize("direction", ["sign", "gradient"])
def test_perturb_holds_its_direction_constant_under_transforms(direction):
    found = torch.func.grad(lambda g: functional.perturb(G, g, 1.0, direction).sum())(G)
    assert torch.equal(found, torch.zeros_like(G))


def test_autocovariance_is_detached_and_the_op_refuses_a_derivative():
    assert not functional.autocovariance(G.clone().requires_grad_()).requires_grad
    leaf = G.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="robustkern::autocovariance is not differentiable"):
        OPS.autocovariance(leaf).sum().backward()


def test_show_config_tells_what_the_dispatcher_does(capsys):
    robustkern.show_config()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["op", "CPU", "CUDA"]
    assert [line.split()[0] for line in lines[1:]] == list(DIFFERENTIABLE_AND_OTHERS)
    for line in lines[1:]:
        name, cpu, _ = line.split()
        kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"robustkern::{name}", "CPU")
        assert cpu == ("C++" if kernel else "reference")


DIFFERENTIABLE_AND_OTHERS = sorted([*DIFFERENTIABLE, "autocovariance"])
