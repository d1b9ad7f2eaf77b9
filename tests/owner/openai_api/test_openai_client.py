"""The client of an API: what is sent, what is kept, what is spent, and what is refused."""

import math
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_api import KEY

from pema.errors import ConfigError, OwnerError, StorageError
from pema.owner.openai_api.client import Client, default_cache
from pema.owner.openai_api.config import APIConfig
from pema.owner.openai_api.ledger import Ledger
from pema.tasks.example import Turn

PROMPT = (Turn("system", "Be brief."), Turn("user", "Count."))
PRICES = {"prompt_price": 1000.0, "completion_price": 2000.0}


@pytest.fixture
def client(described):
    with_all = APIConfig(**described)
    client = Client(with_all)
    yield client
    client.close()


def texts(answer):
    return [position.token.name for position in answer.positions]


def test_a_chat_is_sent_as_turns_and_a_begun_reply_as_the_last_one(api, client):
    first = client.ask(PROMPT, "", 2, 5)
    assert texts(first) == ["One", " two"]
    assert not first.ended
    second = client.ask(PROMPT, "One two", 8, 5)
    assert texts(second) == [" three", " four", " five", " six"]
    assert second.ended
    (path, one), (_, two) = api.requests
    assert path == "/v1/chat/completions"
    assert one == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count."}],
        "max_tokens": 2,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert two["messages"][-1] == {"role": "assistant", "content": "One two"}
    assert api.keys == ["Bearer secret"] * 2


def test_fields_that_a_server_needs_to_continue_a_reply_are_sent_only_then(api, described):
    client = Client(APIConfig(**described, continuing={"continue_final_message": True}))
    client.ask(PROMPT, "", 1, 5)
    client.ask(PROMPT, "One", 1, 5)
    assert [request.get("continue_final_message") for _, request in api.requests] == [None, True]


def test_both_endpoints_and_both_forms_of_their_answers_are_read_as_the_same(api, described):
    chat = Client(APIConfig(**described))
    plain = Client(APIConfig(**described | {"endpoint": "completions", "cache": described["cache"].with_name("b")}))
    one, two = chat.ask(PROMPT, "One", 3, 5), plain.ask("Count: One", "", 3, 5)
    assert [[(t.content, p) for t, p in each.top] for each in one.positions] == [
        [(t.content, p) for t, p in each.top] for each in two.positions
    ]
    assert one.positions[0].top[0][1] == pytest.approx(math.log(0.5))
    assert len(one.positions[0].top) == 20
    assert api.requests[1] == (
        "/v1/completions",
        {"model": "m", "prompt": "Count: One", "max_tokens": 3, "temperature": 0, "logprobs": 20},
    )


def test_the_bytes_of_a_token_that_is_no_text_are_read(api, described):
    client = Client(APIConfig(**described | {"endpoint": "completions", "top_logprobs": 5}))

    def broken(body):
        logprobs = body["choices"][0]["logprobs"]
        logprobs["tokens"][0] = "bytes:\\xf0\\x9f"
        return body

    api.change = broken
    assert client.ask("Count:", "", 1, 5).positions[0].token.content == b"\xf0\x9f"


def test_nothing_is_asked_twice_in_this_process_or_another(api, client, described):
    first = client.ask(PROMPT, "", 2, 5)
    assert client.ask(PROMPT, "", 2, 5) == first
    again = Client(APIConfig(**described))
    assert again.ask(PROMPT, "", 2, 5) == first
    assert len(api.requests) == 1
    assert (client.repeated, again.repeated) == (1, 1)
    client.ask(PROMPT, "", 3, 5)
    assert len(api.requests) == 2
    assert described["cache"].stat().st_mode & 0o077 == 0


def test_spending_is_what_the_api_counts_and_lasts(api, described):
    client = Client(APIConfig(**described, **PRICES))
    client.ask(PROMPT, "", 2, 5)
    client.ask(PROMPT, "One", 3, 5)
    client.ask(PROMPT, "One", 3, 5)
    spent = Client(APIConfig(**described, **PRICES)).spending
    assert (spent.requests, spent.prompt_tokens, spent.completion_tokens) == (2, 22, 5)
    assert spent.cost == pytest.approx(22 * 1e-3 + 5 * 2e-3)
    assert str(spent) == "2 requests with 22 prompt tokens and 5 generated tokens, cost 0.0320"


