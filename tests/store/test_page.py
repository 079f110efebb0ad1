"""What docs/store-format.md shows happens."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cachefreeze.cache.codec import decode, encode
from cachefreeze.store import Row
from cachefreeze.store.journal import LINE_BYTES

from .harness import ABOUT, keys_of, rows_of, segments, write

PAGE = (Path(__file__).parents[2] / "docs" / "store-format.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_of_the_page_reads_rounded_rows() -> None:
    rows = torch.randn(5, 300)
    names: dict[str, Any] = {"rows": encode(rows).numpy(), "numel": 300}
    exec(EXAMPLES[0], names)
    decoded = decode(encode(rows), 300, torch.float32)
    assert np.array_equal(names["values"], decoded)


def test_the_example_of_the_page_reads_a_segment(path: Path) -> None:
    _, example = EXAMPLES
    row = Row((2, 3), "bfloat16")
    numbers = np.arange(19)
    write(path, numbers, row=row)
    (folder,) = segments(path)
    names: dict[str, Any] = {"folder": folder}
    exec(example, names)
    assert (names["rows"].reshape(19, -1).view(np.uint8) == rows_of(numbers, row)).all()
    assert (names["keys"] == keys_of(numbers)).all()
    assert names["about"] == ABOUT
    assert torch.from_numpy(names["rows"]).view(torch.bfloat16).shape == (19, 2, 3)


def test_the_files_of_the_page_are_those_that_are_written(path: Path) -> None:
    write(path, np.arange(3), row=Row((2, 3), "float32"))
    written = {file.name for file in path.rglob("*") if file.is_file()}
    (tree,) = re.findall(r"## Files\n\n```\n(.*?)```", PAGE, re.DOTALL)
    named = set(re.findall(r"^ *([A-Za-z][\w.]*)(?: |$)", tree, re.MULTILINE))
    assert written == named - {"refused"}


def test_a_line_of_the_journal_is_as_long_as_the_one_of_the_page() -> None:
    (line,) = re.findall(r"^\d{8} .*\n", PAGE, re.MULTILINE)
    assert len(line) == LINE_BYTES
