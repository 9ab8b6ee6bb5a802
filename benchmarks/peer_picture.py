"""What ``peers.py`` measured, as a picture: a step's extra time against its peak, a chart a model."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import altair as alt
import peer_tables
import vl_convert
from PIL import Image

_OWN = "memfit"
_FAMILIES = (_OWN, *peer_tables.WHOLE)
_COLOURS = ("#e5355f", "#1f6fb4", "#8a63d2", "#2a9d6f", "#b8860b")
_SHAPES = ("circle", "square", "diamond", "triangle-up", "cross")
_HIGHEST = 0.6  # schedules of many levels take several times the plain step


def rows() -> list[dict[str, Any]]:
    """One row a setting: its measured peak and extra CPU time, both over those of the plain step."""
    found = []
    for model in peer_tables.models():
        plain = peer_tables.measured(model, ("plain",))[0]
        for row in peer_tables.measured(model, _FAMILIES):
            more = row["extra_cpu_s"] / plain["cpu_s"]
            if more <= _HIGHEST:
                peak = row["peak_bytes"] / plain["peak_bytes"]
                found.append({"model": model, "way": row["peer"], "peak": peak, "more": more})
    return found


def chart() -> alt.FacetChart:
    """Points of every way, and a line through memfit's; the same axes in all charts."""
    way = alt.Color("way:N", title=None).scale(domain=list(_FAMILIES), range=list(_COLOURS))
    shape = alt.Shape("way:N", title=None).scale(domain=list(_FAMILIES), range=list(_SHAPES))
    x = alt.X("peak:Q", title="peak, of the plain step's").axis(format="%", tickCount=4)
    y = alt.Y("more:Q", title="extra CPU time").axis(format="%", tickCount=4)
    base = alt.Chart().encode(x=x, y=y)
    own = base.transform_filter(alt.datum.way == _OWN)
    line = own.mark_line(color=_COLOURS[0], strokeWidth=1.5, order=None).encode(order="peak:Q")
    points = base.mark_point(filled=True, size=34, opacity=0.8).encode(color=way, shape=shape)
    facets = alt.Facet("model:N", title=None, sort=peer_tables.models()).header(labelFontSize=13)
    layers = alt.layer(line, points, data=alt.Data(values=rows())).properties(width=190, height=150)
    drawn = layers.facet(facets, columns=3)
    return drawn.configure_legend(orient="top", labelFontSize=13).configure(background="white")


def write_picture(path: Path) -> None:
    """Draws the newest result, in few colours so that the file is small."""
    drawing = Image.open(BytesIO(vl_convert.vegalite_to_png(chart().to_dict(), scale=1.5)))
    drawing.quantize(128).save(path, optimize=True)
