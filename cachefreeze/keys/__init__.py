"""Computes the two keys by which a kept value is found.

The first key stands for how the value is made: the operations that lead to it, their constants, the
bits of the parameters and buffers that they read, and the environment. The second key stands for
the content of a row: the bytes of those inputs that the value depends on, and no others.
"""

from cachefreeze.keys.bits import in_order_of_memory, same_bits
from cachefreeze.keys.environment import environment, machine
from cachefreeze.keys.external_state import ExternalState
from cachefreeze.keys.fingerprint import Fingerprint
from cachefreeze.keys.inputs import SMALL, batch_key, device_hashes, row_keys, rows_hashed
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
    "device_hashes",
    "environment",
    "in_order_of_memory",
    "lineage_of",
    "machine",
    "row_keys",
    "rows_hashed",
    "same_bits",
]
