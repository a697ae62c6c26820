"""A long text is encoded in parts, and nobody can tell."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulmfit_fast import text
from ulmfit_fast.text import SPECIALS, Tokenizer, frequent_words

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.cpu_only("text is made on the host")
# words that the rules join, split or count, and plain ones between which a text may be split
WORDS = "a a a b aaa aaab he heyyy he xxrep xxx x 3 3 33 @-@ @,@ <br <unk> />b <br/> `` '' !!! ΣΑΣ".split()
WORDS += "The THE é 's he's heyyy-day a<br/>".split()
PLAIN = "cat dog Bird fish end".split()
FEW = [*"aabbc", "@-@", "aaa", *["a @-@ b"] * 3, *["xxrep"] * 3, "xxrep xxrep aaa"]
GAPS = [" "] * 12 + ["  ", "\n", "\n \n", "\t", "\x1c", "\xa0", ""]


def words_of(parts):
    return " ".join(parts).split()


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_parts_have_the_words_of_the_whole(seed):
    draw = random.Random(seed)
    words = draw.choices([*WORDS, *PLAIN] if seed % 2 else FEW, k=draw.randrange(200))
    whole = "".join(word + draw.choice(GAPS) for word in words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_AT_ONCE", draw.choice([1, 7, 30]))
        parts = list(text._marked_parts(whole))
    assert words_of(parts) == words_of([text.mark(whole)])
    assert all(part == part.lower() for part in parts)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_long_text_has_the_indices_of_the_whole(monkeypatch, backwards):
    draw = random.Random(0)
    long = " ".join(draw.choices(WORDS + PLAIN * 9, k=4000))
    texts = ["the cat", long, "", long[:300]]
    tokenizer = Tokenizer.from_vocab([*SPECIALS, *frequent_words(texts, 100, 1)], backwards)
    whole, vocabulary = tokenizer.encode(texts), frequent_words(texts, 100, 1)
    sizes, inner = [], text._spell_out
    monkeypatch.setattr(text, "_spell_out", lambda part: sizes.append(len(part)) or inner(part))
    monkeypatch.setattr(text, "_AT_ONCE", 200)
    parts = tokenizer.encode(texts)
    assert max(sizes) < 600 and len(sizes) > 50  # the rules see no long text
    assert [a.dtype for a in parts] == [np.int32] * 4
    assert [a.tolist() for a in parts] == [b.tolist() for b in whole]
    sizes.clear()
    assert frequent_words(texts, 100, 1) == vocabulary and max(sizes) < 600


@pytest.mark.parametrize(
    "whole",
    [
        "the cat @-@ dog cat @-@ dog cat @-@ dog sat on",
        "the cat @-@ dog mat cat @-@ dog mat sat on",
        "the mat @-@ dog cat @-@ mat dog cat @-@ mat dog cat sat on",
        "the b-a @-@ b-a @-@ b-a @-@ b-a b-a b-a",
        "the a- @-@ a @-@ a a",
        "end xxrep xxrep aaa b c",
        "end he he heyyy b c",
        "end aaa a a a b c",
        "the cat <br /> sat <br\n/> on `` the `` mat",
        "Odd ΟΔΟΣ οδος ΣΑΣ Σ sat",
    ],
)
def test_no_rule_reaches_over_a_split(monkeypatch, whole):
    monkeypatch.setattr(text, "_AT_ONCE", 1)
    for begin in range(len(whole)):  # each split is tried
        assert words_of(text._marked_parts(whole[begin:])) == words_of([text.mark(whole[begin:])])


@pytest.mark.parametrize("whole", ["好" * 500, "so " * 200, "a @-@ b " * 100, "aaa a " * 100])
def test_a_text_that_may_be_split_nowhere_stays_whole(monkeypatch, whole):
    monkeypatch.setattr(text, "_AT_ONCE", 50)
    assert list(text._marked_parts(whole)) == [text.mark(whole)]
