"""The shape of the package: layers, weight of the import, one file for each variant."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_func
from lora_func import variants

PACKAGE = Path(lora_func.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# a module may import from the rows above its own
LAYERS = [
    {"_errors", "_checks", "_modules", "_slots", "_batch", "_compare", "_packed"},
    {"_transforms", "_bitsandbytes"},
    {"_quantised"},
    {"_weight"},
    {"_products"},
    {"_entries"},
    {"_frozen", "_trees", "_files"},
    {"_config", "_padding"},
    {"_types"},
    {
        "_linalg",
        "_keys",
        "_roles",
        "_selection",
        "_patterns",
        "_layers",
        "_running",
        "_remat",
    },
    {"_moments", "_low_rank", "_calibrate", "_checkpoint", "_losses", "_parameters"},
    {f"variants.{file.stem}" for file in PACKAGE.glob("variants/[!_]*.py")}
    | {"variants._template"},
    {"variants"},
    {"_targets", "_plan"},
    {"_init", "_stack", "_summary", "_leaves", "_fingerprint"},
    {"_io", "_peft_formats"},
    {"_training", "_peft_read", "_peft_write"},
    {"peft"},
    {"_views"},
    {"_operands"},
    {"_sites"},
    {"_replacements"},
    {"_rows", "_merge", "_attach", "_algebra"},
    {"_inject"},
    {"_call", "_fold"},
    {"_proof"},
    {"_sweep"},
    {""},
    {"__main__"},
]


def name_of(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inside = node.module == "lora_func.variants"
            submodules = [
                a.name for a in node.names if (PACKAGE / "variants" / f"{a.name}.py").exists()
            ]
            yield from (
                (f"{node.module}.{name}" for name in submodules)
                if inside and submodules
                else [node.module]
            )


def rank(name):
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_downwards(file):
    for imported in imports_of(file):
        if imported == "lora_func" or imported.startswith("lora_func."):
            other = imported.removeprefix("lora_func").lstrip(".")
            assert rank(other) < rank(name_of(file)), f"{name_of(file)} imports {other}"


def test_every_module_stands_in_a_layer():
    assert {name_of(file) for file in FILES} == set().union(*LAYERS)


def test_the_table_of_variants_is_the_folder():
    files = {f.stem for f in (PACKAGE / "variants").glob("*.py")} - {"__init__", "_template"}
    assert {variant.init.__module__.rpartition(".")[2] for variant in variants._TABLE} == files
    assert len({variant.name for variant in variants._TABLE}) == len(variants._TABLE)


def test_a_variant_file_ends_with_its_variant():
    for file in (PACKAGE / "variants").glob("[!_]*.py"):
        last = ast.parse(file.read_text()).body[-1]
        assert isinstance(last, ast.Assign), file
        assert last.targets[0].id in {"VARIANT", "VARIANTS"}, file


def test_files_and_functions_are_short():
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= 250, f"{file.name}: {text.count(chr(10))} lines"
        nodes = [*ast.walk(ast.parse(text))]
        documented = {
            node: (ast.get_docstring(node, clean=False) or "").count("\n")
            for node in nodes
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        }
        if file.parent.name == "variants":
            lines = text.count("\n") - sum(documented.values())
            assert lines <= (170 if "VARIANTS = " in text else 130), (
                f"{file.name}: {lines} lines beside its docstrings"
            )
        for node in documented:
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1 - documented[node]
                assert lines <= 40, f"{file.name}: {node.name} has {lines} lines"


def test_the_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import lora_func;"
        "new = set(sys.modules) - before; heavy = {'transformers', 'bitsandbytes', 'peft', 'rich',"
        " 'accelerate', 'safetensors', 'torch._dynamo', 'torch._inductor'};"
        "found = {m for m in new if {m, m.split('.')[0]} & heavy}; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
