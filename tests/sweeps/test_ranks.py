"""What goes through the store that ranks share on the network: names of planned runs, and nothing that is run."""

import json
from pathlib import Path

import pytest

from harness.errors import UserError
from sweeps import ranks
from sweeps.ranks import deal, planned_groups
from sweeps.units import CONFIGS, LOGS, PACK_COMMAND, PLAN, RUN_COMMAND, Unit

A, B, C = (f"coop_16shot_seed{seed}_0123456789ab" for seed in (1, 2, 3))


class Store:
    """The store, of which somebody else may have set what it holds."""

    def __init__(self, forged: bytes | None = None) -> None:
        self.forged, self.values, self.counts = forged, dict[str, bytes](), dict[str, int]()

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key] if self.forged is None else self.forged

    def add(self, key: str, amount: int) -> int:
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / PLAN).write_text(json.dumps({"runs": [A, B, C]}))
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """What would have been started."""
    units: list[Unit] = []
    monkeypatch.setattr(ranks, "_run", lambda unit, *_: units.append(unit) or 143)  # type: ignore[func-returns-value]
    monkeypatch.setattr(ranks, "_own_gpu", lambda: None)
    return units


def test_names_become_commands_on_each_rank_itself(out: Path, started: list[Unit]) -> None:
    deal(out, [[A], [B, C]], Store(), 0, 1)  # type: ignore[arg-type]
    configs = {name: str(out / CONFIGS / f"{name}.yaml") for name in (A, B, C)}
    assert started == [
        Unit((A,), (*RUN_COMMAND, configs[A]), out / LOGS / f"{A}.log"),
        Unit((B, C), (*PACK_COMMAND, configs[B], configs[C]), out / LOGS / f"{B}.log"),
    ]


@pytest.mark.parametrize(
    "forged",
    [
        [{"names": [A], "command": ["sh", "-c", "id"], "log": "log"}],
        [["../../../etc/cron.d/x"]],
        [["coop_16shot_seed9_0123456789ab"]],
        [[A, "--help"]],
        [[A], [A]],
        [[]],
        [[1]],
        {"a": 1},
        "x",
    ],
    ids=str,
)
def test_anything_else_is_refused(out: Path, started: list[Unit], forged: object) -> None:
    said = json.dumps(forged).encode()
    with pytest.raises(UserError, match="the processes' store"):
        deal(out, [[A]], Store(said), 1, 2)  # type: ignore[arg-type]
    assert started == []
    with pytest.raises(UserError, match="the processes' store"):
        planned_groups(out, b"\xff not even JSON")


def test_a_forged_counter_starts_nothing(out: Path, started: list[Unit]) -> None:
    store = Store()
    store.counts["next"] = -2
    deal(out, [[A], [B]], store, 0, 1)  # type: ignore[arg-type]
    assert started == []
