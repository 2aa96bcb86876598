"""Package structure: import order, public faces, private names, file length, light import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_func
from lora_func import variants

PACKAGE = Path(lora_func.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOT = PACKAGE.parent

ORDER = (
    *("version", "errors", "checks", "compat", "modules", "configs", "weights", "variant"),
    *("numerics", "variants", "adapter", "rules", "targeting", "runtime", "initialization"),
    *(
        "sweep",
        "graphs",
        "export",
        "files",
        "distributed",
        "peft",
        "testing",
        "__init__",
        "costs",
        "__main__",
    ),
)
"""The packages and top-level modules; each imports only from those before it, and from itself."""


def package_of(name):
    """The part of a module's name that ``ORDER`` lists; the root is ``__init__``."""
    return name.split(".")[1] if "." in name else "__init__"


def name_of(file):
    return ".".join(("lora_func", *file.relative_to(PACKAGE).with_suffix("").parts))


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*node.module.split("."), f"{alias.name}.py")
                is_module = inner.exists() or inner.with_suffix("").is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_upwards_and_go_through_faces(file):
    here = package_of(name_of(file))
    for imported in imports_of(file):
        if imported.split(".")[0] != "lora_func":
            continue
        there = package_of(imported)
        assert ORDER.index(there) <= ORDER.index(here), f"{name_of(file)} imports {imported}"
        private = re.search(r"\._[a-z]\w*", imported)
        assert there == here or not private, f"{name_of(file)}: {imported} is private to {there}"


def test_the_order_names_every_package():
    there = {file.stem for file in PACKAGE.glob("*.py")} | {
        folder.parent.name for folder in PACKAGE.glob("*/__init__.py")
    }
    assert there == set(ORDER)


def test_every_package_says_what_belongs_there():
    for face in PACKAGE.glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(face.read_text()))
        assert text, face
        assert len(text.split("\n\n")) > 1 or len(text.splitlines()) > 2, face


def own_names(tree):
    """The private names that a file defines, or sets on its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif getattr(getattr(node, "value", None), "id", None) in ("self", "cls", "handle"):
            yield getattr(node, "attr", "")


def private_names(file):
    """The private names of other libraries that a file uses."""
    tree = ast.parse(file.read_text())
    own = {*own_names(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-zA-Z]", node.attr):
            yield from {node.attr} - own - {"_replace"}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] != "lora_func":
            yield from (a.name for a in node.names if re.match(r"_[a-z]", a.name))
            yield from re.findall(r"\._[a-z]\w*", node.module)


def test_private_names_of_other_libraries_stand_in_compat_alone():
    for file in FILES:
        if file.name != "compat.py":
            assert not {*private_names(file)}, name_of(file)


def test_no_variant_is_named_outside_its_file():
    names = {variant.name for variant in variants._TABLE}
    general = re.compile(r"full|lora")  # allowed: "full" for trained heads, "lora" as the default
    folders = ["lora_func/peft", "lora_func/adapter", "lora_func/files", "lora_func/export"]
    folders += ["lora_func/runtime", "lora_func/sweep", "benchmarks", "examples"]
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                assert general.fullmatch(node.value), f"{file}: {node.value!r}"


def made_in(file):
    return getattr(file, "VARIANTS", None) or (file.VARIANT,)


def test_the_table_of_variants_is_the_folder():
    files = {f.stem for f in (PACKAGE / "variants").glob("[!_]*.py")}
    made = {id(one): file for file in files for one in made_in(getattr(variants, file))}
    assert {made[id(variant)] for variant in variants._TABLE} == files
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
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                documented = (ast.get_docstring(node, clean=False) or "").count("\n")
                lines = node.end_lineno - node.lineno + 1 - documented
                assert lines <= 40, f"{file.name}: {node.name} has {lines} lines"


def test_the_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import lora_func;"
        "new = set(sys.modules) - before; heavy = {'transformers', 'bitsandbytes', 'peft', 'rich',"
        " 'accelerate', 'safetensors', 'hypothesis', 'pytest', 'torch._dynamo', 'torch._inductor'};"
        "found = {m for m in new if {m, m.split('.')[0]} & heavy}; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
