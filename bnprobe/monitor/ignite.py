"""A monitor for engines of ignite."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from bnprobe.monitor.log import scalars
from bnprobe.monitor.monitor import Monitor

if TYPE_CHECKING:
    from ignite.engine import Engine
    from typing_extensions import Self


class IgniteMonitor(Monitor):
    """A `bnprobe.Monitor`, of the same arguments, that starts and stops with an engine.

    The figures of samples and findings are in ``engine.state.metrics`` too, where ignite's loggers find them. In a
    checkpoint it is an object like others: ``to_save = {"monitor": monitor, ...}``.

    Example:
        monitor = IgniteMonitor(model, every=100).attach(trainer)
    """

    def attach(self, engine: Engine) -> Self:
        """Watch the runs of an engine that trains the model."""
        from ignite.engine import Events

        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.stop)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._failed)
        self._sinks.append(partial(_add_metrics, engine))
        return self

    def _failed(self, engine: Engine, error: BaseException) -> None:
        """Stop; the engine raises an error again only where nothing handles it, and this is no handling."""
        from ignite.engine import Events

        self.stop()
        if len(engine._event_handlers[Events.EXCEPTION_RAISED]) == 1:
            raise error


def _add_metrics(engine: Engine, event: dict[str, Any]) -> None:
    engine.state.metrics.update(scalars(event))
