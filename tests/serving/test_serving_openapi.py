"""The API against its own OpenAPI description: schemathesis makes the requests, and judges the answers."""

from typing import get_args

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from served import bearer, key, opened, served

from pema.serving.policy import Endpoint, Policy

OPERATIONS = [
    ("GET", "/v1/plm"),
    ("GET", "/v1/tokenizer"),
    ("GET", "/v1/head"),
    ("POST", "/v1/represent"),
    ("POST", "/v1/predict"),
    ("POST", "/v1/sessions"),
    ("POST", "/v1/sessions/{name}/advance"),
    ("DELETE", "/v1/sessions/{name}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def client(plm):
    """A server whose key may do everything."""
    with served(plm, Policy(keys=(key(endpoints=get_args(Endpoint)),))) as client:
        client.headers.update(bearer())
        yield client


@pytest.fixture(scope="module")
def api(client):
    async def running(scope, receive, send):
        """The application that runs already: schemathesis would start and stop it around every request."""
        if scope["type"] != "lifespan":
            await client.app(scope, receive, send)
            return
        for what in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{what}.complete"})

    return schemathesis.openapi.from_asgi("/openapi.json", running)


def test_every_endpoint_is_described(api):
    assert {(result.ok().method.upper(), result.ok().path) for result in api.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
    + [(*operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation[0] == "POST"],
)
def test_no_request_gets_a_5xx_or_an_answer_that_is_not_described(api, method, path, mode):
    operation = api[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(case):
        # A schema cannot say that two lists go together, or what the vocabulary holds: right types may be refused.
        case.call_and_validate(headers=bearer(), excluded_checks=[positive_data_acceptance])

    check()


@pytest.mark.parametrize("path", ["/v1/represent", "/v1/predict", "/v1/sessions"])
def test_the_examples_are_accepted(client, path):
    described = client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]
    (example,) = described["content"]["application/json"]["schema"]["examples"]
    assert client.post(path, json=example).is_success


def test_the_example_of_a_step_is_accepted(client):
    described = client.get("/openapi.json").json()["paths"]["/v1/sessions/{name}/advance"]["post"]["requestBody"]
    (example,) = described["content"]["application/json"]["schema"]["examples"]
    _, path = opened(client, [[1, 2]])
    assert client.post(f"{path}/advance", json=example).is_success
