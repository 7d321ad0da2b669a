"""Text turned into token ids, without torch or transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onnx_woq.errors import DataError
from onnx_woq.runtime.data.settings import read_settings

Encode = Callable[[str, bool], list[int]]
"""`(text, special) -> ids`, with the special tokens of a whole document if `special`."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_BAD_ID = 2**32 - 1  # the id that onnxruntime-extensions gives to a token it does not know
_PROBE = "It’s 1,234 words:\n\n  don't “stop”; naïve café, 北京 и Москва – def f(x): return x**2 😀 <tag>"
_PROBE_LENGTH = 4000  # characters of the user's text that a tokenizer is tried on
_READABLE = 0.9  # share of letters that decoding must give back; a tokenizer may drop accents and unknown signs
_NO_LIMIT = 1 << 24  # tokens; a model_max_length above it means "not known"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, and the model's longest sequence according to the files around it.

    Attributes:
        encode: turns text into ids.
        folder: the folder it was found in.
        longest: tokens that the model takes at most; None if no file tells.
        opening: the ids that a document begins with, such as BOS; empty where there are none.
    """

    encode: Encode
    folder: Path
    longest: int | None
    opening: tuple[int, ...] = ()

    def closes(self) -> bool:
        """Tells whether a document ends with a special token, such as BERT's [SEP]."""
        plain, whole = self.encode("a", False), self.encode("a", True)
        return len(whole) > len(plain) and whole[-1:] != plain[-1:]


def load_tokenizer(tokenizer: Path | None, model_dir: Path | None, text: str, vocabulary: int | None) -> Tokenizer:
    """Loads the tokenizer in the folder `tokenizer`, or else the one beside the model or one folder up.

    The `tokenizers` library reads tokenizer.json. Other formats are read by onnxruntime-extensions. That can be wrong
    without an error, so its ids must lie in the vocabulary and decode to the text again. It is faster, but cannot come
    first: it crashes the process on a tokenizer.json of a kind that it does not expect.

    Args:
        tokenizer: a folder, or a file in one; None for none.
        model_dir: folder of the model.
        text: a part of the user's text.
        vocabulary: number of ids that the model knows, None if unknown.

    Raises:
        DataError: there is no usable tokenizer.
    """
    folder = tokenizer_folder(tokenizer, model_dir)
    probe = text[:_PROBE_LENGTH] + _PROBE
    encode, problem = _huggingface(folder)
    if encode is None:
        encode, other = _extensions(folder, probe, vocabulary)
    if encode is None:
        raise DataError(
            f"the tokenizer in {folder} cannot be used: tokenizers: {problem}; onnxruntime-extensions: {other}. "
            "Give the folder of the model's own tokenizer.json with --tokenizer, or token ids as .npz or dictionaries"
        )
    if worst := _outside(encode(probe, False), vocabulary):
        raise DataError(
            f"the tokenizer in {folder} gives id {worst}, but the model knows {vocabulary} tokens: "
            "name the model's own tokenizer with --tokenizer"
        )
    folders = [folder] + ([model_dir] if model_dir and model_dir != folder else [])
    return Tokenizer(encode, folder, _longest(folders), _opening(encode, folder))


def tokenizer_folder(tokenizer: Path | None, model_dir: Path | None) -> Path:
    """Returns the folder of the tokenizer: the one named, or else the model's or the one above it."""
    if tokenizer is not None:
        folder = tokenizer.parent if tokenizer.is_file() else tokenizer
        if any((folder / name).is_file() for name in _FILES):
            return folder
        raise DataError(f"there is no tokenizer in {folder}: it should hold tokenizer.json or tokenizer_config.json")
    candidates = [] if model_dir is None else [model_dir, model_dir.absolute().parent]
    for folder in candidates:
        if any((folder / name).is_file() for name in _FILES[:3]):
            return folder
    where = f" beside the model in {model_dir}" if model_dir else ""
    raise DataError(
        f"text needs a tokenizer, and there is none{where}: name the folder of its tokenizer.json with --tokenizer, "
        "or give token ids as .npz or dictionaries"
    )


