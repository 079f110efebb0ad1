"""Functions that freeze modules for good, and unfreeze them."""

from functools import partial

from torch import nn


def freeze(*modules: nn.Module) -> None:
    """Freezes modules for good, in place: no gradient, and eval mode whatever `train()` is called.

    The usual `model.train()` at the start of an epoch would otherwise put their batch norms and
    dropout in training mode again. In training mode they run in every pass, since no result of
    theirs can be cached. Gradients of the parameters are set to None.

    Args:
        *modules: Modules to freeze, with everything in them.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 2))
        >>> freeze(model[:2])
        >>> model.train()[1].training
        False
    """
    for module in modules:
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        module.eval()
        for each in module.modules():
            # `nn.Module.train` walks the tree by calling `train` on the children, so an attribute
            # of the instance is asked first. A partial of a plain function survives deepcopy and
            # pickle.
            object.__setattr__(each, "train", partial(_stay_in_eval_mode, each))


def unfreeze(*modules: nn.Module) -> None:
    """Undoes `freeze`: parameters take gradient, and the modules are in training mode.

    Args:
        *modules: Modules to unfreeze, with everything in them.
    """
    for module in modules:
        for each in module.modules():
            vars(each).pop("train", None)
        module.requires_grad_(True)
        module.train()


def _stay_in_eval_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
