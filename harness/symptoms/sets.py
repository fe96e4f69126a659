"""temporary"""

from pathlib import Path

from harness.files import digest_json, read_json


class SymptomSet:
    def __init__(self, data: dict) -> None:
        self.data = data

    @classmethod
    def load(cls, path: Path) -> "SymptomSet":
        return cls(read_json(Path(path)))

    def digest(self) -> str:
        return digest_json(self.data["classes"])

    def texts(self, classes: list[str]) -> list[list[str]]:
        from harness.errors import UserError

        own = {c["name"]: [s["text"] for s in c["symptoms"]] for c in self.data["classes"]}
        if set(classes) - set(own):
            raise UserError("symptoms: missing class")
        return [own[c] for c in classes]
