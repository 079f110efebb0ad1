"""Sentences for the user about what limits a cache.

Each docstring says when its sentence is told. A function that is named `..._reason` returns the end
of a sentence: "... is not cached: {reason}".
"""

from collections.abc import Iterable

from cachefreeze.store.files import human_bytes

_PAD = "a fixed length or pad_to_multiple_of=64"
_PAD_HELPS = "A fixed length or pad_to_multiple_of=64 makes rows come again."


def unaligned(name: str, nbytes: int) -> str:
    """Some inputs begin at an address that is not a multiple of `nbytes`."""
    return (
        f"{name} is not cached for inputs whose address in memory is not a multiple of {nbytes} "
        "bytes, such as some slices of a tensor: their results may differ in the last bits. A "
        "copy, `x.clone()`, is cached."
    )


def many_signatures(name: str, most: int) -> str:
    """There are more combinations of shapes and modes than are traced."""
    return (
        f"{name} was called with more than {most} combinations of shapes and modes. For further "
        f"ones, only frozen modules inside it are cached. If batches are padded, use {_PAD}."
    )


def many_shapes(name: str, many: int) -> str:
    """There are so many combinations of shapes that padding may be the cause."""
    return (
        f"{name} was called with more than {many} combinations of shapes. A row that is padded to "
        f"another length is a new row for the cache. {_PAD_HELPS}"
    )


def changes(name: str, what: str) -> str:
    """Something changes so often that no trace is valid for long."""
    return (
        f"Calls of {name} are not cached while something in it changes from call to call: "
        f"{what or 'the path through it'}. They are cached once it stays the same."
    )


def other_arguments(name: str) -> str:
    """The strings or numbers among the arguments are others in each call."""
    return (
        f"Calls of {name} are not cached while strings or numbers among their arguments differ "
        "from call to call, such as names of files: give the model only those that it uses."
    )


def sharded(name: str) -> str:
    """Frozen parameters of the module lie in pieces on several processes."""
    return (
        f"{name} is not cached: its frozen parameters are sharded over processes, and a process "
        "that skipped frozen work would let the others wait for it. Shard what trains only, or use "
        "DistributedDataParallel."
    )


def compiled(name: str, functions: Iterable[str]) -> str:
    """The module calls compiled functions."""
    return (
        f"{name} is not cached: it calls a function under torch.compile ({', '.join(functions)}), "
        "which would run uncompiled while a call is traced. Compile a module instead."
    )


def other_lengths(name: str) -> str:
    """Rows are padded to another length in each batch, and only equal bits may be served."""
    return (
        f"{name} is not cached: its rows are padded to another length in every batch, and so have "
        f"other bits each time. {_PAD_HELPS} exact=False may serve rows of any length."
    )


def padding_differs(name: str, value: str, far: float, size: float) -> str:
    """Padding changes a value by more than rounding."""
    return (
        f"{name} is not cached: rows of {value} change by {far:.1e} with the length that they are "
        f"padded to. Their largest number is {size:.1e}, so this is more than rounding. "
        f"{_PAD_HELPS}"
    )


def rounding_served(value: str, far: float, size: float) -> str:
    """Kept rows differ by rounding, and the user allows it."""
    return (
        f"Kept rows of {value} differ from computed ones by up to {far:.1e}. Their largest number "
        f"is {size:.1e}. They are served, because exact=False allows it."
    )


def differs_reason(value: str, far: float, size: float, rows: str) -> str:
    """Kept rows differ, and may not be served."""
    return (
        f"kept rows of {value} differ from computed ones by {far:.1e}, in {rows}. Their largest "
        f"number is {size:.1e}"
    )


def why_rows_differ(close: bool) -> str:
    """Explains `differs_reason`. If `close`, the difference is one of rounding."""
    if close:
        return "exact=False would serve them."
    return (
        "Rows depend on the other rows of their batch, or on something that the cache cannot see."
    )


def changed_late(name: str, tensor: str) -> str:
    """A frozen tensor was changed some time ago, and only a hash of all bits has found it."""
    return (
        f"{tensor} of {name} was changed in a few places in a way that leaves no trace, such as "
        ".data or numpy. A hash of all its bits has found this. Rows that were served just before "
        "may belong to the old weights. Writes by torch's operations are seen at once, and "
        'verify="all" compares every batch.'
    )


def in_memory_only(name: str, value: str) -> str:
    """Rows of a value are not written to the directory."""
    return (
        f"Rows of {value} in {name} are kept in memory only. Code from outside torch makes them in "
        "one operation, and a later run could not tell whether that code was edited."
    )


def skipped(name: str, share: float, limit: str) -> str:
    """The cache could skip much more. `limit` is a sentence about the cause."""
    return f"The cache skips {share:.0%} of the forward pass of {name}. {limit}"


def short_calls(name: str) -> str:
    """Some calls run without the cache to save time."""
    return (
        f"Calls of {name} are short, so following all of them would take more than 1 % of the "
        "time. Some run without the cache until rows come again."
    )


def no_row_again(name: str, rows: int) -> str:
    """So many rows have come, and none of them twice."""
    return (
        f"No row of {name} has come again among the first {rows:,}, so nothing was served. "
        "Augmentation, mixup or noise in front of frozen work changes every row."
    )


def full_reason(rows: int, limit: int) -> str:
    """Memory is full before a row has come again."""
    return (
        f"no row came again among the first {rows:,}, which fill max_bytes ({limit / 1e9:.2g} GB)"
    )


def useless_rows_reason(share: str, nbytes: int) -> str:
    """A directory fills with rows that do not come again."""
    return f"{share}, and the kept rows fill {human_bytes(nbytes)} of the directory"


def hardly_known_reason(known: int, batches: int, share: str) -> str:
    """Few batches have only known rows."""
    return (
        f"only {known} of {batches} batches had nothing but known rows, so hardly any could be "
        f"served ({share})"
    )


def why_hardly_known(mixes: str) -> str:
    """Explains the two reasons above. `mixes` names an operation across rows, or is empty."""
    if mixes:
        return (
            f"{mixes} looks across the rows of a batch. Its results are kept for whole batches, "
            "and each epoch has other batches."
        )
    return (
        "Augmentation or noise in front of frozen work changes every row. So does padding to "
        f"another length: use {_PAD}."
    )


def other_path_reason(passes: int, left: str) -> str:
    """So many passes in a row left the path of the traced one. `left` says where."""
    return f"{passes} passes in a row took another path than the traced one ({left})"


def slow_reason(served: float, plain: float) -> str:
    """Serving a call takes as many seconds as running it without the cache."""
    return (
        f"a served call takes {1e3 * served:.1f} ms, as long as one without the cache "
        f"({1e3 * plain:.1f} ms)"
    )
