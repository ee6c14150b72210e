"""docs/results/ideas.svg: the two ways to teleport in one picture, readable on a light and on a dark page.

    python scripts/schematic.py

Left: a weight moves along the null space of its inputs, so its output stays. Right: a turn of the basis brings the gradients'
ellipse onto the axes, along which Adam scales its steps.
"""

import math
import random
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "results" / "ideas.svg"

_STYLE = """\
.page { fill: #ffffff }
text { font: 14px sans-serif; fill: #1f2328 }
.title { font-size: 17px; font-weight: bold }
.axis { stroke: #8c959f; stroke-width: 1.2 }
.span { stroke: #0969da; stroke-width: 2.5 }
.null { stroke: #1a7f37; stroke-width: 2.5; stroke-dasharray: 7 5 }
.weight { stroke: #1f2328; stroke-width: 2.5 }
.move { stroke: #bc4c00; stroke-width: 3.5 }
.help { stroke: #8c959f; stroke-width: 1.2; stroke-dasharray: 3 3 }
.dots { fill: #0969da; opacity: .55 }
.ellipse { fill: none; stroke: #bc4c00; stroke-width: 2.5 }
.spanText { fill: #0969da } .nullText { fill: #1a7f37 } .moveText { fill: #bc4c00 }
.weightHead { fill: #1f2328 } .moveHead { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117 }
  text { fill: #e6edf3 } .weight { stroke: #e6edf3 } .weightHead { fill: #e6edf3 }
  .span { stroke: #58a6ff } .spanText, .dots { fill: #58a6ff }
  .null { stroke: #3fb950 } .nullText { fill: #3fb950 }
  .move, .ellipse { stroke: #f0883e } .moveText, .moveHead { fill: #f0883e }
}"""

Point = tuple[float, float]


def line(kind: str, start: Point, end: Point) -> str:
    return f'<line class="{kind}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'


def arrow(kind: str, start: Point, end: Point) -> str:
    """A line with a head of 12 pixels at its end."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    neck = (end[0] - 10 * math.cos(angle), end[1] - 10 * math.sin(angle))
    sides = [(end[0] - 12 * math.cos(angle + turn), end[1] - 12 * math.sin(angle + turn)) for turn in (-0.4, 0.4)]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (end, *sides))
    return line(kind, start, neck) + f'<polygon class="{kind}Head" points="{corners}"/>'


def text(at: Point, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}">{words}</text>'


def null_space() -> list[str]:
    """One row w of a weight, in the space of a layer's inputs: it moves along their null space."""
    origin, along, across = (210.0, 270.0), (0.9397, -0.3420), (-0.3420, -0.9397)  # y grows downwards

    def place(on_span: float, on_null: float) -> Point:
        return (
            origin[0] + on_span * along[0] + on_null * across[0],
            origin[1] + on_span * along[1] + on_null * across[1],
        )

    before, after = place(130, 45), place(130, 165)
    inputs = [place(length, 0) for length in (-95, -60, 35, 75, 165)]
    return [
        text((20, 30), "Null space of the inputs", "title"),
        line("span", place(-130, 0), place(215, 0)),
        line("null", place(0, -40), place(0, 190)),
        *(f'<circle class="dots" cx="{x:.1f}" cy="{y:.1f}" r="6"/>' for x, y in inputs),
        line("help", place(130, 0), before),
        arrow("weight", origin, before),
        arrow("weight", origin, after),
        arrow("move", before, after),
        text((place(215, 0)[0] - 55, place(215, 0)[1] - 14), "inputs X", "spanText"),
        text((place(0, 190)[0] + 12, place(0, 190)[1] + 4), "null space", "nullText"),
        text((before[0] + 10, before[1] + 14), "w"),
        text((after[0] - 6, after[1] - 10), "w + Δ P", "moveText"),
        text((20, 345), "X (W + Δ P)ᵀ = X Wᵀ: the output stays."),
        text((20, 367), "The gradient grows."),
    ]


def turned_basis() -> list[str]:
    """Gradients of two coordinates as points, before and after a turn to the eigenvectors of their second moment."""
    draw = random.Random(0)
    points = [(draw.gauss(0, 42), draw.gauss(0, 12)) for _ in range(60)]
    tilt = math.radians(38)
    before = [(x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt)) for x, y in points]
    xx, xy, yy = (sum(p[i] * p[j] for p in before) / len(before) for i, j in ((0, 0), (0, 1), (1, 1)))
    angle = 0.5 * math.atan2(2 * xy, xx - yy)  # of the first eigenvector of the second moment
    mean, half = (xx + yy) / 2, math.hypot((xx - yy) / 2, xy)
    radii = 2 * math.sqrt(mean + half), 2 * math.sqrt(mean - half)
    after = [(x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)) for x, y in before]
    left, right = (560.0, 190.0), (810.0, 190.0)
    return [
        text((450, 30), "Turn of the basis", "title"),
        *_gradients(left, before, radii, angle),
        *_gradients(right, after, radii, 0.0),
        arrow("move", (661, 190), (709, 190)),
        text((685, 178), "Q", "moveText", "middle"),
        text((left[0], 315), "before", anchor="middle"),
        text((right[0], 315), "after", anchor="middle"),
        text((450, 345), "Dots: gradients. W becomes Q W, and every output stays."),
        text((450, 367), "Adam scales each axis alone. After the turn its axes fit the gradients."),
    ]


def _gradients(center: Point, points: list[Point], radii: Point, angle: float) -> list[str]:
    (x, y), reach = center, 108
    return [
        line("axis", (x - reach, y), (x + reach, y)),
        line("axis", (x, y - reach), (x, y + reach)),
        *(f'<circle class="dots" cx="{x + dx:.1f}" cy="{y - dy:.1f}" r="3"/>' for dx, dy in points),
        f'<ellipse class="ellipse" cx="{x}" cy="{y}" rx="{radii[0]:.1f}" ry="{radii[1]:.1f}" '
        f'transform="rotate({-math.degrees(angle):.1f} {x} {y})"/>',
    ]


def picture() -> str:
    """The whole picture, as SVG."""
    title = "Two ways to teleport: a move in the null space of the inputs, and a turn of the basis"
    body = "\n".join([*null_space(), *turned_basis()])
    # The page has a colour of its own, because a site's theme may differ from the one that the browser prefers.
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 385" role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}\n</style>\n"
        f'<rect class="page" width="940" height="385" rx="8"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
