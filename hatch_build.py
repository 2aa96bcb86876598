"""The addresses of the project: those of the repository that builds the package."""

import os

from hatchling.metadata.plugin.interface import MetadataHookInterface


class AddressHook(MetadataHookInterface):
    """Names the repository of a build on GitHub; other builds name none."""

    def update(self, metadata: dict[str, object]) -> None:
        """Add ``urls``."""
        repository = os.environ.get("GITHUB_REPOSITORY")
        metadata["urls"] = {}
        if repository:
            address = f"{os.environ['GITHUB_SERVER_URL']}/{repository}"
            owner, _, name = repository.partition("/")
            metadata["urls"] = {
                "Source": address,
                "Documentation": f"https://{owner}.github.io/{name}/",
                "Changelog": f"{address}/blob/main/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }
