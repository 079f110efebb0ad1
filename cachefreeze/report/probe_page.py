"""The page of a probing: its heads in a table and a picture."""

import shlex
from collections.abc import Mapping
from typing import Any

from cachefreeze.report import figures
from cachefreeze.report.page import Picture, render


def probe_page(results: Mapping[str, Any], python: str, score: str) -> bytes:
    """Returns a page in one file.

    Args:
        results: Contents of heads.json.
        python: Name of the interpreter, as it is typed.
        score: Name of the score.

    Raises:
        UserError: The package matplotlib is not installed.
    """
    heads = sorted(results["heads"], key=lambda one: -one["score"])
    curves: dict[str, list[tuple[float, float]]] = {}
    for one in results["heads"]:
        if one["rate"] is not None:
            decay = f", decay {one['decay']:g}" if one["decay"] else ""
            name = f"last {one['blocks']}, {one['pooling']}{decay}"
            curves.setdefault(name, []).append((one["rate"], one["score"]))
    picture = Picture("Heads by learning rate", why="there are no heads with a learning rate")
    if curves:
        tops = "; ".join(
            f"{name} reaches {max(y for _, y in xy):.2%}" for name, xy in curves.items()
        )
        svg = figures.score_by_rate(list(curves.items()), score)
        picture = Picture("Heads by learning rate", svg, f"{score} over learning rates: {tops}.")
    train, val = results["images"]
    return render(
        "probe.html",
        title=f"Heads on {results['network']}",
        command=f"{python} -m cachefreeze.probe {shlex.join(results['command'])}",
        facts=[
            ("network", results["network"]),
            ("images", f"{train:,} for training, {val:,} for validation"),
            ("classes", ", ".join(results["classes"])),
            ("rows", f"{results['rows']:,}, of which {results['rows_served']:,} were kept before"),
            ("time", f"{results['seconds']:.1f} s, of which {results['seconds_of_rows']:.1f} s "
                     "until all rows were there"),
            *(("the cache said", message) for message in results["cache_messages"]),
        ],
        best=heads[0]["score"],
        score=score,
        header=("head", "blocks", "pooling", "setting", score),
        rows=[
            (one["method"], one["blocks"], one["pooling"], one["setting"], f"{one['score']:.2%}")
            for one in heads
        ],
        picture=picture,
    )  # fmt: skip