def test_a_budget_of_requests_is_never_exceeded_by_threads(api, described):
    client = Client(APIConfig(**described, max_requests=3))

    def ask(count):
        try:
            return client.ask(PROMPT, "", count, 5)
        except OwnerError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [1, 2, 3, 4, 5, 6]))
    assert len(api.requests) == 3
    refusals = [each for each in answers if isinstance(each, str)]
    assert len(refusals) == 3
    assert all("could exceed the budget max_requests=3: so far 3 requests" in each for each in refusals)
    raised = Client(APIConfig(**described, max_requests=6))
    for count in range(1, 7):
        raised.ask(PROMPT, "", count, 5)
    assert len(api.requests) == 6  # what was answered is kept


def test_a_request_that_could_exceed_the_money_is_not_sent(api, described):
    most = (5 + 2 * 64) * 1e-3 + 2 * 2e-3
    client = Client(APIConfig(**described, **PRICES, max_cost=most - 1e-6))
    with pytest.raises(OwnerError, match=r"could exceed the budget max_cost=0.136\d+: so far 0 requests"):
        client.ask(PROMPT, "", 2, 5)
    assert not api.requests
    Client(APIConfig(**described, **PRICES, max_cost=most + 1e-6)).ask(PROMPT, "", 2, 5)
    assert len(api.requests) == 1


def test_a_refused_request_costs_nothing_and_an_unusable_answer_is_counted_and_not_kept(api, client):
    api.failures = [(400, {})]
    with pytest.raises(OwnerError, match=r"refused a request with 400 .*: check model, endpoint and top_logprobs"):
        client.ask(PROMPT, "", 2, 5)
    assert client.spending.requests == 0
    api.change = lambda body: body | {"choices": []}
    for n in (1, 2):
        with pytest.raises(OwnerError, match=r"m at http.* answered with something that is no completion"):
            client.ask(PROMPT, "", 2, 5)
        assert client.spending.requests == n


def test_failures_in_transit_are_repeated_and_retry_after_is_waited_for(api, client, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    api.failures = [(500, {}), (429, {"retry-after": "7"}), (503, {})]
    assert texts(client.ask(PROMPT, "", 1, 5)) == ["One"]
    assert len(api.requests) == 4
    assert pauses[1] == 7
    assert client.spending.requests == 1


def test_a_limit_that_lasts_is_an_error_that_says_how_long(api, client, monkeypatch):
    monkeypatch.setattr("pema.owner.openai_api.client.RETRIES", 1)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    api.failures = [(429, {"retry-after": "3600"})] * 9
    with pytest.raises(OwnerError, match=r"with 429 .*: it asks for a pause of 3600 s\. All answers so far are kept"):
        client.ask(PROMPT, "", 1, 5)


def test_a_wrong_key_names_the_variable(api, client):
    api.failures = [(401, {})]
    with pytest.raises(OwnerError, match=f"check the key in {KEY}"):
        client.ask(PROMPT, "", 1, 5)


def test_no_key_and_no_network_are_refused(described, monkeypatch):
    monkeypatch.setattr("pema.owner.openai_api.client.RETRIES", 0)
    client = Client(APIConfig(**described | {"base_url": "http://127.0.0.1:1/v1"}))
    with pytest.raises(OwnerError, match="cannot be reached: 'Connection error"):
        client.ask(PROMPT, "", 1, 5)
    monkeypatch.delenv(KEY)
    with pytest.raises(ConfigError, match=f"the environment variable {KEY} is not set"):
        Client(APIConfig(**described)).ask(PROMPT, "", 1, 5)
    with pytest.raises(ConfigError, match="is not https: prompts and key would be sent unencrypted"):
        Client(APIConfig(**described | {"base_url": "http://example.org/v1"}))


def test_an_answer_that_takes_too_long_stays_counted(api, described, monkeypatch):
    monkeypatch.setattr("pema.owner.openai_api.client.RETRIES", 0)
    monkeypatch.setattr("pema.owner.openai_api.client.TIMEOUT", 0.05)
    answer = api.answer

    def late(*given):
        threading.Event().wait(0.5)
        return answer(*given)

    monkeypatch.setattr(api, "answer", late)
    client = Client(APIConfig(**described))
    with pytest.raises(OwnerError, match="did not answer within 0 s, 1 times"):
        client.ask(PROMPT, "", 1, 5)
    assert client.spending.requests == 1


@pytest.mark.parametrize("logprobs", [None, {"content": None}])
def test_an_api_without_log_probabilities_is_refused_by_name(api, client, logprobs):
    def without(body):
        body["choices"][0]["logprobs"] = logprobs
        return body

    api.change = without
    with pytest.raises(OwnerError, match=r"gives no log-probabilities of its tokens.*Anthropic's gives none"):
        client.ask(PROMPT, "", 1, 5)


def test_fewer_log_probabilities_than_requested_are_refused(api, client):
    def cut(body):
        body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = [
            {"token": "a", "bytes": [97], "logprob": -1.0}
        ] * 5
        return body

    api.change = cut
    with pytest.raises(OwnerError, match=r"gives 5 log-probabilities of a token, and top_logprobs=20 were requested"):
        client.ask(PROMPT, "", 1, 5)


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_log_probabilities_that_are_none_are_refused(api, client, value):
    def wrong(body):
        body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][3]["logprob"] = value
        return body

    api.change = wrong
    with pytest.raises(OwnerError, match="no completion: 'a log-probability is above 0, or no number'"):
        client.ask(PROMPT, "", 1, 5)


