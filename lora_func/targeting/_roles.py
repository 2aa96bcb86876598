"""What a linear layer does to the residual stream, read from shapes and places alone."""

from collections import Counter

from torch import Tensor, nn

from lora_func.configs import Role
from lora_func.weights._layers import affine, is_linear


def role_of(model: nn.Module, path: str) -> Role:
    """Tell the role of a linear-like module.

    Shape decides first: from the width of the residual stream to another is a reader, the reverse
    a writer, neither side of that width inner. A square layer is told by its place among the
    layers of its part of the block (the attention, say), in the order of their definition.

    Args:
        model: The model.
        path: Path of a linear-like module in it.

    Returns:
        "reader", "writer" or "inner".
    """
    block, part = _block_and_part(path)
    width = _stream_width(model, path, block)
    members = dict(model.get_submodule(part).named_modules(prefix=part))
    shapes = {name: _role_by_shape(name, m, width) for name, m in members.items() if is_linear(m)}
    roles = _roles_by_place([*shapes.values()], in_block=block is not None)
    return roles[[*shapes].index(path)]


def _role_by_shape(path: str, module: nn.Module, width: int) -> Role | None:
    d_out, d_in = affine(module, path).shape
    if d_in == d_out == width:
        return None
    return "reader" if d_in == width else "writer" if d_out == width else "inner"


def _roles_by_place(shapes: list[Role | None], in_block: bool) -> list[Role]:
    """Fill in the square layers (None) of a part."""
    # one before another square layer or a writer reads; else it writes what has been read
    roles: list[Role] = []
    for here, shape in enumerate(shapes):
        moved = [role for role in roles if role != "inner"]
        reads_on = shapes[here + 1 : here + 2] in ([None], ["writer"])
        writes = not reads_on and moved[-1:] == ["reader"]
        roles.append(shape or ("writer" if writes else "reader"))
    # a part of a block writes something, if only with a layer that is defined first
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
    """The commonest width in a block; outside one the hidden size that a config above states."""
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
