"""Laws of pure functions: nothing but the arguments goes in, nothing but the result comes out."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_func.compat import version_of
from lora_func.testing._cases import Case, Subject
from lora_func.testing._comparison import close, output
from lora_func.testing._law import Draw, law
from lora_func.testing._layers import Layers
from lora_func.testing._strategies import layers, seeds


@law(
    foreign=True,
    hint="an operation whose name ends with `_`, or `out=`, or `+=` writes into a leaf, W or x",
)
def nothing_that_goes_in_is_written_to(case: Subject, draw: Draw) -> None:
    """``apply``, ``weight`` and ``init`` leave W, p and x as they were, bit for bit."""
    layer = draw(layers(case, scrambled=True))
    inputs = [*layer.leaves.values(), layer.x, *layer.module.parameters()]
    before = [(tensor.clone(), version_of(tensor)) for tensor in inputs]
    output(layer)
    layer.weight()
    if isinstance(case, Case):
        case.params(layer.module, layer.sizes["r"], dtype=torch.float64)
    for tensor, (bits, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, bits), "an input has other values now"
        assert version_of(tensor) == version, "an input was written to"


@law(
    foreign=True,
    hint="`apply` keeps something between calls, or reads what is no argument: a global, a "
    "counter, a cache",
)
def apply_is_a_function(case: Subject, draw: Draw) -> None:
    """``apply(W, p, x)`` twice gives the same bits, also with other calls in between."""
    layer, other = draw(layers(case, scrambled=True)), case.layer(seed=1, scrambled=True)
    first = output(layer)
    output(other)
    assert torch.equal(output(layer), first), "a second call gives other numbers"


@law(
    hint="draw from the generator that `init` gets, as in torch.randn(..., generator=generator)",
)
def randomness_comes_from_the_seed(case: Case, draw: Draw) -> None:
    """``init`` and ``apply`` neither read nor move the global random state."""
    layer = draw(layers(case, scrambled=True))

    def run() -> tuple[dict[str, Tensor], Tensor]:
        return case.params(layer.module, layer.sizes["r"], seed=3, dtype=torch.float64), output(
            layer
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        made, y = run()
        assert torch.equal(torch.get_rng_state(), before), "the global random state has moved"
        torch.manual_seed(1)
        again, y_again = run()
    for key, leaf in made.items():
        assert torch.equal(leaf, again[key]), f"{key}: depends on the global random state"
    assert torch.equal(y, y_again), "the output depends on the global random state"


@law(hint="`init` draws in an order that depends on other sites, or keeps something between calls")
def init_depends_on_seed_site_and_config_alone(case: Case, draw: Draw) -> None:
    """``init(model, cfg, seed)[site]`` is the same whatever other sites the model has."""
    seed = draw(seeds)
    d_in, d_out, r = case.fit(4, 5, 2)
    bias = True if case.bias is None else case.bias
    generator = torch.Generator().manual_seed(seed)
    a, b = nn.Linear(d_in, d_out, bias), nn.Linear(*case.fit(5, 4, 2)[:2], bias)
    for parameter in (*a.parameters(), *b.parameters()):
        parameter.data.normal_(generator=generator)
    wide = Layers({"a": a, "b": b})
    everything = case.params(wide, r, seed=seed)
    again = case.params(wide, r, seed=seed)
    assert all(torch.equal(leaf, again[key]) for key, leaf in everything.items())
    alone = case.params(Layers({"b": b}), r, seed=seed)
    of_b = {key for key in everything if key.startswith("b.")}
    assert of_b == {key for key in alone if not key.startswith("*.")}
    assert all(torch.equal(alone[key], everything[key]) for key in of_b)


@law(
    hint="`apply` branches on the values of a tensor, calls `.item()` or reads Python state: use "
    "torch.where, or decide it in the config"
)
def one_graph_serves_every_adapter(case: Case, draw: Draw) -> None:
    """``torch.compile(apply, fullgraph=True)`` compiles once for all leaves of the same shapes."""
    graphs = 0

    def counted(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    torch.compiler.reset()
    compiled = torch.compile(case.layer().variant.apply, fullgraph=True, backend=counted)
    for seed in range(3):
        layer = case.layer(seed=seed, scrambled=True)
        close(compiled(layer.W, layer.leaves, layer.x), layer.apply())
    assert graphs == 1, f"{graphs} graphs were compiled for adapters of the same shapes"
