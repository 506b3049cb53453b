"""Room on the disk that the store lies on."""

from typing import Protocol


class Space(Protocol):
    """What the control plane asks of the disk of its store."""

    def require(self) -> None:
        """Raises EXHAUSTED while the disk is so full that nothing new may be made; what removes goes on."""
        ...


class Plenty:
    """A disk that never fills: for stores that lie on none."""

    def require(self) -> None:
        return