def _huggingface(folder: Path) -> tuple[Encode | None, str]:
    """Returns the encoder that the `tokenizers` library makes of tokenizer.json, or None and the reason."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None, "there is no tokenizer.json"
    try:
        from tokenizers import Tokenizer as HuggingFace
    except ImportError:
        return None, "not installed (pip install tokenizers)"
    try:
        tokenizer = HuggingFace.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        return None, str(error)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text, special: list(tokenizer.encode(text, add_special_tokens=special).ids), ""


def _extensions(folder: Path, text: str, vocabulary: int | None) -> tuple[Encode | None, str]:
    """Returns the encoder that onnxruntime-extensions makes of a folder, or None and the reason."""
    if not _is_expected(folder / "tokenizer.json"):
        return None, "it reads neither damaged files nor this kind of tokenizer.json"
    try:
        from onnxruntime_extensions.pp_api import Tokenizer as Extensions
    except ImportError:
        return None, "not installed (pip install onnxruntime-extensions)"
    try:
        plain = Extensions(str(folder), {"add_special_tokens": False})
        whole = Extensions(str(folder))
        ids = [int(i) for i in plain.tokenize(text)]
        if worst := _outside(ids, vocabulary):
            return None, f"it gives the id {worst}"
        if _overlap(_letters("".join(plain.detokenize(ids))), _letters(text)) < _READABLE:
            return None, "its ids do not decode to the text they were made from"
    except Exception as error:  # the library raises errors of many kinds
        return None, " ".join(str(error).split())
    return lambda text, special: [int(i) for i in (whole if special else plain).tokenize(text)], ""


def _is_expected(file: Path) -> bool:
    """Tells whether onnxruntime-extensions can read a tokenizer.json without crashing; True if there is none."""
    if not file.is_file():
        return True
    model = read_settings(file).get("model")
    return isinstance(model, dict) and model.get("type") in ("BPE", "Unigram")


def _outside(ids: list[int], vocabulary: int | None) -> int | None:
    """Returns the largest id if the model does not know it, otherwise None."""
    worst = max(ids, default=0)
    return worst if worst == _BAD_ID or (vocabulary is not None and worst >= vocabulary) else None


def _opening(encode: Encode, folder: Path) -> tuple[int, ...]:
    """Returns the ids that the tokenizer puts in front of a document.

    They are what the template of tokenizer.json adds; where it adds nothing, the BOS token if `add_bos_token` of
    tokenizer_config.json asks for it.
    """
    plain, whole = encode("a", False), encode("a", True)
    places = range(len(whole) - len(plain) + 1) if plain else ()
    if start := next((at for at in places if whole[at : at + len(plain)] == plain), 0):
        return tuple(whole[:start])
    settings = read_settings(folder / "tokenizer_config.json")
    token = settings.get("bos_token")
    text = token.get("content") if isinstance(token, dict) else token
    ids = encode(text, False) if settings.get("add_bos_token") is True and isinstance(text, str) else []
    return tuple(ids) if len(ids) == 1 else ()


def _overlap(a: str, b: str) -> float:
    """Returns the share of letters that two texts have in common, in any order."""
    return sum((Counter(a) & Counter(b)).values()) / max(len(a), len(b), 1)


def _letters(text: str) -> str:
    """Returns a text without white space and upper case."""
    return "".join(text.split()).casefold()


def _longest(folders: list[Path]) -> int | None:
    """Reads from tokenizer_config.json and config.json how many tokens the model takes at most."""
    found = []
    for folder in folders:
        for file, names in (
            ("tokenizer_config.json", ("model_max_length",)),
            ("config.json", ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")),
        ):
            content = read_settings(folder / file)
            values = [content.get(name) for name in names]
            found += [int(v) for v in values if isinstance(v, (int, float)) and 0 < v < _NO_LIMIT]
    return min(found, default=None)
