"""Suggested commands: variants of the one that the user ran."""

from __future__ import annotations

import shlex

from rich.cells import cell_len


def with_options(command: str, options: dict[str, str]) -> str:
    """The command with options set; one that was already there is replaced.

    Args:
        command: A command quoted for a POSIX shell, e.g. ``"bnprobe scan model.py --batch-size 2"``.
        options: Values by option; "" for an option without a value.
    """
    words = without_options(shlex.split(command), tuple(options))
    for option, value in options.items():
        words += [option, value] if value else [option]
    return shlex.join(words)


def without_options(words: list[str], options: tuple[str, ...]) -> list[str]:
    """The words of a command without some options that take a value, in both spellings."""
    kept: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word in options:
            next(remaining, None)
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept


def broken(command: str, width: int) -> list[str]:
    """The command in lines of at most ``width`` that a shell still reads as one.

    What is longer than a line by itself stays whole: a broken path could not be pasted.
    """
    lines = [""]
    for phrase in _phrases(shlex.split(command)):
        longer = f"{lines[-1]} {phrase}".lstrip()
        # Two cells are kept for the backslash that continues a line.
        if lines[-1] and cell_len(longer) > width - 2:
            lines.append(phrase)
        else:
            lines[-1] = longer
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _phrases(words: list[str]) -> list[str]:
    """The words, quoted, an option together with its value."""
    phrases: list[str] = []
    after_option = False
    for word in words:
        is_option = word.startswith("--")
        if after_option and not is_option:
            phrases[-1] += f" {shlex.quote(word)}"
        else:
            phrases.append(shlex.quote(word))
        after_option = is_option and "=" not in word
    return phrases
