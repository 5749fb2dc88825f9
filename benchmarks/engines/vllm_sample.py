"""Sample with vLLM, in an environment of its own: python vllm_sample.py JOB.json; prints the seconds as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    start = time.perf_counter()
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_num_seqs=job["batch"],
        max_model_len=job["context"],
        enable_prefix_caching=False,  # every prompt is asked once
        disable_log_stats=True,
    )
    asked = [{"prompt_token_ids": ids} for ids in job["asked"]]
    how = [
        SamplingParams(
            temperature=job["temperature"], top_p=job["top_p"], min_tokens=n, max_tokens=n, ignore_eos=True,
            detokenize=False,
        )
        for n in job["tokens"]
    ]  # fmt: skip
    warm = SamplingParams(max_tokens=4, detokenize=False)
    llm.generate(asked[:2], warm, use_tqdm=False)  # compiled before the clock runs
    begin = time.perf_counter()
    out = llm.generate(asked, how, use_tqdm=False)
    seconds = time.perf_counter() - begin
    assert [len(one.outputs[0].token_ids) for one in out] == job["tokens"]
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds, "start": begin - start}))
