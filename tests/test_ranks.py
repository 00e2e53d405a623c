"""Two ranks give the gradient of one process; two_ranks.py is what each of them runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_ranks
from networks import batch, gradient
from torch import distributed
from torch.nn import functional as F

import robustkern
from robustkern import CURE, GradientPenalty

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="no gloo"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of every scenario, for each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}"}
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "two_ranks.py", str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def results(ranks, name):
    """What both ranks found in a scenario that went well."""
    found = [rank[name] for rank in ranks]
    assert all(f.get("error") is None for f in found), found[0].get("trace")
    return found


def agree(found, truth, tolerance=2e-3):
    """All elements within a part of the largest."""
    assert (found - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.setting(
    "DistributedDataParallel",
    group="many processes",
    note="one reduction a step; batches of unequal sizes too",
)
@pytest.mark.parametrize("split", two_ranks.SPLITS)
@pytest.mark.parametrize("name", two_ranks.PENALTIES)
def test_ddp_gives_the_gradient_of_one_process(ranks, name, split):
    penalty = two_ranks.PENALTIES[name]()
    _, truth, step = two_ranks.one_process(two_ranks.plain_network, penalty)
    for found in results(ranks, f"ddp-{name}-{split}"):
        agree(found["gradient"], truth, 1e-4)
        assert found["reductions"] == 1
        if name == "lipschitz":
            torch.testing.assert_close(found["penalty"], step.penalty)
        if "covariance" in found:
            covariance = next(m for m in penalty.modules() if hasattr(m, "values"))
            agree(found["covariance"], covariance.values, 1e-4)


@pytest.mark.setting(
    "DistributedDataParallel",
    group="many processes",
    note="one reduction a step; batches of unequal sizes too",
)
def test_ddp_takes_the_shift_it_is_given(ranks):
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, CURE(), shift=0.3)
    _, other, _ = two_ranks.one_process(two_ranks.plain_network, CURE())
    assert not torch.allclose(truth, other, rtol=1e-2)
    for found in results(ranks, "ddp-shift"):
        agree(found["gradient"], truth, 1e-4)


@pytest.mark.setting(
    "DistributedDataParallel",
    group="many processes",
    note="one reduction a step; batches of unequal sizes too",
)
def test_ddp_in_eval_mode(ranks):
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, CURE(), batch_norm="eval")
    for found in results(ranks, "ddp-eval"):
        agree(found["gradient"], truth, 1e-4)
        assert found["reductions"] == 1


@pytest.mark.setting(
    "batch norm by the statistics of all ranks",
    group="many processes",
    note="by a stand-in for SyncBatchNorm, which torch has for GPUs alone",
)
@pytest.mark.parametrize("split", two_ranks.SPLITS)
def test_ddp_with_statistics_of_all_ranks(ranks, split):
    _, truth, _ = two_ranks.one_process(two_ranks.shared_norm_network, CURE())
    for found in results(ranks, f"ddp-norm-{split}"):
        agree(found["gradient"], truth, 1e-4)


@pytest.mark.setting(
    "DistributedDataParallel",
    group="many processes",
    note="one reduction a step; batches of unequal sizes too",
)
@pytest.mark.parametrize("name", ["cure", "head"])
def test_ddp_in_eval_mode_with_layers_that_training_alone_uses(ranks, name):
    penalty = two_ranks.PENALTIES[name]()
    _, truth, _ = two_ranks.one_process(two_ranks.WithAuxiliaryHead, penalty, batch_norm="eval")
    for found in results(ranks, f"ddp-auxiliary-{name}"):
        agree(found["gradient"], truth, 1e-4)


def test_ddp_with_buffers_that_enter_the_computation(ranks):
    model, truth, _ = two_ranks.one_process(two_ranks.normed_network, CURE(), steps=3)
    for found in results(ranks, "ddp-spectral"):
        agree(found["gradient"], truth, 1e-4)
        for buffer, once in zip(found["buffers"], model.buffers(), strict=True):
            torch.testing.assert_close(buffer, once)


@pytest.mark.setting(
    "DistributedDataParallel",
    group="many processes",
    note="one reduction a step; batches of unequal sizes too",
)
@pytest.mark.parametrize("option", ["find_unused_parameters", "gradient_as_bucket_view"])
def test_ddp_options(ranks, option):
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, CURE())
    for found in results(ranks, f"ddp-{option}"):
        agree(found["gradient"], truth, 1e-4)


@pytest.mark.setting("DistributedDataParallel with torch.compile", group="many processes")
@pytest.mark.parametrize("wrap", ["ddp", "ddp around"])
def test_ddp_of_a_compiled_model(ranks, wrap):
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, CURE())
    for found in results(ranks, f"compiled-{wrap}"):
        agree(found["gradient"], truth, 1e-4)


@pytest.mark.setting("FSDP2 with torch.compile", group="many processes")
def test_fsdp_of_a_compiled_model(ranks):
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, CURE())
    for found in results(ranks, "compiled-fsdp"):
        agree(found["gradient"], truth, 1e-4)


@pytest.mark.setting(
    "DistributedDataParallel, static_graph=True",
    group="many processes",
    refused="leave static_graph out",
)
def test_ddp_with_a_static_graph_is_refused(ranks):
    for rank in ranks:
        assert rank["ddp-static_graph"]["error"] == (
            "ValueError: backward: DistributedDataParallel must not have a static graph, for it "
            "cannot leave passes unreduced, got static_graph=True"
        )


@pytest.mark.setting(
    "DistributedDataParallel",
    group="many processes",
    note="one reduction a step; batches of unequal sizes too",
)
@pytest.mark.parametrize("view", [False, True])
def test_gradients_accumulated_before_the_reduction_are_part_of_it(ranks, view):
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, CURE())
    for found in results(ranks, f"accumulated-{view}"):
        agree(found["gradient"], 2 * truth, 1e-4)


def test_an_objective_that_does_not_depend_on_all_parameters(ranks):
    _, truth, _ = two_ranks.one_process(two_ranks.TwoHeads, two_ranks.Head())
    for found in results(ranks, "two-heads"):
        agree(found["gradient"], truth, 1e-4)


def test_terms_of_a_loss_under_ddp(ranks):
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, CURE())
    model, (inputs, targets) = two_ranks.plain_network(), batch()
    F.cross_entropy(model(inputs), targets).backward()
    plain = gradient(model)
    for found in results(ranks, "term-double_backward"):
        agree(found["gradient"], truth)
        agree(found["accumulated"], truth + plain)
    for rank in ranks:
        assert rank["term-first_order"]["error"] == (
            "ValueError: CURE: method must be 'double_backward' under DistributedDataParallel, "
            "which would reduce the term's passes in place of the loss's; use "
            "robustkern.backward(model, inputs, targets, penalty), got 'first_order'"
        )


def test_check(ranks):
    first, second = results(ranks, "checked")
    assert first["verdict"] == second["verdict"] == "fine"
    assert first["shift"] == second["shift"] > 0


def test_only_the_rank_that_holds_the_maximum_moves_a_sample(ranks):
    model, (inputs, targets) = two_ranks.plain_network(), batch()
    x = inputs.requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), targets), x)
    largest = F.one_hot(g.flatten(1).norm(dim=1).argmax(), 6).bool()
    moved = torch.cat([found["moved"] for found in results(ranks, "lipschitz-moves")])
    assert torch.equal(moved, largest)


@pytest.mark.setting(
    "FSDP2, fully_shard",
    group="many processes",
    note="a reduction in every pass, so that gradients stay sharded",
)
@pytest.mark.parametrize("name", ["gn", "cure", "anchored", "llr", "sum"])
def test_fsdp_gives_the_gradient_of_one_process(ranks, name):
    penalty = two_ranks.PENALTIES[name]()
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, penalty)
    for found in results(ranks, f"fsdp-{name}"):
        agree(found["gradient"], truth, 1e-4 if name != "sum" else 2e-3)
        assert found["sharded"][0] == 4  # of 8 channels


@pytest.mark.parametrize("what", ["validation", "error", "error-within", "error-of-ones-own"])
def test_fsdp_after_a_forward_without_backward(ranks, what):
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, CURE())
    for found in results(ranks, f"fsdp-after-{what}"):
        agree(found["gradient"], truth, 1e-4)


def test_fsdp_has_no_double_backward(ranks):
    for rank in ranks:
        assert rank["fsdp-double-backward"]["error"] == (
            "RuntimeError: CURE: FSDP2 has no double backward; use robustkern.backward(model, "
            'inputs, targets, penalty) or method="first_order"'
        )


@pytest.mark.setting(
    "FSDP1, FullyShardedDataParallel", group="many processes", refused="use fully_shard"
)
def test_fsdp1_is_refused(ranks):
    for rank in ranks:
        assert rank["fsdp1"]["error"] == (
            "ValueError: backward: model must not be FullyShardedDataParallel; use fully_shard "
            "(FSDP2)"
        )


@pytest.mark.setting("FSDP2 with MixedPrecisionPolicy", group="many processes")
def test_fsdp_in_bfloat16_takes_a_shift_that_stands_out(ranks):
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, GradientPenalty(1.0))
    for found in results(ranks, "fsdp-bfloat16"):
        assert F.cosine_similarity(found["gradient"].double(), truth, dim=0) > 0.9


@pytest.mark.setting(
    "FSDP2 after set_requires_gradient_sync(False)",
    group="many processes",
    refused="gradients must be reduced in every pass",
)
def test_fsdp_that_does_not_reduce_is_refused(ranks):
    for rank in ranks:
        assert rank["fsdp-not-reduced"]["error"] == (
            "ValueError: backward: FSDP must reduce gradients in every pass, got a model after "
            "set_requires_gradient_sync(False)"
        )


@pytest.mark.parametrize("name", ["fail-1", "fail-2", "fail-3", "fail-plain"])
def test_a_rank_that_fails_does_not_leave_the_other_waiting(ranks, name):
    penalty = two_ranks.PENALTIES["tv" if name == "fail-plain" else "sum"]()
    _, truth, _ = two_ranks.one_process(two_ranks.plain_network, penalty)
    assert ranks[0][name]["error"] == "OtherRankError: robustkern: rank 1 has failed"
    assert ranks[1][name]["error"] == "KeyError: 'from inside the model'"
    for rank in ranks:
        assert all(grad is None for grad in rank[name]["left"])
        agree(rank[name]["gradient"], truth, 1e-4)


def test_bad_input_on_one_rank_reaches_the_other(ranks):
    assert ranks[0]["empty"]["error"] == "OtherRankError: robustkern: rank 1 has failed"
    assert ranks[1]["empty"]["error"] == (
        "ValueError: backward: inputs must not be empty, got (0, 3, 8, 8)"
    )


def test_ddp_without_a_process_group_is_named(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(two_ranks.plain_network())
    distributed.destroy_process_group()
    message = "backward: DistributedDataParallel must have a process group, got none"
    with pytest.raises(ValueError, match=f"^{message}$"):
        robustkern.backward(model, *batch(), CURE())
