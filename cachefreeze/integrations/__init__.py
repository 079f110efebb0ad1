"""The cache for trainers of other packages; each module here needs the package that it is for."""
