"""The harness finds what is wrong with caches of straw, and nothing wrong with a careful one."""

import inspect

import pytest
from torch import nn

from . import freezing, straw
from .beside import PerceptualGan, PromptTuning, SwitchedGradients
from .classification import (
    AdversarialBatch,
    FixedViews,
    Mixup,
    NormalisedInTheLoop,
    RandomCrops,
    TwoLabelSets,
)
from .dense import Segmentation
from .harness import Loop, MakeCache, differences, judge, train
from .sequences import ChannelsLast, HalfPrecision
from .several_calls import HardTriplets, ManyHeads, ProbesWithHooks, Siamese
from .test_loops import LOOPS, plain


def fault(loop: type[Loop], cache: MakeCache) -> str:
    """What is wrong with the cache in this loop. An error of the cache's is a fault as well."""
    try:
        return judge(loop, plain(loop), cache)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


STALE_BY_ROW_NUMBER = (
    RandomCrops,
    FixedViews,
    Mixup,
    AdversarialBatch,
    freezing.MomentumMovesTheFrozen,
    freezing.BatchNormLeftTraining,
    freezing.DropoutLeftTraining,
    freezing.ReplacedWeights,
    freezing.MeanTeacher,
    freezing.QueueOfNegatives,
    freezing.AveragedWeights,
    Siamese,
    ProbesWithHooks,
    PerceptualGan,
    SwitchedGradients,
    PromptTuning,
)
STALE_BY_WEIGHTS = (
    freezing.MomentumMovesTheFrozen,
    freezing.BatchNormLeftTraining,
    freezing.ReplacedWeights,
    freezing.MeanTeacher,
    freezing.QueueOfNegatives,
    freezing.AveragedWeights,
    SwitchedGradients,
)
SERVED = (FixedViews, freezing.GradualUnfreezing, HardTriplets, Segmentation, HalfPrecision)


@pytest.mark.parametrize("loop", STALE_BY_ROW_NUMBER)
def test_a_cache_that_keys_by_row_number_is_found_wrong(loop: type[Loop]) -> None:
    assert fault(loop, straw.ByRowNumber)


@pytest.mark.parametrize("loop", STALE_BY_WEIGHTS)
def test_a_cache_that_hashes_weights_once_is_found_wrong(loop: type[Loop]) -> None:
    assert "other bits than the plain loop" in fault(loop, straw.HashesWeightsOnce)


@pytest.mark.parametrize("loop", [NormalisedInTheLoop, Siamese])
def test_a_cache_that_leaves_an_attribute_on_the_model_is_found_wrong(loop: type[Loop]) -> None:
    assert "attributes of" in fault(loop, straw.LeavesItself)


def test_a_cache_that_overlooks_dropout_is_found_wrong() -> None:
    assert "other bits" in fault(freezing.DropoutLeftTraining, straw.TrustsModes)


def test_a_cache_that_forgets_strides_is_found_wrong() -> None:
    pytest.importorskip("timm")
    assert "other bits" in fault(ChannelsLast, straw.ForgetsStrides)


def test_a_cache_that_draws_from_the_random_state_is_found_wrong() -> None:
    assert "random state of torch" in fault(NormalisedInTheLoop, straw.DrawsNumbers)


@pytest.mark.parametrize("loop", [NormalisedInTheLoop, FixedViews])
def test_a_cache_that_serves_nothing_is_found_wrong(loop: type[Loop]) -> None:
    assert "no row was served" in fault(loop, straw.Nothing)


@pytest.mark.parametrize("loop", [Mixup, freezing.MeanTeacher, PromptTuning])
def test_a_cache_that_says_nothing_is_found_wrong(loop: type[Loop]) -> None:
    assert "no message says" in fault(loop, straw.Nothing)


@pytest.mark.parametrize("loop", SERVED)
def test_a_careful_cache_is_found_right(loop: type[Loop]) -> None:
    assert fault(loop, straw.Careful) == ""


def test_rows_of_the_first_epoch_do_not_count_as_served() -> None:
    class Once(TwoLabelSets):
        """One epoch of the loop, in which each image comes twice."""

        EPOCHS = 1

    cached = train(Once, straw.Careful)
    assert cached.served == 0


def test_results_have_names_that_say_where_two_runs_part() -> None:
    class Nudged(ManyHeads):
        """One weight is moved after the second epoch."""

        def on_epoch(self, model: nn.Module, epoch: int) -> None:
            if epoch == 2:
                parameter = next(iter(model.get_submodule("heads.3").parameters()))
                parameter.data[0, 0] += 0.1

    found = differences(plain(ManyHeads), train(Nudged))
    assert found[0] == "loss of step 0 in epoch 2"
    assert "parameter heads.3.weight" in found
    assert "parameter backbone.0.0.weight" not in found


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_says_who_writes_it_why_it_is_hard_and_what_a_row_is(loop: type[Loop]) -> None:
    text = inspect.cleandoc(loop.__doc__ or "")
    assert all(f"\n{word}: " in text for word in ("Who", "Hard", "Row"))
