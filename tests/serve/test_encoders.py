"""Classes by heads of several sizes, embeddings, and the routes of text-embeddings-inference."""

import asyncio
import json
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from openai import BadRequestError, NotFoundError, OpenAI
from peft import PeftModel
from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer, pipeline

from dvora.adapter_file.packs import write_pack
from dvora.serve.server import Server
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import adapted
from tests.serve.served import CLASSES, TOKEN, Alone, Serving, ask, copied, probabilities, save_classifier, serving
from tests.serve.served import TEXTS as PHRASES

TEXTS = ["good movie", "the book was very bad", "it"]


def test_classes_of_one_text_by_several_adapters_in_one_pass(bert: Path, classifiers: Path, judges: Serving) -> None:
    alone = Alone(bert)
    client, server = judges
    before = batches(server)
    answer = client.post("/v1/classify", json={"model": [*CLASSES], "input": TEXTS[0]}).json()
    assert batches(server) == before + 1
    for row in answer["data"]:
        logits = alone.logits(classifiers / row["model"], CLASSES[row["model"]], TEXTS[0])
        if len(logits) == 1:
            assert row["label"] is None
            assert row["score"] == pytest.approx(float(logits), abs=1e-5)
        else:
            np.testing.assert_allclose(row["probs"], logits.softmax(-1), atol=1e-5)
            assert row["label"] == f"LABEL_{int(logits.argmax())}"


def batches(server: Server) -> float:
    return server.metrics.registry.get_sample_value("dvora_batches_total", {"kind": "classify"}) or 0.0


def test_every_answer_under_mixed_load_is_that_of_the_merged_model_alone(
    critic: Path, trained: Path, tmp_path: Path
) -> None:
    alone, draw = Alone(critic), random.Random(0)
    folders = {"critic": None, **{f"a{number}": trained / f"a{number}" for number in range(6)}}
    jobs = [(draw.choice([*folders]), draw.choice(PHRASES)) for _ in range(120)]
    with (
        serving(critic, copied(trained, tmp_path / "adapters")) as (client, server),
        ThreadPoolExecutor(12) as pool,
    ):
        answers = list(pool.map(lambda job: ask(client, *job), jobs))
        digests = {name: server.base.bank.digest(name) for name in folders if name != "critic"}
    for (model, text), answer in zip(jobs, answers, strict=True):
        assert probabilities(answer) == alone.answer(folders[model], text)
        assert answer.headers["x-dvora-digest"] == digests.get(model, "base")
    # Adapters that answered alike would prove nothing.
    assert len({str(probabilities(answer)) for answer in answers}) > 30


