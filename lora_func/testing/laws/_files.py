"""Laws of files: what is saved comes back, and PEFT computes the same with it."""

import importlib.util
import tempfile
import warnings
from pathlib import Path

import torch

from lora_func.adapter import parse
from lora_func.files import load, save
from lora_func.peft import from_peft, to_peft, writable_format
from lora_func.runtime import fcall
from lora_func.testing._cases import Case
from lora_func.testing._comparison import close, output
from lora_func.testing._law import Draw, law
from lora_func.testing._layers import Layers, random_like
from lora_func.testing._strategies import dtypes, layers


@law(
    hint="a setting that is no leaf is lost in a file: attributes of tensors, globals, caches; "
    "make it a constant leaf, whose name starts with `_`"
)
def files_keep_every_bit(case: Case, draw: Draw) -> None:
    """``load(save(p)) == p``, bit for bit, and ``apply`` gives the same bits with it."""
    dtype, leaf_dtype = draw(dtypes(case))
    layer = draw(layers(case, scrambled=True, dtype=dtype, leaf_dtype=leaf_dtype))
    params = layer.params()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        save(params, path, model=layer.module)
        found = load(path, model=layer.module)
    assert found.keys() == params.keys()
    for key, leaf in params.items():
        assert found[key].dtype == leaf.dtype, f"{key}: {found[key].dtype} came back"
        assert torch.equal(found[key], leaf), f"{key}: other numbers came back"
    again = {parse(key).leaf: leaf.detach() for key, leaf in found.items()}
    assert torch.equal(output(layer.with_leaves(again)), output(layer)), (
        "the loaded adapter gives other numbers"
    )


def is_known_to_peft(case: Case) -> bool:
    """True if PEFT has the method, and is installed."""
    if not case.is_adapter or importlib.util.find_spec("peft") is None:
        return False
    return writable_format(case.variant, case.layer().leaves, "Linear") is not None


@law(
    applies=is_known_to_peft,
    hint="`peft` names another tensor, scale, sign or layout than PEFT's module has",
)
def peft_computes_the_same(case: Case, draw: Draw) -> None:
    """PEFT's model of ``to_peft(p)`` computes ``apply(W, p, x)``, and so does ``from_peft``."""
    from peft import PeftModel

    layer = case.layer(d_in=8, d_out=8, dtype=torch.float32)
    model, generator = Layers({"a": layer.module}), torch.Generator().manual_seed(1)
    params = {key: leaf.detach() for key, leaf in case.params(model, layer.sizes["r"]).items()}
    for key, leaf in params.items():
        if not parse(key).is_constant:
            params[key] = leaf + 0.05 * random_like(leaf, generator)
    batch = {"a": layer.x}
    expected = fcall(model, params, batch)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        to_peft(params, folder, model=model, base_model_name="a base")
        close(fcall(model, from_peft(folder, model), batch), expected, 1e-4)
        theirs = PeftModel.from_pretrained(Layers({"a": layer.module}), folder).eval()
        close(theirs(**batch), expected, 1e-4)
