"""What the functions of a model file return by mistake is said with function, file and line, in every command."""

from __future__ import annotations

from dataclasses import replace

import pytest

from functional.command import CLEAN, FINDINGS, MODEL, SHIFTED, Workspace

SCORED = (
    SHIFTED
    + '''

def load_eval_data(batch_size):
    return DataLoader(TensorDataset(images()), batch_size=batch_size)


def loss(model, batch):
    return model(batch[0]).square().mean()


class Unsayable(Exception):
    """Raises wherever it is looked at."""

    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __float__ = __str__

    def __getattr__(self, name):
        raise RuntimeError("no " + name)


def around(value):
    value.append(value)
    return value
'''
)
LINE = SCORED.count("\n") + 3

COMMANDS = {
    "scan": ("scan", "model.py", "--batches", "4"),
    "sweep": ("sweep", "model.py", "--batches", "4", "--batch-sizes", "8"),
    "recalibrate": ("recalibrate", "model.py", "-o", "out.safetensors"),
    "convert": ("convert", "model.py", "-o", "out.safetensors"),
    "finetune": ("convert", "model.py", "--finetune", "--steps", "2", "-o", "out.safetensors"),
    "train-steps": ("scan", "model.py", "--batches", "4", "--train-steps", "2"),
    "gradients": ("scan", "model.py", "--batches", "4", "--gradients"),
}


def said(workspace: Workspace, function: str, value: str, command: str) -> str:
    """The error of a command where a function of the model file gives a value."""
    signature = {"load_data": "batch_size", "load_model": "", "batch_size_of": "batch"}.get(function, "model, batch")
    workspace.write("model.py", f"{SCORED}\n\ndef {function}({signature}):\n    return {value}\n")
    result = workspace.run(*COMMANDS[command], "--batch-size", "4")
    return replace(result, stdout="").error()  # what a scan has measured before is printed


NO_NUMBER = [
    ("None", "None", " Is there a return statement?"),
    ("{'loss': model(batch[0]).mean()}", "a dict", ""),
    ("'0.3'", "the text '0.3'", ""),
    ("model(batch[0])", "a tensor of shape (4, 3) and dtype torch.float32", " Reduce it, e.g. with .mean()."),
    ("model(batch[0]).argmax(1)", "a tensor of shape (4,) and dtype torch.int64", " Reduce it, e.g. with .mean()."),
    ("(model(batch[0]).mean(), 3)", "a tuple of Tensor and int", ""),
    ("torch.zeros((), device='meta')", "a tensor without values (device meta)", ""),
    ("torch.zeros(1).to_sparse()", "a sparse tensor", ""),
    ("torch.nested.nested_tensor([torch.zeros(1)], layout=torch.jagged)", "a nested tensor", ""),
    ("model(batch[0]).mean() * 1j", "a tensor of shape () and dtype torch.complex64", ""),
    ("10 ** 400", "an int", ""),
    ("Unsayable()", "an Unsayable", ""),
    ("type('', (), {})()", "an object", ""),
]


@pytest.mark.parametrize(("value", "what", "hint"), NO_NUMBER, ids=[value for value, _, _ in NO_NUMBER])
def test_what_is_no_number(workspace: Workspace, value: str, what: str, hint: str) -> None:
    function = "loss" if len(value) % 2 else "metric"
    wanted = f"but it must return one number (a float, or a tensor with one element).{hint}"
    message = said(workspace, function, value, "scan")
    assert message == f"{function}(model, batch) (model.py:{LINE}) returned {what}, {wanted}"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("function", ["loss", "metric"])
def test_every_command_says_so(workspace: Workspace, function: str, command: str) -> None:
    message = said(workspace, function, "None", command)
    assert message.startswith(
        f"{function}(model, batch) (model.py:{LINE}) returned None, but it must return one number"
    )


@pytest.mark.parametrize("command", ["finetune", "train-steps", "gradients"])
@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("0.5", "a float, but it must return the training loss as a tensor of one number."),
        (
            "model(batch[0]).mean() * 1j",
            "a tensor of shape () and dtype torch.complex64, but it must return one",
        ),
        ("model(batch[0]).sum().long()", "a tensor of shape () and dtype torch.int64, which has no gradient to train"),
    ],
)
def test_what_nothing_can_be_trained_with(workspace: Workspace, value: str, what: str, command: str) -> None:
    message = said(workspace, "loss", value, command)
    assert message.startswith(f"loss(model, batch) (model.py:{LINE}) returned {what}")


