"""CLIP's byte-level BPE tokenizer with its own vocabulary."""

import itertools
import json
import re

import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from lib.files import write_json


def byte_letters():
    """The 256 characters that stand for bytes in byte-level BPE (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words):
    """BPE merges (Sennrich et al. 2016), most frequent pair first, until each word is one token."""
    parts = {part for word in words for part in re.findall("[a-z]+", word)}  # as CLIP splits
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in sorted(parts)]
    merges = []
    while any(len(word) > 1 for word in pieces):
        counts = {}
        for word in pieces:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in pieces:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def write_tokenizer(folder, words):
    """A CLIPTokenizer with `words` as whole tokens; it spells out all others."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_letters()
    merges = learn_merges(words)
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]  # last, as in CLIP
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def byte_tokenizer(folder, begin):
    """A CLIPTokenizer over single bytes, without merges, written to `folder`.

    For models with random weights: it has `begin` + 2 tokens; texts begin with token `begin` and end with the next one.
    """
    letters = byte_letters()
    words = letters + [letter + "</w>" for letter in letters]
    words += [f"<unused_{i}>" for i in range(begin - len(words))]
    words = [*words[:begin], "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "vocab.json", folder / "merges.txt"
    files[0].write_text(json.dumps({word: index for index, word in enumerate(words)}))
    files[1].write_text("#version: 0.2\n")
    return CLIPTokenizer(*map(str, files), model_max_length=77, pad_token="<|endoftext|>")


def tokenise(tokenizer, captions, padding="max_length"):
    """int64 [N, 77] on the CPU, padded with end-of-text tokens like Stable Diffusion's; padding="longest" pads to the
    longest
    caption."""
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    once = list(numbers)  # most of a million captions occur several times
    ids = tokenizer(once, padding="longest", truncation=True, return_tensors="pt").input_ids
    ids = ids[torch.tensor([numbers[caption] for caption in captions])]
    width = 77 - ids.shape[1] if padding == "max_length" else 0
    return F.pad(ids, (0, width), value=tokenizer.pad_token_id)


def special_tokens(tokenizer):
    """The ids for a CLIPTextConfig, which pools at the first end-of-text token."""
    return dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
