"""The report as one HTML file: opens from disk, asks the network for nothing, runs no script but its own.

Note [What comes from outside]
 1. Names of modules, paths and options may hold anything. In HTML they are escaped; in the JSON that the
    script reads, ``<``, ``>`` and ``&`` are written as ``\\u003c`` and so on, so that no tag begins or ends
    there; the script sets them as text only.
 2. The Content-Security-Policy allows two scripts by their SHA-256, styles, and nothing else: not a
    request, not a frame, not ``eval``. Vega evaluates its expressions with an interpreter.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import vl_convert

import memfit
from memfit.report import categories, figures
from memfit.report.contents import Contents, Planned, about, contents, data, held_against, verdict
from memfit.report.reading import Source, is_number, read_source
from memfit.units import format_bytes

_GLOBALS = "window.vegaEmbed = vegaEmbed;"
_SCALE = 2.0


def write_report(
    place: Path, *, profile: Path | None = None, out: Path | None = None
) -> tuple[Path, Contents]:
    """Writes the page of a run or a plan; returns where it is and what is in it.

    Args:
        place: A run's folder, or a plan.
        profile: Of a plan; by default ``profile.json`` beside it.
        out: By default ``report.html`` in the folder, or beside the plan under its name.

    Raises:
        BadReport: Something is missing or damaged; says what, and the cure.
        OSError: A file cannot be read or written.
    """
    content = contents(read_source(place, profile))
    default = place / "report.html" if place.is_dir() else place.with_suffix(".html")
    target = out or default
    partial = target.with_name(target.name + ".tmp")
    partial.write_text(page(content), "utf-8")
    partial.replace(target)
    return target, content


def write_picture(content: Contents, target: Path, kind: str, *, scale: float = _SCALE) -> None:
    """Writes the main picture as "png" or "svg", without a browser.

    Args:
        scale: Pixels of a PNG for each of the picture.

    Raises:
        ValueError: The report has no plan.
        OSError: The file cannot be written.
    """
    chart = figures.hero(content).to_dict()
    if kind == "png":
        target.write_bytes(vl_convert.vegalite_to_png(chart, scale=scale))
    else:
        target.write_text(vl_convert.vegalite_to_svg(chart), "utf-8")


def page(content: Contents) -> str:
    """The whole file. See Note [What comes from outside]."""
    library, script = _library(), _resource("page.js")
    held = content.source.result.get("held")
    state = "plain" if content.planned is None else "broken" if held is False else "held"
    parts = {
        "policy": _policy(library, script),
        "title": escape(content.source.title),
        "style": _resource("page.css"),
        "state": state,
        "verdict": escape(verdict(content)),
        "body": "\n".join(_body(content)),
        "data": _json(_for_script(content)),
        "library": library,
        "script": script,
    }
    text = _resource("page.html")
    pieces = []  # put together in one go: what is put in is not looked through for further names
    for piece in text.split("{"):
        name, brace, rest = piece.partition("}")
        pieces.append(parts[name] + rest if brace else piece)
    return "".join(pieces)


def _for_script(content: Contents) -> dict[str, Any]:
    """What the script reads: data, charts and looks."""
    found: dict[str, Any] = {
        "data": data(content),
        "light": figures.config(categories.LIGHT, is_dark=False),
        "dark": figures.config(categories.DARK, is_dark=True),
        "losses": figures.losses().to_dict(),
    }
    planned = content.planned
    if planned is not None:
        scale = figures.axes(planned)
        units = {"memory": scale.memory._asdict(), "time": scale.time._asdict()}
        found |= {
            "axes": units | {"top_bytes": scale.top_bytes},
            "timeline": figures.timeline(scale).to_dict(),
            "frontier": figures.frontier(planned).to_dict(),
            "plans": figures.plan_rows(planned),
            "hand": figures.hand_rows(planned),
        }
    return found


# ---- sections ---------------------------------------------------------------------------------------


def _body(content: Contents) -> Iterator[str]:
    """The sections in order."""
    planned, source = content.planned, content.source
    if planned is not None:
        yield _SLIDER
        yield _TIMELINES
        yield _STRIP
        right = _held(held_against(content)) + (_LOSSES if source.losses else "") + _audit(content)
        left = _FRONTIER.replace("NOTES", escape(_by_hand(planned))) + _advice(source)
        yield f'<div class="pair"><div>{left}</div><div>{right}</div></div>'
    elif source.losses:
        yield _measured(source)
        yield _LOSSES
    yield _made_by(content)


_SLIDER = """<section class="slider"><label for="budget"><span>memory <b id="amount"></b></span>
<output id="effect" for="budget"></output></label>
<input id="budget" type="range" min="0" step="1"
 aria-label="memory, from the least that works to no recomputation">
