"""What a file would do when it is imported, as its text shows."""

from __future__ import annotations

import pytest

from bnprobe.loading.scripts import look_at

LOOP = "for batch in loader:\n    loss = net(batch)\n    loss.backward()\n"

TRAINS = {
    LOOP: "the loop in line 1 calls backward()",
    "while True:\n    optimizer.step()\n": "the loop in line 1 calls step()",
    "for epoch in nine:\n  for batch in loader:\n    net(batch).backward()\n": "the loop in line 1 calls backward()",
    "with open('log'):\n  try:\n    " + LOOP.replace("\n", "\n    ") + "\n  finally: pass\n": (
        "the loop in line 3 calls backward()"
    ),
    "trainer.fit(model)\n": "line 1 calls trainer.fit()",
    "L.Trainer(max_epochs=3).fit(model)\n": "line 1 calls Trainer.fit()",
    "learn.fit_one_cycle(3)\n": "line 1 calls learn.fit_one_cycle()",
    "from engine import train_one_epoch\nfor epoch in range(3):\n    train_one_epoch(net)\n": (
        "the loop in line 2 calls train_one_epoch()"
    ),
    "def step(batch):\n    net(batch).backward()\n\nfor batch in loader:\n    step(batch)\n": (
        "the loop in line 4 calls step(), which calls backward()"
    ),
    "def main():\n    trainer.fit(model)\n\nmain()\n": ("line 4 calls main(), and in it line 2 calls trainer.fit()"),
    "if __name__ == '__main__':\n    pass\nelse:\n    trainer.fit(model)\n": "line 4 calls trainer.fit()",
}

DOES_NOT = (
    "def main():\n    trainer.fit(model)\n",
    "class Net:\n    def fit(self):\n        for x in y:\n            x.backward()\n",
    f"if __name__ == '__main__':\n    {LOOP.replace(chr(10), chr(10) + '    ')}\n",
    "def main():\n    trainer.fit(model)\nif '__main__' == __name__:\n    main()\n",
    "scaler.fit(table)\n",
    "loss.backward()\n",  # once: a check of the gradient
    "for step in range(90):\n    rates.append(scheduler.get_last_lr())\n    scheduler.step()\n",
    "model.train()\n",
    "def main():\n    main()\nmain()\n",
    "run = lambda: trainer.fit(model)\n",
)


@pytest.mark.parametrize("text", TRAINS)
def test_training_is_seen(text: str) -> None:
    assert look_at(text.encode()).trains == TRAINS[text]


@pytest.mark.parametrize("text", DOES_NOT)
def test_what_is_no_training_is_let_pass(text: str) -> None:
    assert look_at(text.encode()).trains is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("args = parser.parse_args()\n", 1),
        ("import x\nargs = make_parser().parse_args()\n", 2),
        ("args = parser.parse_args([])\n", None),
        ("args = parser.parse_args(args=())\n", None),
        ("def main():\n    parser.parse_args()\n", None),
        ("if __name__ == '__main__':\n    parser.parse_args()\n", None),
    ],
)
def test_arguments_are_seen(text: str, line: int | None) -> None:
    assert look_at(text.encode()).parses == line
