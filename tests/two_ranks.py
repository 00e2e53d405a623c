"""What test_ranks.py runs in two processes: every scenario, its results saved for each rank."""

import sys
import traceback
import warnings
from pathlib import Path

import torch
from networks import batch, gradient, smooth
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import robustkern
from robustkern import (
    CURE,
    SGR,
    CovarianceFunction,
    GradientPenalty,
    LipschitzPenalty,
    LocalLinearity,
)

PENALTIES = {
    "tv": lambda: GradientPenalty(1.0),
    "gn": lambda: GradientPenalty(1.0, power=2),
    "lipschitz": lambda: LipschitzPenalty(1.0),
    "sgr": lambda: SGR(1.0, CovarianceFunction(3, 8, 8)),
    "cure": CURE,
    "anchored": lambda: CURE(anchored=True),
    "llr": lambda: LocalLinearity(2.0, 1.0, eps=0.1, random_start=False),
    "sum": lambda: CURE() + LipschitzPenalty(1.0) + SGR(1.0, CovarianceFunction(3, 8, 8)),
    "constant": lambda: Constant(),
    "head": lambda: Head(),
}
SPLITS = {"equal": [slice(0, 3), slice(3, 6)], "unequal": [slice(0, 2), slice(2, 6)]}


class Constant(robustkern.Penalty):
    """One without a derivative: no pass is shifted."""

    def value(self, gradient):
        return gradient.detach().square().sum()


class Head(robustkern.Penalty):
    """Of one output, which does not depend on all parameters."""

    def objective(self, outputs, targets):
        return outputs[:, 0]

    def value(self, gradient):
        return robustkern.functional.gradient_norm(gradient, 2).square().mean()


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = smooth(batch_norm=False, dropout=0.0)
        self.first = nn.Linear(5, 1, dtype=torch.float64)
        self.rest = nn.Linear(5, 4, dtype=torch.float64)

    def forward(self, x):
        h = self.body(x).tanh()
        return torch.cat([self.first(h), self.rest(h)], 1)


class SharedNorm(nn.Module):
    """Batch norm by the statistics of all ranks, as SyncBatchNorm, which needs GPUs, has it."""

    def forward(self, x):
        count, mean = torch.tensor(float(len(x))), x.sum(0)
        if distributed.is_initialized():
            distributed.all_reduce(count)
            mean = all_reduce(mean)
        mean = mean / count
        variance = (x - mean).square().sum(0)
        if distributed.is_initialized():
            variance = all_reduce(variance)
        return (x - mean) / (variance / count + 1e-5).sqrt()


def shared_norm_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), SharedNorm(), nn.GELU(), nn.Linear(8, 5)
    ).double()


class WithAuxiliaryHead(nn.Module):
    """A head that only training uses."""

    def __init__(self):
        super().__init__()
        self.body = plain_network()
        self.head = nn.Linear(5, 5, dtype=torch.float64)

    def forward(self, x):
        h = self.body(x)
        return h + self.head(h).tanh() if self.training else h


def plain_network():
    return smooth(batch_norm=False, dropout=0.0)


def normed_network():
    torch.manual_seed(0)
    linear = nn.Linear(192, 5, dtype=torch.float64)
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(linear), nn.GELU())


def one_process(make_model, penalty, steps=1, **options):
    """The gradient that ranks must agree with."""
    torch.manual_seed(0)
    model, (inputs, targets) = make_model(), batch()
    for _ in range(steps):
        model.zero_grad()
        step = robustkern.backward(model, inputs, targets, penalty, **options)
    return model, gradient(model), step


class Reductions:
    """Counts how often DDP reduces a bucket."""

    def __init__(self, model):
        self.count = 0
        model.register_comm_hook(self, self.hook)

    @staticmethod
    def hook(self, bucket):
        self.count += 1
        tensor = bucket.buffer().div_(distributed.get_world_size())
        return (
            distributed.all_reduce(tensor, async_op=True).get_future().then(lambda f: f.value()[0])
        )


def mine(split):
    inputs, targets = batch()
    here = SPLITS[split][distributed.get_rank()]
    return inputs[here], targets[here]


