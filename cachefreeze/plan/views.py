"""Number of views of each image that come again."""

# Views that are an image and its mirror image, each in every other epoch.
FLIPS = "flips"


def count_views(views: int | str | None) -> int:
    """Returns the number of different views of an image.

    Args:
        views: Number of views, or "flips" for an image and its mirror image. None stands for the
            image itself.
    """
    return 2 if views == FLIPS else int(views or 1)
