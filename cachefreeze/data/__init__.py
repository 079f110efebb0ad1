"""Data sets: their images, their splits, their order, and the way from pixels to network input."""

from cachefreeze.data.images import ArrayImages, FolderImages, Images
from cachefreeze.data.inputs import InputRows
from cachefreeze.data.order import Indices, epoch_order, full_batches
from cachefreeze.data.sets import DataSet, Outline, load, outline

__all__ = [
    "ArrayImages",
    "DataSet",
    "FolderImages",
    "Images",
    "Indices",
    "InputRows",
    "Outline",
    "epoch_order",
    "full_batches",
    "load",
    "outline",
]
