"""PEFT's trainable tokens: a kind of its own, and a setting of its LoRA."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_func.adapter import SHARED, Key, group
from lora_func.modules import find_site, shared_parameters
from lora_func.variant import Params
from lora_func.variants import trainable_tokens
from lora_func.weights import is_linear, loaded, weight_at

NAME, KIND = trainable_tokens.VARIANT.name, trainable_tokens.VARIANT.peft[0].peft_type
SETTING = "trainable_token_indices"
_DELTA = "trainable_tokens_delta"
_ADAPTER = "token_adapter"


def read_tokens(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    to_model: Callable[[str], str],
    prefix: str,
) -> tuple[Params, set[str]]:
    """Take the rows of trained tokens out of a checkpoint.

    Args:
        model: The model.
        config: The config.
        tensors: The tensors; those that are read are taken out.
        to_model: From a path in the checkpoint to the model's.
        prefix: What stands before the paths in the names of tensors.

    Returns:
        The leaves of the tokens, and the modules of which rows were stored. Where PEFT changes the
        head that is tied to an embedding too, both share their rows.

    Raises:
        ValueError: If the config names tokens without tensors, or the tensors do not fit.
    """
    found: Params = {}
    stored = {
        to_model(_module_of(name.removeprefix(prefix))): tensors.pop(name)
        for name in [name for name in tensors if name.endswith(f".{_DELTA}")]
    }
    tables = [path for path in stored if isinstance(find_site(model, path)[0], nn.Embedding)]
    covered: dict[str, Tensor] = {}
    for path in tables:
        ids, places = _ids_at(model, config, path), _places(model, path)
        covered |= dict.fromkeys(places, stored[path])
        rows = stored[path].cpu() - _rows_of(model, path, ids, stored[path])
        owner = SHARED if len(places) > 1 else path
        found[str(Key(owner, NAME, "rows"))] = rows
        for place, leaf in places.items():
            found[str(Key(place, NAME, leaf))] = torch.tensor(ids, dtype=torch.float64)
    for path in stored.keys() - {*tables}:  # PEFT writes the rows of a tied head again
        if path not in covered or not torch.equal(covered[path], stored[path]):
            raise ValueError(
                f"{path}: PEFT's trained tokens are read at an embedding, and at the head that "
                "transformers ties to it"
            )
    if not found and (config["peft_type"] == KIND or config.get(SETTING)):
        raise ValueError("the config names trained tokens, the file has no rows of them")
    return found, {*stored}


def _module_of(name: str) -> str:
    return name.removesuffix(f".{_DELTA}").removesuffix(f".{_ADAPTER}")


def _rows_of(model: nn.Module, path: str, ids: list[int], stored: Tensor) -> Tensor:
    """The rows of the base, in the dtype of the stored ones."""
    with torch.no_grad(), loaded(find_site(model, path)[0]):
        table = weight_at(model, path).weight
        assert isinstance(table, Tensor)
        width, tokens = table.shape
        if len({*ids}) < len(ids) or stored.shape != (len(ids), width):
            raise ValueError(
                f"{path}: has rows of shape {tuple(stored.shape)} for the tokens {ids}; expected "
                f"different tokens, and rows of {width}"
            )
        if max(ids) >= tokens:
            raise ValueError(
                f"{path}: token {max(ids)} is none of its {tokens}; call resize_token_embeddings "
                "first"
            )
        return table[:, ids].mT.to(stored.dtype).cpu()


def _ids_at(model: nn.Module, config: Mapping[str, Any], path: str) -> list[int]:
    named = config.get("token_indices") if config["peft_type"] == KIND else config.get(SETTING)
    if isinstance(named, Mapping):
        ends = [own for end, own in named.items() if path == end or path.endswith(f".{end}")]
        named = ends[0] if len(ends) == 1 else None
    if not named or not all(isinstance(i, int) and i >= 0 for i in named):
        raise ValueError(f"{path}: its trained tokens are not told by the config, {named!r}")
    return list(named)


def _places(model: nn.Module, path: str) -> dict[str, str]:
    """Find where PEFT changes the rows of an embedding: module -> the leaf of its tokens.

    Where transformers ties the input embedding, these are all modules that hold its table. With
    other embeddings among them the input embedding itself is never called.

    Returns:
        The modules by their paths.
    """
    module, _ = find_site(model, path)
    ties = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if not ties or _input_embedding(model) is not module:
        return {path: "_inputs"}
    names = {one: name for name, one in model.named_modules()}
    holders = [one for one, _ in shared_parameters(model).get((module, "weight"), [])]
    tables = [one for one in holders if isinstance(one, nn.Embedding) and one is not module]
    found = {names[one]: "_inputs" for one in tables} or {path: "_inputs"}
    return found | {names[one]: "_outputs" for one in holders if is_linear(one)}


def _input_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    return None if getter is None else getter()


class TokenRows(NamedTuple):
    """The trained rows of an embedding, as PEFT stores them.

    Attributes:
        ids: The tokens.
        rows: Their new rows, shape (n, d).
        places: The modules that share them in PEFT, the embedding included.
    """

    ids: list[int]
    rows: Tensor
    places: list[str]


def take_tokens(
    model: nn.Module, leaves: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, TokenRows]]:
    """Split the trained tokens from an adapter that is written for PEFT.

    Args:
        model: The model.
        leaves: The adapter, on the CPU.

    Returns:
        The other leaves; path of an embedding -> its trained rows.

    Raises:
        TypeError: If tokens of a head are trained that PEFT does not tie to the embedding.
        ValueError: If a tied head would follow the embedding in PEFT and does not here.
    """
    sites = {path: keys for (path, name), keys in group(leaves).items() if name == NAME}
    used = {key for keys in sites.values() for key in keys.values()}
    names = {one: name for name, one in model.named_modules()}
    written: dict[str, TokenRows] = {}
    covered: set[str] = set()
    for path, keys in sites.items():
        if path in covered or "_inputs" not in keys:
            continue
        main = names.get(_input_embedding(model), path)
        places = _places(model, main)
        if path not in places:
            main, places = path, _places(model, path)
        keys_of_ids = [sites.get(place, {}).get(leaf) for place, leaf in places.items()]
        every = [[] if key is None else leaves[key].long().tolist() for key in keys_of_ids]
        ids = every[0]
        if not ids or any(own != ids for own in every):
            raise ValueError(
                f"{path}: PEFT trains the same rows at {[*places]}, whose tables are tied; adapt "
                "all of them with TrainableTokens(tied=True)"
            )
        covered |= places.keys()
        rows = leaves[keys["rows"]]
        new = rows + _rows_of(model, main, ids, rows)
        written[main] = TokenRows(ids, new, [*{main: "", **places}])
    if alone := sites.keys() - covered:
        raise TypeError(
            f"{min(alone)}: PEFT trains tokens of an embedding, and of the head that transformers "
            "ties to it; these tokens are not written"
        )
    return {key: leaf for key, leaf in leaves.items() if key not in used}, written


def settings_of(written: Mapping[str, TokenRows], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of trained tokens: a kind of their own, or beside a LoRA.

    Args:
        written: What ``take_tokens`` found.
        config: The config of the rest of the adapter; empty if there is none.

    Returns:
        The settings.

    Raises:
        ValueError: If PEFT cannot hold both.
    """
    if not written:
        return {}
    if config.get("peft_type") == "LORA":
        return {SETTING: {path: own.ids for path, own in written.items()}}
    if config:
        raise ValueError(
            f"params: holds trained tokens beside {config['peft_type']}; PEFT has them alone, or "
            "beside a LoRA"
        )
    different = {tuple(own.ids) for own in written.values()}
    if len(different) > 1:
        raise ValueError(f"params: trains {sorted(different)}; PEFT has one list of tokens")
    kind = {"peft_type": KIND, "inference_mode": True, "target_modules": [*written]}
    return {**kind, "token_indices": [*different.pop()]}


def tensors_of(written: Mapping[str, TokenRows], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of trained tokens by name; of their own kind at each tied place."""
    if config["peft_type"] != KIND:
        return {f"{path}.{_ADAPTER}.{_DELTA}": own.rows for path, own in written.items()}
    return {
        f"{place}.{_DELTA}": own.rows.clone() for own in written.values() for place in own.places
    }
