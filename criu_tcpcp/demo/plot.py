"""A time-sequence plot of what the peer saw, as SVG: the whole transfer, and beside it the pass, enlarged. Pure.

Each segment stands at its time and its place in the stream, in the colour of the host that sent it: as a dot on the
left (no more than one to a pixel), as a bar from its first byte to its last on the right, where the grey line is what
the peer had acknowledged. The shaded band reaches from the old host's last packet to the new one's first.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass

from .sightings import Record, Switch

COLOURS = {"origin": "#1667b5", "destination": "#dd6b00", "unknown": "#c01040"}
_WIDTH, _HEIGHT, _TOP, _BOTTOM = 1120, 500, 64, 56
_LEFT_PANEL, _RIGHT_PANEL = (76, 540), (640, 1096)
_MARGIN_MS = 15.0
_INK, _GRID, _BAND, _ACKED = "#222222", "#dddddd", "#fbe3e0", "#8a8a8a"


@dataclass(frozen=True)
class _Panel:
    """A rectangle of the picture, and what part of the plane it shows: time (x) and bytes (y), in its own units."""

    svg: ElementTree.Element
    span: tuple[int, int]
    x: tuple[float, float]
    y: tuple[float, float]

    def at_x(self, value: float) -> float:
        return self.span[0] + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.span[1] - self.span[0])

    def at_y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (_HEIGHT - _TOP - _BOTTOM)

    def draw(self, title: str, x_title: str, y_title: str, bands: Iterable[tuple[float, float]]) -> None:
        """The frame, the band of each pass, the axes."""
        left, right = self.span
        for start, end in bands:
            width = max(self.at_x(end) - self.at_x(start), 1.5)
            _add(self.svg, "rect", {"class": "pass", "x": self.at_x(start), "y": _TOP, "width": width,
                                    "height": _HEIGHT - _TOP - _BOTTOM, "fill": _BAND, "stroke": "#e0a9a2"})
        for value in _ticks(*self.x):
            at = self.at_x(value)
            _line(self.svg, at, _TOP, at, _HEIGHT - _BOTTOM, _GRID)
            _text(self.svg, at, _HEIGHT - _BOTTOM + 16, f"{value:g}", "middle")
        for value in _ticks(*self.y):
            at = self.at_y(value)
            _line(self.svg, left, at, right, at, _GRID)
            _text(self.svg, left - 6, at + 4, f"{value:g}", "end")
        _add(self.svg, "rect", {"x": left, "y": _TOP, "width": right - left, "height": _HEIGHT - _TOP - _BOTTOM,
                                "fill": "none", "stroke": _INK})
        _text(self.svg, left, _TOP - 10, title, "start", weight="bold")
        _text(self.svg, (left + right) / 2, _HEIGHT - _BOTTOM + 38, x_title, "middle")
        _text(self.svg, left - 52, (_TOP + _HEIGHT - _BOTTOM) / 2, y_title, "middle", turned=True)


def svg(record: Record, title: str) -> str:
    """The picture. ValueError where the connection was not passed, or nothing was seen."""
    if not record.switches:
        raise ValueError("nothing was passed")
    root = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {_WIDTH} {_HEIGHT}",
                                       "width": str(_WIDTH), "height": str(_HEIGHT),
                                       "font-family": "sans-serif", "font-size": "12"})
    ElementTree.SubElement(root, "title").text = title
    _add(root, "rect", {"width": _WIDTH, "height": _HEIGHT, "fill": "white"})
    _text(root, _LEFT_PANEL[0], 24, title, "start", weight="bold")
    _legend(root)
    _whole(root, record)
    _enlarged(root, record, record.switches[0])
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _whole(root: ElementTree.Element, record: Record) -> None:
    zero = record.sightings[0].time_ns

    def seconds(time_ns: int) -> float:
        return (time_ns - zero) / 1e9

    panel = _Panel(root, _LEFT_PANEL, (0.0, seconds(record.sightings[-1].time_ns) or 1.0),
                   (0.0, max(one.end for one in record.sightings) / 1e6 or 1.0))
    panel.draw("the whole transfer, as the peer saw it", "time since the first packet, s", "place in the stream, MB",
               [(seconds(one.last_ns), seconds(one.first_ns)) for one in record.switches])
    dots: dict[str, dict[tuple[int, int], None]] = {}
    for one in record.sightings:
        if one.end > one.start:
            place = (round(panel.at_x(seconds(one.time_ns))), round(panel.at_y(one.end / 1e6)))
            dots.setdefault(str(one.host), {})[place] = None
    for host, places in dots.items():
        group = _add(root, "g", {"class": host, "fill": COLOURS[host]})
        for x, y in places:
            _add(group, "circle", {"cx": x, "cy": y, "r": 1.6})


def _enlarged(root: ElementTree.Element, record: Record, switch: Switch) -> None:
    """The pass in the middle, with as much time before and after as it took itself, or a little more."""
    around = max(_MARGIN_MS, switch.silence_ms)

    def milliseconds(time_ns: int) -> float:
        return (time_ns - switch.last_ns) / 1e6

    low, high = -around, switch.silence_ms + around
    near = [one for one in record.sightings if low <= milliseconds(one.time_ns) <= high and one.end > one.start]
    acknowledged = [(milliseconds(time_ns), place) for time_ns, place in record.acknowledged
                    if low <= milliseconds(time_ns) <= high]
    zero = next((one.start for one in near if one.time_ns >= switch.first_ns), near[-1].end if near else 0)

    def kilobytes(place: int) -> float:
        return (place - zero) / 1e3

    bottom = min((kilobytes(one.start) for one in near), default=0.0)
    top = max((kilobytes(one.end) for one in near), default=1.0)
    room = (top - bottom) * 0.04
    panel = _Panel(root, _RIGHT_PANEL, (low, high), (bottom - room, top + room))
    panel.draw(f"the pass: {switch.silence_ms:.1f} ms without a packet from either host",
               f"time since the last packet of the {switch.old}, ms", f"place from the {switch.new}'s first byte, kB",
               [(0.0, switch.silence_ms)])
    steps = "".join(f"H{panel.at_x(time):.1f}V{panel.at_y(kilobytes(place)):.1f}" for time, place in acknowledged
                    if panel.y[0] <= kilobytes(place) <= panel.y[1])
    if steps:
        _add(root, "path", {"class": "acknowledged", "fill": "none", "stroke": _ACKED,
                            "d": f"M{panel.at_x(low):.1f} {steps.split('V')[1].split('H')[0]}{steps}"})
    groups: dict[str, ElementTree.Element] = {}
    for one in near:
        host = str(one.host)
        group = groups.setdefault(host, _add(root, "g", {"class": host, "stroke": COLOURS[host], "stroke-width": 2.4}))
        x = panel.at_x(milliseconds(one.time_ns))
        _add(group, "line", {"x1": x, "y1": panel.at_y(kilobytes(one.start)), "x2": x,
                             "y2": panel.at_y(kilobytes(one.end))})


def _legend(root: ElementTree.Element) -> None:
    entries = [("sent by the origin", COLOURS["origin"]), ("sent by the destination", COLOURS["destination"]),
               ("acknowledged by the peer", _ACKED), ("the pass", "#e0a9a2")]
    x = _RIGHT_PANEL[0] - 116.0
    for label, colour in entries:
        _add(root, "rect", {"x": x, "y": 15, "width": 10, "height": 10, "fill": colour})
        _text(root, x + 15, 24, label, "start")
        x += 34 + 6.2 * len(label)


def _ticks(low: float, high: float) -> list[float]:
    """Some six round numbers between the two."""
    step = _round_up((high - low) / 6)
    first = int(low // step)
    return [number * step for number in range(first, first + 9) if low <= number * step <= high]


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50 ..."""
    power = 10.0 ** -9
    while power * 10 <= value:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value)


def _add(parent: ElementTree.Element, tag: str, attributes: dict[str, str | float]) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, {name: value if isinstance(value, str) else f"{value:.1f}".removesuffix(
        ".0") for name, value in attributes.items()})


def _line(parent: ElementTree.Element, x1: float, y1: float, x2: float, y2: float, colour: str) -> None:
    _add(parent, "line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "stroke": colour})


def _text(parent: ElementTree.Element, x: float, y: float, text: str, anchor: str, *, weight: str = "normal",
          turned: bool = False) -> None:
    turn = {"transform": f"rotate(-90 {x:.1f} {y:.1f})"} if turned else {}
    written = _add(parent, "text", {"x": x, "y": y, "text-anchor": anchor, "font-weight": weight, "fill": _INK, **turn})
    written.text = text
