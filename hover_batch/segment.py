"""The main job: a cohort in, nuclei tables out. Checks everything that can be checked, runs, and sums up."""

from __future__ import annotations

from dataclasses import dataclass

EXIT_DONE, EXIT_SOME_FAILED, EXIT_NONE = 0, 3, 4


@dataclass(frozen=True)
class Outcome:
    """What a run came to, for the closing lines and the exit code."""

    finished: int
    failed: int
    nuclei: int

    @property
    def exit_code(self) -> int:
        if not self.failed:
            return EXIT_DONE
        return EXIT_SOME_FAILED if self.finished else EXIT_NONE
