"""Draw bench/sweeps.json: docs/images/sweeps.svg, which README shows.

python bench/picture.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "images" / "sweeps.svg"
SWEEPS = {
    "full": "residual\nno shared prefix",
    "prefix": "residual\nshared prefix",
    "heads": "heads\nno shared prefix",
    "heads_prefix": "heads\nshared prefix",
}
COLOURS = {
    "planner": "#1b6ca8",
    "naive": "#8a8f98",
    "nnsight": "#d08c2f",
    "TransformerLens": "#b3464f",
}
NAMES = {
    "planner": "stratoscope",
    "naive": "naive loop, plain hooks",
    "nnsight": "nnsight 0.8",
    "TransformerLens": "TransformerLens 4.3",
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "stratoscope",
}


def seconds(axes: plt.Axes, sweeps: dict) -> None:
    """Seconds for a whole sweep by each tool, on a logarithmic axis, with the ratio above each
    bar."""
    width = 0.2
    for number, arm in enumerate(COLOURS):
        for place, name in enumerate(SWEEPS):
            spent = statistics.median(sweeps[name]["seconds"][arm])
            at = place + (number - 1.5) * width
            axes.bar(
                at, spent, width * 0.92, color=COLOURS[arm], label=NAMES[arm] if not place else None
            )
            told = f"{spent:.1f} s" if arm == "planner" else f"{sweeps[name]['ratio'][arm]:.0f}x"
            axes.annotate(told, (at, spent), ha="center", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(SWEEPS)), list(SWEEPS.values()))
    axes.set_ylabel("seconds for the whole sweep")
    axes.set_title("SmolLM2-135M, 18 tokens, every layer, 2 CPU cores", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    axes.set_ylim(top=axes.get_ylim()[1] * 5)


def growth(axes: plt.Axes, rows: list[dict], along: str, keep: dict[str, int], label: str) -> None:
    """Milliseconds a result, naive and planner, against length or depth."""
    rows = sorted(
        (r for r in rows if all(r[k] == v for k, v in keep.items())), key=lambda r: r[along]
    )
    for arm in ("naive", "planner"):
        points = [(r[along], r["ms_a_result"][arm]) for r in rows]
        axes.plot(*zip(*points), "o-", color=COLOURS[arm], label=NAMES[arm])
        for x, y in points:
            axes.annotate(
                f"{y:.1f}" if y < 10 else f"{y:.0f}",
                (x, y),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                fontsize=8,
            )
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xticks([r[along] for r in rows], [str(r[along]) for r in rows])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.margins(y=0.25)


def main() -> None:
    record = json.loads((HERE / "sweeps.json").read_text())
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(10.5, 3.9), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(2.2, 1, 1))
        seconds(left, record["sweeps"])
        growth(
            middle, record["growth"], "tokens", {"pairs": 1, "layers": 30}, "tokens in the prompt"
        )
        middle.set_ylabel("milliseconds a patched result")
        growth(right, record["growth"], "layers", {"pairs": 1, "tokens": 18}, "layers of the model")
        OUT.parent.mkdir(exist_ok=True)
        figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
