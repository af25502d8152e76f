"""The name of one row."""

from typing import NamedTuple


class FrameKey(NamedTuple):
    """One row = one time step with all its views (the encoders are multi-view)."""

    source: str  # digest of the source's revision, so that two data sets never share a key
    suite: str
    task: str
    episode: int
    step: int

    def __str__(self) -> str:
        return f"{self.suite}/{self.task}/episode {self.episode}/step {self.step}"
