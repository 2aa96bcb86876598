"""The project's commands: ``python -m nox -s tests`` and so on, the same here and in CI."""

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_venv = "yes"

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
    """Check the types of the package."""
    install(session, "types", "-e", ".")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, doctests and the code of README and docs; arguments go to pytest."""
    install(session, "test", "-e", ".[all]")
    # many small models: a process for each core is faster than threads for each process
    one_thread = {"OMP_NUM_THREADS": "1"}
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs, env=one_thread)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train adapters on real text with a real model, offline; arguments go to examples/probe.py."""
    install(session, "quickstart", "-e", ".[hf]")
    session.run("python", "examples/probe.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure everything; or one file of benchmarks/, named first, to which arguments go."""
    install(session, "bench", "-e", ".[all]")
    name, *rest = session.posargs or ["run"]
    session.run("python", f"benchmarks/{name}.py", *rest)
