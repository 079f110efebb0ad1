"""The cache changes the time, and nothing else: same seed, same weights, bit for bit.

Every pair has freezes in mid-epoch, a last batch that is filled up, dropout in what trains, units
that freeze too late to be cached, and validation after every epoch.
"""

import shutil

import pytest
import torch

from cachefreeze.training.checkpoint import load_checkpoint
from cachefreeze.training.device import has_bf16
from tests.conftest import Run, Train

NETWORKS = {
    "wrn": ("--arch", "wrn10_1", "--dropout", 0.3),
    "densenet": ("--arch", "densenet16_4", "--dropout", 0.2),
    "vgg": ("--arch", "vgg11"),
}
# 30 steps of 5 an epoch; the first units freeze at steps 8 to 10.
SCHEDULE = ("--epochs", 6, "--t0", 0.25, "--schedule", "linear", "--lr", 0.05)


def assert_same_run(cached: Run, plain: Run) -> None:
    assert cached.summary["weights_sha256"] == plain.summary["weights_sha256"]
    for key in ("train_loss", "val_loss", "val_accuracy", "lr", "frozen_units"):
        assert [line[key] for line in cached.metrics] == [line[key] for line in plain.metrics]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", NETWORKS)
def test_a_run_with_the_cache_ends_with_the_weights_of_one_without(
    train: Train, arch: str, precision: str
) -> None:
    if precision == "bf16" and not has_bf16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16 instructions")
    # Long enough for rows to be served after they have been compared.
    options = (*NETWORKS[arch], *SCHEDULE, "--epochs", 10, "--precision", precision)
    cached, plain = train(*options), train(*options, "--no-cache")
    assert_same_run(cached, plain)

    # The comparison means something only if the cache was at work, in the middle of epochs.
    cache = cached.summary["cache"]
    assert len(cache["fills"]) >= 2
    assert any(fill["step"] % 5 for fill in cache["fills"])
    assert cache["rows_served"] > 150
    assert plain.summary["cache"]["fills"] == []
    assert plain.summary["cache"]["rows_served"] == 0


def test_random_state_is_drawn_alike_with_decoding_workers(train: Train) -> None:
    options = ("--arch", "wrn10_1", "--dropout", 0.3, *SCHEDULE, "-j", 1)
    assert_same_run(train(*options), train(*options, "--no-cache"))


def test_parity_holds_for_images_in_memory(train: Train) -> None:
    options = ("--dataset", "digits", "--arch", "wrn10_1", "-b", 256, *SCHEDULE)
    options += ("--precision", "auto")
    cached, plain = train(*options), train(*options, "--no-cache")
    assert len(cached.summary["cache"]["fills"]) >= 2
    assert_same_run(cached, plain)


def test_parity_holds_with_several_threads(train: Train) -> None:
    """Which may sum in another order than one does, but do so each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        options = ("--arch", "wrn10_1", *SCHEDULE)
        cached, plain = train(*options), train(*options, "--no-cache")
        assert cached.summary["cache"]["rows_served"] > 150
        assert_same_run(cached, plain)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*NVIDIA driver.*", "ignore::UserWarning:torch")
def test_parity_holds_for_compiled_units(train: Train) -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    options = ("--arch", "wrn10_1", *SCHEDULE, "--compile")
    cached, plain = train(*options), train(*options, "--no-cache")
    assert cached.summary["cache"]["rows_served"] > 0
    assert_same_run(cached, plain)
    eager = train("--arch", "wrn10_1", *SCHEDULE, "--no-cache")
    assert eager.metrics[0]["train_loss"] == pytest.approx(plain.metrics[0]["train_loss"], rel=1e-2)
    assert eager.summary["weights_sha256"] != plain.summary["weights_sha256"], "it was compiled"


def test_the_seed_matters(train: Train) -> None:
    options = ("--arch", "wrn10_1", "--epochs", 1)
    one, other = train(*options, "--seed", 1), train(*options, "--seed", 2)
    assert one.summary["weights_sha256"] != other.summary["weights_sha256"]


def test_the_weights_in_last_pt_are_those_of_the_summary(train: Train) -> None:
    from cachefreeze.keys.hashing import weights_sha256

    run = train("--arch", "wrn10_1", *SCHEDULE)
    state = load_checkpoint(run.folder / "last.pt")
    assert weights_sha256(state["model"]) == run.summary["weights_sha256"]
    assert state["step"] == run.summary["steps"] == 30


def test_the_hash_of_weights_sees_every_part(train: Train) -> None:
    from cachefreeze.keys.hashing import weights_sha256

    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    reference = weights_sha256(state)
    assert weights_sha256(dict(reversed(state.items()))) == reference
    assert weights_sha256({**state, "a": state["a"].T.contiguous().T}) == reference
    for changed in (
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "b": state["b"].double()},
        {**state, "b": torch.nextafter(state["b"], torch.tensor(2.0))},
        {"a": state["a"], "c": state["b"]},
    ):
        assert weights_sha256(changed) != reference