</section>"""

_TIMELINES = """<section><h2>Where the memory goes</h2>
<p class="note">Live bytes over one step, on the same axes; shaded: backward. Move the slider to plan for
another memory; ★ is the plan of this report.</p>
<div class="pair"><figure><h3 id="plain-title"></h3><div class="chart" id="plain"></div>
<figcaption id="plain-caption"></figcaption></figure>
<figure><h3 id="planned-title"></h3><div class="chart" id="planned"></div>
<figcaption id="planned-caption"></figcaption></figure></div>
<ul class="legend" id="legend"></ul></section>"""

_STRIP = """<section><h2>What is kept, what is recomputed</h2>
<p class="note">The model from first to last; a block is filled by the share of its saved bytes. Point at one
for its operations.</p>
<div class="strip" id="strip"></div>
<ul class="legend"><li><i class="kept"></i>kept for the backward</li>
<li><i class="again"></i>recomputed</li></ul>
<div class="ops" id="ops"></div></section>"""

_FRONTIER = """<section><h2>What memory buys</h2><div class="chart" id="frontier"></div>
<p class="note">Grey: memfit's plans; ★ this report's, red ring: the slider. NOTES</p></section>"""

_LOSSES = """<section><h2>Loss</h2><div class="chart" id="losses"></div></section>"""


def _by_hand(planned: Planned) -> str:
    """What the strategies are."""
    blocks = list(dict.fromkeys(s.blocks for s in planned.strategies if s.blocks))
    if not blocks:
        return "The model has no repeated blocks, so there is nothing to checkpoint by hand."
    return (
        f"By hand: torch.utils.checkpoint around blocks ({'; or '.join(blocks)}), simulated by the same "
        "code. Both are charged for their Python, as benchmarks/overhead.py measures it."
    )


def _held(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Predicted over measured."""
    if not rows:
        return (
            "<section><h2>Predicted and measured</h2><p>Nothing was measured: this is a plan.</p></section>"
        )
    lines = "".join(
        "<tr><th>" + "</th><td>".join((escape(row[0]), "</td><td>".join(map(escape, row[1:])))) + "</td></tr>"
        for row in rows
    )
    return (
        "<section><h2>Predicted over measured</h2><table><thead><tr><th></th><th>predicted</th>"
        f"<th>measured</th><th>ratio</th></tr></thead><tbody>{lines}</tbody></table>"
        '<p class="note">The peak by the allocator\'s own account; the step is the median.</p></section>'
    )


def _measured(source: Source) -> str:
    """What a plain run was measured to take."""
    peak = source.result.get("measured_peak_bytes")
    if not isinstance(peak, int):
        return ""
    return f"<section><p>Measured peak: {format_bytes(peak)}, by the allocator's own account.</p></section>"


def _advice(source: Source) -> str:
    """What could be done besides."""
    lines = source.result.get("advice")
    if not isinstance(lines, list) or not lines:
        return ""
    items = "".join(f"<li>{escape(str(line))}</li>" for line in lines)
    return f'<section><h2>Advice</h2><ul class="plain">{items}</ul></section>'


def _audit(content: Contents) -> str:
    """Whether accumulation is exact here."""
    profile = content.source.profile
    assert profile is not None
    told = str(profile.audit)
    if profile.audit is None:
        told = "Not asked yet: before training splits a batch, memfit proves that the parts add up."
    return f"<section><h2>Audit: is accumulation exact?</h2><pre>{escape(told)}</pre></section>"


def _made_by(content: Contents) -> str:
    """The command and the versions."""
    versions: Mapping[str, str] = {"memfit": memfit.__version__} | dict(about(content))
    if is_number(content.source.result.get("steps_done")):
        versions = {**versions, "steps done": str(content.source.result["steps_done"])}
    entries = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in versions.items())
    return f"<section><h2>Made by</h2><pre>{escape(content.source.command)}</pre><dl>{entries}</dl></section>"


# ---- safety -----------------------------------------------------------------------------------------


def _policy(*scripts: str) -> str:
    """The Content-Security-Policy: these scripts, styles, nothing else."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    others = "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {hashes}; {others}"


def _json(content: object) -> str:
    """JSON that can stand in HTML; a loss that is no number becomes null."""
    text = json.dumps(_finite(content), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _finite(content: Any) -> Any:
    """The same without infinities, which JSON does not have."""
    match content:
        case float():
            return content if is_number(content) else None
        case dict():
            return {name: _finite(value) for name, value in content.items()}
        case list() | tuple():
            return [_finite(value) for value in content]
    return content


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    text = vl_convert.javascript_bundle(_GLOBALS)
    assert "</script" not in text.lower()
    return text


def _resource(name: str) -> str:
    """A file that lies beside this one."""
    return files("memfit.report").joinpath(name).read_text("utf-8")
