"""The project's commands: ``python -m nox -s tests`` and so on, the same here and in CI."""

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.reuse_venv = "yes"

# many small models: a process for each core is faster than threads in each process
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

FOLLOWED = ("transformers", "peft", "bitsandbytes")
OLDEST = ("transformers==5.0.0", "peft==0.21.0", "bitsandbytes==0.46.0")
"""The libraries whose private names compat.py uses: followed by name, and as first allowed."""

PYPROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, group: str, *packages: str) -> None:
    """Install a dependency group of pyproject.toml, and packages, under the constraints."""
    requirements = nox.project.dependency_groups(PYPROJECT, group)
    session.install("-c", "constraints.txt", *requirements, *packages)


@nox.session
def lint(session: nox.Session) -> None:
    """Check format, style and docstrings; ``-- --fix`` mends what can be mended."""
    install(session, "lint")
    if "--fix" in session.posargs:
        session.run("ruff", "check", "--fix", ".")
        session.run("ruff", "format", ".")
        return
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, and of code that uses it."""
    install(session, "types", "-e", ".[testing]")
    session.run("mypy", *session.posargs)
    session.run("mypy", "--strict", "--config-file=", "tests/downstream.py")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, doctests and the code of README and docs; arguments go to pytest."""
    install(session, "test", "-e", ".[all]")
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs, env=ONE_THREAD)


@nox.session(name="tests-oldest")
def tests_oldest(session: nox.Session) -> None:
    """Run the tests with the oldest allowed transformers, peft and bitsandbytes."""
    install(session, "test", "-e", ".[all]", *OLDEST)
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs, env=ONE_THREAD)


@nox.session(name="tests-nightly")
def tests_nightly(session: nox.Session) -> None:
    """Run the tests with the newest transformers, peft and bitsandbytes, pre-releases included.

    With TORCH_INDEX set, the newest torch of that index too.
    """
    install(session, "test", "-e", ".[all]")
    session.install("-c", "constraints.txt", "--upgrade", "--pre", *FOLLOWED)
    if index := os.environ.get("TORCH_INDEX"):
        session.install("--upgrade", "--pre", "--index-url", index, "torch")
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs, env=ONE_THREAD)


@nox.session
def mutants(session: nox.Session) -> None:
    """Break the code in many places and count the tests that fail; see tests/mutants.py."""
    install(session, "test", "-e", ".[all]", "cosmic-ray>=8.4")
    session.run("python", "tests/mutants.py", *session.posargs)


@nox.session
def tables(session: nox.Session) -> None:
    """Write the tables of README, docs and CONTRIBUTING that are made from docstrings."""
    install(session, "test", "-e", ".")
    session.run("python", "docs/tables.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site in site/, and check its links; ``-- serve`` shows it while you write."""
    install(session, "docs", "-e", ".[testing,wavelets]")
    session.run("mkdocs", *(session.posargs or ["build"]), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def quickstart(session: nox.Session) -> None:
    """Compare a head and LoRAs on real text, offline; arguments go to examples/quickstart.py."""
    install(session, "quickstart", "-e", ".[hf]")
    session.run("python", "examples/quickstart.py", *session.posargs)


@nox.session
def probe(session: nox.Session) -> None:
    """Train and check any variants on real text, offline; arguments go to examples/probe.py."""
    install(session, "quickstart", "-e", ".[hf,wavelets]")
    session.run("python", "examples/probe.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Make sdist and wheel in dist/, install the wheel by itself, and use it."""
    session.install("build>=1.2")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist", ".")
    (wheel,) = Path("dist").glob("*.whl")
    session.install("-c", "constraints.txt", str(wheel))
    session.install("--no-deps", "--force-reinstall", str(wheel))
    smoke = Path("tests", "smoke.py").resolve()
    session.chdir(session.create_tmp())
    session.run("python", str(smoke))


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a GPU, and measure steps, graphs, sweeps and memory there."""
    install(session, "test", "-e", ".[all]")
    session.run("python", "benchmarks/gpu.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure everything; or one file of benchmarks/, named first, to which arguments go."""
    install(session, "bench", "-e", ".[all]")
    name, *rest = session.posargs or ["run"]
    session.run("python", f"benchmarks/{name}.py", *rest)
