"""Checks lineage on many models: `python scripts/model_table.py --page docs/models.md`.

Every model of `scripts/zoo` runs with three shares of its parameters frozen, in eval and in
training mode. The traced pass, the passes that kept values are taken from, and replayed passes are
compared with plain passes that nobody follows: outputs, gradients, parameters and buffers, and
random state, bit for bit. Then skipping is stopped at random calls, and the same must hold.

`python scripts/model_table.py NAME ...` runs the models whose names contain one of the words.
"""

import argparse
import gc
import json
import random
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo import FAMILIES, Entry, enliven, zoo

from cachefreeze import lineage
from cachefreeze.errors import UserError
from cachefreeze.lineage.structure import tensors
from cachefreeze.report.summary_text import markdown_table

SHARES = (0.3, 0.7, 1.0)
ROWS = 4
# Below this share of the pass's time, a cut is not worth its bytes.
NOTHING = 0.01
INTRODUCTION = """\
# Models that were tried

`python scripts/model_table.py --page docs/models.md` wrote this page. It shows on which
models frozen work was found and left out (`cachefreeze.lineage`). Each model is a small one of its
class, with random weights. It runs with 30 %, 70 % and all but the last parameters frozen, in eval
and in training mode, on two batches. With LoRA and similar methods, the library chooses what is
frozen.

[How frozen work is found](lineage.md) explains traced and replayed passes. In the tables:

- *exact*: the traced pass, the pass whose values were kept, the replayed pass, and up to
  {divergences} replayed passes in which skipping stops at a random call have the bits of the plain
  pass: outputs, gradients, parameters, buffers and random state;
- *nothing to skip*: the passes are exact, and frozen work is less than 1 % of the time of the
  kernels; the notes give the reason;
- *a / b*: the result in eval mode and the result in training mode, if they differ;
- *saved*: the share of the kernels' time that a replayed pass leaves out, with 70 % frozen, in eval
  mode;
- *kB a row*: the size of what is kept for one row (sample), with 70 % frozen, in eval mode.

Times of models this small say little about large models.
"""


@dataclass
class Result:
    """Result of one model, share and mode.

    Args:
        model: Name of the model.
        family: Library that the model is from.
        share: Share of the parameters that is frozen.
        training: Whether the model is in training mode.
        verdict: One of "exact", "nothing to skip", "wrong" and "error".
        reason: Reason for the verdict, if it is not "exact".
        saved: Share of the kernels' time that a replayed pass leaves out.
        row_bytes: Bytes that are kept a row.
        operations: Number of operations of the pass.
        divergences: Number of replayed passes in which skipping stopped at a random call.
        seconds: Time that the checks took.
    """

    model: str
    family: str
    share: float
    training: bool
    verdict: str = "error"
    reason: str = ""
    saved: float = 0.0
    row_bytes: int = 0
    operations: int = 0
    divergences: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """Outputs, gradients and state that a pass leaves behind."""

    outputs: list[torch.Tensor] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    random: torch.Tensor = field(default_factory=torch.Tensor)

    def difference(self, other: "Outcome") -> str:
        """Names what differs between two passes, or returns an empty string."""
        if len(self.outputs) != len(other.outputs):
            return "the number of outputs"
        if not all(map(_equal, self.outputs, other.outputs)):
            return "outputs"
        if self.gradients.keys() != other.gradients.keys():
            return "which parameters have gradients"
        if not all(_equal(self.gradients[key], other.gradients[key]) for key in self.gradients):
            return "gradients"
        if not all(_equal(self.state[key], other.state[key]) for key in self.state):
            return "parameters or buffers"
        return "" if torch.equal(self.random, other.random) else "random state"


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.stride() != other.stride():
        return False
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    # Also "not a number" equals itself here.
    return bool(((one == other) | ((one != one) & (other != other))).all())


