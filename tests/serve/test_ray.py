"""Two replicas under Ray Serve, set up as the page says: they share adapters, and a restart loses no request.

Without Ray this is skipped; `make ray` runs it in an environment that has it.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import httpx2 as httpx
import pytest

import dvora
from tests.serve.served import ADMIN, TEXTS, TOKEN, Alone, ask, copied, probabilities

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="make ray has it")
PAGE = Path(dvora.__file__).parents[2] / "docs" / "how-to" / "ray-serve.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
INSTALL, START, DEPLOY, PUT, ROUTED, RESTART, SCALE = BLOCKS
VALUES = "adapter_model.safetensors"
CREATED = re.compile(r'^dvora_requests_created\{route="/v1/classify",status="200"\} (\S+)$', re.MULTILINE)
"""When a replica first classified a text: no two have the same."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


class Cluster:
    """A folder with what the page names, and a Ray of the test's own."""

    def __init__(self, desk: Path, ray_folder: str) -> None:
        self.desk, self.port = desk, free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        programs = Path(sys.executable).parent
        address = f"127.0.0.1:{free_port()}"
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RAY_ADDRESS": address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "DVORA_SERVE_TOKEN": TOKEN,
        }
        options = f"--node-ip-address 127.0.0.1 --port {address.partition(':')[2]} --num-cpus 4 --temp-dir {ray_folder}"
        command = f"{START.splitlines()[-1]} --block {options} --include-dashboard false --object-store-memory 80000000"
        self.process = subprocess.Popen(
            command.split(),
            cwd=desk,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def run(self, block: str) -> str:
        """Run a block of the page."""
        script = block.replace("curl ", "curl -sS --fail-with-body ")
        script = script.replace("8000", str(self.port))
        ended = subprocess.run(
            ["bash", "-ec", script], cwd=self.desk, env=self.environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, (block, ended.stdout, ended.stderr)
        return ended.stdout

    def metrics(self) -> dict[str, str]:
        """What the replicas that classified texts count, by what only one of them says."""
        with ThreadPoolExecutor(8) as pool:
            # Several at a time, since one after another may all go to one replica.
            texts = list(pool.map(lambda _: self.client.get("/metrics").text, range(64)))
        return {match[1]: text for text in texts for match in CREATED.finditer(text)}

    def wait(self, is_there: Callable[[], bool], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(httpx.HTTPError):
                if is_there():
                    return
            time.sleep(0.2)
        raise AssertionError("it did not come")

    def busy(self) -> bool:
        """Ask until both replicas have answered."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: ask(self.client, "a0").raise_for_status(), range(24)))
        return len(self.metrics()) == 2


@pytest.fixture(scope="module")
def cluster(critic: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    desk = tmp_path_factory.mktemp("desk")
    copied(critic, desk / "minilm")
    copied(trained, desk / "customers")
    copied(trained / "a1", desk / "new")
    # Sockets have short names.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        ray = Cluster(desk, folder)
        try:
            ray.run(DEPLOY.replace("serve run", "until ray status > /dev/null 2>&1; do sleep 0.2; done; serve run"))
            ray.wait(lambda: ray.client.get("/readyz").status_code == 200)
            ray.wait(ray.busy)
            yield ray
        finally:
            # The rest ends with these; asked kindly, Ray takes half a minute.
            os.killpg(ray.process.pid, signal.SIGKILL)
            ray.process.wait()
            ray.client.close()


def test_every_replica_serves_what_one_of_them_took(cluster: Cluster, trained: Path, critic: Path) -> None:
    alone = Alone(critic)

    def answers(_: int) -> httpx.Response:
        return ask(cluster.client, "tenant")

    for source in ("a1", "a2", "a3", "a1"):
        content = (trained / source / VALUES).read_bytes()
        put = cluster.client.put("/v1/adapters/tenant", content=content, headers=ADMIN)
        assert put.status_code in (200, 201)
        with ThreadPoolExecutor(8) as pool:
            for answer in pool.map(answers, range(24)):
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-dvora-digest"] == put.headers["x-dvora-digest"]
                assert probabilities(answer) == alone.answer(trained / source)
    cluster.wait(lambda: len(cluster.metrics()) == 2)
    assert cluster.client.delete("/v1/adapters/tenant", headers=ADMIN).status_code == 200
    assert {answers(0).status_code for _ in range(16)} == {404}


def test_changes_at_two_replicas_are_all_kept(cluster: Cluster, trained: Path) -> None:
    content = (trained / "a1" / VALUES).read_bytes()

    def put(number: int) -> int:
        return int(cluster.client.put(f"/v1/adapters/new{number}", content=content, headers=ADMIN).status_code)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(put, range(24))) == {201}
    for _ in range(8):
        names = {card["id"] for card in cluster.client.get("/v1/models").json()["data"]}
        assert {f"new{number}" for number in range(24)} < names


def test_a_batch_has_several_adapters(cluster: Cluster) -> None:
    """Those of a request, of which each would have one of its own if Ray batched by name."""

    def counts() -> tuple[float, float]:
        texts = cluster.metrics().values()
        return total(texts, "dvora_batch_rows_total"), total(texts, "dvora_batches_total")

    body = {"model": [f"a{number}" for number in range(6)], "input": TEXTS[0]}
    rows, batches = counts()
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: cluster.client.post("/v1/classify", json=body), range(36)))
    assert {answer.status_code for answer in answers} == {200}
    new_rows, new_batches = counts()
    assert new_rows - rows == 6 * 36 >= 6 * (new_batches - batches)


def total(texts: Iterable[str], name: str) -> float:
    """The sum of what replicas counted."""
    return sum(float(re.findall(rf'^{name}{{kind="classify"}} (\S+)$', text, re.MULTILINE)[0]) for text in texts)


def test_a_header_leads_to_where_an_adapter_was_used(cluster: Cluster) -> None:
    """More adapters than the three a replica that Ray would keep."""
    cluster.run(PUT)
    cluster.run(ROUTED)
    names = ("shop", "a0", "a1", "a2", "a3", "a4", "a5")

    def ask_there(name: str) -> None:
        body, headers = {"model": name, "input": TEXTS[0]}, {"serve_multiplexed_model_id": name}
        cluster.client.post("/v1/classify", json=body, headers=headers).raise_for_status()

    for name in names:
        # Replicas tell Ray's routers every second.
        time.sleep(2)
        ask_there(name)
    time.sleep(2)
    for name in names:
        start = classified(cluster)
        for _ in range(12):
            ask_there(name)
        assert sorted(count - start[replica] for replica, count in classified(cluster).items()) == [0, 12]


def classified(cluster: Cluster) -> dict[str, int]:
    """How many texts each replica classified."""
    pattern = re.compile(r'^dvora_requests_total\{route="/v1/classify",status="200"\} (\S+)$', re.MULTILINE)
    return {replica: int(float(pattern.findall(text)[0])) for replica, text in cluster.metrics().items()}


def test_a_restart_loses_no_request(cluster: Cluster, critic: Path, trained: Path) -> None:
    alone, before, is_done = Alone(critic), set(cluster.metrics()), threading.Event()
    expected = {name: alone.answer(trained / name) for name in ("a0", "a1", "a2", "a3")}

    def ask_always(name: str) -> int:
        count = 0
        while not is_done.is_set():
            # One text, or a hundred.
            answer = ask(cluster.client, name, [TEXTS[0]] * (100 if count % 2 else 1))
            assert answer.status_code == 200, answer.text
            assert all(row["probs"] == expected[name] for row in answer.json()["data"])
            count += 1
        return count

    with ThreadPoolExecutor(16) as pool:
        asking = [pool.submit(ask_always, name) for name in expected for _ in range(4)]
        try:
            cluster.run(RESTART)
            cluster.wait(lambda: len(now := set(cluster.metrics())) == 2 and not now & before)
            time.sleep(3)
        finally:
            is_done.set()
        assert all(future.result() > 5 for future in asking)


def test_replicas_come_with_the_load(cluster: Cluster) -> None:
    cluster.run(SCALE.replace("max_replicas: 4", "max_replicas: 3").replace("requests: 32", "requests: 2"))
    with ThreadPoolExecutor(12) as pool:

        def is_larger() -> bool:
            list(pool.map(lambda _: ask(cluster.client, "a0", ["good"] * 200).raise_for_status(), range(60)))
            return len(cluster.metrics()) == 3

        cluster.wait(is_larger, 90)
