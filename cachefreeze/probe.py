"""The program `python -m cachefreeze.probe`."""

import sys

from cachefreeze.probing.program import main

if __name__ != "__main__":
    # As a module it would hide the function of the same name.
    raise ImportError(
        "cachefreeze.probe is a function (`from cachefreeze import probe`), and a program: "
        "python -m cachefreeze.probe"
    )
sys.exit(main())
