"""Tokens: ULMFiT's markers by a few rules, words by the `tokenizers` library, and the vocabulary.

"The BEST film!!!!" becomes  xxbos xxmaj the xxup best film xxrep 4 !
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from .extras import need

UNK, PAD, BOS, EOS, FLD, REP, WREP, UP, MAJ = SPECIALS = (
    "xxunk",
    "xxpad",
    "xxbos",
    "xxeos",
    "xxfld",
    "xxrep",
    "xxwrep",
    "xxup",
    "xxmaj",
)  # fastai 2's markers in its order; a vocabulary starts with them
UNK_ID, PAD_ID, BOS_ID = 0, 1, 2

# what fastai 0.7 and salesforce/awd-lstm-lm call the same markers
_ALIASES = {
    "_unk_": UNK,
    "<unk>": UNK,
    "_pad_": PAD,
    "xbos": BOS,
    "<eos>": EOS,
    "xfld": FLD,
    "tk_rep": REP,
    "tk_wrep": WREP,
    "t_up": UP,
}
_FILLER = "xxfake"  # fastai 2 lengthens a vocabulary to a multiple of 8 with it

# English clitics ('s, 't), runs of letters, up to four digits at a time, and every other sign alone.
_TOKEN = r"'(?:s|t|re|ve|ll|d|m)\b|[\p{L}\p{M}]+|\d{1,4}|[^\s\p{L}\p{M}\d]"

_AT_ONCE = 2**22  # characters encoded at once: an encoding takes 100 bytes per token while it lives

_CLEAN = [  # what corpora write in place of plain text: HTML line ends, WikiText's and Brown's escapes
    (re.compile(r"<br\s*/?>"), " "),
    (re.compile(r" @([-.,])@ "), r"\1"),
    (re.compile(r"``|''"), '"'),
    (re.compile(r"<unk>"), f" {UNK} "),
]
# These three see every character of a corpus, so they are written to fail early: a sign's kind is looked at
# once it repeats, a word is not tried again by a letter less, and one that begins with a to z has no marker.
_REPEATED_CHARACTER = re.compile(r"(\S)\1{2,}(?<!\d)")
_REPEATED_WORD = re.compile(r"(?<!\S)(?=(\S+))\1(?:\s+\1){2,}(?!\S)")
_WORD = re.compile(r"(?<![^\W\d_])[^\W\d_a-z][^\W\d_]+")
# The space behind a plain word, where no rule reaches over. " @-@ " would join the word to the one before,
# and a repeated sign at the beginning of the next one would put xxrep there.
_SEAM = re.compile(r"[^\s@]\s+([^\W_]{1,30})[ \n](?=([^\W_])(?!\2))")


def _mark_case(match: re.Match[str]) -> str:
    word = match[0]
    if not word[0].isupper():
        return word
    return f" {UP} {word} " if word.isupper() else f" {MAJ} {word}"


def mark(text: str) -> str:
    """`text` with xxbos before it and repetitions and capitals spelt out as markers, in lower case."""
    return f"{BOS} {_spell_out(text)}"


def _spell_out(text: str) -> str:
    for pattern, instead in _CLEAN:
        text = pattern.sub(instead, text)
    text = _REPEATED_CHARACTER.sub(lambda m: f" {REP} {len(m[0])} {m[1]} ", text)
    text = _REPEATED_WORD.sub(lambda m: f" {WREP} {len(m[0].split())} {m[1]} ", text)
    return _WORD.sub(_mark_case, text).lower()


def _marked_parts(text: str) -> Iterator[str]:
    """`mark(text)`, a long text in parts that have its tokens one after the other: a rule takes many times a
    text's memory.

    A text without `_SEAM` stays whole.
    """
    begin, before = 0, f"{BOS} "
    while len(text) - begin > _AT_ONCE:
        # words that differ are no repetition, whatever else the rules make of the letters of the first
        seams = (m for m in _SEAM.finditer(text, begin + _AT_ONCE) if m[2] not in m[1])
        if (seam := next(seams, None)) is None:
            break
        yield before + _spell_out(text[begin : seam.end()])
        begin, before = seam.end(), ""
    yield before + _spell_out(text[begin:])


def as_list(values: Any, argument: str, what: str = "texts") -> list[Any]:
    """`values` as a list; TypeError for one str, and for a table, whose entries are its columns' names."""
    if isinstance(values, (str, bytes)):
        raise TypeError(
            f"{argument} must be a list of {what}, got one {type(values).__name__}: {values[:40]!r}"
        )
    if isinstance(values, Mapping) or hasattr(values, "columns"):
        hint = ": give one column of it, for example df['text']" if what.startswith("texts") else ""
        raise TypeError(f"{argument} must be a list of {what}, got a {type(values).__name__}{hint}")
    try:
        return list(values)
    except TypeError:
        got = f"{type(values).__name__}: {values!r:.60}"
        raise TypeError(f"{argument} must be a list of {what}, got {got}") from None


