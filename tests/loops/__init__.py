"""Training loops as people write them, and the harness that holds a cache against them."""
