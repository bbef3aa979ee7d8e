"""The look of a run in figures: one colour a method, whichever runs are shown; line style and marker tell the
runs of one method apart.
"""

import textwrap
import zlib

# arm -> colour and first marker. The arms of the study have Okabe & Ito's colours, told apart by the
# colour-blind; relatives lie near each other, and markers tell all apart in print
METHODS = {
    "vanilla": ("#000000", "o"),
    "vanilla_selected": ("#8C6D31", "d"),
    "frozen_decoder": ("#7F7F7F", "X"),
    "soft_frozen_decoder": ("#A9A9A9", "P"),
    "frozen_encoder": ("#4D4D4D", "x"),
    "fixed": ("#E69F00", "s"),
    "grouped": ("#56B4E9", "D"),
    "ortsae": ("#009E73", "v"),
    "adaptive": ("#D55E00", "^"),
    "adaptive_directions": ("#F4A582", "<"),
    "adaptive_firing": ("#7F2704", ">"),
    "adaptive_both": ("#B2182B", "H"),
    "gsae": ("#CC79A7", "p"),
    "routed": ("#0072B2", "h"),
    "jumprelu": ("#17BECF", "H"),
    "matryoshka": ("#637939", "8"),
    "difference_of_means": ("#999933", "*"),
    "leace": ("#44AA99", "p"),
    "linear_gate": ("#B39DDB", "h"),
    "mlp_gate": ("#6A3D9A", "P"),
    "context_gate": ("#3F007D", "s"),
    "feature_gate": ("#DD1C77", "D"),
    "token_list": ("#A65628", "<"),
    "mean_guard": ("#F781BF", ">"),
    "bayes_guard": ("#882255", "8"),
    "rmu": ("#332288", "X"),
    "npo": ("#117733", "d"),
    "oracle": ("#E31A1C", "*"),
}
OTHERS = ("#80B1D3", "#B3DE69", "#BC80BD", "#FDB462", "#1B6CA8", "#66C2A5", "#B15928", "#5E4FA2")
MARKERS = "osD^vP*X<>pdh"
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def look(arm: str, variant: int) -> dict:
    """Colour, line style and marker of the variant-th run of an arm, from 0. An arm of the user's own has a
    colour that follows from its name."""
    number = zlib.crc32(arm.encode())
    own = (OTHERS[number % len(OTHERS)], MARKERS[number % len(MARKERS)])
    colour, first = METHODS.get(arm, own)
    markers = first + MARKERS.replace(first, "")
    return {
        "color": colour,
        "linestyle": STYLES[variant % len(STYLES)],
        "marker": markers[variant % len(markers)],
        "markersize": 5,
    }


def in_lines(label: str, width: int = 36, most: int = 3) -> str:
    """A label in so many lines at most; of a longer one the middle is left out."""
    room = width * most
    if len(label) > room:
        label = f"{label[: room // 2]}…{label[1 - room // 2 :]}"
    lines = textwrap.wrap(label, width)
    pieces = [label[i : i + width] for i in range(0, len(label), width)]
    return "\n".join(lines if len(lines) <= most else pieces)


def literal(text: str) -> str:
    """As matplotlib takes a text literally: no mathematics, and no label that it hides."""
    return text.replace("$", r"\$").lstrip("_")
