"""Health: what an instance's own check says of it."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from alveole.model.base import Record


class Health(StrEnum):
    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class HealthCheck(Record):
    """A command run inside the instance; exit 0 is healthy."""

    command: tuple[str, ...] = Field(min_length=1)
    interval_s: Annotated[float, Field(ge=0.1)] = 30.0
    timeout_s: Annotated[float, Field(ge=0.1)] = 30.0
    start_period_s: Annotated[float, Field(ge=0)] = 0.0
    retries: Annotated[int, Field(ge=1)] = 3
