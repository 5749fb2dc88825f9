"""The tiny model's tokenizer: byte-level BPE of 512 tokens in which every digit and sign stands alone."""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ssgr.model.tiny import corpus

VOCAB_SIZE = 512
BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK = SPECIAL = (
    "<|bos|>",
    "<|eos|>",
    "<|endoftext|>",  # the name that Qwen2Tokenizer expects: AutoTokenizer takes that class for any qwen2 model
    "<|user|>",
    "<|assistant|>",
    "<think>",
    "</think>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('tiny knows the roles user and assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def build(documents: int = 20_000, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `documents` generated documents."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\d\n+\-*=()?.,;:]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (corpus.document(rng) for _ in range(documents))
    tokenizer.train_from_iterator((f"{q or ''}\n{corpus.shown(a).replace(END_THINK, '')}" for q, a in texts), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
