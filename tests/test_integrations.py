"""In other people's training loops `.grad` is what robustkern.backward gives by hand."""

import runpy
from pathlib import Path

import lightning as L
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.pytorch.plugins import MixedPrecision
from networks import batch, gradient, smooth
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import robustkern
from robustkern import CURE, GradientPenalty
from robustkern.integrations.lightning import regularized_loss

pytestmark = [
    # Lightning's, of torch and of a data set that is as small as a test's.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PENALTY = CURE(weight=50.0, h=0.5) + GradientPenalty(10.0, power=2)  # four passes
BATCHES = [batch(torch.float32, seed=seed) for seed in (1, 2)]
SAMPLES = TensorDataset(*(torch.cat(parts) for parts in zip(*BATCHES, strict=True)))


def network():
    return smooth(torch.float32, dropout=0.0)


def by_hand(batches, clip, scaler=None):
    """The mean gradient over batches, clipped."""
    model = network()
    for inputs, targets in batches:
        robustkern.backward(model, inputs, targets, PENALTY, scaler=scaler)
    scale = len(batches) * (1.0 if scaler is None else scaler.get_scale())
    for p in model.parameters():
        p.grad /= scale
    if clip:
        assert nn.utils.clip_grad_norm_(model.parameters(), clip) > 2 * clip
    return gradient(model)


class Recorder(torch.optim.SGD):
    """Keeps the gradient of every step; moves nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.gradients = []

    def step(self, closure=None):
        loss = closure() if closure else None
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        self.gradients.append(torch.cat(grads))
        return loss


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network, self.penalty = network(), PENALTY
        self.optimizer = Recorder(self.network.parameters())

    def forward(self, inputs):
        return self.network(inputs)

    def training_step(self, batch, batch_idx):
        loss, step = regularized_loss(self, *batch, self.penalty)
        self.log("penalty", step.penalty)
        return loss

    def train_dataloader(self):
        return DataLoader(SAMPLES, batch_size=6)

    def configure_optimizers(self):
        return self.optimizer


def fit(module, **options):
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options |= dict.fromkeys(off, False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, **options)
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_gradient(accumulate, clip):
    module = Classifier()
    trainer = fit(module, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    expected = [by_hand(BATCHES[i : i + accumulate], clip) for i in range(0, 2, accumulate)]
    torch.testing.assert_close(module.optimizer.gradients, expected, rtol=1e-5, atol=1e-7)
    assert trainer.callback_metrics["penalty"] > 0


def half(scale):
    """Autocast to float16, which on a CPU the plugin does only when it is told."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize(
    ("plugin", "dtype", "scale"),
    [
        (MixedPrecision("bf16-mixed", "cpu"), torch.bfloat16, None),
        (half(64.0), torch.float16, 64.0),
    ],
    ids=["bfloat16", "float16"],
)
def test_lightning_gradient_in_mixed_precision(plugin, dtype, scale):
    module = Classifier()
    fit(module, plugins=plugin, max_steps=1)
    scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", dtype):
        expected = by_hand(BATCHES[:1], None, scaler)
    torch.testing.assert_close(module.optimizer.gradients, [expected], rtol=1e-5, atol=1e-7)


def test_lightning_skips_the_step_of_an_overflow():
    module, plugin = Classifier(), half(2.0**24)
    fit(module, plugins=plugin, max_steps=1)
    assert not module.optimizer.gradients
    assert plugin.scaler.get_scale() == 2.0**23


def test_lightning_takes_no_more_passes():
    module, count = Classifier(), []
    module.network.register_forward_hook(lambda *_: count.append(1))
    fit(module, max_steps=1)
    assert len(count) == 4


class OfRank(Classifier):
    """Trains on the batch that has its rank's number, and keeps the gradient in a folder."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def train_dataloader(self):
        return DataLoader(TensorDataset(*BATCHES[self.global_rank]), batch_size=6)

    def on_fit_end(self):
        torch.save(self.optimizer.gradients, self.folder / f"{self.global_rank}.pt")


def test_lightning_gradient_of_two_processes_is_the_mean(tmp_path):
    fit(OfRank(tmp_path), devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, [by_hand(BATCHES, None)], rtol=1e-5, atol=1e-7)


def test_lightning_leaves_the_gradient_alone_when_a_step_fails():
    class Failing(robustkern.Penalty):
        def value(self, gradient):
            raise RuntimeError("failed")

    module = Classifier()
    module.penalty = Failing()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    held = [p.grad for p in module.parameters()]
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="failed"):
        module.training_step(BATCHES[0], 0)
    assert all(p.grad is grad for p, grad in zip(module.parameters(), held, strict=True))


@pytest.fixture
def accelerator(request):
    AcceleratorState._reset_state(reset_partial_state=True)  # it is shared by all Accelerators
    yield Accelerator(cpu=True, **request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "accelerator",
    [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}],
    ids=["plain", "accumulation", "bfloat16"],
    indirect=True,
)
def test_accelerate_gradient(accelerator):
    train_epoch = runpy.run_path(EXAMPLES / "accelerate_digits.py")["train_epoch"]
    model = network()
    recorder = Recorder(model.parameters())
    batches = DataLoader(SAMPLES, batch_size=6)
    train_epoch(accelerator, *accelerator.prepare(model, recorder, batches), PENALTY)
    accumulate = accelerator.gradient_accumulation_steps
    with torch.autocast("cpu", torch.bfloat16, enabled=accelerator.mixed_precision == "bf16"):
        expected = [by_hand(BATCHES[i : i + accumulate], 1.0) for i in range(0, 2, accumulate)]
    torch.testing.assert_close(recorder.gradients, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["lightning", "accelerate"])
def test_example_runs(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(EXAMPLES / f"{name}_digits.py")["main"](["--epochs", "1"])
    assert "under PGD-20" in capsys.readouterr().out
