"""The list of protected prompts: read from a text file, with {class} replaced and a part held out (lib/PROTECTION.md)."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lib.errors import UserError
from lib.texts import read_text, text_lines

HELD_OUT = 0.1  # of the prompts: not in P, they show its effect on similar prompts
FEWEST = 10  # prompts in a list
# Words that name no concept; words before a noun; the beginning of a caption that names its medium.
FUNCTION_WORDS = frozenset("a an the of in on at with without and or by to from for as its his her their".split())
BEFORE_NOUN = FUNCTION_WORDS | {"wearing", "holding", "wears", "holds"}
MEDIUM = re.compile(
    r"^(?:an? |the )?(?:[\w-]+ )?(?:photo|photograph|image|picture|painting|drawing|illustration|close-up|portrait) of "
)


def check_protection(config):
    """Raises UserError for an invalid loss guidance or protection."""
    scales = config["loss_guidance_scale"]
    if len(scales) != 2 or scales[0] > scales[1]:
        raise UserError(f"loss_guidance_scale is {scales}, but must be two numbers, the smaller first: 1,1.7")
    path = config["protected_prompts"]
    if path is None:
        return
    if not Path(path).is_file():
        raise UserError(f"protected_prompts: {path}: no such file; prompts/protected.txt is an example")
    if config["dora"]:
        raise UserError(
            "protected_prompts is unavailable with DoRA, whose magnitudes scale each layer's output under every prompt; "
            "add --no-dora"
        )
    others = [t for t in config["unet_targets"] if t not in ("attn2.to_k", "attn2.to_v")]
    if others:
        raise UserError(
            f"unet_targets holds {', '.join(others)}, but with protected_prompts it may hold only attn2.to_k and "
            "attn2.to_v: every other layer sees the image, and an adapter there changes the images of every prompt"
        )


@dataclass(frozen=True)
class ProtectedPrompts:
    """The protected prompts in two parts, and facts about the list for messages."""

    path: str
    noun: str  # that replaces {class}; "" without one
    noun_is_given: bool
    listed: tuple  # P is computed from them; the empty prompt is the first
    held_out: tuple  # P is tested on them
    concept_words: tuple  # of the captions
    left_out: int  # prompts with one of those words, or equal to a caption
    captions: tuple  # the concept, most frequent first
    sha256: str  # of both parts

    def text(self):
        """The list in a line or two for the console."""
        origin = "" if self.noun_is_given else ", from the caption; --protected-class names another"
        text = f"protected: {len(self.listed):,} prompts of {self.path}, {len(self.held_out)} more held out"
        if self.noun:
            text += f"; {{class}} is {self.noun}{origin}"
        if self.left_out:
            words = ", ".join(self.concept_words) or "the caption"
            text += f"\nnote: {self.left_out} of its prompts describe the concept ({words}) and are left out"
        return text


def words_of(text):
    return re.findall(r"[\w'-]+", text.lower())


def class_of(caption):
    """The noun of a caption, the last word of its first noun phrase: dog in “a photo of a sks dog on a beach”."""
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
    """The words that make a caption's `noun` the concept: those right before it or, if there are none, all other words
    except function words."""
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
    """The ProtectedPrompts in the text file `path`: one prompt per line, comments after #, {class} for `noun`.

    `captions` are ordered by frequency; a `noun` of None is taken from the first. UserError for a file with too few
    prompts, and for a `noun` that the captions are not about.
    """
    lines = text_lines(read_text(path, "protected_prompts: "))
    lines = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    filled = any("{class}" in line for line in lines)
    given, noun = noun is not None, class_of(captions[0]) if noun is None else noun.strip()
    if filled and not noun:
        raise UserError(
            f"{path} has prompts with {{class}}, but the caption “{captions[0]}” has no noun to replace it; name one, for "
            "example --protected-class raincoat"
        )
    mentioned = any(set(words_of(noun)) <= set(words_of(caption)) for caption in captions)
    if given and filled and not mentioned:
        # “sks” in “a photo of sks” names no kind of thing, unlike a word that other prompts use too.
        other = class_of(captions[0])
        if any(other in words_of(line) for line in lines if "{class}" not in line):
            raise UserError(
                f"protected_class is {noun}, but no caption contains it: “{captions[0]}” is about a {other}. Name the kind "
                "of thing whose other examples should stay unchanged, as raincoat for “a holographic raincoat”"
            )
    concept = set().union(*(concept_words_of(caption, noun) for caption in captions[:1]))
    captioned = {" ".join(words_of(caption)) for caption in captions}
    prompts = dict.fromkeys(line.replace("{class}", noun) for line in lines)
    kept = [p for p in prompts if not concept & set(words_of(p)) and " ".join(words_of(p)) not in captioned]
    if len(kept) < FEWEST:
        raise UserError(
            f"{path} holds {len(kept)} prompts that can be protected, but at least {FEWEST} are needed and about 2,000 are "
            "recommended: the fewer there are, the more other prompts change (prompts/protected.txt is an example)"
        )
    import numpy as np  # here, so that a wrong option is reported before it is imported

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
