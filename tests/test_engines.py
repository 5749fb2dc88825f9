"""Every engine keeps one contract, and what is special to servers: tries, text only, another tokenizer, a server that dies."""

from __future__ import annotations

import importlib.util
import json
import queue
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssgr.loadable import Loadable
from ssgr.problems.arithmetic import ArithmeticProblems
from ssgr.records import Trace
from ssgr.sampler import Decoding, Request, Sampler, slots, stop_ids
from ssgr.sampler.hf import HfSampler
from ssgr.sampler.replay import ReplaySampler
from ssgr.sampler.server import ServerSampler, _asked_pause
from ssgr.sampler.vllm import VllmSampler, _prompts, _Replicas
from ssgr.stages.sample import sample
from ssgr.tables import write_traces
from tests.conftest import TINY, Loaded
from tests.test_sampler import requests

SAMPLING = Decoding(2, 0.6, 0.95, 60, 0)


@dataclass
class Server:
    """The tiny model behind the interface that vLLM has, one request at a time."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    refuse: int = 0  # so many requests are answered with 503 first
    answers: list[tuple[int, object]] = field(
        default_factory=list
    )  # how the first requests are answered, whatever they are
    retry_after: str = ""
    dies_after: int | None = None  # so many answers; then connections are cut
    gives: str = "token_ids"  # or text
    bos: bool = False  # adds a token to each prompt
    slow: threading.Event | None = None  # it answers nothing until this is set, and then that it is busy
    ends: list[str | None] = field(default_factory=list)  # how the first responses end, whatever they are
    change: Callable[[dict[str, Any]], None] = lambda answer: None  # what it does to each answer
    key: str = ""
    says_context: bool = True  # as vLLM and SGLang do
    served: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of the requests
    lock: threading.Lock = field(default_factory=threading.Lock)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        request = Request("any", 0, tuple(body["prompt"]))
        decoding = Decoding(1, body["temperature"], body["top_p"], body["max_tokens"], body["seed"])
        stop = stop_ids(self.model.generation_config, self.tokenizer)
        (trace,) = (t for some in slots.decode(self.model, [request], decoding, stop, 1) for t in some)
        prompt_ids = [*([0] if self.bos else []), *body["prompt"]]
        choice = {
            "finish_reason": self.ends.pop(0) if self.ends else trace.finish,
            "text": self.tokenizer.decode(trace.generated_ids, skip_special_tokens=True),
            "prompt_token_ids": prompt_ids,
        }
        if self.gives == "token_ids":
            choice["token_ids"] = list(trace.generated_ids)
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(trace.generated_ids)}
        answer = {"choices": [choice], "usage": usage}
        self.change(answer)
        return answer


@contextmanager
def running(server: Server) -> Iterator[str]:
    """The address of `server` on this machine, while inside."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self, code: int, content: object) -> None:
            text = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            if server.retry_after and code != 200:
                self.send_header("Retry-After", server.retry_after)
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            context = {"max_model_len": server.model.config.max_position_embeddings} if server.says_context else {}
            self.reply(200, {"data": [{"id": "tiny", **context}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.slow is not None:
                server.slow.wait(60)
                return self.reply(503, {"error": "busy"})
            with server.lock:
                server.bodies.append(body)
                if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                    return self.reply(401, {"error": "no key"})
                if server.answers:
                    return self.reply(*server.answers.pop(0))
                if server.refuse:
                    server.refuse -= 1
                    return self.reply(503, {"error": "busy"})
                context = int(server.model.config.max_position_embeddings)
                if len(body["prompt"]) + body["max_tokens"] > context:
                    return self.reply(400, {"error": f"the model's maximum context length is {context} tokens"})
                if server.dies_after is not None and server.served >= server.dies_after:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return None
                server.served += 1
                return self.reply(200, server.complete(body))

        def log_message(self, *args: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *args: None  # type: ignore[method-assign]
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


NO_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own: make test-vllm"
)


@pytest.fixture(params=["slots", "workers", "batches", "server", "replay", pytest.param("vllm", marks=NO_VLLM)])
def engine(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Sampler]]:
    """Each engine, for some requests (what replay replays is what slots sampled of them)."""
    model = TINY.load()
    if request.param == "slots":
        yield lambda *asked: HfSampler(7)
    elif request.param == "workers":
        yield lambda *asked: HfSampler(7, workers=2)
    elif request.param == "batches":
        monkeypatch.setattr(slots, "serves", lambda model: False)
        yield lambda *asked: HfSampler(7)
    elif request.param == "server":
        with running(Server(model, tokenizer)) as url:
            yield lambda *asked: ServerSampler(url, concurrency=3)
    elif request.param == "vllm":
        options = {"enforce_eager": True}  # compiles nothing, so it starts sooner
        yield lambda *asked: VllmSampler(batch_size=7, options=options)
    else:

        def replay(asked: list[Request], decoding: Decoding) -> Sampler:
            traces = [t for some in HfSampler(7).sample(TINY, tokenizer, asked, decoding) for t in some]
            write_traces(tmp_path / "traces.parquet", traces)
            return ReplaySampler(str(tmp_path / "traces.parquet"), True)

        yield replay


def drawn(engine: Callable[..., Sampler], tokenizer: Any, asked: list[Request], decoding: Decoding) -> dict[Any, Trace]:
    own = engine(asked, decoding)
    out = [trace for some in own.sample(TINY, tokenizer, asked, decoding) for trace in some]
    assert len(out) == len(asked)
    return {(trace.problem_id, trace.attempt): trace for trace in out}


def test_an_engine_keeps_the_contract(engine: Callable[..., Sampler], tokenizer: PreTrainedTokenizerBase) -> None:
    asked = [
        Request(r.problem_id, r.attempt, r.prompt_ids, 8 + 7 * i % 50) for i, r in enumerate(requests(tokenizer, 10))
    ]
    first, again = (drawn(engine, tokenizer, asked, SAMPLING) for _ in range(2))
    assert first == again, "the same seed gives the same traces"
    stop = stop_ids(TINY.load().generation_config, tokenizer)
    for one in asked:
        trace = first[one.problem_id, one.attempt]
        assert trace.prompt_ids == one.prompt_ids
        assert 1 <= len(trace.generated_ids) <= one.most(SAMPLING)
        assert (trace.generated_ids[-1] in stop) == (trace.finish == "stop")
        assert not stop & set(trace.generated_ids[:-1])
        assert trace.finish == "stop" or len(trace.generated_ids) == one.most(SAMPLING)
    assert {trace.finish for trace in first.values()} == {"stop", "length"}
    others = [first[name, 0] != first[name, 1] for name, attempt in first if attempt == 1]
    assert any(others), "attempts differ"
    if not isinstance(engine(asked, SAMPLING), ReplaySampler | VllmSampler):  # vLLM's seeds are those of the attempts
        assert first != drawn(engine, tokenizer, asked, Decoding(2, 0.6, 0.95, 60, 1)), "seeds differ"
    greedy = drawn(engine, tokenizer, asked, Decoding(2, 0.0, 1.0, 60, 0))
    pairs = [(greedy[n, 0].generated_ids, greedy[n, 1].generated_ids) for n, attempt in greedy if attempt == 1]
    assert all(a[: len(b)] == b[: len(a)] for a, b in pairs)


def test_an_engine_goes_on_with_what_was_begun(
    engine: Callable[..., Sampler], tokenizer: PreTrainedTokenizerBase
) -> None:
    """From tokens that it would not have drawn itself, so that it cannot come to them by beginning anew."""
    asked = requests(tokenizer, 3)
    own, greedy = engine(asked, SAMPLING), Decoding(2, 0.0, 1.0, 60, 0)
    for decoding in (greedy,) if isinstance(own, VllmSampler) else (SAMPLING, greedy):  # that starts anew each time
        whole = drawn(lambda *_: HfSampler(7), tokenizer, asked, decoding)
        ids = [whole[r.problem_id, r.attempt].generated_ids for r in asked]
        if isinstance(own, ReplaySampler):  # it gives back what was begun, and the rest of it
            on = [replace(r, begun=begun[:4]) for r, begun in zip(asked, ids, strict=True)]
            assert drawn(engine, tokenizer, on, decoding) == whole
            continue
        others = [other[:-1][5 : 7 + i] for i, other in enumerate(ids[1:] + ids[:1])]
        on = [replace(r, begun=begun) for r, begun in zip(asked, others, strict=True)]
        first = drawn(engine, tokenizer, on, decoding)
        for one in on:
            trace = first[one.problem_id, one.attempt]
            assert trace.prompt_ids == one.prompt_ids and trace.generated_ids[: len(one.begun)] == one.begun
            assert len(one.begun) < len(trace.generated_ids) <= 60
            assert trace.finish == ("stop" if trace.generated_ids[-1] == 1 else "length")
            assert trace.finish == "stop" or len(trace.generated_ids) == 60
        if isinstance(own, HfSampler) or decoding.temperature == 0:  # else the rest is drawn by other random numbers
            cut = [first[r.problem_id, r.attempt].generated_ids[:-1][: len(r.begun) + 3] for r in on]
            further = [replace(r, begun=begun) for r, begun in zip(on, cut, strict=True)]
            assert drawn(engine, tokenizer, further, decoding) == first


def test_a_prompt_beyond_the_context_is_refused(
    engine: Callable[..., Sampler], tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = requests(tokenizer, 1, 1)
    own, long = engine(asked, SAMPLING), [Request(name, 0, (5,) * 1000) for name in ("long", "longer")]
    if isinstance(own, ReplaySampler):
        pytest.skip("nothing is generated")
    with pytest.raises(
        ValueError, match=r"^2 of 3 prompts leave no room .* context of 1024 tokens, the longest is that of long "
    ):
        list(own.sample(TINY, tokenizer, [*asked, *long], SAMPLING))


def test_a_server_that_does_not_say_its_context_refuses_by_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    with running(Server(TINY.load(), tokenizer, says_context=False)) as url:
        own, long = ServerSampler(url, retries=0), Request("long", 0, (5,) * 1000)
        with pytest.raises(ValueError, match=r"attempt 0 of long failed: 400 .*maximum context length is 1024"):
            list(own.sample(TINY, tokenizer, [long], SAMPLING))


def ask(
    url: str, tokenizer: PreTrainedTokenizerBase, count: int = 4, checkpoint: Loadable = TINY, **how: Any
) -> list[Trace]:
    asked = requests(tokenizer, count, 1)
    own = ServerSampler(url, concurrency=2, **{"retries": 1, **how})
    return [t for some in own.sample(checkpoint, tokenizer, asked, SAMPLING) for t in some]


def test_all_that_changes_the_distribution_is_sent(tokenizer: PreTrainedTokenizerBase) -> None:
    """A server fills what is absent from the checkpoint's generation config, or from defaults of its own."""
    with running(server := Server(TINY.load(), tokenizer)) as url:
        (trace,) = ask(url, tokenizer, count=1)
    (body,) = server.bodies
    assert body == {
        "model": "tiny",
        "prompt": list(trace.prompt_ids),
        "max_tokens": 60,
        "seed": trace.seed % 2**31,
        "temperature": 0.6,
        "top_p": 0.95,
        "stop_token_ids": [1],
        "skip_special_tokens": False,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "samplers": ["temperature", "top_p"],
        "return_token_ids": True,
    }


def test_the_rest_of_a_response_is_asked_for_with_another_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    """With the same one, the random numbers of what is there would come again."""
    (one,) = requests(tokenizer, 1, 1)
    asked = [replace(one, begun=begun) for begun in ((), (5, 6), (5, 6, 7))]
    for gives in ("token_ids", "text"):
        with running(server := Server(TINY.load(), tokenizer, gives=gives)) as url:
            own = ServerSampler(url, concurrency=1, allow_retokenise=True)
            traces = [t for some in own.sample(TINY, tokenizer, asked, SAMPLING) for t in some]
        for body, request, trace in zip(server.bodies, asked, traces, strict=True):
            assert body["prompt"] == [*request.prompt_ids, *request.begun]
            assert body["max_tokens"] == 60 - len(request.begun)
            assert trace.generated_ids[: len(request.begun)] == request.begun
            assert trace.seed == one.seed(0)
        assert len({body["seed"] for body in server.bodies}) == 3 and server.bodies[0]["seed"] == one.seed(0) % 2**31


@pytest.mark.parametrize(
    ("answer", "said"),
    [({"error": {"message": "model is overloaded"}}, "200 .*model is overloaded\"}}"),
     ({"choices": []}, '200 {"choices": \\[\\]}'),
     ({"choices": [{"text": "7"}]}, r"the response was not finished \(finish_reason=None\)"), ([], r"200 \[\]")],
)  # fmt: skip
def test_an_answer_that_is_none_is_shown(answer: object, said: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with (
        running(Server(TINY.load(), tokenizer, answers=[(200, answer)])) as url,
        pytest.raises(ValueError, match=f"failed: {said}; what was"),
    ):
        ask(url, tokenizer, count=1, retries=0)
    with running(Server(TINY.load(), tokenizer, answers=[(200, answer)])) as url:
        assert len(ask(url, tokenizer, count=1, retries=1)) == 1


def test_a_server_is_left_alone_for_as_long_as_it_asks(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssgr.sampler.server._LONGEST_PAUSE", 0.01)
    with running(Server(TINY.load(), tokenizer, answers=[(429, {}), (529, {})], retry_after="1")) as url:
        start = time.monotonic()
        assert len(ask(url, tokenizer, count=1, retries=2)) == 1
        assert time.monotonic() - start > 2
    assert 1.5 < _asked_pause(formatdate(time.time() + 3, usegmt=True)) <= 3
    assert _asked_pause("soon") == _asked_pause(None) == _asked_pause("-3") == 0 and _asked_pause("99999") == 3600


def test_a_busy_server_is_asked_again(tokenizer: PreTrainedTokenizerBase) -> None:
    with running(Server(TINY.load(), tokenizer, refuse=3)) as url:
        assert len(ask(url, tokenizer, retries=3)) == 4
    with (
        running(Server(TINY.load(), tokenizer, refuse=99)) as url,
        pytest.raises(ValueError, match=r"failed: 503.*type the same"),
    ):
        ask(url, tokenizer)


def test_text_alone_is_refused_unless_it_may_be_tokenised_again(tokenizer: PreTrainedTokenizerBase) -> None:
    with running(Server(TINY.load(), tokenizer)) as url:
        want = {t.problem_id: t for t in ask(url, tokenizer)}
    with running(Server(TINY.load(), tokenizer, gives="text")) as url:
        with pytest.raises(ValueError, match=r"no token ids.*type sampler.engine.allow_retokenise=true"):
            ask(url, tokenizer)
        got = {t.problem_id: t for t in ask(url, tokenizer, allow_retokenise=True)}
    assert got.keys() == want.keys() and all(got[name].finish == want[name].finish for name in want)


def test_a_stop_token_is_what_the_generation_config_names(tokenizer: PreTrainedTokenizerBase) -> None:
    """Not only what the tokenizer calls special: nothing is appended to a response that ends with it."""
    model = TINY.load()
    with running(Server(model, tokenizer)) as url:
        often = min(set.intersection(*({*t.generated_ids} - {*tokenizer.all_special_ids} for t in ask(url, tokenizer))))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [1, often]
    with running(Server(model, tokenizer)) as url:
        traces = ask(url, tokenizer, checkpoint=Loaded(model))
    assert {trace.generated_ids[-1] for trace in traces} == {often}
    assert not any(often in trace.generated_ids[:-1] for trace in traces)


def test_stop_tokens_are_those_of_the_config_where_there_is_no_generation_config(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY.files(), folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 7]}))
    model = replace(TINY, path=str(folder))
    assert stop_ids(model.generation(), tokenizer) == stop_ids(model.load().generation_config, tokenizer) == {1, 7}


def test_a_response_that_was_not_finished_is_asked_for_again(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssgr.sampler.server._LONGEST_PAUSE", 0.01)
    with running(Server(TINY.load(), tokenizer)) as url:
        want = ask(url, tokenizer, count=1)
    with running(Server(TINY.load(), tokenizer, ends=["abort", "content_filter", None])) as url:
        assert ask(url, tokenizer, count=1, retries=3) == want
    with (
        running(Server(TINY.load(), tokenizer, ends=["abort"] * 9)) as url,
        pytest.raises(ValueError, match=r"failed: the response was not finished \(finish_reason=abort\); what was"),
    ):
        ask(url, tokenizer, count=1)


def none_drawn(answer: dict[str, Any]) -> None:
    answer["choices"][0]["token_ids"] = []


def another_vocabulary(answer: dict[str, Any]) -> None:
    answer["choices"][0]["token_ids"][0] = 151643


def too_many(answer: dict[str, Any]) -> None:
    answer["choices"][0]["token_ids"][:-1] = [5] * 60


def cut_sooner(answer: dict[str, Any]) -> None:
    answer["choices"][0] |= {"token_ids": [5] * 59, "finish_reason": "length"}


def echoed(answer: dict[str, Any]) -> None:
    answer["choices"][0]["token_ids"] = [5, 6, 7, 8, 5, 6]
    answer["usage"]["completion_tokens"] = 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (echoed, "has 7 tokens, and the server counts 2: does it echo the prompt"),
        (none_drawn, "is empty; look at the server's log"),
        (another_vocabulary, "has the token id 151643, and the model's vocabulary is 512: is it another model"),
        (too_many, "has 61 tokens, and 60 were asked for"),
        (cut_sooner, "was cut at 59 of 60 tokens: start the server with a longer context, or lower max_new_tokens"),
    ],
)
def test_ids_that_cannot_be_the_response_are_refused(
    change: Callable[[dict[str, Any]], None], said: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with (
        running(Server(TINY.load(), tokenizer, change=change)) as url,
        pytest.raises(ValueError, match=rf"url={url}: the response to attempt 0 of .* {said}"),
    ):
        ask(url, tokenizer, count=1)


@pytest.mark.parametrize("gives", ["token_ids", "text"])
def test_what_follows_the_end_of_a_response_is_none_of_it(gives: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """As of a server that does not know all stop tokens, and lets the model ask itself the next question."""
    ids = [5, 9, int(tokenizer.eos_token_id), *[7] * 57]

    def runs_on(answer: dict[str, Any]) -> None:
        told = {"token_ids": ids} if gives == "token_ids" else {"text": tokenizer.decode(ids)}
        answer["choices"][0] |= {**told, "finish_reason": "length"}
        answer["usage"]["completion_tokens"] = 60

    with running(Server(TINY.load(), tokenizer, gives=gives, change=runs_on)) as url:
        (trace,) = ask(url, tokenizer, count=1, allow_retokenise=gives == "text")
    assert trace.generated_ids == tuple(ids[:3]) and trace.finish == "stop"


def test_an_empty_text_is_a_response_that_stopped_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    def empty(answer: dict[str, Any]) -> None:
        answer["choices"][0] |= {"text": "", "finish_reason": "stop"}
        answer["usage"]["completion_tokens"] = 1

    with running(Server(TINY.load(), tokenizer, gives="text", change=empty)) as url:
        (trace,) = ask(url, tokenizer, count=1, allow_retokenise=True)
    assert trace.generated_ids == (tokenizer.eos_token_id,) and trace.finish == "stop"


@pytest.mark.parametrize("told", ["prompt_token_ids", "usage"])
def test_a_prompt_that_the_server_changed_is_refused(told: str, tokenizer: PreTrainedTokenizerBase) -> None:
    def tell_once(answer: dict[str, Any]) -> None:
        if told == "usage":
            del answer["choices"][0]["prompt_token_ids"]
        else:
            del answer["usage"]

    with running(Server(TINY.load(), tokenizer, change=tell_once)) as url:
        assert len(ask(url, tokenizer, count=1)) == 1
    with (
        running(Server(TINY.load(), tokenizer, bos=True, change=tell_once)) as url,
        pytest.raises(
            ValueError, match=r"changed the prompt of .*: (\d+) ids went out and \d+ came in; .*does it add a BOS"
        ),
    ):
        ask(url, tokenizer, count=1)


def test_keys_and_names(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_KEY", "secret")
    with running(Server(TINY.load(), tokenizer, key="secret")) as url:
        assert len(ask(url, tokenizer, key_variable="OWN_KEY")) == 4
        with pytest.raises(ValueError, match="401") as caught:
            ask(url, tokenizer, key_variable="NONE_SUCH")
        assert "secret" not in str(caught.value)
        monkeypatch.setenv("OWN_KEY", "secret\n")  # as a file has it
        assert len(ask(url, tokenizer, key_variable="OWN_KEY", count=1)) == 1
        for key in ("sec\nret", "secr\u20act"):
            monkeypatch.setenv("OWN_KEY", key)
            with pytest.raises(ValueError, match=r"^the key in OWN_KEY holds signs that no header may; set it again$"):
                ask(url, tokenizer, key_variable="OWN_KEY")
        with pytest.raises(ValueError, match=r"served=other: the server has tiny; type one"):
            ask(url, tokenizer, served="other")


def test_no_server_is_one_sentence(tokenizer: PreTrainedTokenizerBase) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match=r"does not answer \(ConnectError.*type sampler.engine.url=http://HOST"):
        ask(url, tokenizer)


@pytest.mark.parametrize(
    ("name", "value"), [("ALL_PROXY", "nonsense://127.0.0.1:9"), ("SSL_CERT_FILE", "no such file")]
)
def test_an_environment_that_no_client_can_use_is_one_sentence(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"url=http://127.0.0.1:1/v1 cannot be asked .*unset or mend ALL_PROXY"):
        ask("http://127.0.0.1:1/v1", tokenizer)


@pytest.mark.parametrize(
    "url", ["http://HOST:PORT/v1", "127.0.0.1:8000/v1", "localhost:8000/v1", "http://", "", "http://[::1"]
)
def test_an_address_that_is_none_is_one_sentence(url: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^sampler.engine.url={re.escape(url)}(:| is) .*; type sampler.engine.url=http://HOST"
    ):
        ServerSampler(url)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"^sampler\.engine\.timeout=.*: give seconds above 0, 1000000 at most$"):
        ServerSampler("http://127.0.0.1:8000/v1", timeout=seconds)


@pytest.mark.parametrize("text", [{}, {"text": None}])
def test_a_response_without_text_is_one_sentence(text: dict[str, None], tokenizer: PreTrainedTokenizerBase) -> None:
    def change(answer: dict[str, Any]) -> None:
        del answer["choices"][0]["text"]
        answer["choices"][0] |= text

    with (
        running(Server(TINY.load(), tokenizer, gives="text", change=change)) as url,
        pytest.raises(ValueError, match=r"the response to attempt 0 of .* has neither token ids nor text"),
    ):
        ask(url, tokenizer, count=1, allow_retokenise=True)


def test_a_server_that_dies_loses_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    problems = ArithmeticProblems((1,), 1, 8, 5).read("test")

    def run(url: str) -> list[Trace]:
        own = ServerSampler(url, concurrency=2, retries=1)
        prompt = lambda question: TINY.prompt_ids(tokenizer, question)
        return sample(TINY, tokenizer, prompt, problems, own, Decoding(1, 0.6, 0.95, 60, 0), tmp_path)

    dying = Server(TINY.load(), tokenizer, dies_after=5)
    with running(dying) as url, pytest.raises(ValueError, match="what was sampled before is kept"):
        run(url)
    assert dying.served == 5
    other = Server(TINY.load(), tokenizer)
    with running(other) as url:
        assert len(run(url)) == 8
    assert other.served == 3, "only what was missing is asked for"


def test_ctrl_c_does_not_wait_for_requests_under_way(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = threading.Event()
    with running(Server(TINY.load(), tokenizer, slow=answer)) as url:
        there, start = {*threading.enumerate()}, time.monotonic()
        stop = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        stop.start()
        with pytest.raises(KeyboardInterrupt):
            ask(url, tokenizer, retries=0, timeout=30)
        assert time.monotonic() - start < 10
        stop.join()
        left = {*threading.enumerate()} - there
        assert len(left) >= 2 and all(thread.daemon for thread in left), "nor does Python wait for them when it ends"
        answer.set()
        for thread in left:
            thread.join(10)
        assert not any(thread.is_alive() for thread in left)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_one_sentence(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"vLLM is not installed; type pip install 'ssgr\[vllm\]', or sampler=hf"):
        list(VllmSampler().sample(TINY, tokenizer, requests(tokenizer, 1), SAMPLING))


@pytest.mark.parametrize(
    "setting", [{"batch_size": 0}, {"tensor_parallel": 0}, {"data_parallel": 0}, {"memory_share": 1.5}]
)
def test_numbers_that_vllm_cannot_use_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"sampler.engine.{next(iter(setting))}="):
        VllmSampler(**setting)


def test_vllm_goes_on_with_another_seed() -> None:
    one = Request("any", 0, (3, 4))
    asked = [one, replace(one, begun=(5, 6))]
    ((first, on),) = _prompts(asked, SAMPLING, frozenset({1}))
    assert (first[1], first[2]["max_tokens"], first[2]["seed"]) == ([3, 4], 60, one.seed(0))
    assert (on[1], on[2]["max_tokens"]) == ([3, 4, 5, 6], 58) and on[2]["seed"] != one.seed(0)


def test_vllm_is_asked_for_no_more_than_the_context(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It refuses a `max_model_len` above it, and needs no more than prompt and response together."""
    asked: dict[str, Any] = {}

    class Asked(Exception):
        pass

    def replicas(engine: VllmSampler, settings: dict[str, Any], shards: Any) -> None:
        asked.update(settings)
        raise Asked

    (tmp_path / "vllm.py").touch()  # found, and not imported
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ssgr.sampler.vllm._Replicas", replicas)
    with pytest.raises(Asked):
        list(VllmSampler().sample(TINY, tokenizer, [Request("any", 0, (5,) * 964)], SAMPLING))
    assert asked["max_model_len"] == 1024


def test_what_vllm_did_not_finish_is_no_trace() -> None:
    replicas = object.__new__(_Replicas)  # without its processes
    replicas.left, replicas.processes, replicas.said = 3, [], queue.Queue()
    replicas.said.put([(0, [5, 1], "stop"), (1, [5], "abort"), (2, [5, 5], "length")])
    answers = replicas.answers()
    assert next(answers) == [(0, [5, 1], "stop"), (2, [5, 5], "length")]
    with pytest.raises(
        ValueError, match=r"vLLM failed: a response was not finished \(abort\); what was sampled before"
    ):
        next(answers)
