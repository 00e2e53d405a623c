"""What two ranks of DDP tell one another in a step, beside the step; on the CPU, by gloo."""

import subprocess
import sys

import pytest
import torch
from bench_step import GN, sgr
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import robustkern
from robustkern import CURE, LipschitzPenalty
from robustkern.gradients import ranks
from robustkern.training.models import ResNet

SAMPLES = 24  # of each rank
STOP = -1
PENALTIES = {
    "CURE": CURE(0.1, h=0.5),
    "GN": GN,
    "SGR": sgr(),
    "Lipschitz": LipschitzPenalty(0.1),
}


def methods():
    """Every step, the same on both ranks, and what it exchanges besides gradients, alone."""
    torch.manual_seed(distributed.get_rank())
    inputs, targets = torch.rand(SAMPLES, 3, 32, 32), torch.randint(10, (SAMPLES,))
    torch.manual_seed(0)
    model = DistributedDataParallel(ResNet(24, (2, 2, 2, 2)))

    def plain():
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()

    def step(penalty):
        model.zero_grad()
        robustkern.backward(model, inputs, targets, penalty)

    def exchanges(made):
        for size in made:
            if size:
                distributed.all_reduce(torch.zeros(size))
            else:
                ranks.gather(inputs.device)

    made = {name: exchanges_of(step, penalty) for name, penalty in PENALTIES.items()}
    return {
        "plain": plain,
        **{name: lambda p=penalty: step(p) for name, penalty in PENALTIES.items()},
        **{f"{name}'s exchanges alone": lambda m=m: exchanges(m) for name, m in made.items()},
    }


def exchanges_of(step, penalty):
    """The exchanges of a step: 0 for the small one, else the numbers that are summed."""
    made = []
    gather, total = ranks._all_gather, ranks.total

    def gathering(slots):
        made.append(0)
        return gather(slots)

    def summing(values):
        made.append(values.numel())
        return total(values)

    ranks._all_gather, ranks.total = gathering, summing
    try:
        step(penalty)
    finally:
        ranks._all_gather, ranks.total = gather, total
    return made


def join(rank, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def follow(store):
    """Rank 1: runs what rank 0 runs."""
    torch.set_num_threads(1)
    join(1, store)
    runs = list(methods().values())
    chosen = torch.zeros((), dtype=torch.int64)
    while True:
        distributed.broadcast(chosen, src=0)
        if chosen == STOP:
            break
        runs[chosen]()
    runs.clear()  # DDP's threads end before the process group does
    distributed.destroy_process_group()


@pytest.fixture
def lead(tmp_path):
    """Rank 0's methods, each of which has rank 1 run its own."""
    threads, store = torch.get_num_threads(), tmp_path / "store"
    torch.set_num_threads(1)
    follower = subprocess.Popen([sys.executable, __file__, str(store)])
    join(0, store)

    def both(number, run):
        def method():
            distributed.broadcast(torch.tensor(number), src=0)
            run()

        return method

    yield {name: both(i, run) for i, (name, run) in enumerate(methods().items())}
    distributed.broadcast(torch.tensor(STOP), src=0)
    distributed.destroy_process_group()
    assert follower.wait(timeout=60) == 0
    torch.set_num_threads(threads)


def test_ranks(lead, compare, device):
    if device.type != "cpu":
        pytest.skip("two ranks need two GPUs")
    compare(
        f"two ranks|ResNet width 24, 2-2-2-2|N={SAMPLES} each, 3x32x32|float32|cpu",
        lead,
        baseline="plain",
        rounds=30,
        # 2% of the penalty's own step; SGR's are its covariance, too.
        limits={
            f"{name}'s exchanges alone": 0.02 * (4 if name == "CURE" else 2) for name in PENALTIES
        },
    )


if __name__ == "__main__":
    follow(sys.argv[1])