class Bench:
    """One model, its parameters frozen by a share, that starts every pass from the same state."""

    def __init__(self, entry: Entry, share: float, training: bool) -> None:
        torch.manual_seed(0)
        random.seed(0)
        self.entry, self.training = entry, training
        self.model = entry.build()
        enliven(self.model, entry.inputs(ROWS, 7))
        frozen = entry.frozen(self.model, share)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in frozen and parameter.is_floating_point())
        self.model.train(training)
        self.start = {key: tensor.detach().clone() for key, tensor in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def batch(self, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = self.entry.inputs
        if not self.training and self.entry.eval_inputs is not None:
            inputs = self.entry.eval_inputs
        return inputs(ROWS, seed)

    def run(self, seed: int, call: Callable[..., Any]) -> tuple[Outcome, Any]:
        """Runs a pass and its backward pass from the start.

        Args:
            seed: Seed of the batch.
            call: Function called with the model and the arguments, that returns the output first.
        """
        args, kwargs = self.batch(seed)
        # Some models keep a tensor from pass to pass until their mode is switched.
        self.model.train(not self.training).train(self.training)
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for key, tensor in self._tensors():
                tensor.copy_(self.start[key])
        torch.manual_seed(1)
        random.seed(1)
        output, *rest = call(self.model, *args, **kwargs)
        outcome = Outcome(outputs=list(tensors(output)))
        loss = [
            (tensor.float() * torch.linspace(0.5, 1.5, tensor.numel()).view(tensor.shape)).sum()
            for tensor in outcome.outputs
            if tensor.requires_grad and tensor.is_floating_point()
        ]
        if loss:
            torch.stack(loss).sum().backward()
        outcome.outputs = [tensor.detach().clone() for tensor in outcome.outputs]
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                outcome.gradients[name] = parameter.grad.clone()
        outcome.state = {key: tensor.detach().clone() for key, tensor in self._tensors()}
        outcome.random = torch.get_rng_state()
        return outcome, rest


def _plain(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any]:
    return (model(*args, **kwargs),)


def judge(entry: Entry, share: float, training: bool, divergences: int) -> Result:
    """Runs all checks on one model, share and mode."""
    result = Result(entry.name, entry.family, share, training)
    began = time.perf_counter()
    try:
        _judge(Bench(entry, share, training), result, divergences)
    except UserError as error:
        result.verdict, result.reason = "nothing to skip", str(error)
    except Exception as error:  # a row of the table, and not the end of it
        result.reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        result.reason += f" ({traceback.extract_tb(error.__traceback__)[-1].name})"
    result.seconds = time.perf_counter() - began
    return result


def _judge(bench: Bench, result: Result, divergences: int) -> None:
    plain = [bench.run(seed, _plain)[0] for seed in (0, 1)]
    again, _ = bench.run(1, _plain)
    if plain[1].difference(again):
        result.reason = f"the plain pass does not repeat: {plain[1].difference(again)}"
        return
    outcome, (trace,) = bench.run(0, lineage.trace)
    result.operations = len(trace.operations)
    checks = [("traced", outcome, plain[0])]
    limits = []
    for cut in (lineage.crossing_cut(trace), lineage.minimum_cut(trace, reading_rate=1e9)):
        plan = lineage.Plan(trace, cut)
        for seed in (0, 1):
            outcome, (kept, report) = bench.run(
                seed, lambda *args, plan=plan, **kwargs: lineage.capture(plan, *args, **kwargs)
            )
            checks.append(("captured", outcome, plain[seed]))
            if kept is None:
                limits.append(f"the second batch goes another way ({report.left})")
                continue
            outcome, report = _replay(bench, seed, plan, kept)
            checks.append(("replayed", outcome, plain[seed]))
            if report.left:
                limits.append(f"a replayed pass goes another way ({report.left})")
            dice = random.Random(f"{bench.entry.name} {result.share} {bench.training} {seed}")
            for _ in range((divergences + 1) // 2 if seed else 0):
                at = dice.randrange(len(plan.replayed))
                outcome, _ = _replay(bench, seed, plan, kept, at)
                checks.append((f"left at event {at}", outcome, plain[seed]))
                result.divergences += 1
    cut = lineage.crossing_cut(trace)
    result.saved = cut.seconds_saved / max(trace.kernel_seconds, 1e-12)
    result.row_bytes = cut.nbytes // ROWS
    wrong = [f"{what}: {one.difference(other)}" for what, one, other in checks
             if one.difference(other)]  # fmt: skip
    if wrong:
        result.verdict, result.reason = "wrong", wrong[0]
    elif limits or result.saved < NOTHING:
        result.verdict = "nothing to skip"
        result.reason = limits[0] if limits else _why(trace)
    else:
        result.verdict = "exact"


def _replay(
    bench: Bench, seed: int, plan: Any, kept: dict[int, torch.Tensor], at: int | None = None
) -> tuple[Outcome, lineage.Report]:
    own = {number: tensor.clone() for number, tensor in kept.items()}
    outcome, (report,) = bench.run(
        seed, lambda *args, **kwargs: lineage.replay(plan, own, *args, leave_at=at, **kwargs)
    )
    return outcome, report


def _why(trace: lineage.Trace) -> str:
    reasons = [one.reason for one in trace.operations if one.kind == "live" and one.reason]
    return reasons[0] if reasons else "what is frozen takes next to no time"


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold lineage against many models.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="Words that names contain.")
    parser.add_argument("--family", choices=list(FAMILIES), help="Library to take models from.")
    parser.add_argument("--divergences", type=int, default=5, metavar="N",
                        help="Number of random calls at which skipping stops, for each model, "
                        "share and mode. Default: 5, which makes 36 a model.")  # fmt: skip
    parser.add_argument("--part", default="1/1", metavar="K/N",
                        help="Part of the models to run, for several processes.")  # fmt: skip
    parser.add_argument("--results", type=Path, nargs="+", metavar="FILE",
                        help="Files of results to write the page from.")  # fmt: skip
    parser.add_argument("--earlier", type=Path, metavar="FILE",
                        help="Page of an earlier run, for models without results.")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="File to write results to.")
    parser.add_argument("--page", type=Path, metavar="FILE", help="Page to write, in Markdown.")
    options = parser.parse_args()
    if options.results:
        results = [Result(**one) for file in options.results for one in _lines(file)]
    else:
        results = list(_run(options))
    if options.page:
        before = options.earlier.read_text() if options.earlier else ""
        options.page.write_text("\n".join(page(results, before)) + "\n")
    counts = {verdict: sum(one.verdict == verdict for one in results) for verdict in VERDICTS}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["wrong"] or counts["error"] else 0


VERDICTS = ("exact", "nothing to skip", "wrong", "error")


def _run(options: argparse.Namespace) -> Iterator[Result]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    part, parts = map(int, options.part.split("/"))
    entries = zoo([options.family] if options.family else None)
    entries = [e for e in entries if not options.names or any(n in e.name for n in options.names)]
    for entry in entries[part - 1 :: parts]:
        for share in SHARES:
            for training in (False, True):
                result = judge(entry, share, training, options.divergences)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(asdict(result)) + "\n")
                mode = "train" if training else "eval"
                print(f"{entry.name:45} {share:3.0%} {mode:5} {result.verdict:15} "
                      f"{result.saved:4.0%} {result.reason}", flush=True)  # fmt: skip
                yield result
        gc.collect()  # models hold themselves


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def page(results: Sequence[Result], earlier: str = "") -> Iterator[str]:
    """Yields the lines of the page in Markdown.

    Args:
        results: Results of this run.
        earlier: Page of an earlier run. Its rows stand for models without results.
    """
    most = max((one.divergences for one in results), default=0)
    yield INTRODUCTION.format(divergences=most)
    versions = [torch.__version__.split("+")[0], *_versions()]
    yield f"torch {', '.join(versions)}; one thread on a CPU.\n"
    new = {one.model for one in results}
    old = [row for row in _rows_of_page(earlier) if row[1] not in new]
    families = list(dict.fromkeys([*(one.family for one in results), *(row[0] for row in old)]))
    rows = [["", *VERDICTS]]
    for family in [*families, "all"]:
        of = [one for one in results if family in (one.family, "all")]
        from_page = [row for row in old if family in (row[0], "all")]
        verdicts = [one.verdict for one in of] + [v for row in from_page for v in _verdicts(row)]
        count = len({one.model for one in of}) + len(from_page)
        counts = [verdicts.count(verdict) for verdict in VERDICTS]
        rows.append([f"{family} ({count} models)", *map(str, counts)])
    yield from markdown_table(rows)
    forced = sum(one.divergences for one in results)
    total = len(results) + len(SHARES) * 2 * len(old)
    yield f"\n{total} cases. In {forced:,} passes of this run, skipping stopped at a random call."
    if old:
        yield (
            f"\nThe {len(old)} models marked {EARLIER} did not run again: their rows come from an "
            f"earlier run of the same script, on an earlier state of the code.{_forced(earlier)}"
        )
    missing = [one.name for one in zoo() if one.name not in new | {row[1] for row in old}]
    if missing:
        yield f"\n{len(missing)} models of `scripts/zoo` are in no table yet: {', '.join(missing)}."
    for family in families:
        yield from ("", f"## {family}", "")
        made = [*_rows([one for one in results if one.family == family])]
        made += [[f"{row[1]} {EARLIER}", *row[2:]] for row in old if row[0] == family]
        yield from markdown_table([HEADER, *sorted(made, key=lambda row: row[0].lower())])