def ddp(name, split="equal", make_model=plain_network, steps=1, ddp_options=None, **options):
    penalty = PENALTIES[name]()
    torch.manual_seed(0)
    model = DDP(make_model(), **(ddp_options or {}))
    reductions = Reductions(model)
    for _ in range(steps):
        model.zero_grad()
        reductions.count = 0
        step = robustkern.backward(model, *mine(split), penalty, **options)
    found = {
        "gradient": gradient(model.module),
        "reductions": reductions.count,
        "penalty": step.penalty,
        "buffers": list(model.buffers()),
    }
    for module in penalty.modules():
        if isinstance(module, CovarianceFunction):
            found["covariance"] = module.values
    return found


def compiled(wrap):
    """DDP around a compiled model, or compiled with it; the same of FSDP2."""
    network = plain_network()
    if wrap == "fsdp":
        fully_shard(network, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
        model = torch.compile(network, backend="aot_eager")
    elif wrap == "ddp":
        model = torch.compile(DDP(network), backend="aot_eager")
    else:
        model = DDP(torch.compile(network, backend="aot_eager"))
    for _ in range(2):
        network.zero_grad()
        robustkern.backward(model, *mine("equal"), CURE())
    grads = [p.grad.full_tensor() if wrap == "fsdp" else p.grad for p in network.parameters()]
    return {"gradient": torch.cat([grad.flatten() for grad in grads])}


def accumulated(view):
    model = DDP(plain_network(), gradient_as_bucket_view=view)
    penalty = CURE()
    robustkern.backward(model, *mine("equal"), penalty)  # .grad lies where DDP wants it
    model.zero_grad(set_to_none=False)
    with model.no_sync():
        robustkern.backward(model, *mine("equal"), penalty)
    robustkern.backward(model, *mine("equal"), penalty)
    return {"gradient": gradient(model.module)}


def two_heads():
    torch.manual_seed(0)
    model = DDP(TwoHeads())
    for _ in range(2):  # a reduction left open is found by the next forward
        model.zero_grad()
        robustkern.backward(model, *mine("equal"), Head())
    return {"gradient": gradient(model.module)}


def as_term(method):
    """The penalty as a term of the loss."""
    penalty, (inputs, targets) = PENALTIES["cure"](), mine("equal")
    model = DDP(plain_network())
    with model.no_sync():
        F.cross_entropy(model(inputs), targets).backward()
    found = []
    for _ in range(2):  # a reduction left open is found by the next forward
        term = penalty(model, inputs, targets, method=method)
        (F.cross_entropy(model(inputs), targets) + term).backward()
        found.append(gradient(model.module))
        model.zero_grad()
    return {"accumulated": found[0], "gradient": found[1]}


def checked():
    report = robustkern.check(DDP(plain_network()), *mine("unequal"), LipschitzPenalty(1.0))
    return {"verdict": report.verdict, "shift": report.shift}


def lipschitz_moves_one_sample():
    inputs = []
    model = DDP(plain_network())
    model.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    robustkern.backward(model, *mine("equal"), LipschitzPenalty(1.0))
    return {"moved": ((inputs[1] - inputs[0]).flatten(1) != 0).any(1)}


def sharded_network():
    model = plain_network()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_gradient(model):
    return torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])


def fsdp_after(what):
    """A step after a forward without backward, or after one that failed on all ranks."""
    model, (inputs, targets) = sharded_network(), mine("equal")
    if what == "validation":
        with torch.no_grad():
            model(inputs)
    else:
        failing = model if what == "error" else model[1]
        handle = failing.register_forward_hook(fail_at_once)
        try:
            if what == "error-of-ones-own":
                model(inputs)
            else:
                robustkern.backward(model, inputs, targets, CURE())
        except KeyError:
            handle.remove()
    robustkern.backward(model, inputs, targets, CURE())
    return {"gradient": whole_gradient(model)}


def fail_at_once(*_):
    raise KeyError("from inside the model")


def fsdp_double_backward():
    inputs, targets = mine("equal")
    CURE()(sharded_network(), inputs, targets)


def fsdp1():
    model = FullyShardedDataParallel(
        plain_network(), use_orig_params=True, device_id=torch.device("cpu")
    )
    robustkern.backward(model, *mine("equal"), CURE())


