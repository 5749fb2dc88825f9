"""Sampling with vLLM's offline engine, in processes of its own: one replica of the model in each."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from ssgr.errors import first_line
from ssgr.loadable import Loadable, context_of
from ssgr.records import Trace
from ssgr.sampler import Decoding, Request, check_room, stop_ids
from ssgr.sampler.workers import end_with_the_parent

_YIELD_SECONDS = 30.0  # finished traces are handed on at least so often
_END_SECONDS = 60.0  # that a replica may take to end
_Answer = tuple[int, list[int], str]  # index of the request, response ids, finish reason


@dataclass(frozen=True)
class VllmSampler:
    """vLLM runs the checkpoint; prompts and responses are token ids, and the attempts at a problem share its prefix.

    `tensor_parallel` GPUs hold one replica of the model and `data_parallel` replicas share the problems; `batch_size` rows
    are decoded together in each. `options` are further arguments of vLLM's `LLM`, by their names.

    Raises:
        ValueError: a number is too small.
    """

    runs_model: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    tensor_parallel: int = field(default=1, metadata={"key": False})
    data_parallel: int = field(default=1, metadata={"key": False})
    batch_size: int = field(default=256, metadata={"key": False})
    memory_share: float = field(default=0.9, metadata={"key": False})
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "data_parallel", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampler.engine.{name}={getattr(self, name)}: give 1 or more")
        if not 0 < self.memory_share <= 1:
            raise ValueError(
                f"sampler.engine.memory_share={self.memory_share}: give a share of the GPU above 0, at most 1"
            )

    def sample(
        self,
        checkpoint: Loadable,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        decoding: Decoding,
    ) -> Iterator[list[Trace]]:
        """Yield the traces of all `requests` as they come.

        Raises:
            ValueError: vLLM is not installed, a prompt leaves no room in the context, or a replica failed. What came before
                has been yielded.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("sampler.engine: vLLM is not installed; type pip install 'ssgr[vllm]', or sampler=hf")
        folder = str(checkpoint.files())
        trusted = bool(self.options.get("trust_remote_code", checkpoint.trust_remote_code))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        check_room(context_of(config), requests, decoding)
        text = config.get_text_config()
        stored = str(getattr(config, "dtype", None) or getattr(text, "dtype", None) or "auto").removeprefix("torch.")
        settings = {
            "model": folder,
            "skip_tokenizer_init": True,  # ids in, ids out
            "trust_remote_code": trusted,
            # By itself vLLM would run a float32 checkpoint in bfloat16.
            "dtype": stored if checkpoint.dtype == "auto" else checkpoint.dtype,
            "generation_config": "vllm",  # the decoding is ours, not that of the checkpoint's generation_config.json
            "max_model_len": max(len(r.prompt_ids) + r.most(decoding) for r in requests),
            "max_num_seqs": self.batch_size,
            "tensor_parallel_size": self.tensor_parallel,
            "gpu_memory_utilization": self.memory_share,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            **self.options,
        }
        stop = stop_ids(checkpoint.generation(), tokenizer)
        replicas = _Replicas(self, settings, _prompts(requests, decoding, stop))
        try:
            for answers in replicas.answers():
                yield [_trace(requests[index], ids, finish, decoding) for index, ids, finish in answers]
        finally:
            replicas.end()


def _trace(request: Request, ids: list[int], finish: str, decoding: Decoding) -> Trace:
    seed = request.seed(decoding.seed)
    whole = (*request.begun, *ids)
    return Trace(
        request.problem_id, request.attempt, request.prompt_ids, whole, "length" if finish == "length" else "stop", seed
    )


_Prompt = tuple[int, list[int], dict[str, Any]]  # index of the request, ids, sampling parameters


