"""The prompts that a protected adapter leaves alone: read from a text file, filled in, divided (lib/PROTECTION.md)."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lib.errors import UserError
from lib.texts import read_text, text_lines

HELD_OUT = 0.1  # of the prompts: they take no part in P, and show what it does to others like them
FEWEST = 10  # prompts of a list
# Words of a caption that name no concept, and what a caption may begin with.
FUNCTION_WORDS = frozenset("a an the of in on at with without and or by to from for as its his her their".split())
BEFORE_NOUN = FUNCTION_WORDS | {"wearing", "holding", "wears", "holds"}
MEDIUM = re.compile(
    r"^(?:an? |the )?(?:[\w-]+ )?(?:photo|photograph|image|image|painting|drawing|illustration|close-up|portrait) of "
)


def check_protection(config):
    """Refuse a loss guidance or a protection that makes no sense."""
    scales = config["loss_guidance_scale"]
    if len(scales) != 2 or scales[0] > scales[1]:
        raise UserError(f"loss_guidance_scale is {scales}, but must be two numbers, the smaller first: 1,1.7")
    path = config["protected_prompts"]
    if path is None:
        return
    if not Path(path).is_file():
        raise UserError(f"protected_prompts: {path}: no such file; prompts/protected.txt is one")
    if config["dora"]:
        raise UserError(
            "protected_prompts cannot be had with DoRA, whose magnitudes scale each layer's output under every "
            "prompt; take --no-dora"
        )
    others = [t for t in config["unet_targets"] if t not in ("attn2.to_k", "attn2.to_v")]
    if others:
        raise UserError(
            f"unet_targets holds {', '.join(others)}, but with protected_prompts it may hold attn2.to_k and attn2.to_v "
            "alone: every other layer sees the image, and an adapter there changes every prompt's images"
        )


@dataclass(frozen=True)
class ProtectedPrompts:
    """A list of prompts to leave alone, {class} filled in, in two parts, and what is said of it."""

    path: str
    noun: str  # what {class} stands for
    noun_is_given: bool
    listed: tuple  # P is made of them; the empty prompt is the first
    held_out: tuple  # P is tried on them
    concept_words: tuple  # of the captions
    left_out: int  # prompts that held one of those, or were a caption
    captions: tuple  # what is taught, the commonest first
    sha256: str  # of both parts

    def text(self):
        """What the console says."""
        origin = "" if self.noun_is_given else ", from the caption; --protected-class names another"
        text = f"protected: {len(self.listed):,} prompts of {self.path}, {len(self.held_out)} more held out"
        if self.noun:
            text += f"; {{class}} is {self.noun}{origin}"
        if self.left_out:
            words = ", ".join(self.concept_words) or "what is taught"
            text += f"\nnote: {self.left_out} of its prompts speak of what is taught ({words}) and are left out"
        return text


def words_of(text):
    return re.findall(r"[\w'-]+", text.lower())


def class_of(caption):
    """What a caption is about: the last word of its first noun phrase. “a photo of a sks dog on a beach”: dog."""
    rest = words_of(MEDIUM.sub("", caption.lower().strip()))
    if "wearing" in rest:  # “a person wearing a holographic raincoat in the rain”
        rest = rest[rest.index("wearing") + 1 :]
    noun = ""
    for word in rest:
        if word in FUNCTION_WORDS and noun:
            break
        if word not in FUNCTION_WORDS:
            noun = word
    return noun


def concept_words_of(caption, noun):
    """The words of a caption that make its `noun` the concept: those right before it, or else, where there are none,
    all other words that are not mere grammar."""
    words, kind = words_of(MEDIUM.sub("", caption.lower())), words_of(noun)
    others = [word for word in words if word not in kind and word not in FUNCTION_WORDS]
    starts = [i for i in range(len(words)) if kind and words[i : i + len(kind)] == kind]
    if starts:
        own = []
        for word in reversed(words[: starts[0]]):
            if word in BEFORE_NOUN:
                break
            own.insert(0, word)
        if own:
            return own
    return others


def read_protected(path, noun, captions):
    """The ProtectedPrompts of the text file `path`, a prompt a line, # before a comment, {class} for `noun`, which
    may be None: then it is taken from the commonest of the `captions` [str], which come in that order.

    Raises UserError for a file without enough prompts, and a `noun` while the captions are about something else.
    """
    lines = text_lines(read_text(path, "protected_prompts: "))
    lines = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    filled = any("{class}" in line for line in lines)
    given, noun = noun is not None, class_of(captions[0]) if noun is None else noun.strip()
    if filled and not noun:
        raise UserError(
            f"{path} has prompts with {{class}}, but the caption “{captions[0]}” names nothing that it could stand "
            "for; name it: --protected-class raincoat"
        )
    spoken_of = any(set(words_of(noun)) <= set(words_of(caption)) for caption in captions)
    if given and filled and not spoken_of:
        # “a photo of sks” names no kind of thing; a word that other prompts use too does.
        other = class_of(captions[0])
        if any(other in words_of(line) for line in lines if "{class}" not in line):
            raise UserError(
                f"protected_class is {noun}, but no caption speaks of that: “{captions[0]}” is about a {other}. It is the "
                "kind of thing that is taught, as raincoat for “a holographic raincoat”, whose other examples are to stay"
            )
    concept = set().union(*(concept_words_of(caption, noun) for caption in captions[:1]))
    taught = {" ".join(words_of(caption)) for caption in captions}
    prompts = dict.fromkeys(line.replace("{class}", noun) for line in lines)
    kept = [p for p in prompts if not concept & set(words_of(p)) and " ".join(words_of(p)) not in taught]
    if len(kept) < FEWEST:
        raise UserError(
            f"{path} holds {len(kept)} prompts that can be protected, {FEWEST} are the fewest and some 2,000 are good: "
            "what is not listed is spoiled the more, the fewer there are (prompts/protected.txt is a list)"
        )
    import numpy as np  # here, so that a wrong option is answered before it is imported

    order = np.random.default_rng(len(kept)).permutation(len(kept))
    held_out = set(order[: round(HELD_OUT * len(kept))].tolist())
    listed = ["", *(p for i, p in enumerate(kept) if i not in held_out)]
    tried = [p for i, p in enumerate(kept) if i in held_out]
    digest = hashlib.sha256("\n".join([*listed, "", *tried]).encode()).hexdigest()
    return ProtectedPrompts(
        str(path),
        noun if filled else "",
        given,
        tuple(listed),
        tuple(tried),
        tuple(sorted(concept)),
        len(prompts) - len(kept),
        tuple(captions),
        digest,
    )
