"""A plugin for pytest: a test fails where the BN layers of a model behave differently in training and at inference.

It is there wherever bnprobe is installed, and imports nothing of it until a test asks. ``docs/ci/pytest.md`` shows it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from bnprobe.records import Report

MARKER = "bn_healthy"
MOST_FINDINGS = 10
"""So many findings are in the message of a test that fails, the worst."""


def assert_bn_healthy(model: nn.Module, loader: Any, batch_size: int | None = None, **settings: Any) -> Report:
    """Scan a model, and fail the test if a scan would exit with 1.

    Args:
        model: Any module; it comes back bit-identical.
        loader: A DataLoader or Dataset, or an iterable of micro-batches.
        batch_size: Samples per micro-batch; None: the loader's own.
        **settings: As for ``bnprobe.scan``: ``num_batches``, ``evaluation``, ``loss``, ``metric``, ``seed``, ...

    Returns:
        The report, for further assertions.

    Raises:
        BnprobeError: The model or its data cannot be scanned.
    """
    import bnprobe
    from bnprobe.rules.findings import failures

    report: Report = bnprobe.scan(model, loader, batch_size, **settings)
    found = failures(report)
    if found:
        pytest.fail(_message(report, found), pytrace=False)
    return report


def _message(report: Report, found: Any) -> str:
    from bnprobe.report.findings import text_of, title_of_finding
    from bnprobe.report.scan import one_line

    lines = [f"{report.scan.model}: {one_line(report)}."]
    lines += [f"  {title_of_finding(each)}, {text_of(each)}" for each in found[:MOST_FINDINGS]]
    if len(found) > MOST_FINDINGS:
        lines.append(f"  and {len(found) - MOST_FINDINGS} more")
    return "\n".join(lines)


@pytest.fixture(name="assert_bn_healthy")
def _function() -> Callable[..., Report]:
    """The function ``bnprobe.pytest_plugin.assert_bn_healthy``, for tests that do not import it."""
    return assert_bn_healthy


def pytest_configure(config: pytest.Config) -> None:
    """Describe the marker."""
    config.addinivalue_line(
        "markers",
        f'{MARKER}(model="model", loader="loader", **settings): after the test, scan the model of one fixture on the'
        " data of another, and fail if its BN layers behave differently in training and at inference (bnprobe).",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let marked tests have the fixtures that their marker names."""
    for item in items:
        marker = item.get_closest_marker(MARKER)
        if marker is not None and isinstance(item, pytest.Function):
            names = [marker.kwargs.get(name, name) for name in ("model", "loader")]
            for name in names:
                if not isinstance(name, str):
                    raise pytest.UsageError(f"{item.nodeid}: {MARKER} takes names of fixtures, but got {name!r}.")
            item.fixturenames.extend(name for name in names if name not in item.fixturenames)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Scan the model of a marked test that has passed."""
    result = yield
    marker = item.get_closest_marker(MARKER)
    if marker is not None and isinstance(item, pytest.Function):
        settings = {name: value for name, value in marker.kwargs.items() if name not in ("model", "loader")}
        model: Any = item.funcargs[marker.kwargs.get("model", "model")]
        loader = item.funcargs[marker.kwargs.get("loader", "loader")]
        from bnprobe.errors import BnprobeError

        try:
            assert_bn_healthy(model, loader, *marker.args, **settings)
        except BnprobeError as error:  # of the marker or the fixtures: no line of bnprobe's own says more
            pytest.fail(f"{MARKER}: {error}", pytrace=False)
    return result
