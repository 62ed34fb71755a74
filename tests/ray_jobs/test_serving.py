"""A linker on Ray Serve: the same answers, a killed replica, replicas that come with the load."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray
from ray import serve

import dsmip
from dsmip.errors import UserError
from dsmip.runs.run import Run
from ray_jobs.serving import app
from tests.support.cluster.ray_heads import free_ports, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]
WAIT_SECONDS = 300.0


@pytest.fixture
def port() -> Iterator[int]:
    """Serve on a port of its own, on the shared Ray."""
    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()


def num_running() -> int:
    """Replicas that answer."""
    deployments = serve.status().applications["dsmip"].deployments
    states = deployments["linker"].replica_states if "linker" in deployments else {}
    return sum(count for state, count in states.items() if state == "RUNNING")


def ask(address: str, client: httpx.Client) -> Any:
    """An answer, asked for again where a replica was just lost, as clients do."""
    for _ in range(100):
        try:
            answer = client.post(address, json={"word": "red", "sentence": "a red thing", "top": 2})
        except httpx.TransportError:
            continue
        if answer.status_code < 500:
            return answer.json()["mentions"][0]["links"]
    pytest.fail(f"no answer: {answer.status_code} {answer.text}")


def test_a_killed_replica_loses_no_request_and_load_brings_a_second_one(run: Run, port: int) -> None:
    arguments = {"model": str(run.folder), "max_replicas": "2", "ongoing": "2", "cpus": "0.5"}
    serve.run(app(arguments), name="dsmip")
    address = f"http://127.0.0.1:{port}/link"
    expected = [link.entity_id for link in dsmip.load(run.folder).link("red", "a red thing", top=2)]
    done, answers = threading.Event(), list[Any]()

    def load() -> None:
        with httpx.Client(timeout=120) as client:
            while not done.is_set():
                answers.append(ask(address, client))

    with ThreadPoolExecutor(8) as clients:
        loads = [clients.submit(load) for _ in range(8)]
        try:
            wait_until(lambda: len(answers) > 8, WAIT_SECONDS, "no answers")
            wait_until(lambda: num_running() == 2, WAIT_SECONDS, "no second replica comes")
            victim = next(
                each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if "linker" in each["name"]
            )
            ray.kill(ray.get_actor(victim, namespace="serve"))
            before = len(answers)
            wait_until(lambda: len(answers) > before + 40, WAIT_SECONDS, "no answers after a replica was killed")
            wait_until(lambda: num_running() == 2, WAIT_SECONDS, "the killed replica is not replaced")
        finally:
            done.set()
        for each in loads:
            each.result(WAIT_SECONDS)  # an answer that never came fails here
    assert all([link["entity_id"] for link in links] == expected for links in answers)


@pytest.mark.parametrize(
    ("arguments", "message"), [({}, "model: Field required"), ({"model": "x", "modle": "y"}, "modle")]
)
def test_wrong_arguments_are_named(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        app(arguments)
