"""Prompts files and the folders of prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import UserError
from lib.evaluation.prompts import read_prompts, slugs


def test_categories_are_trimmed_and_of_any_case(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "# mine\na raincoat\n unrelated: a cat\nUnrelated: a dog\n\n\tNEAR :a coat  \n"
        "success: style: a coat\na photo of: a coat\n"
    )
    assert read_prompts(path) == [
        ("success", "a raincoat"),
        ("unrelated", "a cat"),
        ("unrelated", "a dog"),
        ("near", "a coat"),
        ("success", "style: a coat"),
        ("success", "a photo of: a coat"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a coat\nfail: a cat", ["line 2", "“fail” is no category", "“success: fail: a cat”"]),
        ("unrelated:", ["line 1", "no prompt"]),
        ("a coat\n\nnear: a coat", ["line 3", "duplicate"]),
        ("# nothing\n", ["has no prompts"]),
    ],
)
def test_a_wrong_line_is_named(tmp_path, text, words):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(UserError) as problem:
        read_prompts(path)
    for word in words:
        assert word in str(problem.value)


@pytest.mark.parametrize("prompts", [["a cat 3", "a cat", "a cat!"], ["prompt 2", "猫"]])
def test_prompts_that_look_alike_have_folders_of_their_own(prompts):
    assert len(set(slugs([("success", prompt) for prompt in prompts]))) == len(prompts)


def test_no_folder_is_called_as_a_device_of_windows():
    assert slugs([("success", "Con"), ("unrelated", "aux"), ("near", "con")]) == ["con-1", "aux-2", "con-3"]


@given(st.lists(st.text(alphabet="ab -123猫!", max_size=70), max_size=12))
def test_no_two_prompts_share_a_folder(prompts):
    names = slugs([("success", prompt) for prompt in prompts])
    assert len(set(names)) == len(prompts)
    assert all(name.strip("-") and "/" not in name for name in names)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_prompt_may_hold_signs_that_end_lines_elsewhere(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a coat\u2028on a hook\r\na\u0085cat\r\n".encode(encoding))
    assert read_prompts(path) == [("success", "a coat\u2028on a hook"), ("success", "a\u0085cat")]
