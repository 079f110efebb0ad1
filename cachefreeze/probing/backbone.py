"""Input of heads: the outputs of the last blocks of a network, pooled or as they are."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachefreeze.errors import UserError, first_line

# Most tokens before those of the patches: a class token and registers.
_MOST_PREFIX = 16


@dataclass(frozen=True)
class Layout:
    """Places and shapes of the outputs of a network's last blocks. It is saved with a head.

    Attributes:
        blocks: Names of the last blocks, from the last one backwards.
        norm: Name of the norm that follows the last block. It is applied to all of them. Empty if
            there is none.
        widths: Number of channels of each of these blocks.
        prefix: Number of tokens before those of the patches, of which the first is the class token.
            0 if there are none.
        form: `tokens` (N, T, C), or `NCHW` or `NHWC` for maps.
        side: Number of patches along each side of the image, in the last block's output.
    """

    blocks: tuple[str, ...]
    norm: str
    widths: tuple[int, ...]
    prefix: int
    form: str
    side: int

    def as_json(self) -> dict[str, Any]:
        """Returns the layout as a dict of plain values."""
        return {**asdict(self), "blocks": list(self.blocks), "widths": list(self.widths)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Layout":
        """Reads a layout from the dict that `as_json` made.

        Raises:
            KeyError: A field is missing.
            TypeError: A field has another type.
            ValueError: A field is no number.
        """
        names, widths = tuple(map(str, found["blocks"])), tuple(map(int, found["widths"]))
        rest = str(found["norm"]), widths, int(found["prefix"]), str(found["form"])
        return cls(names, *rest, int(found["side"]))

    def poolings(self, wanted: Sequence[str]) -> list[str]:
        """Returns the wanted poolings that this network has: the mean if it has no class token."""
        return [one for one in wanted if one == "mean" or self.prefix]

    def columns(self, blocks: int, pooling: str) -> list[int]:
        """Returns the columns of a pooled row that a head takes.

        Args:
            blocks: Number of last blocks whose outputs are joined.
            pooling: `class`, `mean`, or `both`.
        """
        found: list[int] = []
        start = 0
        for number, width in enumerate(self.widths):
            for part in ("class", "mean") if self.prefix else ("mean",):
                if number < blocks and pooling in (part, "both"):
                    found += range(start, start + width)
                start += width
        return found


class Backbone(nn.Module):
    """A network that returns the outputs of its last blocks, as a list of tensors for `Joined`.

    They are not joined here, so that a cache has the output of each block, however many blocks are
    asked for.

    Args:
        model: Network that takes images.
        layout: Places of these outputs.
        pooled: Whether they are pooled: the class token and the mean of the patches of each block,
            (N, channels). If False, they are the patches of each block, (N, patches, channels).
    """

    def __init__(self, model: nn.Module, layout: Layout, pooled: bool = True) -> None:
        super().__init__()
        self.model, self.layout, self.pooled = model, layout, pooled

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps images, (N, 3, H, W), to the parts of their rows."""
        with _caught(self.model, self.layout.blocks) as outputs:
            self.model(x)
        found: list[Tensor] = []
        for name in self.layout.blocks:
            tokens = _as_tokens(outputs[name], self.layout.form)
            if self.layout.norm:
                tokens = self.model.get_submodule(self.layout.norm)(tokens)
            patches = tokens[:, self.layout.prefix :]
            if not self.pooled:
                found.append(patches)
                continue
            if self.layout.prefix:
                found.append(tokens[:, 0])
            found.append(patches.mean(1))
        return found


class Joined(nn.Module):
    """Joins the parts of rows."""

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Returns rows, (N, ..., columns) in float32."""
        return torch.cat(parts, -1).float()


def find_layout(model: nn.Module, blocks: int, image_size: int, device: torch.device) -> Layout:
    """Finds the last blocks of a network, by one pass over a black image.

    Args:
        model: Network, in eval mode.
        blocks: Number of last blocks.
        image_size: Height and width of the images.
        device: Device of the network.

    Raises:
        UserError: The network has no blocks, or fewer than asked for, or does not take such images.
    """
    names = _names_of_blocks(model)
    norms = {
        id(module): name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and not any(module.children())
    }
    seen: list[tuple[str, Any]] = []
    normed: dict[int, str] = {}

    def after(name: str) -> Any:
        return lambda module, args, output: seen.append((name, _first(output)))

    def before(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and seen and args[0] is seen[-1][1]:
            normed.setdefault(id(seen[-1][1]), norms[id(module)])

    handles = [model.get_submodule(name).register_forward_hook(after(name)) for name in names]
    handles += [
        module.register_forward_pre_hook(before)
        for module in model.modules()
        if id(module) in norms
    ]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, image_size, image_size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"the network does not take images of {image_size}x{image_size} "
            f"({first_line(error)}): choose another --image-size"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    seen = [(name, output) for name, output in seen if isinstance(output, Tensor)]
    form = _form(seen[-1][1], model) if seen else None
    if form is None:
        raise UserError(
            "the network has no blocks that heads could be put on, such as those of a vision "
            "transformer or a ResNet: choose another network"
        )
    kind = [(name, output) for name, output in seen if output.dim() == seen[-1][1].dim()]
    if len(kind) < blocks:
        raise UserError(
            f"the network has {len(kind)} blocks, and the last {blocks} were asked for: give a "
            "smaller number of blocks"
        )
    last = kind[-1][1]
    taken = kind[::-1][:blocks]
    widths = tuple(int(_as_tokens(output, form).shape[-1]) for _, output in taken)
    norm = normed.get(id(last), "") if form == "tokens" and len(set(widths)) == 1 else ""
    count = int(_as_tokens(last, form).shape[1])
    prefix = _prefix(model, count) if form == "tokens" else 0
    side = math.isqrt(count - prefix)
    return Layout(tuple(name for name, _ in taken), norm, widths, prefix, form, side)


def _names_of_blocks(model: nn.Module) -> list[str]:
    """Returns the names of blocks: modules of one class, with parts, that stand in a row."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        children = list(module.named_children())
        kinds = {type(child) for _, child in children}
        own = next(iter(kinds), nn.Module)
        made_of_parts = all(any(child.children()) for _, child in children)
        is_row = len(children) > 1 and len(kinds) == 1 and made_of_parts
        if is_row and not issubclass(own, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            found += [f"{name}.{child}" for child, _ in children]
    return found


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


@contextmanager
def _caught(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that holds the outputs of blocks after a pass."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = _first(output)

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _form(output: Tensor, model: nn.Module) -> str | None:
    if output.dim() == 3:
        return "tokens"
    if output.dim() != 4:
        return None
    _, first, second, third = output.shape
    last = getattr(model, "output_fmt", None) == "NHWC" or (first == second and second != third)
    return "NHWC" if last else "NCHW"


def _as_tokens(output: Tensor, form: str) -> Tensor:
    """Returns the output of a block as (N, T, C)."""
    if form == "tokens":
        return output
    return output.flatten(1, 2) if form == "NHWC" else output.flatten(2).transpose(1, 2)


def _prefix(model: nn.Module, tokens: int) -> int:
    """Returns the number of tokens before those of the patches, of which there are a square."""
    inner = getattr(model, "model", model)
    said = getattr(inner, "num_prefix_tokens", None)
    registers = getattr(getattr(inner, "config", None), "num_register_tokens", None)
    if isinstance(registers, int):
        said = registers + 1
    if isinstance(said, int):
        return said
    squares = (n for n in range(min(_MOST_PREFIX, tokens)) if math.sqrt(tokens - n).is_integer())
    return next(squares, 0)
