"""What an entry of the cache depends on: operations, frozen bits, and the rows of the inputs.

A kept value is found by two keys. One says how it was made: the operations that lead to it, their
constants, the bits of the parameters and buffers that they read, and the environment. The other is
the content of the row: the bytes of just those inputs that the value depends on.
"""

from cachefreeze.keys.bits import same_bits
from cachefreeze.keys.environment import environment, machine
from cachefreeze.keys.external_state import ExternalState
from cachefreeze.keys.fingerprint import Fingerprint
from cachefreeze.keys.inputs import SMALL, batch_key, row_keys, rows_hashed
from cachefreeze.keys.operations import Lineage, lineage_of
from cachefreeze.keys.weights import Look, Weights

__all__ = [
    "SMALL",
    "ExternalState",
    "Fingerprint",
    "Lineage",
    "Look",
    "Weights",
    "batch_key",
    "environment",
    "lineage_of",
    "machine",
    "row_keys",
    "rows_hashed",
    "same_bits",
]
