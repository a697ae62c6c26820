"""text.py, corpus.py and batches.py: from characters to batches."""

import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulmfit_fast import batches, corpus
from ulmfit_fast.text import (
    PAD_ID,
    SPECIALS,
    UNK_ID,
    Tokenizer,
    frequent_words,
    join_tokens,
    target_vocab,
    transfer_rows,
)

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.cpu_only("text and batches are made on the host")
TEXTS = ["The cat sat on the mat .", "A cat is not a dog !", "The dog's mat"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 100, 1)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The BEST film", "xxbos xxmaj the xxup best film"),
        ("A I o'clock", "xxbos a i o ' clock"),
        ("No!!!!", "xxbos xxmaj no xxrep 4 !"),
        ("so so so good", "xxbos xxwrep 3 so good"),
        ("It isn't Bob's", "xxbos xxmaj it isn 't xxmaj bob 's"),
        ("1,000.5 in 10000", "xxbos 1 , 000 . 5 in 1000 0"),
        ("a @-@ b <unk> c<br />d", "xxbos a - b xxunk c d"),
        ("`` yes ''", 'xxbos " yes "'),
        ("under_score\tand\n\nlines", "xxbos under _ score and lines"),
        ("Élan ÉLAN 日本", "xxbos xxmaj élan xxup élan 日本"),
        ("", "xxbos"),
    ],
)
def test_rules(tokenizer, text, tokens):
    assert " ".join(tokenizer.tokens(text)) == tokens


def test_vocabulary(tokenizer):
    assert tuple(tokenizer.itos[:9]) == SPECIALS
    assert tokenizer.itos[9] == "the" and set(tokenizer.itos[10:14]) == {"a", "cat", "dog", "mat"}
    assert len(Tokenizer.train(TEXTS, 12, 1)) == 12
    assert "is" not in Tokenizer.train(TEXTS, 100, 2).stoi and "cat" in Tokenizer.train(TEXTS, 100, 2).stoi
    assert frequent_words(TEXTS * 3, 100, 1) == frequent_words(TEXTS * 3, 100, 1)


def test_encode_and_decode(tokenizer):
    ids = tokenizer.encode(["The cat !", "The zebra"])
    assert [i.dtype for i in ids] == [np.int32, np.int32]
    assert tokenizer.decode(ids[0]) == "The cat!"
    assert ids[1][-1] == UNK_ID


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.tokens("a\ud800"), ValueError, "text is not valid Unicode"),
        (lambda t: t.tokens(3), TypeError, "text must be str, got int: 3"),
        (lambda t: t.train(["a", "\udcff"]), ValueError, r"texts\[1\] is not valid Unicode"),
        (lambda t: t.from_vocab([*SPECIALS, "\ud800"]), ValueError, r"itos\[9\] is not valid Unicode"),
        (lambda t: t.from_vocab([*SPECIALS, 3]), TypeError, r"itos\[9\] must be str, got int: 3"),
    ],
)
def test_what_is_no_text_is_named(tokenizer, call, error, message):
    with pytest.raises(error, match=message) as refused:
        call(tokenizer)
    assert type(refused.value) is error


