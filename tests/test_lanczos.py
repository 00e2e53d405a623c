import numpy as np
import pytest
import torch
from networks import batch, smooth
from scipy.sparse.linalg import LinearOperator, eigsh

from robustkern.analysis import InputHessian, lanczos, spectrum


def symmetric(samples, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(
        samples, size, size, generator=generator, dtype=torch.float64, device="cpu"
    )
    return (matrices + matrices.mT).to(torch.get_default_device(), dtype)


def product_with(matrices):
    return lambda v: (matrices @ v.flatten(1)[:, :, None]).view_as(v)


def descending(matrices):
    return torch.linalg.eigvalsh(matrices).flip(1)


def test_top_and_bottom_are_those_of_the_dense_matrices():
    matrices = symmetric(4, 60)
    like = torch.zeros(4, 3, 4, 5, dtype=torch.float64)
    found = lanczos(product_with(matrices), like, 3, 2)
    expected = descending(matrices)[:, [0, 1, 2, 58, 59]]
    assert found.converged.all()
    torch.testing.assert_close(found.values, expected)
    vectors = found.vectors.flatten(2)
    assert found.vectors.shape == (4, 5, 3, 4, 5)
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(5).double().expand(4, -1, -1))
    errors = (matrices @ vectors.mT - vectors.mT * found.values[:, None]).norm(dim=1)
    torch.testing.assert_close(errors, found.residuals, rtol=1e-3, atol=1e-10)


