"""Whether it pays to keep all rows of the data set when units have frozen."""

from cachefreeze.cache.route import LEAST_SHARE

# Uses of each row that a fill must have left: one pays for the forward pass that fills, and the
# rest for writing.
LEAST_USES = 1.2
# Share of an epoch, and number of steps: if the next units freeze within them, their fill does for
# both. Each new cut is compared in two batches and written once more before it is served.
SOON_SHARE, SOON_STEPS = 1 / 8, 8


def worth_filling(
    steps_left: int,
    steps_to_next_freeze: int,
    *,
    rows: int,
    batch_size: int,
    steps_per_epoch: int,
    share: float,
) -> bool:
    """Says whether a pass over the data set pays that keeps what newly frozen units give.

    Args:
        steps_left: Number of steps that are left of the run.
        steps_to_next_freeze: Number of steps before the next units freeze; `steps_left` or more if
            none do.
        rows: Number of training rows.
        batch_size: Number of rows of a batch.
        steps_per_epoch: Number of steps of an epoch.
        share: Share of the forward pass that is frozen.
    """
    soon = steps_to_next_freeze < max(SOON_SHARE * steps_per_epoch, SOON_STEPS)
    soon = soon and steps_to_next_freeze < steps_left
    return share >= LEAST_SHARE and steps_left * batch_size > LEAST_USES * rows and not soon