KILLED = """
import os, sys
from pema.owner.openai_api import ledger
from pema.owner.openai_api.config import APIConfig
from pathlib import Path

book = ledger.Ledger(Path(sys.argv[1]), APIConfig(base_url="https://a/v1", model="m", tokenizer="t"))
number = book.begin(10, 3)
book.end(number, 9, 2, "key", {"whole": True})
book.begin(7, 4)
print("ready", flush=True)
os.kill(os.getpid(), 9)
"""


def test_after_a_kill_answers_are_whole_and_what_was_sent_is_counted(tmp_path):
    path = tmp_path / "answers.sqlite"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ledger = Ledger(path, APIConfig(base_url="https://a/v1", model="m", tokenizer="t"))
    assert ledger.answer("key") == {"whole": True}
    assert ledger.answer("another") is None
    spent = ledger.spending()
    assert (spent.requests, spent.prompt_tokens, spent.completion_tokens, spent.cost) == (2, 16, 6, None)


def test_a_file_that_is_something_else_is_refused(tmp_path):
    path = tmp_path / "answers.sqlite"
    path.write_text("Dear diary, " * 1000)
    with pytest.raises(StorageError, match=r"answers\.sqlite with the answers of m cannot be used: file is not a"):
        Ledger(path, APIConfig(base_url="https://a/v1", model="m", tokenizer="t"))


def test_a_failed_entry_leaves_the_ledger_as_it_was(tmp_path):
    ledger = Ledger(tmp_path / "a.sqlite", APIConfig(base_url="https://a/v1", model="m", tokenizer="t"))
    number = ledger.begin(10, 3)
    with pytest.raises(TypeError, match="not JSON serializable"):
        ledger.end(number, 1, 1, "key", object())
    assert ledger.spending().prompt_tokens == 10
    ledger.close()
    with pytest.raises(StorageError, match="Cannot operate on a closed database"):
        ledger.spending()


def test_each_api_has_a_file_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("PEMA_CACHE", str(tmp_path))
    given = {"base_url": "https://a/v1", "model": "m", "tokenizer": "t"}
    one = default_cache(APIConfig(**given))
    assert one.parent == tmp_path / "api"
    assert default_cache(APIConfig(**given, block=3)) == one
    assert default_cache(APIConfig(**given | {"model": "n"})) != one


def test_the_file_is_one_of_sqlite(client, described):
    client.ask(PROMPT, "", 1, 5)
    rows = sqlite3.connect(described["cache"]).execute("SELECT COUNT(*) FROM answers").fetchone()
    assert rows == (1,)
