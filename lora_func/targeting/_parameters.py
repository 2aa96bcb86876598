"""Which parameters of a model patterns name."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_func.modules import is_spread, named_parameters
from lora_func.targeting._patterns import check_matches, first_match, some
from lora_func.weights import is_packed


def distinct_parameters(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Find the parameters that patterns name.

    Returns:
        Name -> the first pattern that matches. A tied parameter is listed under its first matching
        name only.

    Raises:
        ValueError: If a pattern matches none.
    """
    names = dict(named_parameters(model))
    check_matches("target_parameters", patterns, names, {})
    found: dict[int, tuple[str, str]] = {}
    for name, parameter in names.items():
        pattern = first_match(patterns, name)
        if pattern is not None:
            found.setdefault(id(parameter), (name, pattern))
    return dict(found.values())


def check_trainable(names: Iterable[str], parameters: Mapping[str, Tensor]) -> None:
    """Check that parameters can be trained themselves.

    Args:
        names: Their names.
        parameters: All parameters of the model.

    Raises:
        TypeError: If one is not floating-point, or packed by bitsandbytes.
        ValueError: If one lies in the memory of another, or has the name of a constant.
    """
    in_memory: dict[int, list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        in_memory[_memory(parameter)].append(name)
    for name in names:
        parameter = parameters[name]
        here = in_memory[_memory(parameter)]
        views = [other for other in here if parameters[other] is not parameter]
        if views:
            raise ValueError(
                f"{name}: shares its memory with {some(views)} without being the same parameter, "
                "and training one of them would untie them; make them one parameter, or two"
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
    no_data = no_data or is_spread(parameter)
    return id(parameter) if no_data else parameter.data_ptr()
