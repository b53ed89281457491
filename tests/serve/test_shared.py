"""Servers that share a folder: from its answer on, a change at one of them is one at all."""

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx2 as httpx
import pytest

from dvora.serve import store
from dvora.serve.server import Server
from dvora.serve.store import UNUSED_SECONDS, Store
from tests.serve.served import ADMIN, Alone, answer_of, ask, copied, probabilities, put, serving

VALUES = "adapter_model.safetensors"
Pair = tuple[tuple[httpx.Client, httpx.Client], tuple[Server, Server]]


@pytest.fixture
def pair(critic: Path, adapters: Path) -> Iterator[Pair]:
    """Clients of two servers, and these."""
    with (
        serving(critic, adapters, is_shared=True) as (one, first),
        serving(critic, adapters, is_shared=True) as (two, second),
    ):
        yield (one, two), (first, second)


def test_a_change_at_one_is_a_change_at_all(pair: Pair, critic: Path, trained: Path) -> None:
    alone, ((one, two), _) = Alone(critic), pair
    for client, other, source in ((one, two, "a1"), (two, one, "a2"), (two, one, "a3"), (one, two, "a1")):
        digest = put(client, "tenant", trained / source).json()["digest"]
        assert other.get("/v1/adapters/tenant").json()["digest"] == digest
        assert answer_of(other, "tenant") == alone.answer(trained / source)
    assert two.delete("/v1/adapters/tenant", headers=ADMIN).status_code == 200
    assert one.delete("/v1/adapters/a0", headers=ADMIN).status_code == 200
    for client in (one, two):
        names = {card["id"] for card in client.get("/v1/models").json()["data"]}
        assert names == {"critic", "a1", "a2", "a3", "a4", "a5"}
        assert ask(client, "tenant").status_code == 404


def test_who_asks_while_a_change_is_taken_over_waits_for_it(pair: Pair, trained: Path) -> None:
    ((one, two), _) = pair
    with ThreadPoolExecutor(8) as pool:
        for number in range(12):
            digest = put(one, "tenant", trained / f"a{number % 5}").json()["digest"]
            answers = pool.map(lambda _: ask(two, "tenant"), range(16))
            assert {answer.headers["x-dvora-digest"] for answer in answers} == {digest}


def test_a_folder_whose_files_were_replaced_is_read_by_all(pair: Pair, critic: Path, adapters: Path) -> None:
    (one, two), _ = pair
    copied(adapters / "a1", adapters / "later")
    body = {"lora_name": "tenant", "lora_path": "later", "load_inplace": True}
    for source in ("a1", "a2"):
        (adapters / "later" / VALUES).write_bytes((adapters / source / VALUES).read_bytes())
        assert one.post("/v1/load_lora_adapter", json=body, headers=ADMIN).status_code == 200
        assert answer_of(two, "tenant") == Alone(critic).answer(adapters / source)


def test_changes_at_the_same_time_are_all_kept(pair: Pair, critic: Path, trained: Path, adapters: Path) -> None:
    """Both are changed and asked all the time; every answer is of a content that its name had, none is the base's."""
    alone, (clients, _) = Alone(critic), pair
    digests = {clients[0].get(f"/v1/adapters/a{n}").json()["digest"]: f"a{n}" for n in range(1, 6)}
    for name in ("x", "y"):
        put(clients[0], name, trained / "a1").raise_for_status()
    is_done = threading.Event()

    def change(number: int) -> set[str]:
        """Every second new adapter is deleted again; the others."""
        draw, client, names = random.Random(number), clients[number], list[str]()
        while not is_done.is_set() or len(names) < 10:
            source = trained / f"a{draw.randint(1, 5)}"
            assert put(client, draw.choice("xy"), source).status_code == 200
            names.append(f"own{number}-{len(names)}")
            assert put(client, names[-1], source).status_code == 201
            if len(names) % 2:
                assert client.delete(f"/v1/adapters/{names[-1]}", headers=ADMIN).status_code == 200
        return set(names[1::2])

    with ThreadPoolExecutor(10) as pool:
        changing = [pool.submit(change, number) for number in range(2)]
        try:
            answers = list(pool.map(lambda n: ask(clients[n % 2], "xy"[n // 2 % 2]), range(200)))
        finally:
            is_done.set()
        expected = set.union(*(future.result() for future in changing))
    for answer in answers:
        assert answer.status_code == 200, answer.text
        source = trained / digests[answer.headers["x-dvora-digest"]]
        assert probabilities(answer) == alone.answer(source)
    with serving(critic, adapters, is_shared=True) as (later, _):
        for client in (*clients, later):
            names = {card["id"] for card in client.get("/v1/models").json()["data"]}
            assert {name for name in names if name.startswith("own")} == expected


def test_a_replaced_upload_stays_for_those_who_still_read_it(pair: Pair, trained: Path, adapters: Path) -> None:
    (one, two), _ = pair

    def uploads() -> set[Path]:
        return {path for path in (adapters / ".served").iterdir() if path.is_dir()}

    put(one, "tenant", trained / "a1")
    (first,) = uploads()
    put(two, "tenant", trained / "a2")
    (second,) = uploads() - {first}
    # Whoever hears of it there lets go of the first.
    assert one.get("/v1/adapters/tenant").status_code == 200
    for path in (first, second):
        os.utime(path, (0, path.stat().st_mtime - UNUSED_SECONDS - 10))
    put(one, "tenant", trained / "a3")
    # The second was used until now, whenever it was written.
    assert first not in uploads()
    assert second in uploads()


def test_an_upload_that_takes_its_name_disturbs_no_other_servers_sweep(adapters: Path) -> None:
    with closing(Store(adapters, is_shared=True)) as one, closing(Store(adapters, is_shared=True)) as two:
        with ThreadPoolExecutor(1) as pool:
            uploads = pool.submit(lambda: [one.write({"values": b""}) for _ in range(200)])
            while not uploads.done():
                two.sweep()
        assert all(path.is_dir() for path in uploads.result())


@pytest.mark.parametrize(("first", "second"), [(False, False), (True, False), (False, True)])
def test_what_one_server_has_no_other_has(first: bool, second: bool, critic: Path, adapters: Path) -> None:
    """Unless both share it."""
    with serving(critic, adapters, is_shared=first), pytest.raises(ValueError, match="another server has it"):
        serving(critic, adapters, is_shared=second).__enter__()


def test_every_change_is_later_than_the_one_before(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clock stands still."""
    monkeypatch.setattr(store.time, "time_ns", lambda: 10**18)
    with closing(Store(adapters, is_shared=True)) as one, closing(Store(adapters, is_shared=True)) as two:
        for number in range(3):
            one._write_index({f"x{number}": None})
            assert (adapters / ".served" / "index.json").stat().st_mtime_ns == 10**18 + number * 10**6
            assert two.is_stale
            with two.refreshing() as changed:
                assert f"x{number}" in changed
            assert not two.is_stale
            assert not one.is_stale


def test_what_cannot_be_read_is_no_older_answer(pair: Pair, trained: Path, adapters: Path) -> None:
    (one, two), (first, _) = pair
    put(one, "tenant", trained / "a1").raise_for_status()
    file = adapters / first.store.index["tenant"].folder / VALUES
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    assert ask(two, "tenant").status_code == 503
    assert two.get("/readyz").status_code == 503
    file.write_bytes(content)
    assert ask(two, "tenant").status_code == 200
