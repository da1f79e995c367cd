"""W&B's module as the plugin uses it, without W&B (its own offline files are read back in tests/integration)."""

from types import SimpleNamespace
from typing import Any


class WandbMock:
    """A mock of W&B: keeps what the plugin hands to its module and its run."""

    def __init__(self) -> None:
        self.run = SimpleNamespace(id="r1", summary={}, alert=self._alert, log_artifact=self._log_artifact)
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.alerts: list[tuple[str, str]] = []
        self.artifacts: dict[str, tuple[Any, list[str]]] = {}

    Table = staticmethod(lambda columns, data: SimpleNamespace(columns=columns, data=data))
    Image = staticmethod(lambda path: SimpleNamespace(path=path))

    class Artifact:
        def __init__(self, name: str, type: str, metadata: dict[str, Any], description: str) -> None:
            self.name, self.type, self.metadata = name, type, metadata
            self.added: list[tuple[Any, ...]] = []

        def add_dir(self, folder: str) -> None:
            self.added.append(("dir", folder))

        def add_reference(self, uri: str, checksum: bool = True) -> None:
            self.added.append(("reference", uri, checksum))

    def log(self, data: dict[str, Any], step: int) -> None:
        self.logged.append((data, step))

    def _alert(self, title: str, text: str) -> None:
        self.alerts.append((title, text))

    def _log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.artifacts[artifact.name] = (artifact, aliases)