def _prompts(requests: Sequence[Request], decoding: Decoding, stop: frozenset[int]) -> list[list[_Prompt]]:
    """What vLLM is asked, the attempts at one problem together, longest prompts first."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), requests[i].problem_id))
    out = []
    for _, group in groupby(order, key=lambda i: requests[i].problem_id):
        shard: list[_Prompt] = []
        for index in group:
            request = requests[index]
            how = {
                "temperature": decoding.temperature,
                "top_p": decoding.top_p,
                "max_tokens": request.most(decoding) - len(request.begun),
                "seed": request.seed_of_the_rest(decoding.seed),
                "stop_token_ids": sorted(stop),
                "detokenize": False,
            }
            shard.append((index, [*request.prompt_ids, *request.begun], how))
        out.append(shard)
    return out


class _Replicas:
    """The processes, and what they are asked and answer."""

    def __init__(self, engine: VllmSampler, settings: dict[str, Any], shards: list[list[_Prompt]]) -> None:
        context: Any = multiprocessing.get_context("spawn")
        self.left = sum(map(len, shards))
        self.asked, self.said = context.Queue(), context.Queue()
        for shard in shards:
            self.asked.put(shard)
        count = min(engine.data_parallel, len(shards))
        devices = [_devices(i, engine.tensor_parallel) if count > 1 else None for i in range(count)]
        self.processes = [
            context.Process(target=_replica, args=(settings, own, self.asked, self.said)) for own in devices
        ]
        for process in self.processes:
            self.asked.put(None)
            process.start()

    def answers(self) -> Iterator[list[_Answer]]:
        """Answers as they come.

        Raises:
            ValueError: a replica failed or was killed, or a response was not finished.
        """
        done: list[_Answer] = []
        failed, due = "", time.monotonic() + _YIELD_SECONDS
        while self.left and not failed:
            try:
                said = self.said.get(timeout=1.0)
            except queue.Empty:
                codes = [process.exitcode for process in self.processes]
                if any(codes) or None not in codes:
                    failed = f"its processes ended with codes {codes}"
                continue
            if isinstance(said, str):
                failed = said
                continue
            self.left -= len(said)
            done += [answer for answer in said if answer[2] in ("stop", "length")]
            if others := {str(answer[2]) for answer in said} - {"stop", "length"}:
                failed = f"a response was not finished ({', '.join(others)})"
            if time.monotonic() > due:
                yield done
                done, due = [], time.monotonic() + _YIELD_SECONDS
        if done:
            yield done
        if failed:
            raise ValueError(
                f"sampler.engine: vLLM failed: {failed}; what was sampled before is kept: type the same command again to go on. "
                "Where memory is short, lower sampler.engine.memory_share or batch_size"
            )

    def end(self) -> None:
        """End the processes, which frees their devices."""
        due = time.monotonic() + (_END_SECONDS if not self.left else 0.0)
        for process in self.processes:
            process.join(max(0.0, due - time.monotonic()))
            if process.is_alive():
                process.terminate()
                process.join(_END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        for channel in (self.asked, self.said):
            channel.cancel_join_thread()
            channel.close()


def _devices(number: int, each: int) -> str:
    """The GPUs of replica `number`, of those that this process may see."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    own = names[number * each : (number + 1) * each]
    if len(own) < each:
        raise ValueError(
            f"sampler.engine.data_parallel with tensor_parallel={each} needs more than the {len(names)} GPUs that are there"
        )
    return ",".join(own)


def _replica(settings: dict[str, Any], devices: str | None, asked: Any, said: Any) -> None:
    """Run one replica in this process: take shards while there is room, and say what is finished."""
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process is there for it
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = LLM(**settings).llm_engine
        most, open_ = int(settings["max_num_seqs"]), True
        while open_ or engine.has_unfinished_requests():
            while open_ and engine.get_num_unfinished_requests() < 2 * most:
                try:
                    shard = asked.get(block=not engine.has_unfinished_requests())
                except queue.Empty:
                    break
                open_ = shard is not None
                for index, ids, how in shard or ():
                    parameters = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **how)
                    engine.add_request(str(index), {"prompt_token_ids": ids}, parameters)
            if engine.has_unfinished_requests():
                finished = [one for one in engine.step() if one.finished]
                if finished:
                    answers = [
                        (int(o.request_id), list(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in finished
                    ]
                    said.put(answers)
    except Exception as error:  # of vLLM or of one of the libraries that it calls: the parent says it in a sentence
        said.put(first_line(error)[:300])
        said.close()
        said.join_thread()
        raise SystemExit(1) from error
