"""Sentences for the user about what limits a cache."""

from cachefreeze.files import human_bytes

# What helps against rows that are padded to another length each time.
PAD_ALIKE = "a fixed length or pad_to_multiple_of=64"


def in_memory_only(name: str, value: str) -> str:
    """Says that rows of a value are not written to the directory.

    Args:
        name: Name of the module.
        value: Name of the value.
    """
    return (
        f"Rows of {value} in {name} are kept in memory only: code that is not torch's made them in "
        "one operation, and might be edited without being noticed."
    )


def left_out(name: str, share: float, limit: str) -> str:
    """Says how much of a forward pass is left out, and what limits it.

    Args:
        name: Name of the module.
        share: Share of the forward pass, from 0 to 1.
        limit: Sentence that says what limits it.
    """
    return f"The cache leaves out {share:.0%} of the forward pass of {name}. {limit}"


def pauses(name: str) -> str:
    """Says that some calls are left alone for the sake of time.

    Args:
        name: Name of the module.
    """
    return (
        f"Calls of {name} are short, so that following all of them takes more than 1 % of the "
        "time: some are left alone until rows come again."
    )


def no_row_again(name: str, rows: int) -> str:
    """Says that nothing was served yet.

    Args:
        name: Name of the module.
        rows: Number of rows that have come.
    """
    return (
        f"No row of {name} has come again among the first {rows:,}: nothing was served. "
        "Augmentation, mixup or noise in front of frozen work make every row another one."
    )


def too_many_rows(rows: int, limit: int) -> tuple[str, str]:
    """Says that memory is full before a row has come again.

    Args:
        rows: Number of rows that have come.
        limit: Largest number of bytes that are kept.

    Returns:
        Reason, to follow a colon, and a further sentence.
    """
    return (
        f"no row came again among the first {rows:,}, which fill max_bytes ({limit / 1e9:.2g} GB)",
        "If it is the data set that is larger, a larger max_bytes helps.",
    )


def useless_rows(share: str, nbytes: int) -> str:
    """Says that a directory fills with rows that do not come again. It follows a colon.

    Args:
        share: Share of the rows that had come before, in words.
        nbytes: Bytes of the rows that were written.
    """
    return f"{share}, and those that are kept fill {human_bytes(nbytes)} of the directory"


def hardly_known(known: int, batches: int, share: str) -> str:
    """Says that few batches have only known rows. It follows a colon.

    Args:
        known: Number of batches all of whose rows were known.
        batches: Number of batches since rows have come again.
        share: Share of the rows that had come before, in words.
    """
    return (
        f"{known} of {batches} batches had only rows that came before, so that hardly any could be "
        f"served ({share})"
    )


def why_hardly_known(mixes: str) -> str:
    """Says why few batches have only known rows.

    Args:
        mixes: Operation that looks across the rows of a batch. Empty if none does.
    """
    if mixes:
        return (
            f"{mixes} looks across the rows of a batch: its results are kept for whole batches, "
            "and those come with other rows in each epoch."
        )
    return (
        "Augmentation or noise in front of frozen work makes every row another one, and so does "
        f"padding to other lengths: there, {PAD_ALIKE} helps."
    )


def lost(left: str) -> str:
    """Says that passes go other ways than the traced one. It follows a colon.

    Args:
        left: Event at which the last pass left the way of the traced one.
    """
    return f"3 passes in a row went another way than the first ({left})"


def as_slow(served: float, plain: float) -> str:
    """Says that serving saves no time. It follows a colon.

    Args:
        served: Seconds of a served call.
        plain: Seconds of a plain call.
    """
    return (
        f"serving its frozen work takes {1e3 * served:.1f} ms, as long as doing it "
        f"({1e3 * plain:.1f} ms in all)"
    )
