"""How a data set is read, and what was left out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Reading"]

_SHOWN = 5  # bad rows that a message names


@dataclass
class Reading:
    """How a data set is read, and what was left out.

    Attributes:
        named: the columns of image, caption and label, where given.
        skip: leave bad rows out.
        allow_outside: let paths leave the file's folder.
        attributes: columns kept beside these.
        skipped: why each row was left out.
        places: where each row of the result comes from, if the source says.
    """

    named: Sequence[str | None] = (None, None, None)
    skip: bool = False
    allow_outside: bool = False
    attributes: Sequence[str] = ()
    skipped: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    @contextmanager
    def row(self) -> Iterator[None]:
        """Around the work on one row: what is wrong with it is raised or, with ``skip``, noted."""
        try:
            yield
        except (ValueError, OSError) as error:
            if not self.skip:
                raise
            self.skipped.append(str(error))

    def summary(self, source: str, kept: int) -> str:
        """One line for the user."""
        shown = "; ".join(self.skipped[:_SHOWN]) + ("; ..." if len(self.skipped) > _SHOWN else "")
        return f"{source}: left out {len(self.skipped)} of {kept + len(self.skipped)} rows: {shown}"
