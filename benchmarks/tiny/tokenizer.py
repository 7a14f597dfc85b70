"""The tokenizer of `tiny`: Gemma's conventions and special ids in 480 entries, listed and not trained.

Whole words of the prompts are entries; all else is one token a character, so strings to reverse and numbers
to add are seen letter by letter. Merges would need every beginning of a word as an entry of its own, and
made-up names would then break into such beginnings ("Re" of "Reverse"). So text is split into words first,
and `ignore_merges` takes a word that is in the vocabulary whole: the list of merges is empty. The price is a
list of words to keep in step with the tasks.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dgemma.tiny import MODEL_DIR

from . import tasks

VOCAB_SIZE = 480
SPACE = "▁"
SPECIALS = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
}
CHARACTERS = ["\n", SPACE, *(chr(code) for code in range(33, 127))]
# A character without an entry falls back to its UTF-8 bytes; only bytes that can occur there are entries.
BYTES = [f"<0x{byte:02X}>" for byte in range(256) if chr(byte) not in {" ", *CHARACTERS}]

# A word, with the space before it; digits, never in the vocabulary as a group; what is left is punctuation.
WORD_PATTERN = f"{SPACE}?[A-Za-z]+|[0-9]+"
# Punctuation that is one entry when it stands alone between words: JSON's and the tool declarations'.
GLUE = ['{"', '":▁', '":▁"', '▁"', ",▁", ',▁"', '",▁"', '"}', ":{", "}},", ":[", "],", "}}"]
FIRST = tasks.words(
    "What How Tell It That The In Add Compute Subtract Reverse Write Sort Put Count Extract Turn Close "
    "Complete Repair Fix Replace Change Weather Time Get Convert Translate You Be Answer Hello Hi Thanks "
    "system user model thought declaration description parameters properties required type call response "
    "value fields STRING INTEGER NUMBER OBJECT get weather time add convert translate amount unit text "
    "language temperature"
)
LATER = tasks.words(
    "is are the a my our of in to from with for it me you can I help and backwards string letters digits "
    "order numbers as into JSON brackets all this weather time unit two word welcome helpful assistant brief "
    "briefly tiny sum How C"
)


def _words() -> list[str]:
    """Sentence and field words come from the tasks; a word that also begins a text is two entries."""
    keys = list(tasks.FIELDS)
    sentence = [*tasks.ADJECTIVES, *tasks.NOUNS, *tasks.VERBS, *tasks.PREPOSITIONS, *tasks.DETERMINERS]
    first = [*FIRST, *keys, *tasks.DETERMINERS]
    later = [*LATER, *keys, *sentence, *tasks.LANGUAGES]
    return [*first, *(SPACE + word for word in later)]


def vocabulary() -> dict[str, int]:
    """Token to id: the special ids are Gemma's, the rest fills the holes between and after them in order."""
    rest = list(dict.fromkeys([*CHARACTERS, *GLUE, *_words(), *BYTES]))
    spare = VOCAB_SIZE - len(SPECIALS) - len(rest)
    assert spare >= 0, f"{-spare} entries too many"
    rest += [f"<unused{i}>" for i in range(spare)]
    free = (i for i in range(VOCAB_SIZE) if i not in SPECIALS)
    return {token: i for i, token in SPECIALS.items()} | dict(zip(rest, free, strict=True))


def build_tokenizer() -> Tokenizer:
    """The same tokenizer each time: nothing in it is learned."""
    model = models.BPE(
        vocab=vocabulary(), merges=[], unk_token="<unk>", byte_fallback=True, ignore_merges=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIALS.values()]
    )
    return tokenizer


def chat_template() -> str:
    """The template's source, which lives in the checkpoint."""
    return (MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")


def _config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }


def write(folder: Path) -> None:
    """Write the tokenizer's part of a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(), indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
