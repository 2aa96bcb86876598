"""The parametrizations with which an attached adapter changes a model's parameters."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_func.adapter import parse
from lora_func.compat import parameters_of
from lora_func.modules import AttachedView
from lora_func.runtime import (
    Site,
    adapted_bias,
    adapted_weight,
    check_no_dropout,
    name_for_bias,
    weight_view,
)
from lora_func.weights import is_packed, is_stack, matrix, restore_layout


def as_own(key: str, leaf: Tensor) -> Tensor:
    """Return a copy of a leaf: a parameter if it is trained, which several sites may share."""
    copy = leaf.detach().clone()
    return copy if parse(key).is_constant else nn.Parameter(copy)


class Leaves(nn.Module):
    """The leaves of a site: parameters, and buffers for constants."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, leaf in leaves.items():
            if isinstance(leaf, nn.Parameter):
                self.register_parameter(name, leaf)
            else:
                self.register_buffer(name, leaf)

    def tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


class View(AttachedView):
    """Gives the adapted parameter for the frozen one."""

    def __init__(self, site: Site, module: nn.Module, name: str, leaves: Leaves) -> None:
        super().__init__()
        self.site = site
        self.name = name
        # in a tuple they are not registered as children
        self.around = (module, leaves)

    def tensors(self) -> dict[str, Tensor]:
        """Return the leaves."""
        return self.around[1].tensors()


class _Trained(View):
    def forward(self, tensor: Tensor) -> Tensor:
        """Return the leaf itself."""
        return self.tensors()[self.name].to(tensor.dtype)


class _Weight(View):
    def forward(self, tensor: Tensor) -> Tensor:
        """Return the adapted weight."""
        module, own, leaves = self.around[0], {self.name: tensor}, self.tensors()
        if module.training:
            check_no_dropout(self.site, leaves)
        W = matrix(module, own, self.name)
        weight = adapted_weight(self.site, W, leaves)
        return restore_layout(module, own, self.name, weight)


class _Bias(View):
    def forward(self, tensor: Tensor) -> Tensor:
        """Return the adapted bias."""
        bias = adapted_bias(self.site, tensor, self.tensors(), tensor.ndim == 2)
        assert bias is not None
        return bias.to(tensor.dtype)


def views_of(site: Site, leaves: Mapping[str, Tensor]) -> Iterator[tuple[str, type[View], Leaves]]:
    """The parameters of a site that are adapted, how, and with which leaves."""
    module = site.module
    if site.variant.parameters is not None:
        yield from ((name, _Trained, Leaves({name: leaf})) for name, leaf in leaves.items())
        return
    weight_view(site)
    name, own = site.parameter or "weight", parameters_of(module)
    weight = own.get(name)
    if weight is None or is_packed(weight):
        raise TypeError(
            f"{site.path}: its weight is quantised, or computed when it is read, and takes no "
            "parametrization; run the model in a block of `with adapted(model, params)`"
        )
    W, of_both = matrix(module, own, name), Leaves(leaves)
    yield name, _Weight, of_both
    with torch.no_grad():
        bias = adapted_bias(site, W.bias, leaves, is_stack(W))
    if bias is not None:
        beside = name_for_bias(site, own, name)
        if own[beside] is None:
            raise TypeError(
                f"{site.path}: {site.variant.name} adds a bias, and the layer has none; run the "
                "model in a block of `with adapted(model, params)`"
            )
        yield beside, _Bias, of_both
