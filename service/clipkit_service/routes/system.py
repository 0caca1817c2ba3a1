"""What operators ask: is it alive, is it ready, what does it count."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from clipkit_service.answers import Ready
from clipkit_service.routes.shared import REFUSALS, EngineDep

router = APIRouter(tags=["system"])


@router.get("/healthz", summary="Alive?")
async def healthz() -> dict[str, str]:
    """The event loop runs. Says nothing about the model: restart when this fails, not when busy."""
    return {"status": "ok"}


@router.get("/readyz", responses={**REFUSALS, 503: {"model": Ready}}, summary="Ready?")
async def readyz(engine: EngineDep, response: Response) -> Ready:
    """A real forward pass and a real search succeed; 503 with the reasons when they do not."""
    faults = await engine.faults()
    if faults:
        response.status_code = 503
        response.headers["Retry-After"] = "1"
    queues = {b.name: {"depth": b.depth, "limit": b.max_items} for b in (engine.images, engine.texts)}
    sound = not faults
    return Ready(
        status="ready" if sound else "not ready",
        reasons=faults,
        models={engine.model_id: not any("model" in f or "worker" in f or "shutting" in f for f in faults)},
        indexes={engine.index_id: not any("index" in f for f in faults)} if engine.index is not None else {},
        queues=queues,
    )


@router.get("/metrics", response_class=Response, summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    """Counters and histograms in Prometheus' text format."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
