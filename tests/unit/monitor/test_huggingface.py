"""A Trainer of Hugging Face with a monitor trains as one without."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from support.frameworks import framework
from unit.monitor.loops import Blobs, Net, assert_nothing_is_left, assert_same, only_warnings_of_bnprobe

framework("accelerate")
transformers = framework("transformers")
transformers_trainer = framework("transformers.trainer")
outputs = framework("transformers.modeling_outputs")
HuggingFaceMonitor = framework("bnprobe.monitor.huggingface").HuggingFaceMonitor


class Config(transformers.PretrainedConfig):  # type: ignore[misc]
    model_type = "blobs"


class Classifier(transformers.PreTrainedModel):  # type: ignore[misc]
    """The loss is an output of the model, as of all of transformers'."""

    config_class = Config
    fails_at = -1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.net = Net()
        self.calls = 0
        self.post_init()

    def forward(self, points: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(points)
        self.calls += self.training
        if self.calls == self.fails_at:
            raise RuntimeError("out of luck")
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs

    def __len__(self) -> int:
        return len(self.blobs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        points, label = self.blobs[index]
        return {"points": points, "labels": label}


class InOrder(transformers_trainer.Trainer):  # type: ignore[misc, name-defined]
    def _get_train_sampler(self, *given: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def _model() -> Any:
    transformers.set_seed(3)
    return Classifier(Config())


def _trainer(
    folder: Path, model: Any, *callbacks: Any, epochs: int = 3, in_order: bool = False, **settings: Any
) -> Any:
    """Epochs of eight batches."""
    defaults = {"save_strategy": "no", "logging_steps": 5, "learning_rate": 0.02, "optim": "sgd"}
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **{**defaults, **settings},
    )
    kind = InOrder if in_order else transformers_trainer.Trainer
    data = {"train_dataset": Rows(Blobs(256, in_order)), "eval_dataset": Rows(Blobs(64))}
    return kind(model, args, callbacks=list(callbacks), **data)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"gradient_accumulation_steps": 3},
    {"bf16": True},
    {"eval_strategy": "steps", "eval_steps": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_run_that_is_watched_is_bit_identical(tmp_path: Path, settings: dict[str, Any]) -> None:
    alone = _model()
    with only_warnings_of_bnprobe():
        _trainer(tmp_path, alone, **settings).train()
    drawn = torch.get_rng_state()
    seen, callback = _model(), HuggingFaceMonitor(every=4, log=tmp_path / "log")
    with only_warnings_of_bnprobe():
        trainer = _trainer(tmp_path, seen, callback, **settings)
        trainer.train()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same(alone.state_dict(), seen.state_dict())
    monitor = callback.monitor
    assert monitor.step == trainer.state.global_step == (9 if "gradient_accumulation_steps" in settings else 24)
    assert monitor.sample.loss is not None
    assert set(monitor.sample.layers) == {"net.body.1", "net.neck.1"}
    logged = [each for each in trainer.state.log_history if "bnprobe/output" in each]
    assert [each["step"] for each in logged] == list(range(4, monitor.step, 4))
    assert logged[-1]["bnprobe/loss/eval"] == monitor.sample.loss.eval
    events = [json.loads(line) for line in (tmp_path / "log" / "monitor.jsonl").read_text().splitlines()]
    assert len(events) == 1 + len(logged)
    assert_nothing_is_left(seen)


@pytest.mark.parametrize("restored", [False, True])
def test_a_checkpoint_has_the_state_and_a_resumed_run_goes_on(tmp_path: Path, restored: bool) -> None:
    def findings(epochs: int, checkpoint: Path | None) -> Any:
        callback = HuggingFaceMonitor(every=4, on_finding=lambda *_: None)
        settings = {"save_strategy": "steps", "save_steps": 32, "restore_callback_states_from_checkpoint": restored}
        trainer = _trainer(tmp_path, _model(), callback, epochs=epochs, in_order=True, **settings)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        used = [each for each in trainer.callback_handler.callbacks if type(each) is HuggingFaceMonitor]
        assert len(used) == 1
        rules = {finding.rule for finding in used[0].monitor.findings}
        assert {f"bnprobe/finding/{rule}" for rule in rules} <= {
            key for row in trainer.state.log_history for key in row
        }
        return used[0].monitor.findings

    with only_warnings_of_bnprobe() if not restored else pytest.warns(UserWarning, match="bnprobe, step"):
        whole = findings(20, None)
        assert findings(20, tmp_path / "checkpoint-32") == whole != []


def test_after_an_exception_the_monitor_ends_with_the_trainer(tmp_path: Path) -> None:
    model = _model()
    model.fails_at = 7
    trainer = _trainer(tmp_path, model, HuggingFaceMonitor(every=4))
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    del trainer
    gc.collect()
    assert_nothing_is_left(model)


def test_what_the_trainer_compiles_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _model(), HuggingFaceMonitor(every=4), epochs=1)
    trainer.args.torch_compile = True
    with pytest.warns(UserWarning, match="bnprobe does not watch this training: torch_compile=True"):
        trainer.train()


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    callback = HuggingFaceMonitor(every=4)
    model = _model()
    _trainer(tmp_path, model, callback, epochs=1).train()
    first = callback.monitor
    _trainer(tmp_path, model, callback, epochs=1).train()
    assert callback.monitor is not first
    assert callback.monitor.step == 8
    assert_nothing_is_left(model)
    assert isinstance(model, nn.Module)
