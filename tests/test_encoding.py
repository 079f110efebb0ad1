"""Rows as they are stored: nothing is lost unless it was asked for, and then no more than that."""

import pytest
import torch

from cachefreeze.encoding import Encoding, as_array


def there_and_back(x: torch.Tensor, stored: str | None) -> torch.Tensor:
    encoding = Encoding.of(x, stored)
    plain = as_array(encoding.encode(x))
    held, room = encoding.empty(len(x), plain.shape[1:])
    room[:] = plain.reshape(len(x), -1).view("uint8")
    return encoding.decode(held, torch.device("cpu"))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.uint8]
)
@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (5, 7)])
def test_in_their_own_type_every_bit_comes_back(dtype: torch.dtype, shape: tuple[int]) -> None:
    x = (torch.randn(shape) * 50).to(dtype)
    back = there_and_back(x, None)
    assert back.dtype == dtype
    assert torch.equal(back, x)


def test_bfloat16_of_bfloat16_loses_nothing() -> None:
    x = torch.randn(5, 3, 4, 2).bfloat16()
    assert Encoding.of(x, "bfloat16") == Encoding.of(x, None)


def test_float32_as_bfloat16_is_rounded_to_it() -> None:
    x = torch.randn(5, 3, 4, 2)
    back = there_and_back(x, "bfloat16")
    assert back.dtype == torch.float32
    assert torch.equal(back, x.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_off_by_half_a_step_of_its_channel_at_most(dtype: torch.dtype) -> None:
    x = torch.randn(50, 3, 4, 2) * torch.tensor([0.01, 1.0, 100.0])[:, None, None] + 3
    x = x.to(dtype)
    back = there_and_back(x, "int8")
    assert back.dtype == dtype
    ranges = (x.amax((0, 2, 3)) - x.amin((0, 2, 3))).double()
    errors = (back.double() - x.double()).abs().amax((0, 2, 3))
    rounding = 0.0 if dtype == torch.float32 else x.double().abs().amax((0, 2, 3)) / 256
    assert (errors <= ranges / 255 * 0.501 + rounding).all()


def test_int8_cuts_off_what_lies_beyond_the_range_it_has_seen() -> None:
    seen = torch.linspace(-1, 1, 50)[:, None, None, None].expand(-1, 2, 1, 1)
    encoding = Encoding.of(seen, "int8")
    plain = encoding.encode(torch.tensor([[[[100.0]], [[-100.0]]]]))
    assert plain.reshape(-1).tolist() == [127, -128]


def test_a_constant_channel_survives_int8() -> None:
    x = torch.full((4, 2, 3, 3), 7.5)
    x[:, 1] = 0
    assert torch.allclose(there_and_back(x, "int8"), x)


def test_what_has_no_range_is_kept_as_it_is() -> None:
    x = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    assert Encoding.of(x, "int8") == Encoding.of(x, None)