def test_an_input_hessian_agrees_with_scipy():
    model, (inputs, targets) = smooth().eval(), batch(samples=2)
    found = lanczos(InputHessian(model, inputs, targets, method="exact"), inputs, 4, 1)
    for index in range(2):
        one = InputHessian(
            model, inputs[index : index + 1], targets[index : index + 1], method="exact"
        )

        def product(v, one=one):
            return one(torch.from_numpy(v).to(inputs).view(one.inputs.shape)).cpu().numpy().ravel()

        operator = LinearOperator((192, 192), matvec=product, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(192)
        top = eigsh(operator, k=4, which="LA", v0=start, return_eigenvectors=False)
        bottom = eigsh(operator, k=1, which="SA", v0=start, return_eigenvectors=False)
        expected = torch.from_numpy(np.r_[np.sort(top)[::-1], bottom])
        scale = expected.abs().max()
        torch.testing.assert_close(found.values[index].cpu(), expected, rtol=0, atol=1e-5 * scale)


def test_the_largest_values_of_float32_are_within_a_ten_thousandth():
    model, (inputs, targets) = smooth(torch.float32).eval(), batch(torch.float32)
    hessian = InputHessian(model, inputs, targets, method="exact")
    found, expected = lanczos(hessian, inputs, 10), spectrum(hessian)
    scale = expected.abs().amax(1, keepdim=True)
    assert found.values.dtype == torch.float32
    assert ((found.values - expected[:, :10]).abs() <= 1e-4 * scale).all()


@pytest.mark.parametrize(
    "diagonal",
    [[0.0], [1.0], [2.0, 2.0, 2.0, 1.0], [3.0, -1.0], [1e-25, 5e-26], [1e25]],
    ids=str,
)
def test_exhausted_krylov_spaces_go_on(diagonal):
    values = torch.zeros(2, 40)
    values[0, : len(diagonal)] = torch.tensor(diagonal)
    values[1] = torch.linspace(-1, 1, 40)
    found = lanczos(lambda v: values * v, torch.zeros(2, 40), 5, 2)
    expected = values.sort(1, descending=True).values[:, [0, 1, 2, 3, 4, 38, 39]]
    scale = expected.abs().amax(1, keepdim=True)
    assert ((found.values - expected).abs() <= 1e-5 * scale).all()
    assert found.converged.all()
    gram = found.vectors @ found.vectors.mT
    torch.testing.assert_close(gram, torch.eye(7).expand(2, -1, -1), atol=1e-5, rtol=0)


def test_one_dimension_is_enough():
    found = lanczos(lambda v: -3 * v, torch.zeros(2, 1), 1)
    assert found.values.tolist() == [[-3.0], [-3.0]]
    assert found.steps == 1


def test_it_stops_when_converged_and_says_when_it_has_not():
    low_rank = symmetric(3, 3)
    matrices = torch.zeros(3, 200, 200, dtype=torch.float64)
    matrices[:, :3, :3] = low_rank
    like = torch.zeros(3, 200, dtype=torch.float64)
    assert lanczos(product_with(matrices), like, 2).steps < 20
    few = lanczos(product_with(symmetric(3, 200)), like, 5, steps=12)
    assert few.steps == 12
    assert not few.converged.all()
    assert (few.residuals > 0).any()


def test_it_repeats_itself_and_follows_the_generator():
    product, like = product_with(symmetric(2, 50)), torch.zeros(2, 50, dtype=torch.float64)

    def run(seed=None):
        source = None if seed is None else torch.Generator(like.device).manual_seed(seed)
        return lanczos(product, like, 2, steps=8, generator=source).values

    state = torch.get_rng_state()
    assert torch.equal(run(), run())
    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert torch.equal(state, torch.get_rng_state())


def test_of_a_matrix_that_is_not_symmetric_it_finds_the_symmetric_part():
    matrices = symmetric(2, 30) + 3 * torch.randn(2, 30, 30, dtype=torch.float64).triu()
    whole = descending((matrices + matrices.mT) / 2)
    like = torch.zeros(2, 30, dtype=torch.float64)
    some = lanczos(product_with(matrices), like, 2, steps=12)
    assert (some.values[:, 0] <= whole[:, 0]).all()  # a direction's value: a lower bound
    u = some.vectors[:, 0]
    torch.testing.assert_close((u * product_with(matrices)(u)).sum(1), some.values[:, 0])
    errors = product_with(matrices)(u) - some.values[:, :1] * u
    torch.testing.assert_close(errors.norm(dim=1), some.residuals[:, 0])
    torch.testing.assert_close(lanczos(product_with(matrices), like, 30).values, whole)


def test_a_spectrum_is_that_of_the_dense_matrices():
    model, (inputs, targets) = smooth().eval(), batch(samples=2)
    hessian = InputHessian(model, inputs, targets, h=0.5, batch_size=100)
    done = []
    found = spectrum(hessian, advance=done.append)
    torch.testing.assert_close(found, descending(hessian.dense()))
    assert done == [1, 1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"operator": 1}, TypeError, "operator must be callable, got int"),
        ({"operator": lambda v: 1}, TypeError, "operator must return a tensor, got int"),
        ({"operator": lambda v: v[:1]}, ValueError, r"given, \(2, 5\), got \(1, 5\)"),
        ({"operator": lambda v: v / 0}, ValueError, "must return finite products"),
        ({"like": torch.zeros(0, 5)}, ValueError, "like must be .* at least one sample"),
        ({"like": 1}, TypeError, "like must be a floating-point tensor, got int"),
        ({"top": -1}, ValueError, "top must be at least 1, got -1"),
        ({"top": 1.0}, TypeError, "top must be an int, got float"),
        ({"top": 0}, ValueError, "sum to 1 at least and 5 at most, .* got 0 and 0"),
        ({"top": 4, "bottom": 2}, ValueError, "got 4 and 2"),
        ({"top": 3, "steps": 2}, ValueError, r"steps must be at least top \+ bottom, got 2 and 3"),
        ({"tolerance": "1"}, TypeError, "tolerance must be a number, got str"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive and finite, got 0.0"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"operator": lambda v: v, "like": torch.zeros(2, 5), **change}
    with pytest.raises(error, match=f"lanczos: .*{message}"):
        lanczos(**arguments)


def test_a_spectrum_is_that_of_an_input_hessian():
    with pytest.raises(
        TypeError, match=r"^spectrum: hessian must be an InputHessian, got function"
    ):
        spectrum(lambda v: v)
