"""Lengths of padded rows, such as texts and sounds, as a mask in the batch shows them.

A batch is padded to its longest row, so a row comes with another length in every epoch. What is
kept of it may still be the same, for example a pooled output. So the key of such a row is its
content without the padding.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

Tensor = torch.Tensor


def mask_of(inputs: Mapping[int, Tensor], with_rows: Collection[int]) -> int | None:
    """Finds the mask of a padded batch: an input that has ones and then zeros in every row.

    Args:
        inputs: Inputs of a pass, by number.
        with_rows: Numbers of the inputs that have a part for every row.

    Returns:
        Number of the mask, or None if there is none.
    """
    for number, tensor in inputs.items():
        two = number in with_rows and tensor.dim() == 2 and tensor.shape[1] > 1
        if two and not tensor.is_floating_point() and _is_mask(tensor):
            return number
    return None


def _is_mask(tensor: Tensor) -> bool:
    ones = tensor == 1
    return bool(
        (ones | (tensor == 0)).all() and ones[:, 0].all() and (ones[:, 1:] <= ones[:, :-1]).all()
    )


def own_lengths(
    mask: Tensor, others: Mapping[int, Tensor], padding: dict[int, float]
) -> np.ndarray | None:
    """Returns the length of each row without its padding.

    Args:
        mask: Input that was a mask in the traced batch, of shape (rows, length).
        others: Padded inputs of shape (rows, length, ...), by number.
        padding: Number that each input is padded with, by the input's number. New ones are added.

    Returns:
        Lengths of shape (rows,), or None if anything but padding follows the end of a row.
    """
    if not _is_mask(mask):
        return None
    behind = mask == 0
    for number, tensor in others.items():
        values = tensor[behind]
        if values.numel():
            first = float(values.reshape(-1)[0])
            if padding.setdefault(number, first) != first or not bool((values == first).all()):
                return None
    return mask.sum(1).cpu().numpy()


def differ_in_length(
    shapes: Sequence[torch.Size], others: Sequence[torch.Size], length: int
) -> bool:
    """Returns whether two batches differ only in the length that their rows are padded to.

    Args:
        shapes: Shapes of the inputs of one batch.
        others: Shapes of the inputs of the other batch.
        length: Length that the rows of the first batch are padded to.
    """
    lengths = {
        (one[1], other[1])
        for one, other in zip(shapes, others, strict=False)
        if len(one) > 1 and len(other) > 1 and one[1] != other[1]
    }
    return (
        len(shapes) == len(others)
        and len(lengths) == 1
        and next(iter(lengths))[0] == length
        and all(
            len(one) == len(other) and one[:1] == other[:1] and one[2:] == other[2:]
            for one, other in zip(shapes, others, strict=True)
        )
    )