def check_text(text: object, where: str) -> str:
    """`text`, or TypeError if it is no str, ValueError if it cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise TypeError(f"{where} must be str, got {type(text).__name__}: {text!r:.60}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = text[max(0, error.start - 20) : error.start + 20]
            raise ValueError(
                f"{where} is not valid Unicode: {error.reason} at character {error.start}, in {place!r}; "
                "read the file with its true encoding"
            ) from None
    return text


def check_texts(
    texts: object, argument: str = "texts", allow_empty: bool = False, what: str = "texts"
) -> list[str]:
    """Returns `texts` as a list of str, or raises naming the argument and the first entry that is not
    text.
    """
    checked = as_list(texts, argument, what)
    for i, text in enumerate(checked):
        check_text(text, f"{argument}[{i}]")
    if not checked and not allow_empty:
        raise ValueError(f"{argument} is empty: at least one text is needed")
    return checked


# Runs of letters that only a text without spaces has: of Han and kana more than 5, but of katakana alone, as
# in loanwords, and of Thai, Lao, Burmese and Khmer, whose words are longer, more than 15.
_UNSPACED = re.compile(
    r"[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]{6,}"
    r"|[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff]{16,}"
)
_KATAKANA = re.compile("[\u30a0-\u30ff]{,15}")
_SAMPLE = 1000  # texts, and characters of each


def warn_of_unspaced(texts: Sequence[str], argument: str) -> None:
    """A UserWarning where a fifth of `texts` or more is in a script without spaces, not cut into words."""
    letters = unspaced = 0
    for text in texts[:: -(-len(texts) // _SAMPLE) or 1]:
        text = text[:_SAMPLE]
        letters += sum(map(str.isalnum, text))
        unspaced += sum(len(run) for run in _UNSPACED.findall(text) if not _KATAKANA.fullmatch(run))
    if unspaced and unspaced >= 0.2 * letters:
        warnings.warn(
            f"{argument} has no spaces between words in {min(1, unspaced / letters):.0%} of its letters, as "
            "Chinese, Japanese and Thai are written: each clause becomes one token, and most will be xxunk. "
            "Cut the texts into words first, with a space between them",
            stacklevel=3,
        )


class Tokenizer:
    """Words of a text as indices into `itos`; index 0 is xxunk, 1 xxpad, 2 xxbos.

    Made by `Tokenizer.train(texts)`, `Tokenizer.from_vocab(itos)` or `Tokenizer.load(path)`.

    backwards: `encode` reverses the indices of each text as a whole, so that xxbos comes last, and `decode`
    reverses them back. All that trains or reads gets its indices here, language model and classifier alike.
    The texts of a stream keep their order. This is what `backwards=True` does in fastai 2: its TextBlock
    puts `reverse_text`, a flip of the indices, behind Numericalize for both kinds of model.
    """

    def __init__(self, inner: Any, backwards: bool = False) -> None:
        self._inner, self.backwards = inner, backwards
        vocab: dict[str, int] = inner.get_vocab()
        self.itos: list[str] = sorted(vocab, key=vocab.__getitem__)
        self.stoi = vocab
        if tuple(self.itos[: len(SPECIALS)]) != SPECIALS or sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"not a vocabulary of ulmfit_fast: it must start with {' '.join(SPECIALS)}")

    def __len__(self) -> int:
        return len(self.itos)

    @classmethod
    def from_vocab(cls, itos: Sequence[str], backwards: bool = False) -> "Tokenizer":
        """`itos`: the words in order, the markers (`SPECIALS`) first, no word twice."""
        tk = need("tokenizers")
        itos = check_texts(itos, "itos", allow_empty=True, what="words")
        inner = tk.Tokenizer(tk.models.WordLevel({word: i for i, word in enumerate(itos)}, unk_token=UNK))
        inner.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(_TOKEN), behavior="removed", invert=True)
        return cls(inner, backwards)

    @classmethod
    def train(
        cls, texts: Iterable[str], max_vocab: int = 60000, min_freq: int = 2, backwards: bool = False
    ) -> "Tokenizer":
        """The most frequent words of `texts` seen at least `min_freq` times, `max_vocab` with the markers."""
        words = frequent_words(texts, max_vocab - len(SPECIALS), min_freq)
        return cls.from_vocab(list(SPECIALS) + words, backwards)

    @classmethod
    def load(cls, path: str | PathLike[str], backwards: bool = False) -> "Tokenizer":
        """Reads tokenizer.json, which does not say the direction; ValueError if this
        library did not write it.
        """
        with open(path, encoding="utf-8") as file:
            text = file.read()
        try:
            return cls(need("tokenizers").Tokenizer.from_str(text), backwards)
        except ImportError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer of ulmfit_fast: {error}") from None

    def to_json(self) -> str:
        """The text of tokenizer.json, readable by the `tokenizers` library alone (it splits and looks up)."""
        return self._inner.to_str()

    def encode(self, texts: Iterable[str], argument: str = "texts") -> list[np.ndarray]:
        """One int32 array of indices per text, in the order of reading: xxbos first, or last if backwards."""
        texts = check_texts(texts, argument, allow_empty=True)
        step = -1 if self.backwards else 1
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for batch in _at_once((i, part) for i, text in enumerate(texts) for part in _marked_parts(text)):
            encodings = self._inner.encode_batch_fast([part for _, part in batch], add_special_tokens=False)
            for (i, _), encoding in zip(batch, encodings, strict=True):
                ids[i].append(np.array(encoding.ids[::step], dtype=np.int32))
        return [parts[0] if len(parts) == 1 else np.concatenate(parts[::step]) for parts in ids]

    def tokens(self, text: str) -> list[str]:
        """The words of one text after all rules, unknown ones as they are, from left to right."""
        marked = mark(check_text(text, "text"))
        return [word for word, _ in self._inner.pre_tokenizer.pre_tokenize_str(marked)]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text of indices as `encode` gives them: markers undone, punctuation joined to its word."""
        words = [self.itos[int(i)] for i in ids]
        return join_tokens(words[::-1] if self.backwards else words)


