"""Late values in the hands of python code, of other libraries and of C++ code."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from cachefreeze.lineage.late import Late

from .late_values import Pair


@pytest.fixture
def pair():
    return Pair()


@pytest.fixture
def plain(pair):
    return pair.plain()


@pytest.fixture
def late(pair):
    return pair.late()


def test_what_a_late_value_is_made_of_does_not_compute_it(pair, late):
    assert late.shape == (4, 4)
    assert late.dtype == torch.float32
    assert late.stride() == (4, 1)
    assert not late.requires_grad
    assert late.device.type == "cpu"
    assert len(late) == 4
    assert late.dim() == late.ndim == 2
    assert late.numel() == 16
    assert late.is_floating_point()
    assert isinstance(late, torch.Tensor)
    assert not pair.report.computed


def test_a_computed_late_value_is_the_same_object_and_a_plain_tensor(pair, plain, late):
    name, reference, held = id(late), weakref.ref(late), {late: "found"}
    assert torch.equal(late, plain)
    assert type(late) is torch.Tensor
    assert id(late) == name
    assert reference() is late
    assert held[late] == "found"
    assert pair.report.computed


def test_a_late_value_that_nobody_holds_goes(pair):
    reference = weakref.ref(pair.late())
    assert reference() is None


def test_dlpack_gives_the_values(plain, late):
    assert torch.equal(torch.from_dlpack(late), plain)


def test_numpy_takes_the_values_by_dlpack(plain, late):
    assert np.array_equal(np.from_dlpack(late), plain.numpy())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_keeps_the_values(plain, late, protocol):
    again = pickle.loads(pickle.dumps(late, protocol))
    assert type(again) is torch.Tensor
    assert torch.equal(again, plain)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_have_the_values(plain, late, copied):
    again = copied(late)
    assert torch.equal(again, plain)
    assert type(again) is torch.Tensor
    again.mul_(2)
    assert torch.equal(late, plain * 2) == (copied is copy.copy)


def test_a_saved_file_has_the_values(plain, late):
    file = io.BytesIO()
    torch.save({"late": late}, file)
    file.seek(0)
    again = torch.load(file)["late"]
    assert type(again) is torch.Tensor
    assert torch.equal(again, plain)


def test_numpy_functions_take_the_values(pair, plain):
    assert np.array_equal(np.asarray(pair.late()), plain.numpy())
    assert np.array_equal(np.stack([pair.late()]), plain.numpy()[None])
    assert np.allclose(np.tanh(pair.late()), np.tanh(plain.numpy()))


def test_setting_the_data_of_a_late_value_is_right(late):
    late.data = torch.ones(4, 4)
    assert torch.equal(late, torch.ones(4, 4))


def test_setting_a_gradient_takes_the_values(pair, plain):
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.grad = pair.late()
    assert torch.equal(layer.weight.grad, plain)
    before = layer.weight.detach().clone()
    torch.optim.SGD(layer.parameters(), 1.0).step()
    assert torch.allclose(layer.weight, before - plain)


@pytest.mark.parametrize("grad", [False, True])
def test_a_parameter_made_of_a_late_value_has_the_values(late, plain, grad):
    parameter = nn.Parameter(late, requires_grad=grad)
    assert isinstance(parameter, nn.Parameter)
    assert torch.equal(parameter, plain)
    layer = nn.Linear(4, 4)
    layer.weight = parameter
    layer(torch.ones(1, 4)).sum().backward()
    assert (parameter.grad is not None) == grad


def test_a_buffer_made_of_a_late_value_has_the_values(late, plain):
    layer = nn.Linear(4, 4)
    layer.register_buffer("kept", late)
    layer.buffer = nn.Buffer(late)
    assert torch.equal(layer.state_dict()["kept"], plain)
    assert torch.equal(copy.deepcopy(layer).buffer, plain)


def test_load_state_dict_takes_the_values(pair, plain):
    layer = nn.Linear(4, 4)
    layer.load_state_dict({"weight": pair.late(), "bias": torch.zeros(4)})
    assert torch.equal(layer.weight, plain)
    layer.load_state_dict({"weight": pair.late(), "bias": torch.zeros(4)}, assign=True)
    assert torch.equal(layer.weight, plain)


@pytest.mark.parametrize("used", ["saved", "mark_dirty", "context", "returned"])
def test_a_custom_function_takes_the_values(pair, plain, used):
    class Using(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, q):
            ctx.how = used
            if used == "saved":
                ctx.save_for_backward(q)
            elif used == "context":
                ctx.q = q
            elif used == "mark_dirty":
                ctx.mark_dirty(q)
                return x * 1, q.mul_(2)
            return x * 1, q

        @staticmethod
        def backward(ctx, grad, _):
            if ctx.how == "saved":
                return grad * ctx.saved_tensors[0], None
            return grad * (ctx.q if ctx.how == "context" else 1), None

    def run(q):
        x = torch.ones(4, 4, requires_grad=True)
        one, two = Using.apply(x, q)
        one.sum().backward()
        return one, two * 2, x.grad, q * 1

    assert all(map(torch.equal, run(pair.late()), run(plain.clone())))


@pytest.mark.parametrize("before", ["used before backward", "left"])
def test_autograd_may_save_a_late_value(pair, plain, before):
    weight = torch.full((4, 4), 2.0, requires_grad=True)
    late = pair.late()
    output = late @ weight
    if before == "used before backward":
        late.sum()
    del late
    output.square().sum().backward()
    other = torch.full((4, 4), 2.0, requires_grad=True)
    (plain @ other).square().sum().backward()
    assert torch.equal(weight.grad, other.grad)


def test_comparisons_see_the_values(pair, plain):
    assert torch.equal(pair.late(), plain)
    assert torch.equal(plain, pair.late())
    assert torch.allclose(pair.late(), plain)
    assert bool((pair.late() == plain).all())
    torch.testing.assert_close(pair.late(), plain, rtol=0, atol=0)


def test_python_protocols_see_the_values(pair, plain):
    assert repr(pair.late()) == repr(plain)
    assert f"{pair.late().sum():.3f}" == f"{plain.sum():.3f}"
    assert pair.late().tolist() == plain.tolist()
    assert [float(v) for v in pair.late()[0]] == plain[0].tolist()
    assert plain[0, 0] in pair.late()
    assert bool(pair.late()[0, 0] == plain[0, 0])
    assert max(pair.late()[0]) == max(plain[0])


def test_an_index_or_a_mask_that_is_late_is_right():
    pair = Pair(lambda model, q: [(q * 3).long().abs() % 4, q > 0, q])
    index, mask, value = pair.plain()
    late_index, late_mask, late_value = pair.late()
    base = torch.arange(16.0).view(4, 4)
    assert torch.equal(base[late_index[0]], base[index[0]])
    assert torch.equal(base[late_mask], base[mask])
    made, expected = base.clone(), base.clone()
    made[late_mask], expected[mask] = late_value[mask], value[mask]
    assert torch.equal(made, expected)


def test_a_write_to_a_late_value_reaches_its_late_view():
    def way(model, q):
        q = q * 2
        return [q, q[0], q.t()]

    pair = Pair(way)
    plain, late = pair.plain(), pair.late()
    for base, row, turned in (plain, late):
        base.add_(1)
        row.mul_(3)
        turned[0, 0] = 9
    assert all(map(torch.equal, plain, late))


def test_a_write_to_the_batch_after_the_pass_leaves_late_values_alone():
    pair = Pair(lambda model, q: [q * 2, q + 1])
    plain = pair.plain()
    own = {number: tensor.clone() for number, tensor in pair.kept.items()}
    from cachefreeze import lineage

    x = pair.x.clone()
    late, _ = lineage.replay(pair.plan, own, pair.model, x)
    x.zero_()
    assert all(map(torch.equal, plain, late))


def test_late_values_of_one_pass_stand_beside_those_of_another():
    pair = Pair()
    one, two = pair.late(), pair.late()
    assert torch.equal(one + two, pair.plain() * 2)
    assert torch.equal(torch.cat([pair.late(), pair.late()]), torch.cat([pair.plain()] * 2))


def test_a_late_value_is_given_to_the_next_pass():
    pair = Pair()
    late, plain = pair.late(), pair.plain()
    assert isinstance(late, Late)
    assert torch.equal(pair.model(late), pair.model(plain))


def test_late_values_are_taken_by_an_optimizer_and_a_loss(pair, plain):
    weight = nn.Parameter(torch.ones(4, 4))
    nn.functional.mse_loss(weight, pair.late()).backward()
    other = nn.Parameter(torch.ones(4, 4))
    nn.functional.mse_loss(other, plain).backward()
    assert torch.equal(weight.grad, other.grad)


def test_late_values_are_right_in_another_thread_and_in_inference_mode(pair, plain):
    import threading

    late, seen = pair.late(), []
    thread = threading.Thread(target=lambda: seen.append(late * 1))
    thread.start()
    thread.join()
    assert torch.equal(seen[0], plain)
    late = pair.late()
    with torch.inference_mode():
        assert torch.equal(late * 1, plain)
    assert torch.equal(late, plain)
    assert not late.is_inference()
    late = pair.late()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(late * 1, plain)


def test_late_values_of_work_under_a_mode_are_computed_under_it():
    def way(model, q):
        with torch.autocast("cpu", torch.bfloat16):
            return [model.body(q), model.body(q).float()]

    pair = Pair(way)
    plain, late = pair.plain(), pair.late()
    assert late[0].dtype == torch.bfloat16
    assert all(map(torch.equal, plain, late))


def test_a_late_value_whose_model_is_gone_says_so():
    pair = Pair(lambda model, q: model.body(q))
    late = pair.late()
    pair.model = None
    gc.collect()
    with pytest.raises(RuntimeError, match="was deleted"):
        late.sum()