def test_names_of_classes_are_those_of_the_run(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    run = tmp_path / "adapters" / "tone"
    copied(classifiers / "two", run / "adapter")
    (run / "run.json").write_text('{"labels": ["cross", "kind"]}')
    with serving(bert, tmp_path / "adapters") as (client, _):
        answer = client.post("/predict", json={"model": "tone", "inputs": TEXTS[0]}).json()
    assert {row["label"] for row in answer} == {"cross", "kind"}
    assert answer[0]["score"] > answer[1]["score"]


def test_an_answer_has_every_class_in_the_order_of_the_head_and_the_revision(judges: Serving) -> None:
    client, server = judges
    for row in client.post("/v1/classify", json={"model": "five", "input": TEXTS}).json()["data"]:
        assert row["labels"] == [f"LABEL_{index}" for index in range(5)]
        assert sum(row["probs"]) == pytest.approx(1, abs=1e-12)
        assert (row["label"], row["score"]) == max(
            zip(row["labels"], row["probs"], strict=True), key=lambda pair: pair[1]
        )
        assert row["digest"] == server.registry.version("five").digest  # type: ignore[union-attr]


def test_rows_that_are_not_sure_abstain(bert: Path, classifiers: Path, judges: Serving, tmp_path: Path) -> None:
    client, _ = judges
    body = {"model": "three", "input": TEXTS}
    named = client.post("/v1/classify", json=body).json()["data"]
    least = sorted(row["score"] for row in named)[1]
    expected = [
        {**row, "abstained": row["score"] < least, "label": None if row["score"] < least else row["label"]}
        for row in named
    ]
    assert {row["abstained"] for row in expected} == {True, False}
    assert client.post("/v1/classify", json={**body, "abstain_below": least}).json()["data"] == expected
    assert client.post("/v1/classify", json={**body, "abstain_below": 70}).status_code == 400
    with serving(bert, copied(classifiers, tmp_path / "adapters"), abstain_below=least) as (strict, _):
        by_default = strict.post("/v1/classify", json=body).json()["data"]
        assert [row["label"] for row in by_default] == [row["label"] for row in expected]
        assert strict.post("/v1/classify", json={**body, "abstain_below": 0}).json()["data"][0]["label"] is not None


def test_http_classify_of_semantic_router(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    """`POST {endpoint}/classify` with `{"inputs": text}` and a key, as `HTTPClassifierInference` sends it (its pull
    requests 2759 and 2930), and takes: a list of each declared label once, with scores in [0, 1] that add up to one."""
    for name, labels in {"domain": ["code", "law"], "guard": ["benign", "jailbreak", "spam"]}.items():
        copied(classifiers / {2: "two", 3: "three"}[len(labels)], tmp_path / "adapters" / name / "adapter")
        (tmp_path / "adapters" / name / "run.json").write_text(json.dumps({"labels": labels}))
    keys = "".join(
        f'[{name}]\nsha256 = "{sha256(f"key of {name}".encode()).hexdigest()}"\nadapters = ["{name}"]\n'
        for name in ("domain", "guard")
    )
    (tmp_path / "keys.toml").write_text(keys)
    with serving(bert, tmp_path / "adapters", keys=tmp_path / "keys.toml") as (client, _):
        for name, labels in {"domain": {"code", "law"}, "guard": {"benign", "jailbreak", "spam"}}.items():
            headers = {"Accept": "application/json", "Authorization": f"Bearer key of {name}"}
            answer = client.post("/classify", json={"inputs": TEXTS[1]}, headers=headers)
            assert answer.status_code == 200
            scores = answer.json()
            assert [row.keys() for row in scores] == [{"label", "score"}] * len(labels)
            assert {row["label"] for row in scores} == labels
            assert all(0 <= row["score"] <= 1 for row in scores)
            assert sum(row["score"] for row in scores) == pytest.approx(1, abs=1e-6)
            expected = client.post("/predict", json={"inputs": TEXTS[1], "model": name}, headers=headers)
            assert scores == expected.json()
        everything = {"Authorization": f"Bearer {TOKEN}"}
        unclear = client.post("/classify", json={"inputs": TEXTS[1]}, headers=everything)
        assert (unclear.status_code, "name an adapter" in unclear.text) == (400, True)


TAGS = {"pii": ["O", "B-MAIL", "I-MAIL", "B-NAME", "I-NAME"], "place": ["O", "B-CITY", "I-CITY"]}


def test_entities_of_texts_of_several_lengths_by_several_adapters(bert: Path, tmp_path: Path) -> None:
    """As pipelines of transformers find them, each adapter alone; spans are semantic-router's `token_spans.v1`."""
    texts = ["the book was very bad", "good", "it is é 你 not a movie  great"]
    expected = {}
    for seed, (name, tags) in enumerate(TAGS.items(), 1):
        folder = save_classifier(bert, tmp_path / "adapters" / name / "adapter", seed, len(tags), "TOKEN_CLS")
        (folder.parent / "run.json").write_text(json.dumps({"labels": tags}))
        model = AutoModelForTokenClassification.from_pretrained(
            bert, num_labels=len(tags), id2label=dict(enumerate(tags))
        )
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        alone = pipeline(
            "token-classification", model, tokenizer=str(bert), aggregation_strategy="simple", device="cpu"
        )
        for text in texts:
            expected[name, text] = [
                {
                    "start": one["start"],
                    "end": one["end"],
                    "label": one["entity_group"],
                    "text": text[one["start"] : one["end"]],
                }
                for one in alone(text)
            ]
    assert {one["label"] for found in expected.values() for one in found} == {"MAIL", "NAME", "CITY"}
    with serving(bert, tmp_path / "adapters") as (client, server):
        answer = client.post("/v1/classify", json={"model": [*TAGS], "input": texts}).json()["data"]
        assert batches(server) == 1
        for row in answer:
            found = [{key: one[key] for key in ("start", "end", "label", "text")} for one in row["entities"]]
            assert found == expected[row["model"], texts[row["index"]]]
            assert all(0 < one["score"] <= 1 for one in row["entities"])
            assert row["digest"] == server.registry.version(row["model"]).digest  # type: ignore[union-attr]
        spans = client.post("/classify", params={"model": "pii"}, json={"inputs": texts[0]}).json()
        assert spans == answer[0]["entities"]
        for body in ({"input": [texts[:2]]}, {"input": texts, "abstain_below": 0.5}):
            assert client.post("/v1/classify", json={"model": "pii", **body}).status_code == 400
        assert client.post("/predict", json={"model": "pii", "inputs": "a", "raw_scores": True}).status_code == 400
        values = save_classifier(bert, tmp_path / "whole", 0, 2) / "adapter_model.safetensors"
        pack = tmp_path / "whole.pack"
        write_pack(pack, {"whole": values.parent})
        put = client.put("/v1/adapters/whole", content=pack.read_bytes(), headers={"Authorization": f"Bearer {TOKEN}"})
        assert (put.status_code, "'SEQ_CLS'" in put.text) == (422, True)


def test_tokens_are_no_entities_without_names_of_classes(bert: Path, tmp_path: Path) -> None:
    tags, token = TAGS["place"], {"Authorization": f"Bearer {TOKEN}"}
    three, five = (save_classifier(bert, tmp_path / str(n), n, n, "TOKEN_CLS") for n in (3, 5))
    copied(three, tmp_path / "adapters" / "unnamed")
    with serving(bert, tmp_path / "adapters") as (client, _):

        def put(folder: Path, labels: list[str]) -> httpx.Response:
            content = (folder / "adapter_model.safetensors").read_bytes()
            return client.put("/v1/adapters/new", content=content, params={"labels": labels}, headers=token)

        for refused in (
            put(three, []),
            client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "unnamed"}, headers=token),
        ):
            assert (refused.status_code, "put it with labels=" in refused.text) == (422, True)
        # Those of the version before are kept where they are as many.
        for folder, labels, status in ((three, tags, 201), (three, [], 200), (five, [], 422), (five, TAGS["pii"], 200)):
            assert put(folder, labels).status_code == status
        assert client.get("/v1/adapters/new").json()["labels"] == TAGS["pii"]
        for path, body in (
            ("/v1/classify", {"model": "unnamed", "input": TEXTS}),
            ("/v1/classify", {"model": ["new", "unnamed"], "input": TEXTS}),
            ("/predict", {"model": "unnamed", "inputs": TEXTS[0]}),
            ("/classify", {"model": "unnamed", "inputs": TEXTS[0]}),
            ("/", {"model": "unnamed", "inputs": TEXTS[0]}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 422
            assert "'unnamed' has no names of its 3 classes" in answer.json()["error"]["message"]
            assert "LABEL_" not in answer.text


@pytest.mark.parametrize(("make", "target"), [(tiny_models.roberta, "query"), (tiny_models.distilbert, "q_lin")])
def test_heads_of_several_layers(make: Callable[[Path], Path], target: str, tmp_path: Path) -> None:
    """As PEFT names them by itself; the models are 16 wide."""
    base, token = make(tmp_path / "base"), {"Authorization": f"Bearer {TOKEN}"}
    settings = {"task_type": "SEQ_CLS", "target_modules": [target]}
    names = {count: [f"class {number}" for number in range(count)] for count in (2, 16, 24)}
    models = {count: adapted(base, "dvora", classes=count, **settings) for count in names}
    for count, model in models.items():
        model.save_pretrained(tmp_path / str(count))
    copied(tmp_path / "24", tmp_path / "adapters" / "first")
    ids = AutoTokenizer.from_pretrained(base)(TEXTS[1], return_tensors="pt")["input_ids"]
    with serving(base, tmp_path / "adapters") as (client, _):
        for count, model in models.items():
            content = (tmp_path / str(count) / "adapter_model.safetensors").read_bytes()
            for labels in (*names.values(), []):
                query = {"labels": labels}
                put = client.put(f"/v1/adapters/of-{count}", content=content, params=query, headers=token)
                assert put.status_code == (422 if len(labels) not in (0, count) else 200 if not labels else 201)
            (row,) = client.post("/v1/classify", json={"model": f"of-{count}", "input": TEXTS[1]}).json()["data"]
            assert row["labels"] == names[count]
            with torch.no_grad():
                expected = model(ids).logits[0].softmax(-1).tolist()
            assert row["probs"] == pytest.approx(expected, abs=1e-5)


def test_the_routes_of_text_embeddings_inference(bert: Path, classifiers: Path, judges: Serving) -> None:
    alone = Alone(bert)
    client, _ = judges
    several = client.post("/predict", json={"model": "three", "inputs": [[text] for text in TEXTS]}).json()
    pair = client.post("/predict", json={"model": "three", "inputs": TEXTS[:2], "raw_scores": True}).json()
    ranked = client.post("/rerank", json={"model": "one", "query": "good", "texts": TEXTS, "raw_scores": True}).json()
    assert client.post("/rerank", json={"model": "two", "query": "good", "texts": TEXTS}).status_code == 400
    assert client.get("/info").json()["works"] == ["classify", "embed"]
    assert client.get("/health").status_code == 200
    for text, answer in zip(TEXTS, several, strict=True):
        best = alone.logits(classifiers / "three", 3, text).softmax(-1).max()
        assert answer[0]["score"] == pytest.approx(float(best), abs=1e-5)
    logits = alone.logits(classifiers / "three", 3, *TEXTS[:2])
    assert pair[0]["score"] == pytest.approx(float(logits.max()), abs=1e-5)
    expected = [float(alone.logits(classifiers / "one", 1, "good", text)) for text in TEXTS]
    assert [row["index"] for row in ranked] == sorted(range(3), key=lambda row: -expected[row])


def test_embeddings_are_the_merged_encoders(bert: Path, classifiers: Path, judges: Serving) -> None:
    alone = Alone(bert)
    http, server = judges
    client = OpenAI(base_url=f"{http.base_url}/v1", api_key="unused", max_retries=0)
    of_adapter = client.embeddings.create(model="two", input=TEXTS).data
    of_base = client.embeddings.create(model=server.base.name, input=TEXTS, encoding_format="float").data
    routes = http.post("/embed", json={"inputs": TEXTS, "model": "two"}).json()
    models = {"two": alone.merged(classifiers / "two", 2).base_model, "base": AutoModel.from_pretrained(bert).eval()}
    for index, text in enumerate(TEXTS):
        for given, name in ((of_adapter[index].embedding, "two"), (of_base[index].embedding, "base")):
            with torch.no_grad():
                hidden = models[name](**alone.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
            np.testing.assert_allclose(given, expected, atol=1e-5)
        np.testing.assert_allclose(routes[index], of_adapter[index].embedding, atol=1e-6)


def test_openais_client(trained: Path, critics: Serving) -> None:
    http, server = critics
    client = OpenAI(base_url=f"{http.base_url}/v1", api_key="unused", max_retries=0)
    cards = {card.id: card for card in client.models.list()}
    assert {*cards} == {"critic", *(folder.name for folder in trained.iterdir())}
    assert cards["a3"].parent == "critic"  # type: ignore[attr-defined]
    assert client.models.retrieve("critic:a3").id == "a3"
    expected = client.embeddings.create(model="a3", input="good").data[0].embedding
    for field, value in (("user", "someone"), ("metadata", {"a": "b"}), ("store", True), ("service_tier", "auto")):
        answer = client.embeddings.create(model="critic:a3", input="good", extra_body={field: value})
        assert answer.data[0].embedding == expected
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)
    with pytest.raises(NotFoundError, match="no model 'a9'"):
        client.embeddings.create(model="a9", input="good")
    with pytest.raises(BadRequestError, match=r"dimensions is not kept here, leave it out; expected model, input"):
        client.embeddings.create(model="a3", input="good", dimensions=4)
    with pytest.raises(BadRequestError, match="at most 32 are read"):
        client.embeddings.create(model="a3", input="good " * 40)
    assert server.base.works == ("classify", "embed")


def test_the_base_never_answers_for_an_adapter(judges: Serving) -> None:
    """A head that nobody trained, unknown names and fields that are not kept are errors."""
    client, server = judges
    for path, body, status, message in [
        ("/predict", {"inputs": "good"}, 400, "no trained head"),
        ("/v1/classify", {"model": server.base.name, "input": "good"}, 400, "no trained head"),
        ("/v1/classify", {"model": ["two", "six"], "input": "good"}, 404, "no model 'six'"),
        ("/v1/embeddings", {"model": "six", "input": "good"}, 404, "no model 'six'"),
        ("/v1/embeddings", {"model": "two", "input": "good", "dimensions": 4}, 400, "dimensions"),
        ("/embed", {"model": "two", "inputs": "good", "lora": "two"}, 400, "lora"),
        ("/v1/classify", {"model": "two", "input": "good " * 40}, 400, "42 tokens, and at most 32"),
    ]:
        answer = client.post(path, json=body)
        assert answer.status_code == status, (path, answer.text)
        assert message in answer.json()["error"]["message"]
    cut = client.post("/v1/classify", json={"model": "two", "input": "good " * 40, "truncate": True})
    assert cut.status_code == 200


def test_more_rows_than_may_wait_are_refused_before_they_are_made(judges: Serving) -> None:
    client, _ = judges
    many = {"model": ["two"] * 300_000, "input": ["x"] * 300_000}
    answer = client.post("/v1/classify", json=many)
    assert answer.status_code == 400
    assert "90,000,000,000 rows" in answer.json()["error"]["message"]
    assert client.post("/v1/embeddings", json={"model": "two", "input": ["x"] * 1025}).status_code == 400
    answer = client.post("/v1/embeddings", json={"model": "two", "input": ["x"] * 1024})
    assert len(answer.json()["data"]) == client.get("/info").json()["max_client_batch_size"] == 1024


def test_hugging_faces_client(bert: Path, classifiers: Path, judges: Serving) -> None:
    """It names no adapter in the body, so the address does; `POST /` is what text-embeddings-inference has there."""
    alone = Alone(bert)
    logits = alone.logits(classifiers / "three", 3, TEXTS[0])
    http, _ = judges
    for path in ("/predict", "/"):
        client = InferenceClient(base_url=f"{str(http.base_url).rstrip('/')}{path}?model=three")
        rows = client.text_classification(TEXTS[0])
        assert [row.label for row in rows] == [f"LABEL_{index}" for index in logits.argsort(descending=True)]
        assert [row.score for row in rows] == pytest.approx(sorted(logits.softmax(-1).tolist(), reverse=True), abs=1e-5)
        for function, scores in (("sigmoid", logits.sigmoid()), ("none", logits)):
            (best,) = client.text_classification(TEXTS[0], top_k=1, function_to_apply=function)  # type: ignore[arg-type]
            assert best.score == pytest.approx(float(scores.max()), abs=1e-5)
    client = InferenceClient(base_url=f"{str(http.base_url).rstrip('/')}/embed?model=three")
    options: dict[str, object] = {"normalize": True, "truncate": False, "truncation_direction": "right"}
    vectors = client.feature_extraction(TEXTS, **options, encoding_format="float")  # type: ignore[arg-type]
    expected = http.post("/v1/embeddings", json={"model": "three", "input": TEXTS}).json()["data"]
    np.testing.assert_allclose(vectors, [row["embedding"] for row in expected], atol=1e-6)
    assert http.get("/").headers["content-type"].startswith("text/html")


def test_fields_of_text_embeddings_inference_at_their_defaults(judges: Serving) -> None:
    neutral: dict[str, object] = {"truncate": False, "truncation_direction": "Right", "auto_truncate": False}
    client, _ = judges
    for path, body, others in [
        ("/predict", {"model": "two", "inputs": "good"}, {"raw_scores": False}),
        ("/", {"model": "two", "inputs": "good"}, {"raw_scores": False}),
        ("/embed", {"inputs": "good"}, {"normalize": True, "prompt_name": None, "dimensions": None}),
        (
            "/rerank",
            {"model": "one", "query": "good", "texts": ["bad"]},
            {"return_text": False, "raw_scores": False},
        ),
    ]:
        expected = client.post(path, json=body)
        assert expected.status_code == 200, expected.text
        for name, value in {**neutral, **others}.items():
            for sent in (value, None):
                answer = client.post(path, json={**body, name: sent})
                assert answer.json() == expected.json(), (path, name, sent)
    for name, value in (("normalize", False), ("truncation_direction", "Left"), ("prompt_name", "query")):
        answer = client.post("/embed", json={"inputs": "good", name: value})
        assert answer.status_code == 400
        assert name in answer.json()["error"]["message"]
    assert (
        client.post("/embed", json={"inputs": [4, 5]}).json() == client.post("/embed", json={"inputs": [[4, 5]]}).json()
    )


def test_headers_name_the_version_if_it_is_one(judges: Serving) -> None:
    client, _ = judges
    one = client.post("/v1/classify", json={"model": ["two", "two"], "input": "good"})
    several = client.post("/v1/classify", json={"model": [*CLASSES], "input": "good"})
    embedded = client.post("/v1/embeddings", json={"model": "two", "input": "good"})
    digest = one.json()["data"][0]["digest"]
    for answer in (one, embedded):
        assert (answer.headers["x-dvora-adapter"], answer.headers["x-dvora-digest"]) == ("two", digest)
    assert not [name for name in several.headers if name.startswith("x-dvora")]
    assert [row["adapter"] for row in several.json()["data"]] == [*CLASSES]
    assert embedded.json()["data"][0]["digest"] == digest


def test_tokens_of_one_client_beside_texts_of_another(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    """Whose tokenizer gives token types, which tokens in a request have not."""
    base = shutil.copytree(bert, tmp_path / "base")
    settings = base / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_input_names": names}))
    body = {"model": "two", "input": ["good movie"]}
    with serving(base, copied(classifiers, tmp_path / "adapters")) as (client, server):
        texts = asyncio.run(server.texts.read(["good movie", [4, 5, 6]], ""))
        assert [text.types is None for text in texts] == [False, True]
        expected = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
        with ThreadPoolExecutor(8) as pool:
            with server.base.passing:
                ids = [pool.submit(client.post, "/v1/embeddings", json={**body, "input": [4, 5, 6]}) for _ in range(4)]
                answers = [pool.submit(client.post, "/v1/embeddings", json=body) for _ in range(4)]
                time.sleep(0.5)
            assert all(answer.result().status_code == 200 for answer in ids)
            for answer in answers:
                assert answer.result().json()["data"][0]["embedding"] == pytest.approx(expected, abs=1e-5)


def test_no_inputs(judges: Serving) -> None:
    client, _ = judges
    for route in ("/predict", "/", "/embed", "/rerank", "/v1/classify", "/v1/embeddings"):
        body = {"model": "two", "inputs": [], "input": [], "query": "a", "texts": []}
        assert client.post(route, json=body).status_code == 400
        names = {"/rerank": ("query", "texts"), "/v1/classify": ("input",), "/v1/embeddings": ("input",)}
        small = {"model": "two", **{name: body[name] for name in names.get(route, ("inputs",))}}
        assert client.post(route, json=small).status_code == 400
