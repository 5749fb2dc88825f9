"""Sampling from a server with an OpenAI-compatible completions interface: vLLM, SGLang, llama.cpp.

Prompts go out as token ids. Responses come back as token ids from vLLM (0.10.2 and later) and newer SGLang, on request
(`return_token_ids`), and as text alone from llama.cpp, which has ids in its own /completion only.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

import httpx
from transformers import PreTrainedTokenizerBase

from ssgr.errors import first_line
from ssgr.loadable import Loadable
from ssgr.records import Finish, Trace
from ssgr.sampler import Decoding, Request, check_room, stop_ids

_YIELD_SECONDS = 30.0  # finished traces are handed on at least so often
_LONGEST_PAUSE, _LONGEST_ASKED = 60.0, 3600.0  # seconds between two tries, and where the server asks for more
_PASSING = {408, 409, 425, 429}  # answers that a later try may turn, as those from 500 up
_AS_WRITTEN = "sampler.engine.url=http://HOST:PORT/v1, such as http://127.0.0.1:8000/v1"
_NOTHING_ELSE = {  # what changes the distribution beside temperature and top_p, turned off
    # Else vLLM and SGLang fill it from the checkpoint's generation_config.json, and llama.cpp from defaults of its own.
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "repeat_penalty": 1.0,  # llama.cpp's name of it
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "samplers": ["temperature", "top_p"],  # llama.cpp's, which would take the nucleus before the temperature
}


@dataclass(frozen=True)
class ServerSampler:
    """The model that a server at `url` serves as `served` (None: the only one it names), which must be the configured one.

    `concurrency` requests are under way at a time; each is tried 1 + `retries` times, with pauses that double, and may take
    `timeout` seconds. A server that gives text only is refused unless `allow_retokenise`: the ids of its text may differ
    from those that the model drew. The key, if one is needed, is read from the environment variable `key_variable`.

    Raises:
        ValueError: a number is too small, or the address is none.
    """

    runs_model: ClassVar[bool] = False
    draws: ClassVar[bool] = True
    url: str = field(metadata={"key": False})
    served: str | None = None
    allow_retokenise: bool = False
    concurrency: int = field(default=64, metadata={"key": False})
    retries: int = field(default=6, metadata={"key": False})
    timeout: float = field(default=3600.0, metadata={"key": False})
    key_variable: str = field(default="OPENAI_API_KEY", metadata={"key": False})

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"sampler.engine.{name}={getattr(self, name)}: give {least} or more")
        try:
            written = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ValueError(f"sampler.engine.url={self.url}: {error}; type {_AS_WRITTEN}") from error
        if written.scheme not in ("http", "https") or not written.host:
            raise ValueError(f"sampler.engine.url={self.url} is no address of a server; type {_AS_WRITTEN}")
        if not 0 < self.timeout <= 1e6:
            raise ValueError(f"sampler.engine.timeout={self.timeout}: give seconds above 0, 1000000 at most")

    def sample(
        self,
        checkpoint: Loadable,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        decoding: Decoding,
    ) -> Iterator[list[Trace]]:
        """Yield the traces of all `requests` as they come.

        Raises:
            ValueError: the server cannot be reached, a prompt leaves no room in its context, it refuses a request, goes away
                for longer than the tries last, changes a prompt, or gives no token ids or none that serve; or its key is none.
                What came before has been yielded.
        """
        key = os.environ.get(self.key_variable, "").strip()  # as files of keys end with a new line
        if not (key.isascii() and key.isprintable()):  # whose refusal by a header would show it
            raise ValueError(f"the key in {self.key_variable} holds signs that no header may; set it again")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        stop = stop_ids(checkpoint.generation(), tokenizer)
        limits = httpx.Limits(max_connections=self.concurrency)
        try:
            opened = httpx.Client(base_url=self.url, headers=headers, timeout=self.timeout, limits=limits)
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            raise ValueError(
                f"sampler.engine.url={self.url} cannot be asked ({first_line(error)[:200]}); unset or mend ALL_PROXY, "
                "HTTP_PROXY, HTTPS_PROXY and SSL_CERT_FILE, or name the server's host in NO_PROXY"
            ) from error
        with opened as client:
            name, context = self._model(client)
            check_room(context, requests, decoding)
            ask = _Asking(self, client, name, tokenizer, decoding, stop)
            yield from _as_they_come(ask, requests, self.concurrency)

    def _model(self, client: httpx.Client) -> tuple[str, int | None]:
        """What the server calls the model, and the tokens of its context (None: llama.cpp does not say)."""
        try:
            answer = client.get("models", timeout=min(self.timeout, 30.0))
            answer.raise_for_status()
            contexts = {str(one["id"]): one.get("max_model_len") for one in answer.json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"sampler.engine.url={self.url} does not answer ({first_line(error)[:200]}); start the server (vllm serve MODEL, "
                f"say), or type {_AS_WRITTEN}"
            ) from error
        name = next(iter(contexts)) if self.served is None and len(contexts) == 1 else self.served
        if name is None or name not in contexts:
            raise ValueError(
                f"sampler.engine.served={self.served}: the server has {', '.join(contexts) or 'no model'}; type one of them"
            )
        context = contexts[name]
        return name, context if isinstance(context, int) else None


@dataclass
class _Asking:
    """One request after another, from any thread."""

    engine: ServerSampler
    client: httpx.Client
    name: str
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    stop: frozenset[int]  # every id that ends a response
    stopped: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: Request) -> Trace:
        """The trace of `request`.

        Raises:
            ValueError: there is none.
        """
        sent, most = [*request.prompt_ids, *request.begun], request.most(self.decoding) - len(request.begun)
        seed = request.seed_of_the_rest(self.decoding.seed)
        body = {
            "model": self.name, "prompt": sent, "max_tokens": most, "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p, "seed": seed % 2**31, "return_token_ids": True,
            "stop_token_ids": sorted(self.stop), "skip_special_tokens": False, **_NOTHING_ELSE,
        }  # fmt: skip
        choice, usage = self._post(request, body)
        back, count = choice.get("prompt_token_ids"), usage.get("prompt_tokens")
        if back not in (None, sent) or count not in (None, len(sent)):
            raise ValueError(
                f"sampler.engine.url={self.engine.url} changed the prompt of {request.problem_id}: {len(sent)} ids went out and "
                f"{len(back) if isinstance(back, list) else count} came in; is it another tokenizer, or does it add a BOS?"
            )
        ids = self._ids(request, choice, usage, most)
        # Some say length of one that just fits.
        finish: Finish = "stop" if ids[-1] in self.stop else choice["finish_reason"]
        own, whole = request.seed(self.decoding.seed), (*request.begun, *ids)
        return Trace(request.problem_id, request.attempt, request.prompt_ids, whole, finish, own)

    def _post(self, request: Request, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The choice of an answer, which has stopped or is as long as it may be, and the usage (empty if it is not told)."""
        said, asked = "", 0.0
        for attempt in range(1 + self.engine.retries):
            if attempt and self.stopped.wait(max(asked, min(2.0 ** (attempt - 1), _LONGEST_PAUSE))):
                break
            asked = 0.0
            try:
                answer = self.client.post("completions", json=body)
                said = f"{answer.status_code} {answer.text[:200]}"
                if answer.status_code == 200:
                    content = answer.json()
                    choice, usage = dict(content["choices"][0]), dict(content.get("usage") or {})
                    if choice.get("finish_reason") in ("stop", "length"):
                        return choice, usage
                    said = f"the response was not finished (finish_reason={choice.get('finish_reason')})"
                    continue
                if answer.status_code < 500 and answer.status_code not in _PASSING:
                    break
                asked = _asked_pause(answer.headers.get("retry-after"))
            except (httpx.HTTPError, ValueError) as error:  # nor is what is no JSON worth reading
                said = first_line(error)[:200]
            except (KeyError, IndexError, TypeError, AttributeError):  # an answer without choices, which `said` shows
                continue
        raise ValueError(
            f"sampler.engine.url={self.engine.url}: attempt {request.attempt} of {request.problem_id} failed: {said}; what was "
            "sampled before is kept: type the same command again to go on"
        )

    def _ids(self, request: Request, choice: dict[str, Any], usage: dict[str, Any], most: int) -> tuple[int, ...]:
        """The ids of the response, at most so many, with what ended it.

        Raises:
            ValueError: there are none, they are not of this model, or they are more or fewer than were asked for.
        """
        told, stopped = choice.get("token_ids"), choice["finish_reason"] == "stop"
        ids = list(told) if isinstance(told, list) else self._retokenised(request, choice)
        known = len(self.tokenizer)
        if wrong := [i for i in ids if not (isinstance(i, int) and 0 <= i < known)]:
            raise self._refused(
                request, f"has the token id {wrong[0]}, and the model's vocabulary is {known}: is it another model?"
            )
        if end := next((n for n, i in enumerate(ids, 1) if i in self.stop), None):
            ids, stopped = ids[:end], True  # a server that knows fewer ends goes on past this one
        if not ids and not (stopped and told is None):  # a text may be empty: what ends a response is no text
            raise self._refused(request, "is empty; look at the server's log")
        if stopped and not (ids and ids[-1] in self.stop) and self.tokenizer.eos_token_id is not None:
            ids.append(int(self.tokenizer.eos_token_id))  # servers may leave out what ended the response
        # A text may be tokenised into another number of tokens than were drawn.
        drawn = usage.get("completion_tokens") if told is None else len(ids)
        if isinstance(drawn, int) and drawn > most:
            raise self._refused(
                request, f"has {drawn} tokens, and {most} were asked for: does the server ignore max_tokens?"
            )
        if isinstance(drawn, int) and drawn < most and not stopped:
            raise self._refused(
                request,
                f"was cut at {drawn} of {most} tokens: start the server with a longer context, or lower max_new_tokens",
            )
        count = usage.get("completion_tokens")
        if told is not None and isinstance(count, int) and len(ids) > count + 1:  # some do not count what ended it
            raise self._refused(
                request, f"has {len(ids)} tokens, and the server counts {count}: does it echo the prompt?"
            )
        return tuple(ids)

    def _retokenised(self, request: Request, choice: dict[str, Any]) -> list[int]:
        if not self.engine.allow_retokenise:
            raise ValueError(
                f"sampler.engine.url={self.engine.url} gives no token ids (vLLM from 0.10.2 and newer SGLang do); type "
                "sampler.engine.allow_retokenise=true to tokenise its text again, whose ids may not be those the model drew"
            )
        if not isinstance(choice.get("text"), str):
            raise self._refused(request, "has neither token ids nor text: is it a server of /v1/completions?")
        return list(self.tokenizer(choice["text"], add_special_tokens=False).input_ids)

    def _refused(self, request: Request, why: str) -> ValueError:
        where = f"attempt {request.attempt} of {request.problem_id}"
        return ValueError(f"sampler.engine.url={self.engine.url}: the response to {where} {why}")


