"""The reports of ``bnprobe profile`` and ``bnprobe drift``: what is usual, and what moved how far."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from bnprobe.numbers import count, listed, number, percent
from bnprobe.records import ChannelDrift, DriftReport, LayerDrift, Profile, SkippedLayer
from bnprobe.report.page import FINE, FLAGGED, STYLES, UNMEASURED, Page, RenderOptions, to_string
from bnprobe.report.table import Column, Mark, Names, dropping, table

MOST_LAYERS = 12
"""So many layers are shown, those with the most evidence, unless all are asked for."""

_CHANNELS = 3


def render_profile(found: Profile, options: RenderOptions) -> str:
    """The profile as text in lines of at most ``options.width`` cells."""
    page = Page.of(options)
    rows = [
        ("data", found.data),
        (
            "samples",
            f"{found.described} described, {count(found.blocks, 'block')} of {found.block} others to compare with",
        ),
        ("layers", str(len({layer.name for layer in found.layers}))),
    ]
    parts = [
        page.heading(f"{found.model}: a profile for service"),
        page.labelled(rows),
        _skipped(found.skipped, page),
        page.section("Notes", found.notes),
        page.verdict(
            FINE,
            f"{one_line_of_profile(found)}.",
            ["bnprobe drift compares data with it, and bnprobe.ShiftMonitor a model in service."],
        ),
    ]
    return to_string(parts, options.color)


def one_line_of_profile(found: Profile) -> str:
    """What is in it, e.g. "20 layers profiled on 4,224 samples"."""
    layers = count(len({layer.name for layer in found.layers}), "layer")
    return f"{layers} profiled on {count(found.described + found.blocks * found.block, 'sample')}"


def render(found: DriftReport, options: RenderOptions) -> str:
    """The comparison as text in lines of at most ``options.width`` cells."""
    page = Page.of(options)
    data = f" of {found.data}" if found.data else ""
    parts = [
        page.heading(f"{found.model}: {count(found.samples, 'sample')}{data} against its profile"),
        _layers(found, page, options.show_all),
        page.section("Notes", found.notes),
        page.verdict(sign(found), f"{one_line(found)}.", _sentences(found)),
    ]
    return to_string(parts, options.color)


def sign(found: DriftReport) -> str:
    """Whether there is an alarm; unmeasured where nothing was compared."""
    if found.alarm is not None:
        return FLAGGED
    return UNMEASURED if found.samples < found.block else FINE


def one_line(found: DriftReport) -> str:
    """The result in one line, e.g. "Alarm after 48 samples: they are not like the profile"."""
    if found.alarm is not None:
        return f"Alarm after {count(found.alarm, 'sample')}: they are not like the profile"
    return f"No alarm in {count(found.samples, 'sample')}"


def _sentences(found: DriftReport) -> list[str]:
    rate = f"An alarm needs an e-value of {number(1 / found.alpha)}; samples like the profile's reach it in at most"
    said = [f"The e-value is {evidence(found.e_value)}. {rate} {percent(found.alpha)} of streams, however long."]
    first = next((layer for layer in found.layers if layer.moved), None)
    if first is not None:
        said.append(f"The first layer in the network that moved is {title(first)}: look at what comes before it.")
    return said


def _layers(found: DriftReport, page: Page, show_all: bool) -> list[Text]:
    ranked = sorted(found.layers, key=lambda layer: (not layer.moved, -layer.e_value))
    shown = ranked if show_all else ranked[:MOST_LAYERS]
    if not shown or found.samples < found.block:
        return []
    columns = [
        Column("e-value", [evidence(layer.e_value) for layer in shown], "right"),
        Column("mean\nmoved", [f"{layer.position:.2f}" for layer in shown], "point"),
        Column("spread\nmoved", [f"{layer.extent:.2f}" for layer in shown], "point"),
        Column("since", ["" if layer.since is None else f"{layer.since:,}" for layer in shown], "right"),
        Column("channels", [", ".join(map(channel, layer.channels[:_CHANNELS])) for layer in shown], "left"),
    ]
    marks = [Mark(each, STYLES[each]) for each in (FLAGGED if layer.moved else FINE for layer in shown)]
    names = Names([title(layer) for layer in shown], marks=marks)
    hidden = len(ranked) - len(shown)
    said = [
        "Root mean square over channels, and the channels that moved farthest, in standard deviations of healthy"
        " samples; since: so many samples ago it seems to have begun.",
        f"{count(hidden, 'layer')} with less evidence not shown; --all shows all." if hidden else "",
    ]
    return [
        *page.heading("Layers, those with most evidence first"),
        *table(names, dropping(columns, ("since", "channels")), page),
        *page.paragraphs(said, first=""),
    ]


def title(layer: LayerDrift) -> str:
    """Name of a layer, and which call of it, beyond the first."""
    return layer.name if not layer.call else f"{layer.name}, call {layer.call + 1}"


def channel(found: ChannelDrift) -> str:
    """A channel and the larger of its moves, e.g. "12 (+5.1)"."""
    return f"{found.channel} ({max(found.position, found.extent, key=abs):+.1f})"


def evidence(e_value: float) -> str:
    """An e-value in few digits."""
    return f"{e_value:.0e}" if e_value >= 1e5 else f"{e_value:,.0f}" if e_value >= 10 else f"{e_value:.2g}"


def _skipped(skipped: Sequence[SkippedLayer], page: Page) -> list[Text]:
    reasons = dict.fromkeys(layer.reason for layer in skipped)
    names = {reason: [layer.name for layer in skipped if layer.reason == reason] for reason in reasons}
    return page.section("Not profiled", [f"{listed(names[reason], 3)}: {reason}." for reason in reasons])
