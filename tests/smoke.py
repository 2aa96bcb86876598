"""What ``nox -s build`` runs with the installed wheel alone, outside of the checkout."""

import tempfile
from pathlib import Path

import torch

import lora_func as lf

model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.randn(5, 4)
params = lf.init(model, lf.LoRA(r=2))
assert torch.equal(lf.fcall(model, params, x), model(x))
stacked = lf.stack([params, lf.init(model, lf.LoRA(r=2), seed=1)])
assert lf.vcall(model, stacked, x).shape == (2, 5, 2)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "adapter.safetensors"
    lf.save(params, path, model=model)
    assert all(torch.equal(leaf, params[key]) for key, leaf in lf.load(path, model=model).items())
assert "site-packages" in lf.__file__, lf.__file__
assert (Path(lf.__file__).parent / "py.typed").is_file()
print(f"lora_func {lf.__version__} from {lf.__file__}: works")
