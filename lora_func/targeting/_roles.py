"""The role of a linear layer in the residual stream, read from shapes and places."""

from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from lora_func.configs import Role
from lora_func.weights import affine, is_linear


def roles_of(model: nn.Module, paths: Iterable[str]) -> dict[str, Role]:
    """Find the roles of linear layers.

    The shape decides first: a layer from the width of the residual stream to another width is a
    reader, the reverse is a writer, and a layer with neither side of that width is inner. For a
    square layer the place decides, among the layers of its part of the block (the attention, for
    example), in the order of their definition.

    Args:
        model: The model.
        paths: Paths of linear layers in it.

    Returns:
        Path -> "reader", "writer" or "inner".
    """
    of_part: dict[str, dict[str, Role]] = {}
    found = {}
    for path in paths:
        block, part = _block_and_part(path)
        if part not in of_part:
            of_part[part] = _roles_in(model, path, block, part)
        found[path] = of_part[part][path]
    return found


def _roles_in(model: nn.Module, path: str, block: str | None, part: str) -> dict[str, Role]:
    width = _stream_width(model, path, block)
    members = dict(model.get_submodule(part).named_modules(prefix=part))
    shapes = {name: _role_by_shape(name, m, width) for name, m in members.items() if is_linear(m)}
    roles = _roles_by_place([*shapes.values()], in_block=block is not None)
    return dict(zip(shapes, roles, strict=True))


def _role_by_shape(path: str, module: nn.Module, width: int) -> Role | None:
    d_out, d_in = affine(module, path).shape
    if d_in == d_out == width:
        return None
    return "reader" if d_in == width else "writer" if d_out == width else "inner"


def _roles_by_place(shapes: list[Role | None], in_block: bool) -> list[Role]:
    """Fill in the square layers (None) of a part."""
    # a square layer before another one or a writer reads; otherwise it writes what was read
    roles: list[Role] = []
    reads_before = False
    for here, shape in enumerate(shapes):
        reads_on = shapes[here + 1 : here + 2] in ([None], ["writer"])
        role: Role = shape or ("writer" if reads_before and not reads_on else "reader")
        roles.append(role)
        reads_before = reads_before if role == "inner" else role == "reader"
    # a part of a block writes, if only with a layer that is defined first
    if in_block and "writer" not in roles and None in shapes:
        roles[len(shapes) - 1 - shapes[::-1].index(None)] = "writer"
    return roles


def _block_and_part(path: str) -> tuple[str | None, str]:
    """The innermost numbered module around a layer, and the child of it that holds the layer."""
    parts = path.split(".")
    block = max((i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()), default=0)
    if not block:
        return None, path.rpartition(".")[0]
    end = block if len(parts) == block + 1 else block + 1
    return ".".join(parts[:block]), ".".join(parts[:end])


def _stream_width(model: nn.Module, path: str, block: str | None) -> int:
    """The most common width in a block; outside a block the hidden size that a config states."""
    stated = _stated_width(model, path)
    if block is None and stated is not None:
        return stated
    widths = _widths(model.get_submodule(block or ""))
    return max(widths, key=lambda width: (widths[width], width == stated, -width))


def _stated_width(model: nn.Module, path: str) -> int | None:
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        width = getattr(config, "hidden_size", None)
        if isinstance(width, int):
            return width
    return None


def _widths(module: nn.Module) -> Counter[int]:
    """How often each width occurs on either side of linear layers, in embeddings and in norms."""
    widths: Counter[int] = Counter()
    for path, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if is_linear(child):
            widths.update(affine(child, path).shape)
        elif isinstance(child, nn.Embedding):
            widths[child.embedding_dim] += 1
        elif isinstance(weight, Tensor) and weight.ndim == 1:
            widths[weight.numel()] += 1
    return widths