IN_BATCHES = [
    ("torch.zeros(4, 2, 8, 8, device='meta')", "a tensor without values (device meta)"),
    ("torch.nested.nested_tensor([torch.zeros(2, 8, 8)] * 4, layout=torch.jagged)", "a nested tensor"),
    ("torch.zeros(4, 2, 8, 8).to_sparse()", "a sparse tensor"),
    ("around([])", "more than 64 levels of lists or mappings (does it contain itself?)"),
]


@pytest.mark.parametrize(("value", "what"), IN_BATCHES, ids=[what for _, what in IN_BATCHES])
def test_batches_and_outputs_that_cannot_be_read(workspace: Workspace, value: str, what: str) -> None:
    message = said(workspace, "load_data", f"[[{value}, 0]] * 8", "scan")
    place = "" if "levels" in what else " at [0]"
    assert message.startswith(f"Batch 1 (the first is 1) of load_data of model.py holds {what}{place}.")
    message = said(workspace, "forward", f"[model(batch[0]), {value}]", "scan")
    place = place.replace("0", "1")
    assert message.startswith(f"What forward(model, batch) (model.py:{LINE}) returned holds {what}{place}.")


@pytest.mark.parametrize(
    ("value", "gave"),
    [
        ("None", "None"),
        ("2.5", "a float"),
        ("True", "a bool"),
        ("-1", "a negative number"),
        ("10 ** 400", "one that is too large"),
    ],
)
def test_a_count_of_samples_that_is_none(workspace: Workspace, value: str, gave: str) -> None:
    assert said(workspace, "batch_size_of", value, "scan") == (
        f"batch_size_of(batch) (model.py:{LINE}) must return the number of samples in the batch, a whole number from 0,"
        f" but gave {gave}."
    )


@pytest.mark.parametrize(
    "value",
    ["Unsayable()", "{Unsayable(): 3}", "type('', (), {})()", "DataLoader([1, 2, 3, 4], batch_sampler=3)", "None"],
)
def test_data_that_is_none(workspace: Workspace, value: str) -> None:
    assert "load" in said(workspace, "load_data", value, "scan")


def test_objects_in_a_batch_may_answer_with_errors(workspace: Workspace) -> None:
    """They are passed on as they are, and only what is asked of them must work."""
    workspace.write(
        "model.py", f"{SCORED}\n\ndef load_data(batch_size):\n    return [[torch.ones(4, 2, 8, 8), Unsayable()]] * 8\n"
    )
    assert workspace.scan("--batches", "4").code in (CLEAN, FINDINGS)


RAISED = [
    *((each, "Unsayable()") for each in ("load_model", "load_data", "forward", "loss", "metric", "batch_size_of")),
    *(("forward", each) for each in ("GeneratorExit()", "BaseException('x')", "SystemExit(0)")),
    ("loss", "Exception('\\udcff')"),
    ("load_model", "type('Leaving', (Exception,), {'__str__': lambda self: exit(0)})()"),
]


@pytest.mark.parametrize(("function", "raised"), RAISED)
def test_whatever_is_raised_is_an_error_of_the_users(workspace: Workspace, function: str, raised: str) -> None:
    message = said(workspace, function, f"(_ for _ in ()).throw({raised})", "scan")
    name = "Leaving" if "Leaving" in raised else raised.partition("(")[0]
    assert f"{name} while calling " in message
    assert f'model.py", line {LINE + 1}, in {function}' in message


@pytest.mark.parametrize("error", ["SystemExit(0)", "BaseException('x')"])
def test_an_exit_where_nobody_reckons_with_it_is_no_clean_scan(workspace: Workspace, error: str) -> None:
    """Every nn.Module may be asked for any attribute."""
    leaving = f"\n\ndef fails(self, *_):\n    raise {error}\n\n\nNet.named_children = fails\n"
    workspace.write("model.py", MODEL + leaving)
    message = workspace.scan().error()
    assert message.startswith(f"{error.partition('(')[0]} while running the command")
    assert ", in fails" in message
