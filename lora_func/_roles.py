"""What a linear layer does to the residual stream, read from shapes and places alone."""

from collections import Counter

from torch import nn

from lora_func._config import Role
from lora_func._weight import affine, is_linear


def role_of(model: nn.Module, path: str) -> Role:
    """Tell the role of a linear-like module.

    Shape decides first: from the width of the residual stream to another is a reader, the reverse
    a writer, neither side of that width inner. A square layer is told by its place among the
    layers of its part of the block (the attention, say): of neighbouring square layers all but the
    last are readers; the last is a writer if something has read since the part last wrote.

    Args:
        model: The model.
        path: Path of a linear-like module in it.

    Returns:
        "reader", "writer" or "inner".
    """
    width = _stream_width(model, path)
    part, in_block = _part_of_block(path)
    members = dict(model.get_submodule(part).named_modules(prefix=part))
    roles = {name: _role_by_shape(m, width) for name, m in members.items() if is_linear(m)}
    return roles[path] or _role_by_place([*roles.values()], [*roles].index(path), in_block)


def _role_by_shape(module: nn.Module, width: int) -> Role | None:
    d_out, d_in = affine(module).shape
    if d_in == d_out == width:
        return None
    return "reader" if d_in == width else "writer" if d_out == width else "inner"


def _role_by_place(roles: list[Role | None], here: int, in_block: bool) -> Role:
    if roles[here + 1 : here + 2] == [None]:
        return "reader"
    before = [role for role in roles[:here] if role != "inner"]
    has_read = before and before[-1] != "writer"
    alone_in_block = in_block and len(roles) == 1
    return "writer" if has_read or alone_in_block else "reader"


def _part_of_block(path: str) -> tuple[str, bool]:
    """The block's child that holds a layer, or the block itself, or outside one its parent."""
    parts = path.split(".")
    block = max((i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()), default=0)
    if not block:
        return path.rpartition(".")[0], False
    end = block if len(parts) == block + 1 else block + 1
    return ".".join(parts[:end]), True


def _stream_width(model: nn.Module, path: str) -> int:
    """The hidden size that the nearest config above a layer states, else the commonest width."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        width = getattr(config, "hidden_size", None)
        if isinstance(width, int):
            return width
    return _commonest_width(model)


def _commonest_width(model: nn.Module) -> int:
    widths: Counter[int] = Counter()
    for module in model.modules():
        if is_linear(module):
            widths.update(affine(module).shape)
        elif isinstance(module, nn.Embedding):
            widths[module.embedding_dim] += 1
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            widths[module.normalized_shape[-1]] += 1
    return max(widths, key=lambda width: (widths[width], -width))
