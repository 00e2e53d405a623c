"""In other people's training loops `.grad` is what robustkern.backward gives by hand."""

import importlib
import runpy
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.pytorch.plugins import MixedPrecision
from networks import batch, smooth
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import robustkern
from robustkern import CURE, GradientPenalty
from robustkern.integrations.lightning import regularized_loss
from robustkern.integrations.transformers import RobustTrainer

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


def by_hand(model, batches, accumulate=1, clip=torch.inf, scaler=None, **options):
    """The gradients of steps that each take the mean over so many batches, clipped."""
    gradients = []
    for number, (inputs, targets) in enumerate(batches, start=1):
        robustkern.backward(model, inputs, targets, PENALTY, scaler=scaler, **options)
        if number % accumulate == 0:
            trained = [p for p in model.parameters() if p.grad is not None]
            for p in trained:
                p.grad /= accumulate * (1.0 if scaler is None else scaler.get_scale())
            norm = nn.utils.clip_grad_norm_(trained, clip)
            assert clip == torch.inf or norm > 2 * clip
            gradients.append(torch.cat([p.grad.flatten() for p in trained]))
            model.zero_grad()
    return gradients


class Recorder(torch.optim.SGD):
    """Keeps the gradient of every step; moves nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.gradients = []

    def step(self, closure=None):
        loss = closure() if closure else None
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.gradients.append(torch.cat([g.flatten() for g in grads if g is not None]))
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


@pytest.mark.parametrize("clip", [torch.inf, 1.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_gradient(accumulate, clip):
    module = Classifier()
    trainer = fit(module, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    expected = by_hand(network(), BATCHES, accumulate, clip)
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
        expected = by_hand(network(), BATCHES[:1], scaler=scaler)
    torch.testing.assert_close(module.optimizer.gradients, expected, rtol=1e-5, atol=1e-7)


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
    expected = torch.cat([g.flatten() for g in by_hand(network(), BATCHES, accumulate=2)])
    for rank in range(2):
        found = torch.cat([g.flatten() for g in torch.load(tmp_path / f"{rank}.pt")])
        # Ranks take one step of the finite difference, batches each their own.
        assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()


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
def accelerate_state():
    """Accelerate's own, which all Accelerators of a process share, as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def accelerator(request, accelerate_state):
    return Accelerator(cpu=True, **request.param)


@pytest.mark.parametrize(
    ("accelerator", "clip"),
    [
        ({}, 1.0),
        ({"gradient_accumulation_steps": 2}, torch.inf),  # clipped, its length would not be seen
        ({"mixed_precision": "bf16"}, 1.0),
    ],
    ids=["clipped", "accumulated", "bfloat16"],
    indirect=["accelerator"],
)
def test_accelerate_gradient(accelerator, clip):
    train_epoch = runpy.run_path(EXAMPLES / "accelerate_digits.py")["train_epoch"]
    model = network()
    recorder = Recorder(model.parameters())
    batches = DataLoader(SAMPLES, batch_size=6)
    train_epoch(accelerator, *accelerator.prepare(model, recorder, batches), PENALTY, clip)
    accumulate = accelerator.gradient_accumulation_steps
    with torch.autocast("cpu", torch.bfloat16, enabled=accelerator.mixed_precision == "bf16"):
        expected = by_hand(network(), BATCHES, accumulate, clip)
    torch.testing.assert_close(recorder.gradients, expected, rtol=1e-5, atol=1e-7)


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_labels": 5,
}

IMAGES = [{"pixel_values": x, "labels": y} for x, y in SAMPLES]


def vision_transformer():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SMALL))


class InOrder(RobustTrainer):
    """Takes the batches in their order."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(folder, model, samples=IMAGES, wrt=None, compute_loss_func=None, **options):
    """One epoch; the gradients of its steps."""
    recorder = Recorder(model.parameters())
    arguments = TrainingArguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=6,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    InOrder(
        model,
        arguments,
        penalty=PENALTY,
        wrt=wrt,
        train_dataset=samples,
        optimizers=(recorder, None),
        compute_loss_func=compute_loss_func,
    ).train()
    return recorder.gradients


def expected_of_images(**options):
    batches = [({"pixel_values": inputs}, targets) for inputs, targets in BATCHES]
    return by_hand(vision_transformer(), batches, output="logits", wrt="pixel_values", **options)


@pytest.mark.parametrize("clip", [torch.inf, 0.1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_transformers_gradient(accumulate, clip, tmp_path, accelerate_state):
    options = {"gradient_accumulation_steps": accumulate, "max_grad_norm": clip}
    found = train(tmp_path, vision_transformer(), **options)
    expected = expected_of_images(accumulate=accumulate, clip=clip)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_transformers_gradient_in_mixed_precision(tmp_path, accelerate_state):
    found = train(tmp_path, vision_transformer(), bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = expected_of_images()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_transformers_gradient_of_other_losses(tmp_path, accelerate_state):
    def hinge(outputs, labels, num_items_in_batch):
        margins = F.multi_margin_loss(outputs.logits, labels, reduction="sum")
        return margins / num_items_in_batch

    found = train(tmp_path, vision_transformer(), label_smoothing_factor=0.2)
    expected = expected_of_images(loss_fn=nn.CrossEntropyLoss(label_smoothing=0.2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    found = train(tmp_path, vision_transformer(), compute_loss_func=hinge)
    expected = expected_of_images(loss_fn=nn.MultiMarginLoss())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_transformers_gradient_of_embedded_text(tmp_path, accelerate_state):
    def text_classifier():
        torch.manual_seed(0)
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForSequenceClassification(BertConfig(vocab_size=8, **no_dropout, **SMALL))

    # Each image is a text of 12 words, the last 4 of them padding.
    mask = (torch.arange(12) < 8).long()
    texts = [(x.reshape(-1, 12, 16), y) for x, y in BATCHES]
    batches = [
        ({"inputs_embeds": x, "attention_mask": mask.expand(len(x), -1)}, y) for x, y in texts
    ]
    samples = [
        {"inputs_embeds": x, "attention_mask": mask, "labels": y}
        for text in texts
        for x, y in zip(*text, strict=True)
    ]
    found = train(tmp_path, text_classifier(), samples, wrt="inputs_embeds")
    expected = by_hand(text_classifier(), batches, output="logits", wrt="inputs_embeds")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["lightning_digits", "accelerate_digits", "transformers_digits"])
def test_example_runs(name, capsys, tmp_path, monkeypatch, accelerate_state):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(EXAMPLES / f"{name}.py")["main"](["--epochs", "1"])
    assert "under PGD-20" in capsys.readouterr().out


def test_bad_input_to_transformers(tmp_path, accelerate_state, monkeypatch):
    regression = [{"pixel_values": x, "labels": y.float()} for x, y in SAMPLES]
    with pytest.raises(ValueError, match=r"RobustTrainer: labels must be class indices.*float32"):
        train(tmp_path, vision_transformer(), regression)
    with pytest.raises(ValueError, match=r"backward: wrt must be .*'pixels'"):
        train(tmp_path, vision_transformer(), wrt="pixels")
    with pytest.raises(ValueError, match=r"RobustTrainer: model must have one entry of labels"):
        train(tmp_path, vision_transformer(), label_names=["start", "end"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "robustkern.integrations.transformers")
    with pytest.raises(ImportError, match=r"robustkern\[transformers\]"):
        importlib.import_module("robustkern.integrations.transformers")
