"""Data sets: their images, splits and order of rows, and the network input made of pixels."""

from cachefreeze.data.images import ArrayImages, FolderImages, Images
from cachefreeze.data.inputs import InputRows, labels_of
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
    "labels_of",
    "load",
    "outline",
]
