"""Which parameters of a model patterns name."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_func.modules import named_parameters
from lora_func.targeting._patterns import first_match, require_matches, some
from lora_func.weights._bitsandbytes import is_packed


def distinct_parameters(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Find the parameters that patterns name.

    Returns:
        Name -> the first pattern that matches; of tied parameters the first name alone.

    Raises:
        ValueError: If a pattern matches none.
    """
    names = dict(named_parameters(model))
    require_matches("target_parameters", patterns, names, {})
    found: dict[int, tuple[str, str]] = {}
    for name, parameter in names.items():
        pattern = first_match(patterns, name)
        if pattern is not None:
            found.setdefault(id(parameter), (name, pattern))
    return dict(found.values())


def refuse_untrainable(name: str, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a parameter that cannot be trained itself.

    Args:
        name: Its name.
        parameters: All of the model's.

    Raises:
        TypeError: If it is no float, or packed by bitsandbytes.
        ValueError: If it lies in the memory of another, or has the name of a constant.
    """
    parameter = parameters[name]
    views = [
        other
        for other, p in parameters.items()
        if p is not parameter and _memory(p) == _memory(parameter)
    ]
    if views:
        raise ValueError(
            f"{name}: shares its memory with {some(views)} without being the same parameter, and "
            "training one of them would untie them; make them one parameter, or two"
        )
    if is_packed(parameter) or not parameter.is_floating_point():
        kind = "a packed weight" if is_packed(parameter) else parameter.dtype
        raise TypeError(f"{name}: {kind} cannot be trained; accepted are floats")
    if name.rpartition(".")[2].startswith("_"):
        raise ValueError(
            f"{name}: a leaf whose name starts with an underscore is a constant and is never "
            "trained; rename the parameter"
        )


def _memory(parameter: Tensor) -> int:
    no_data = parameter.is_meta or is_lazy(parameter) or not parameter.numel()
    return id(parameter) if no_data else parameter.data_ptr()