def fsdp(name, split="equal", **options):
    penalty, model = PENALTIES[name](), sharded_network()
    robustkern.backward(model, *mine(split), penalty, **options)
    robustkern.backward(model, *mine(split), penalty, **options)  # .grad is added to
    return {
        "gradient": whole_gradient(model) / 2,
        "sharded": model[0].weight.grad.to_local().shape,
    }


def fsdp_bfloat16():
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = plain_network().float()
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    inputs, targets = mine("equal")
    robustkern.backward(model, inputs.float(), targets, GradientPenalty(1.0))
    return {"gradient": torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])}


def fsdp_not_reduced():
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = fully_shard(plain_network(), mesh=mesh)
    model.set_requires_gradient_sync(False)
    robustkern.backward(model, *mine("equal"), CURE())


def fail_in_pass(number, make_penalty):
    """Rank 1 raises in a pass; then both make another, whole step."""
    model = DDP(plain_network())
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == number and distributed.get_rank() == 1:
            raise KeyError("from inside the model")

    handle = model.module.register_forward_hook(fail)
    error = None
    try:
        robustkern.backward(model, *mine("equal"), make_penalty())
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    handle.remove()
    left = [p.grad for p in model.parameters()]
    robustkern.backward(model, *mine("equal"), make_penalty())
    return {"error": error, "left": left, "gradient": gradient(model.module)}


def empty_on_one_rank():
    inputs, targets = mine("equal")
    if distributed.get_rank() == 1:
        inputs, targets = inputs[:0], targets[:0]
    robustkern.backward(DDP(plain_network()), inputs, targets, CURE())


def scenarios():
    for name in PENALTIES:
        for split in SPLITS:
            yield f"ddp-{name}-{split}", lambda name=name, split=split: ddp(name, split)
    yield "ddp-shift", lambda: ddp("cure", shift=0.3)
    yield "ddp-eval", lambda: ddp("cure", batch_norm="eval")
    for split in SPLITS:
        options = {"make_model": shared_norm_network, "split": split}
        yield f"ddp-norm-{split}", lambda options=options: ddp("cure", **options)
    options = {"make_model": WithAuxiliaryHead, "batch_norm": "eval", "steps": 2}
    for name in ("cure", "head"):
        yield f"ddp-auxiliary-{name}", lambda name=name: ddp(name, **options)
    yield "ddp-spectral", lambda: ddp("cure", make_model=normed_network, steps=3)
    for option in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view"):
        yield f"ddp-{option}", lambda o=option: ddp("cure", steps=2, ddp_options={o: True})
    for wrap in ("ddp", "ddp around", "fsdp"):
        yield f"compiled-{wrap}", lambda wrap=wrap: compiled(wrap)
    for view in (False, True):
        yield f"accumulated-{view}", lambda view=view: accumulated(view)
    yield "two-heads", two_heads
    for method in ("double_backward", "first_order"):
        yield f"term-{method}", lambda method=method: as_term(method)
    yield "checked", checked
    yield "lipschitz-moves", lipschitz_moves_one_sample
    for name in ("gn", "cure", "anchored", "llr", "sum"):
        yield f"fsdp-{name}", lambda name=name: fsdp(name, "unequal")
    for what in ("validation", "error", "error-within", "error-of-ones-own"):
        yield f"fsdp-after-{what}", lambda what=what: fsdp_after(what)
    yield "fsdp-double-backward", fsdp_double_backward
    yield "fsdp1", fsdp1
    yield "fsdp-bfloat16", fsdp_bfloat16
    yield "fsdp-not-reduced", fsdp_not_reduced
    for number in (1, 2, 3):
        yield f"fail-{number}", lambda n=number: fail_in_pass(n, PENALTIES["sum"])
    yield "fail-plain", lambda: fail_in_pass(1, lambda: GradientPenalty(1.0))
    yield "empty", empty_on_one_rank


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = {}
    for name, scenario in scenarios():
        try:
            results[name] = scenario()
        except Exception as error:
            results[name] = {
                "error": f"{type(error).__name__}: {error}",
                "trace": traceback.format_exc(),
            }
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
