"""What every record shares: frozen, tolerant of fields a newer version wrote, strict at the API edge."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, PlainSerializer, StringConstraints


def _freeze(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(value))


StringMap = Annotated[Mapping[str, str], AfterValidator(_freeze), PlainSerializer(dict, return_type=dict[str, str])]
"""A frozen mapping of strings: environment, labels."""

AnyMap = Annotated[Mapping[str, Any], AfterValidator(_freeze), PlainSerializer(dict, return_type=dict[str, Any])]
"""A frozen mapping whose values are JSON: operation parameters and results."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
"""What users call an instance, volume, network or project: lower case, at most 63 characters."""

Timestamp = AwareDatetime


class Record(BaseModel):
    """A frozen value that is at once API contract, stored record and in-memory value.

    Stored records keep fields they do not know, so that an older version rewrites a newer record without loss;
    the API edge refuses them by validating with ``extra="forbid"``.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        ser_json_timedelta="float",
        val_json_bytes="base64",
        allow_inf_nan=False,  # JSON has neither: a record with one could not be read again
    )

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed. The changed values are validated."""
        return type(self).model_validate({**dict(self), **changes})

    def to_json(self) -> bytes:
        """The stored and transmitted form: compact JSON, absent optionals left out."""
        return self.model_dump_json(exclude_none=True).encode()

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """Read a stored record. Raises pydantic's ``ValidationError`` if it is not one of ours."""
        return cls.model_validate_json(data)
