"""How each regulariser looks, the same in every chart: colour, dashes and mark together, so that colour alone never tells."""

from __future__ import annotations

from dataclasses import dataclass

from mgs_core.report.runs import group

BACKGROUND = ("#ffffff", "#14171c")
PLAIN = ("#111418", "#f3f5f8")
STRONG = (  # Okabe and Ito's hues, each dark enough on white and light enough on black to be read as text
    ("#0069b4", "#5cb8ff"),
    ("#b84500", "#ff9150"),
    ("#00795a", "#2fd0a0"),
    ("#a3357f", "#f191cd"),
    ("#7a5c00", "#e6c229"),
    ("#5b45c4", "#b3a4ff"),
    ("#b3202c", "#ff8a8f"),
    ("#006f80", "#3fcfe4"),
)
MUTED = (
    ("#596b82", "#93a7c2"),
    ("#7b684b", "#bba784"),
    ("#4f735f", "#8db8a0"),
    ("#7d5f80", "#c09fc3"),
    ("#8a5c52", "#cb9d92"),
    ("#666a70", "#a6abb3"),
)
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "12 4", "5 2 1 2 1 2", "3 5", "14 3 4 3")
MARKS = {  # paths about the origin, and matplotlib's names of the same
    "o": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "s": "M-3.6,-3.6h7.2v7.2h-7.2z",
    "^": "M0,-4.6L4.4,3.4H-4.4z",
    "D": "M0,-5L5,0L0,5L-5,0z",
    "v": "M0,4.6L4.4,-3.4H-4.4z",
    "P": "M-1.6,-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "X": "M-4.4,-2.2L-2.2,-4.4L0,-2.2L2.2,-4.4L4.4,-2.2L2.2,0L4.4,2.2L2.2,4.4L0,2.2L-2.2,4.4L-4.4,2.2L-2.2,0z",
    "p": "M0,-4.8L4.6,-1.5L2.8,3.9H-2.8L-4.6,-1.5z",
}


@dataclass(frozen=True)
class Look:
    """Hold the look of one regulariser.

    Attributes:
        index: its number on the page.
        name: its name.
        group: "plain", "mgs" or "other".
        colours: on the light and on the dark background.
        dash: lengths of strokes and gaps, empty for an unbroken line.
        mark: a key of `MARKS`.
        width: of the line.
    """

    index: int
    name: str
    group: str
    colours: tuple[str, str]
    dash: str
    mark: str
    width: float

    @property
    def mark_path(self) -> str:
        """The mark as an SVG path about the origin."""
        return MARKS[self.mark]


def looks(regularizers: tuple[str, ...]) -> dict[str, Look]:
    """Return a look for each regulariser, no two alike."""
    found: dict[str, Look] = {}
    seen = {"plain": 0, "mgs": 0, "other": 0}
    marks = tuple(MARKS)
    for index, name in enumerate(regularizers):
        kind = group(name)
        at = seen[kind]
        seen[kind] += 1
        palette = {"plain": (PLAIN,), "mgs": STRONG, "other": MUTED}[kind]
        turn = at // len(palette)
        if kind == "plain":
            dash, mark = "", "o"
        elif kind == "mgs":
            dash, mark = DASHES[turn % len(DASHES)], marks[(at + turn) % len(marks)]
        else:
            dash, mark = DASHES[1 + (at + 3 * turn) % (len(DASHES) - 1)], marks[(at + 1 + 2 * turn) % len(marks)]
        width = {"plain": 3.2, "mgs": 2.4, "other": 1.6}[kind]
        found[name] = Look(index, name, kind, palette[at % len(palette)], dash, mark, width)
    return found
