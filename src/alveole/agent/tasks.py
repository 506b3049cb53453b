"""Operations that the agent carries out itself. Each is idempotent: after a crash it is carried out again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from alveole.agent import snapshots, templates
from alveole.agent.engine import Engine
from alveole.agent.faults import told
from alveole.agent.steps import StepLog
from alveole.model.agent import TaskReport
from alveole.model.error import AlveoleError, ErrorCode, internal
from alveole.model.image import ImageContent, Recipe
from alveole.model.operation import Operation, OperationState
from alveole.model.snapshot import Snapshot
from alveole.model.volume import Volume

log = logging.getLogger(__name__)
PROGRESS_EVERY_S = 0.5
RETRY_S = 1.0


class Task:
    """One operation under way on this node."""

    def __init__(self, engine: Engine, operation: Operation) -> None:
        self._engine = engine
        self._operation = operation
        self._steps = StepLog(operation.verb, engine.clock, engine.fault)
        self._progress = ""
        self._carrier: asyncio.Task[Any] | None = None
        self._ended: Operation | None = None  # as it is once it is over, whoever ended it

    def end(self, operation: Operation) -> None:
        """It is over: stop what is still done for it."""
        self._ended = operation
        if self._carrier is not None:
            self._carrier.cancel()

    async def run(self) -> None:
        """Carry it out and report the outcome. Cancelled when the operation was, or when the daemon stops."""
        self._carrier = asyncio.current_task()
        reporter = asyncio.ensure_future(self._report_progress())
        try:
            result = await self._carry_out()
            if not await self._report(finished=True, result=result):
                await self._take_back()
        except asyncio.CancelledError:
            if self._ended is not None and self._ended.state is not OperationState.DONE:
                await asyncio.shield(self._take_back())
            raise
        except AlveoleError as error:
            await self._report(finished=True, error=error)
        except OSError as error:
            await self._report(finished=True, error=told(error))
        except Exception:
            log.exception("operation %s failed", self._operation.id)
            fault = internal("the agent met a fault of its own", hint="the daemon's log has the details")
            await self._report(finished=True, error=fault)
        finally:
            reporter.cancel()
            await asyncio.wait({reporter})

    async def _carry_out(self) -> Mapping[str, Any]:
        actions: dict[str, Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]] = {
            "image.pull": self._image_pull,
            "image.import": self._image_import,
            "image.build": self._image_build,
            "image.rm": self._image_rm,
            "volume.create": self._volume_create,
            "volume.rm": self._volume_rm,
            "snapshot.create": self._snapshot_create,
            "snapshot.rm": self._snapshot_rm,
            "template.rm": self._template_rm,
            "template.refresh": self._template_refresh,
        }
        action = actions.get(self._operation.verb)
        if action is None:
            raise internal(f"this agent does not know {self._operation.verb}", hint="upgrade this node")
        if self._operation.verb == "snapshot.create":  # has steps of its own
            return await action(self._operation.params)
        with self._steps.step(self._operation.verb.partition(".")[2]):
            return await action(self._operation.params)

    async def _take_back(self) -> None:
        """It was cancelled when it had just been carried out. Images that no record names are collected anyway."""
        if self._operation.verb == "volume.create":
            await self._engine.volumes.remove(self._operation.params["volume"]["id"])
        elif self._operation.verb == "snapshot.create":
            await self._snapshot_rm(self._operation.params)

    async def _image_pull(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        content = await self._engine.images.pull(
            params["reference"], tls_verify=params["tls_verify"], progress=self._note
        )
        return _content(content)

    async def _image_import(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        return _content(await self._engine.images.load(Path(params["path"]), params["format"], self._note))

    async def _image_build(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        base = ImageContent.model_validate(params["base"]) if "base" in params else None
        content = await self._engine.images.build(
            Recipe.model_validate(params["recipe"]),
            Path(params["directory"]),
            base,
            use_cache=params["use_cache"],
            progress=self._note,
        )
        return _content(content)

    async def _image_rm(self, _params: Mapping[str, Any]) -> Mapping[str, Any]:
        used = await self._engine.link.used_images()
        freed_bytes = await self._engine.images.collect(used)
        keys = {content.digest.removeprefix("sha256:") for content in used}
        return {"freed_bytes": freed_bytes + await self._engine.volumes.collect_bases(keys)}

    async def _volume_create(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        volume = Volume.model_validate(params["volume"])
        if source := params.get("source"):
            await snapshots.fill_volume(self._engine, volume, source["snapshot_id"], source["volume_id"])
        else:
            await self._engine.volumes.create(volume)
        return {}

    async def _volume_rm(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        await self._engine.volumes.remove(params["id"])
        return {}

    async def _snapshot_create(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        await snapshots.make(self._engine, Snapshot.model_validate(params["snapshot"]), self._steps)
        return {}

    async def _snapshot_rm(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        await snapshots.remove(self._engine, Snapshot.model_validate(params["snapshot"]))
        return {}

    async def _template_rm(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        return await templates.remove(self._engine, params["key"])

    async def _template_refresh(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        return await templates.refresh(self._engine, params["key"], self._operation.id)

    def _note(self, progress: str) -> None:
        self._progress = progress

    async def _report_progress(self) -> None:
        told = ""
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            if self._progress != told:
                told = self._progress
                await self._report(finished=False)

    async def _report(
        self, *, finished: bool, result: Mapping[str, Any] | None = None, error: AlveoleError | None = None
    ) -> bool:
        """False if the operation was cancelled meanwhile."""
        told = {"code": error.code.value, "message": error.message, "hint": error.hint} if error else None
        report = TaskReport(
            project=self._operation.project,
            operation_id=self._operation.id,
            steps=self._steps.steps,
            progress=self._progress,
            finished=finished,
            result=result,
            error=told,
        )
        while True:
            try:
                await self._engine.link.report_task(report)
            except AlveoleError as refused:
                if refused.code is ErrorCode.CANCELLED:
                    return False
                log.warning("could not report on operation %s: %s", self._operation.id, refused)
                if not finished:
                    return True
                await asyncio.sleep(RETRY_S)
            else:
                return True


def _content(content: ImageContent) -> Mapping[str, Any]:
    return {"content": content.model_dump(mode="json", exclude_none=True)}
