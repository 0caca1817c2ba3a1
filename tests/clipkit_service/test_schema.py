"""The OpenAPI document against the service: whatever is sent, sound or not, no answer is a 5xx."""

import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from clipkit_service import create_app
from clipkit_service.commands import claim_address

CONFORMS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def address(world: Any) -> Iterator[str]:
    """The service on a real port, in a thread."""
    with claim_address("127.0.0.1", 0) as claimed:
        app = create_app(world.settings())
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [claimed]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{claimed.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_server_error(address: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    called = 0
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=12,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        def sent(case: Any) -> None:
            nonlocal called
            called += 1
            response = case.call(timeout=20)
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert response.headers["content-type"][0] == "application/problem+json", response.text
            case.validate_response(response, checks=CONFORMS)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the generator's, about unusual schemas
                sent()
        except Unsatisfiable:
            continue  # nothing can be wrong about a route without input
    assert called > 60
