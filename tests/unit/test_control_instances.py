"""What users ask of instances ends, in records and on the host, as they asked."""

from pathlib import Path

import pytest

from alveole.control import instances, keys
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Desired, Phase
from alveole.model.operation import OperationState
from tests.control_world import living
from tests.virtual import virtual

@virtual
async def test_run(tmp_path: Path) -> None:
    async with living(tmp_path) as world:
        operation = await world.run()
        assert operation.state is OperationState.DONE, operation
        assert world.running == {"web"}
        world.check()