def _at_once(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch, characters = [], 0
    for i, part in parts:
        batch.append((i, part))
        characters += len(part) + 32  # plus the memory of an encoding without tokens
        if characters >= _AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def frequent_words(texts: Iterable[str], max_words: int, min_freq: int) -> list[str]:
    """Words of `texts` with at least `min_freq` occurrences, most frequent first (ties by spelling), no
    markers.
    """
    tk = need("tokenizers")
    inner = Tokenizer.from_vocab(SPECIALS)._inner
    trainer = tk.trainers.WordLevelTrainer(
        vocab_size=max_words + 2 * len(SPECIALS),  # the markers are also counted as words of the text
        min_frequency=min_freq,
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    checked = (check_text(text, f"texts[{i}]") for i, text in enumerate(texts))
    inner.train_from_iterator((part for text in checked for part in _marked_parts(text)), trainer)
    vocab = inner.get_vocab()
    return sorted(vocab.keys() - set(SPECIALS), key=vocab.get)[:max_words]


def target_vocab(
    base: Sequence[str], texts: Sequence[str], max_vocab: int, min_freq: int, keep_base: bool = True
) -> list[str]:
    """Vocabulary of stage 2: words of `texts` that are frequent or known to `base`, most frequent first.

    base: the base model's itos. keep_base: all of `base` stays, in its order, and new words follow; otherwise
    only words of `texts` are in it, behind the markers. At most `max_vocab` words are taken from `texts`.
    """
    room = max_vocab - len(SPECIALS)
    known = set(base)
    if keep_base:
        return list(base) + [w for w in frequent_words(texts, room, min_freq) if w not in known]
    frequent = set(frequent_words(texts, room, min_freq))
    words = [w for w in frequent_words(texts, 2**31, 1) if w in frequent or w in known]
    return list(SPECIALS) + words[:room]


def own_names(tokens: Iterable[str]) -> list[str]:
    """`tokens` in their order, with other programs' markers renamed to ours."""
    return [_ALIASES.get(token, token) for token in tokens]


def own_vocab(tokens: Iterable[str]) -> list[str]:
    """The words of a foreign vocabulary as a vocabulary of ours: the markers, then each other word once."""
    return list(SPECIALS) + [w for w in dict.fromkeys(tokens) if w not in {*SPECIALS, _FILLER}]


def transfer_rows(old: Iterable[str], new: Iterable[str]) -> np.ndarray:
    """For each word of `new` its row in `old`, -1 for a word that `old` lacks (fastai's match_embeds): int64
    array.
    """
    row = {word: i for i, word in enumerate(old)}
    return np.array([row.get(word, -1) for word in new], dtype=np.int64)


_NO_SPACE_BEFORE = re.compile(r"\s+([.,;:!?%)\]}]|'(?:s|t|re|ve|ll|d|m)\b)")
_NO_SPACE_AFTER = re.compile(r"([(\[{$#])\s+")


def join_tokens(tokens: Sequence[str]) -> str:
    """Undoes the markers: ["xxmaj", "the", "xxrep", "3", "!"] -> "The!!!"."""
    words, case, queue = [], None, list(reversed(tokens))
    while queue:
        token = queue.pop()
        if token in (REP, WREP):
            if len(queue) < 2 or not queue[-1].isdecimal():
                continue
            times, what = min(int(queue.pop()), 100), queue.pop()
            words.append(what * times if token == REP else " ".join([what] * times))
        elif token in (UP, MAJ):
            case = token
        elif token == BOS:
            words.append("\n")
        elif token not in (PAD, EOS, FLD):
            words.append(token.upper() if case == UP else token.capitalize() if case == MAJ else token)
            case = None
    text = _NO_SPACE_AFTER.sub(r"\1", _NO_SPACE_BEFORE.sub(r"\1", " ".join(words)))
    return re.sub(r" *\n *", "\n", text).strip()