def _asked_pause(retry_after: str | None) -> float:
    """Seconds that a server asks to be left alone for, in either form of the header; an hour at most."""
    seconds = 0.0
    with suppress(TypeError, ValueError):
        if (given := retry_after or "").strip().isdigit():
            seconds = float(given)
        elif given:
            seconds = parsedate_to_datetime(given).timestamp() - time.time()
    return min(max(seconds, 0.0), _LONGEST_ASKED)


def _start(ask: _Asking, request: Request) -> Future[Trace]:
    """Ask in a thread that nobody waits for: a run that is stopped leaves requests behind that may take an hour yet.

    An executor would wait for them when it is left, and again when Python ends; closing the client does not wake them.
    """
    answer = Future[Trace]()

    def run() -> None:
        try:
            answer.set_result(ask(request))
        except BaseException as error:  # handed on to whoever asks for the result
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def _as_they_come(ask: _Asking, requests: Sequence[Request], at_once: int) -> Iterator[list[Trace]]:
    """Ask for all `requests`; where one fails, hand on those that came, then raise."""
    waiting, under_way = iter(requests), set[Future[Trace]]()
    done: list[Trace] = []
    failed: BaseException | None = None
    due = time.monotonic() + _YIELD_SECONDS
    try:
        while True:
            while failed is None and len(under_way) < at_once and (request := next(waiting, None)) is not None:
                under_way.add(_start(ask, request))
            if not under_way:
                break
            ready, under_way = wait(under_way, timeout=1.0, return_when=FIRST_COMPLETED)
            for one in ready:
                if error := one.exception():
                    failed = failed or error
                    ask.stopped.set()
                else:
                    done.append(one.result())
            if done and (len(done) >= at_once or time.monotonic() > due):
                yield done
                done, due = [], time.monotonic() + _YIELD_SECONDS
        if done:
            yield done
    finally:
        ask.stopped.set()
    if failed is not None:
        raise failed