def test_saved_and_loaded(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.itos == tokenizer.itos
    assert all(
        np.array_equal(a, b) for a, b in zip(again.encode(TEXTS), tokenizer.encode(TEXTS), strict=True)
    )


def test_join_tokens():
    assert (
        join_tokens("xxbos xxmaj the xxup best film , xxrep 3 ! xxwrep 2 so ( it 's )".split())
        == "The BEST film,!!! so so (it's)"
    )
    assert join_tokens(["xxrep", "many"]) == "many"
    assert join_tokens(["xxrep", "²", "a"]) == "² a"  # a digit that is no number


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_encodes(text):
    tokenizer = Tokenizer.from_vocab([*SPECIALS, "a"])
    if not text.isprintable() and any(0xD800 <= ord(c) < 0xE000 for c in text):
        return
    ids = tokenizer.encode([text])[0]
    assert len(ids) >= 1 and ids[0] == 2


def test_target_vocabulary_and_transfer(tokenizer):
    texts = ["zebra zebra cat", "lion cat"]
    kept = target_vocab(tokenizer.itos, texts, 100, 2)
    assert kept == tokenizer.itos + ["zebra"]
    own = target_vocab(tokenizer.itos, texts, 100, 2, keep_base=False)
    assert set(own) == {*SPECIALS, "cat", "zebra"} and tuple(own[:9]) == SPECIALS
    rows = transfer_rows(tokenizer.itos, own)
    assert rows[own.index("zebra")] == -1 and rows[own.index("cat")] == tokenizer.stoi["cat"]


def test_readers(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\n  two \nthree".encode())
    (tmp_path / "b.csv").write_text('label,text\nx,"a, ""b""\nc"\ny,d\n')
    (tmp_path / "c.tsv").write_text("text\tlabel\nq\t1\n")
    a, b, c = (tmp_path / name for name in ("a.txt", "b.csv", "c.tsv"))
    assert corpus.read_texts([a, "free text", str(b)]) == [
        "one",
        "two",
        "three",
        "free text",
        'a, "b"\nc',
        "d",
    ]
    assert corpus.read_texts(str(a)) == ["one", "two", "three"]
    assert corpus.read_labelled(b) == (['a, "b"\nc', "d"], ["x", "y"])
    assert corpus.read_labelled(c) == (["q"], ["1"])
    assert corpus.read_labelled(["t", "u"], np.array([1, 0])) == (["t", "u"], [1, 0])
    assert corpus.read_texts(["See read me.txt"]) == ["See read me.txt"]
    assert corpus.read_labelled(["see readme", "robots.txt", str(a)], [1, 0, 1])[0][1:] == [
        "robots.txt",
        str(a),
    ]


def test_a_single_name_of_a_file_is_its_path(tmp_path, monkeypatch):
    (tmp_path / "wiki.train.tokens").write_text("one\ntwo\n")
    monkeypatch.chdir(tmp_path)
    assert corpus.read_texts("wiki.train.tokens") == ["one", "two"]


def test_quotation_marks_and_labels_of_tables(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"so\tpos \nend" of\t neg\n')
    assert corpus.read_labelled(tmp_path / "a.tsv") == (['"so', 'end" of'], ["pos", "neg"])
    (tmp_path / "a.csv").write_text('text,label\na "so" b,pos \n"""c"", d",neg\n')
    assert corpus.read_labelled(tmp_path / "a.csv") == (['a "so" b', '"c", d'], ["pos", "neg"])


def test_a_file_with_a_wrong_byte_far_inside(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\n" + 5000 * "\u00e9t\u00e9 1\n".encode() + b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.csv' is not UTF-8: byte 0xe9 at offset 40008; "):
        corpus.read_texts(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\rtwo\r\n\r\nthree \xc3")
    with pytest.raises(ValueError, match=r"a\.txt' is not UTF-8: byte 0xc3 at offset 20; "):
        corpus.read_texts(tmp_path / "a.txt")


def test_a_wrong_byte_in_a_pipe(tmp_path):
    pipe = tmp_path / "p.txt"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"ok\ncaf\xe9\n",))
    writer.start()
    with pytest.raises(ValueError, match=r"p\.txt' is not UTF-8; convert it"):
        corpus.read_lines(pipe)
    writer.join()


def test_many_texts_are_encoded_in_parts(tokenizer, monkeypatch):
    texts = [TEXTS[i % 3] * (i % 4) for i in range(50)] + ["", "the " * 40]
    whole = tokenizer.encode(texts)
    assert len(whole) == len(texts)
    monkeypatch.setattr("ulmfit_fast.text._AT_ONCE", 100)
    parts = tokenizer.encode(texts)
    assert all(a.dtype == np.int32 and a.tolist() == b.tolist() for a, b in zip(whole, parts, strict=True))
    assert tokenizer.encode([]) == []


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 6), st.integers(1, 9))
@settings(deadline=None)
def test_stream_is_contiguous(lengths, batch_size, bptt):
    total = sum(lengths)
    stream = np.arange(total, dtype=np.int32)
    docs = np.split(stream, np.cumsum(lengths)[:-1])
    if total < 3:
        with pytest.raises(ValueError, match="too short"):
            batches.TokenStream(docs, batch_size, bptt)
        return
    windows = batches.TokenStream(docs, batch_size, bptt)
    ids, targets = (torch.cat([w[i] for w in windows], 1) for i in (0, 1))
    assert torch.equal(targets, ids + 1)
    assert torch.equal(ids, ids[:, :1] + torch.arange(ids.shape[1]))
    assert torch.equal(ids.flatten(), torch.arange(ids.numel())) and total - 1 - ids.numel() < len(ids)
    assert all(w[0].shape[1] == bptt for w in list(windows)[:-1])
    scored = torch.cat([t.flatten() for _, t in batches.evaluation_windows(docs, batch_size, bptt)])
    assert sorted(scored[scored >= 0].tolist()) == list(range(1, total))


def test_epoch_streams_are_functions_of_seed_and_epoch():
    docs = [np.full(5, i, np.int32) for i in range(20)]

    def ids(seed, epoch, shuffle):
        return batches.epoch_stream(docs, 2, 8, seed, epoch, shuffle).ids

    for shuffle in (True, False):
        assert torch.equal(ids(0, 1, shuffle), ids(0, 1, shuffle))
        assert not torch.equal(ids(0, 1, shuffle), ids(0, 2, shuffle))
    assert ids(0, 0, False)[0, 0] == 0


@given(st.lists(st.integers(1, 300), min_size=2, max_size=200), st.integers(2, 9), st.integers(0, 3))
@settings(deadline=None)
def test_buckets_hold_each_document_once(lengths, batch_size, epoch):
    order = batches.shuffled_buckets(lengths, batch_size, 0, epoch)
    assert sorted(i for b in order for i in b) == list(range(len(lengths)))
    assert all(1 < len(b) <= batch_size + 1 for b in order)
    assert order == batches.shuffled_buckets(lengths, batch_size, 0, epoch)


def test_buckets_pad_little():
    lengths = np.random.default_rng(0).integers(5, 500, 640).tolist()
    order = batches.shuffled_buckets(lengths, 32, 0, 0)
    padded = sum(max(lengths[i] for i in b) * len(b) for b in order)
    assert padded < 1.1 * sum(lengths)
    assert order != batches.shuffled_buckets(lengths, 32, 0, 1)


def test_pad_batch():
    ids, lengths = batches.pad_batch([np.array([2, 5, 6], np.int32), np.array([2], np.int32)])
    assert ids.tolist() == [[2, 5, 6], [2, PAD_ID, PAD_ID]] and lengths.tolist() == [3, 1]


def test_a_sentence_that_ends_in_an_address_is_a_text():
    sentences = ["See https://example.org/tables/List.txt", "Read docs/README.txt"]
    assert corpus.read_texts(sentences) == sentences
