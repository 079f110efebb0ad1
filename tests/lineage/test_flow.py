"""The cut of a graph is the cheapest of all: held against trying every side."""

from itertools import combinations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachefreeze.lineage.flow import side_of_source

NODES = 6
SOURCE, SINK = NODES - 2, NODES - 1
# The first path goes through 0 and 3. The second one, through 1 and 3, has to send it back to 0.
REROUTED = [
    (SOURCE, 1, 1), (SOURCE, 0, 1), (1, 3, 1), (0, 2, 1), (0, 3, 1), (3, SINK, 1), (2, SINK, 1),
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@example(REROUTED)
@given(
    st.lists(
        st.tuples(st.integers(0, SINK), st.integers(0, SINK), st.integers(0, 9)),
        min_size=4, max_size=14,
    )
)  # fmt: skip
def test_no_side_of_the_source_is_cheaper_and_of_the_cheapest_it_has_the_fewest_nodes(edges):
    def price(side):
        return sum(c for start, end, c in edges if start in side and end not in side)

    sides = [
        {SOURCE, *some} for size in range(NODES - 1) for some in combinations(range(SOURCE), size)
    ]
    best = min(map(price, sides))
    fewest = min((side for side in sides if price(side) == best), key=len)
    assert side_of_source(edges, SOURCE, SINK) == fewest


def test_a_chain_of_many_operations_needs_no_recursion():
    edges = [(one, one + 1, 2) for one in range(5000)]
    assert side_of_source([*edges, (2500, 2501, 0)], 0, 5000) == {0}
