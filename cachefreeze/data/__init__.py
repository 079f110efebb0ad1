"""Data sets: their images, their splits, and the way from pixels to network input."""

from cachefreeze.data.images import ArrayImages, FolderImages, Images
from cachefreeze.data.inputs import InputRows
from cachefreeze.data.sets import DataSet, Outline, load, outline

__all__ = [
    "ArrayImages",
    "DataSet",
    "FolderImages",
    "Images",
    "InputRows",
    "Outline",
    "load",
    "outline",
]
