"""Parameters that are trained themselves, as PEFT keeps them: whole modules, biases, LN_TUNING."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lora_func.modules import Place, original_parameters, shared_parameters
from lora_func.peft._checkpoint import BASE
from lora_func.peft._formats import all_formats
from lora_func.peft._task import head_parameters, head_paths, hidden_by_head


class Trained(NamedTuple):
    """What a checkpoint holds beside the leaves of its adapter.

    Attributes:
        tensors: Name -> tensor.
        modules: The modules that are kept whole.
        bias: PEFT's setting of that name; None if no bias is trained by it.
        kind: The kind of the checkpoint, if there is no adapter beside.
        targets: The modules that this kind names.
    """

    tensors: dict[str, Tensor]
    modules: list[str]
    bias: str | None
    kind: str | None
    targets: list[str]


def trained_parameters(
    model: nn.Module,
    trained: Mapping[str, Mapping[str, Tensor]],
    adapted: Mapping[str, str],
    kind: str | None,
    task: str | None,
) -> Trained:
    """Put trained parameters into PEFT's terms.

    Args:
        model: The model.
        trained: Path of a module -> its trained parameters by name.
        adapted: Path of a module with an adapter -> what stands before the names of its tensors.
        kind: The kind of the adapter; None if there is none.
        task: PEFT's name of the task.

    Returns:
        The tensors and the settings.

    Raises:
        ValueError: If PEFT would keep more than these parameters, or ignore an adapter inside of a
            module that it keeps whole.
    """
    if kind is None:
        one = next(found for _, found in all_formats() if found.whole is not None)
        whole = _whole(model, trained)
        targets = [path for path in whole if not hidden_by_head(task, [path])]
        tensors = {
            f"{path}.{one.whole if path in targets else ''}{name}": tensor
            for path, own in whole.items()
            for name, tensor in own.items()
        }
        kept = _heads(model, task, [path for path in whole if path not in targets], tensors)
        return Trained(
            {**head_parameters(model, task), **tensors}, kept, None, one.peft_type, targets
        )
    bias, biases = _biases(model, trained, adapted, kind)
    named = {(path, name) for path, name, _ in biases}
    others = {
        path: {name: tensor for name, tensor in own.items() if (path, name) not in named}
        for path, own in trained.items()
    }
    whole = _whole(model, {path: own for path, own in others.items() if own})
    _check_outside(whole, adapted)
    check_ambiguous(whole, [name for name, _ in model.named_modules()], separator="")
    tensors = {f"{path}.{name}": t for path, own in whole.items() for name, t in own.items()}
    for path, name, tensor in biases:
        tensors[f"{adapted[path]}.{BASE}.{name}" if path in adapted else f"{path}.{name}"] = tensor
    kept = _heads(model, task, whole, tensors)
    return Trained({**head_parameters(model, task), **tensors}, kept, bias, None, [])


def _check_outside(whole: Collection[str], adapted: Collection[str]) -> None:
    for path in adapted:
        around = next((one for one in whole if path == one or _is_inside(path, one)), None)
        if around is not None:
            raise ValueError(
                f"{path}: has an adapter, and {around} around it has trained parameters; PEFT "
                "keeps that module whole, and would ignore the adapter"
            )


def _heads(
    model: nn.Module, task: str | None, paths: Collection[str], tensors: Collection[str]
) -> list[str]:
    """The modules that PEFT keeps whole; a head of the task is one, if all of it is there."""
    outside = [path for path in paths if not hidden_by_head(task, [path])]
    heads = head_paths(model, task)
    whole = [
        path
        for path in heads
        if {f"{path}.{name}" for name, _ in heads[path].named_parameters()} <= {*tensors}
    ]
    return [*outside, *whole]


def _biases(
    model: nn.Module,
    trained: Mapping[str, Mapping[str, Tensor]],
    adapted: Collection[str],
    kind: str,
) -> tuple[str | None, list[tuple[str, str, Tensor]]]:
    """PEFT's setting, and the biases that it covers: those of adapted layers, or all."""
    everywhere = [
        path
        for path, module in model.named_modules()
        if original_parameters(module).get("bias") is not None
    ]
    alone = {path for path, own in trained.items() if [*own] == ["bias"]}
    beside = [path for path in everywhere if path in adapted]
    if not alone & {*adapted}:
        return None, []
    if not {*beside} <= alone:
        missing = sorted({*beside} - alone)
        raise ValueError(
            f"{missing[0]}: its bias is not trained, and those of other adapted layers are; PEFT "
            "trains the biases of all adapted layers, or of none"
        )
    covers = everywhere if {*everywhere} <= alone else beside
    setting = "all" if covers is everywhere else f"{kind.lower()}_only"
    return setting, [(path, "bias", trained[path]["bias"].clone()) for path in covers]


def _whole(
    model: nn.Module, trained: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """All parameters in modules with trained ones, at each place of a tied one."""
    places: Mapping[Place, list[Place]] = shared_parameters(model)
    names = {module: name for name, module in model.named_modules()}
    whole: dict[str, dict[str, Tensor]] = {}
    changed: dict[str, dict[str, Tensor]] = {}
    for path, own in trained.items():
        for leaf, tensor in own.items():
            for module, alias in places[model.get_submodule(path), leaf]:
                name = names[module]
                parameters = module.named_parameters(remove_duplicate=False)
                whole[name] = {n: p.detach().cpu().clone() for n, p in parameters}
                changed.setdefault(name, {})[alias] = tensor.clone()
    outermost = [name for name in whole if not any(_is_inside(name, other) for other in whole)]
    for name in whole.keys() - {*outermost}:
        around = next(one for one in outermost if _is_inside(name, one))
        inner = {f"{name}.{n}".removeprefix(f"{around}."): t for n, t in changed[name].items()}
        changed[around] |= inner
    return {name: whole[name] | changed[name] for name in outermost}


def _is_inside(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


def check_ambiguous(paths: Collection[str], names: Collection[str], separator: str = ".") -> None:
    """Check that PEFT finds by the end of a name only what is meant.

    Args:
        paths: The paths that the config names.
        names: All paths of that kind in the model.
        separator: What PEFT expects before the end of a name.

    Raises:
        ValueError: If another path ends like one of them.
    """
    for name in names:
        if name not in paths and any(name.endswith(f"{separator}{path}") for path in paths):
            raise ValueError(
                f"{name}: PEFT would take this one too, since its path ends like one of "
                f"{sorted(paths)}"
            )
