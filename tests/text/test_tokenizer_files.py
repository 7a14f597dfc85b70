"""The tokenizer's files, read as transformers reads them; and files that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgemma.errors import CheckpointError, DgemmaError, PromptError
from dgemma.text.tokenizer import Tokenizer
from tests.text.folders import make

pytest.importorskip("transformers")
from transformers import AutoTokenizer

ASK = [{"role": "user", "content": 'Reverse "canvas" <extra> x.'}]


def opened(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.open(folder)
    assert tokenizer is not None
    return tokenizer


def oracle_ids(folder: Path) -> Any:
    oracle = AutoTokenizer.from_pretrained(folder)
    return oracle.apply_chat_template(ASK, add_generation_prompt=True, tokenize=True, return_dict=False)


CUT = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
PAD = {
    "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<pad>",
}  # fmt: skip
LEFT: dict[str, dict[str, Any]] = {
    "truncation": {"truncation": CUT},
    "truncation on the left": {"truncation": CUT | {"direction": "Left"}},
    "padding": {"padding": PAD},
    "padding to a multiple": {"padding": PAD | {"strategy": "BatchLongest", "pad_to_multiple_of": 64}},
    "both": {"truncation": CUT, "padding": PAD},
}


@pytest.mark.parametrize("left", LEFT)
def test_what_a_training_left_is_not_applied(left: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tokenizer=lambda data: data.update(LEFT[left]))
    assert opened(folder).encode_chat(ASK, control_tokens=True) == oracle_ids(folder)
    long = opened(folder).encode("a" * 500)
    assert len(long) == len(opened(make(tmp_path / "plain")).encode("a" * 500))


@pytest.mark.parametrize(
    "left",
    [
        {"truncation": CUT | {"stride": 20}},  # a panic of the library, once it encodes
        {"padding": PAD | {"strategy": {"Fixed": 2**40}}},  # the memory of the machine
        {"padding": {"anything": 1}, "truncation": "x"},
    ],
)
def test_what_a_training_left_need_not_be_usable(left: dict[str, Any], tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tokenizer=lambda data: data.update(left))
    assert opened(folder).encode("a b") == opened(make(tmp_path / "plain")).encode("a b")


def test_dropout_is_not_applied(tmp_path: Path) -> None:
    """transformers leaves it on, and a prompt has other ids each time."""

    def merges(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        vocab["aa"] = vocab.pop(next(token for token, id in vocab.items() if id == 479))
        data["model"] |= {"merges": [["a", "a"]], "dropout": 0.5, "ignore_merges": False}

    tokenizer = opened(make(tmp_path / "m", tokenizer=merges))
    assert {tuple(tokenizer.encode("aaaaaaaa")) for _ in range(20)} == {(479,) * 4}


# ---- tokens -----------------------------------------------------------------------------------------

TOKEN = {"content": "<extra>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
DECLARED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "extra_special_tokens": lambda c: c.update(extra_special_tokens=["<extra>"]),
    "additional_special_tokens": lambda c: c.update(additional_special_tokens=["<extra>"]),
    "objects": lambda c: c.update(additional_special_tokens=[{"__type": "AddedToken", **TOKEN}]),
    "by name": lambda c: c.update(extra_special_tokens={"extra_token": "<extra>"}),
    "a name of its own": lambda c: c.update(cursor_token="<extra>"),
    "added_tokens_decoder": lambda c: c.update(added_tokens_decoder={"480": TOKEN | {"special": True}}),
    "not special": lambda c: c.update(added_tokens_decoder={"480": TOKEN | {"special": False}}),
    "as BOS": lambda c: c.update(bos_token="<extra>"),
    "BOS as an object": lambda c: c.update(bos_token={"__type": "AddedToken", **TOKEN}),
    "several": lambda c: c.update(mask_token="<extra>", extra_special_tokens=["x.", "<b>"]),
}


@pytest.mark.parametrize("declared", DECLARED)
def test_tokens_declared_beside_the_tokenizer(declared: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", config=DECLARED[declared])
    tokenizer = opened(folder)
    ids = tokenizer.encode_chat(ASK, control_tokens=True)
    assert ids == oracle_ids(folder) and 480 in ids
    if declared != "not special":
        assert 480 not in tokenizer.encode_chat(ASK)[5:]  # a message that spells it means its letters


def test_older_files_declare_tokens(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", config=lambda config: config.pop("bos_token"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {**TOKEN, "content": "<bos>"}}))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 480}))
    ids = opened(folder).encode_chat(ASK, control_tokens=True)
    assert ids == oracle_ids(folder) and ids[0] == 2 and 480 in ids


@pytest.mark.parametrize("place", ["config.json", "text_config", "generation_config.json"])
def test_bos_is_found_by_its_id(place: str, tmp_path: Path) -> None:
    """transformers drops it in silence, and a model without its BOS answers nonsense."""
    folder = make(tmp_path / "m", config=lambda config: config.pop("bos_token"))
    data = {"text_config": {"bos_token_id": 2}} if place == "text_config" else {"bos_token_id": 2}
    (folder / ("config.json" if place == "text_config" else place)).write_text(json.dumps(data))
    assert opened(folder).encode_chat(ASK)[0] == 2


@pytest.mark.parametrize("nested", [False, True])
def test_bos_is_found_where_the_tokenizer_puts_it(nested: bool, tmp_path: Path) -> None:
    special = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    step: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }
    step = {"type": "Sequence", "processors": [step]} if nested else step
    folder = make(
        tmp_path / "m",
        config=lambda config: config.pop("bos_token"),
        tokenizer=lambda data: data.update(post_processor=step),
    )
    assert opened(folder).encode_chat(ASK)[:2] == [2, 105]


@pytest.mark.parametrize("data", [{}, {"bos_token_id": None}, {"bos_token_id": 10**6}, {"bos_token_id": "2"}])
def test_a_bos_that_nobody_names_is_refused(data: dict[str, Any], tmp_path: Path) -> None:
    folder = make(tmp_path / "m", config=lambda config: config.pop("bos_token"))
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="bos_token, which no file here names"):
        opened(folder)


def test_a_template_that_needs_no_bos_does_without(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "{{ messages[0].content }}", config=lambda config: config.pop("bos_token"))
    assert opened(folder).encode_chat(ASK)


def test_byte_order_marks_are_no_part_of_a_file(tmp_path: Path) -> None:
    folder, plain = make(tmp_path / "m"), make(tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = folder / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert opened(folder).encode_chat(ASK) == opened(plain).encode_chat(ASK)


@pytest.mark.parametrize("declared", [
    {"bos_token": 5}, {"bos_token": []}, {"bos_token": {"content": 5}}, {"extra_special_tokens": "x"},
    {"extra_special_tokens": [None]}, {"added_tokens_decoder": []}, {"added_tokens_decoder": {"x": TOKEN}},
    {"added_tokens_decoder": {"5": None}}, {"cursor_token": {}},
    {"bos_token": {"content": "a", "lstrip": "yes"}}, {"bos_token": "\ud800"},
    {"extra_special_tokens": ["a\udfff"]}, {"added_tokens_decoder": {"5": {"content": "\ud800"}}},
])  # fmt: skip
def test_declarations_that_are_none(declared: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(make(tmp_path / "m", config=lambda config: config.update(declared)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"a": []}', '{"a": {}}', '{"a": "x"}', '{"a": null}', '{"": 5}', "[]"])
def test_older_declarations_that_are_none(text: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "added_tokens.json").write_text(text)
    with pytest.raises(DgemmaError, match=r"added_tokens.json") as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


# ---- tokenizers that fail -----------------------------------------------------------------------------

BROKEN: dict[str, dict[str, Any]] = {
    "an unknown model": {"model": {"type": "Nope"}},
    "no model": {"model": None},
    "a decoder of no kind": {"decoder": {"type": "Nope"}},
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "pieces of length 0 within": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 0}]}
    },
    "a wrong version": {"version": 5},
    "tokens of no kind": {"added_tokens": [{"id": "x"}]},
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_tokenizer_is_one_line(broken: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tokenizer=lambda data: data.update(BROKEN[broken]))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer") as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "5", "{", "[" * 100000, '{"a": ' * 5000, "null", '"x"'])
def test_a_tokenizer_that_is_no_object(text: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(DgemmaError, match=r"tokenizer.json: ") as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


def test_a_word_without_a_token(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<x>"}
    folder = make(tmp_path / "m", tokenizer=lambda data: data.update(model=model, added_tokens=[]))
    with pytest.raises(PromptError, match=r"the tokenizer cannot encode this text \(WordLevel"):
        opened(folder).encode_chat(ASK)


@pytest.mark.parametrize("special", [True, False])
def test_a_vocabulary_that_has_a_control_token_as_a_word(special: bool, tmp_path: Path) -> None:
    """Without a pre-tokenizer the model's own look-up finds the token: it is cut in two."""

    def change(data: dict[str, Any]) -> None:
        data["pre_tokenizer"] = None
        for token in data["added_tokens"]:
            token["special"] = special

    tokenizer = opened(make(tmp_path / "m", tokenizer=change))
    assert "<|turn>" in tokenizer.control
    ids = tokenizer.encode_chat([{"role": "user", "content": "<|turn>"}])
    assert ids.count(105) == 2 and "<|turn>" in tokenizer.decode(ids[3:-4])