EARLIER = "†"


def _rows_of_page(text: str) -> Iterator[list[str]]:
    """Yields the rows of a page that this script wrote, each behind its family."""
    family = ""
    for line in text.splitlines():
        if line.startswith("## "):
            family = line[3:]
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if family and len(cells) == len(HEADER) and cells[0] != HEADER[0] and cells[0].strip("-"):
            yield [family, cells[0].removesuffix(EARLIER).strip(), *cells[1:]]


def _verdicts(row: Sequence[str]) -> list[str]:
    """Returns the verdicts of a row of a page, of each share in eval and in training mode."""
    cells = [cell.split(" / ") for cell in row[5 : 5 + len(SHARES)]]
    return [verdict for cell in cells for verdict in (cell if len(cell) == 2 else cell * 2)]


def _forced(earlier: str) -> str:
    found = re.search(r"([\d,]+) passes in which skipping stopped", earlier)
    models = re.search(r"all \((\d+) models\)", earlier)
    if not found or not models:
        return ""
    return f" That run made {found[1]} passes in which skipping stopped, on {models[1]} models."


HEADER = ["model", "operations", "saved", "kB a row", "30 %", "70 %", "head only", "notes"]


def _rows(results: Sequence[Result]) -> Iterator[list[str]]:
    for model in dict.fromkeys(one.model for one in results):
        of = {(one.share, one.training): one for one in results if one.model == model}
        middle = of[SHARES[1], False]
        cells = [" / ".join(of[share, mode].verdict for mode in (False, True)) for share in SHARES]
        cells = [cell if cell != "exact / exact" else "exact" for cell in cells]
        notes = dict.fromkeys(one.reason for one in of.values() if one.reason)
        yield [
            model, str(middle.operations), f"{middle.saved:.0%}",
            f"{middle.row_bytes / 1000:,.1f}", *cells, "; ".join(notes).replace("|", "\\|"),
        ]  # fmt: skip


def _versions() -> Iterator[str]:
    command = [sys.executable, "-m", "pip", "list", "--format=json"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    known = {family.replace("_", "-") for family in FAMILIES} | {"open-clip-torch"}
    for package in listed:
        if package["name"].replace("_", "-") in known:
            yield f"{package['name']} {package['version']}"


if __name__ == "__main__":
    sys.exit(main())
