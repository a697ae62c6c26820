"""A program of a user who type-checks: never run, but checked by mypy --strict in test_typing.py.

`assert_type` says what a call is known to return; where that is Any it fails, as any other type does.
"""

from pathlib import Path
from typing import Any

import torch
from numpy import float32
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from typing_extensions import assert_type

import ulmfit_fast as uf
from ulmfit_fast import fastai, salesforce
from ulmfit_fast.pretrained import Checkpoint
from ulmfit_fast.results import TrainedClassifier, TrainedLM

State = tuple[Tensor, Tensor]


def ops(x: Tensor, h: Tensor, w: Tensor, ids: Tensor, p: float | None) -> None:
    assert_type(uf.lstm(x, h, h, w, w), tuple[Tensor, Tensor, Tensor])
    assert_type(uf.lstm(x, None, None, w, w, precision="high", seed=h), tuple[Tensor, Tensor, Tensor])
    assert_type(uf.lstm(x, h, h, w, w, dropout_p=0.5), tuple[Tensor, Tensor, Tensor, Tensor])
    y, h_n, *_ = uf.lstm(x, h, h, w, w, dropout_p=p)
    assert_type(y, Tensor)
    assert_type(uf.embedding_dropout(w, ids, 0.1, seed=3, padding_idx=1), Tensor)
    assert_type(uf.variational_dropout(x, 0.5, batch_first=False), Tensor)
    assert_type(uf.linear_cross_entropy(h, w, None, ids, reduction="sum"), Tensor)
    assert_type(uf.concat_pool(x, ids), Tensor)
    assert_type(uf.dropout_mask(1, x.shape, 0.5, dtype=torch.bfloat16, device="cpu"), Tensor)
    assert_type(uf.dropout_mask(None, 7, 0.5), Tensor)
    assert_type(uf.release_workspace(), int)
    assert_type(uf.info().isas, tuple[str, ...])
    assert_type(uf.__version__, str)


def modules(x: Tensor, h: Tensor, ids: Tensor) -> None:
    lstm = uf.WeightDropLSTM(10, 16, num_layers=2, bidirectional=True, weight_p=0.5, device="cpu")
    assert_type(lstm(x), tuple[Tensor, State])
    assert_type(lstm(x, (h, h), lengths=ids, seed=1), tuple[Tensor, State])
    assert_type(lstm(x, dropout_p=0.4, dropout_seed=1), tuple[Tensor, State, Tensor])
    assert_type(lstm.eval()(x)[0], Tensor)
    assert_type(uf.VariationalDropout(0.3)(x), Tensor)
    embedding = uf.EmbeddingDropout(nn.Embedding(50, 12), 0.1)
    assert_type(embedding(ids, scale=2.0), Tensor)
    encoder = uf.AWDLSTM(50, emb_sz=12, n_hid=16, n_layers=3, pad_token=None, dtype=torch.float64)
    assert_type(encoder(ids), Tensor)
    assert_type(encoder(ids, return_raw=True), tuple[Tensor, list[Tensor]])
    assert_type(encoder.run(ids, encoder.hidden, seed=3), tuple[list[Tensor], list[State]])
    assert_type(encoder.to_torch(), fx.GraphModule)
    encoder.set_dropout(hidden_p=0.1, weight_p=0.2)


def models(encoder: uf.AWDLSTM, ids: Tensor, lengths: Tensor) -> None:
    lm = uf.LanguageModel(encoder, output_p=0.1)
    assert_type(lm(ids), Tensor)
    loss, cross_entropy = lm(ids[:, :-1], ids[:, 1:])
    assert_type(loss, Tensor)
    assert_type(cross_entropy, Tensor)
    assert_type(lm[0], uf.AWDLSTM)
    assert_type(lm[1].decoder, nn.Linear)
    assert_type(lm[-1](ids), Tensor)
    assert_type(lm[:1], nn.Sequential)
    lm[0].reset()
    clf = uf.TextClassifier.from_language_model(lm, 2, dropout={"hidden_p": 0.2}, lin_ftrs=[50])
    assert_type(clf(ids, lengths), Tensor)
    assert_type(clf[0].module, uf.AWDLSTM)
    assert_type(clf.layer_groups(), list[list[nn.Parameter]])
    assert_type(uf.TextClassifier(encoder, 3, max_len=None).to("cpu"), uf.TextClassifier)


def stages(table: Any) -> None:
    lm = uf.pretrain_lm([Path("a.txt"), "a text"], "out", "tiny", valid="b.csv", progress="lines", epochs=1)
    assert_type(lm, TrainedLM)
    assert_type(uf.finetune_lm(lm, ["a text"], Path("out"), callback=print, resume=True), TrainedLM)
    clf = uf.train_classifier(lm, ["a", "b"], ["x", "y"], "out", valid=(["c"], ["x"]), device="cpu")
    uf.train_classifier("run", table["text"], table["label"], "out", config={"epochs": 3})
    uf.train_classifier(None, ["a", "b"], [0, 1], "out", valid="valid.csv", lr=1e-3)
    assert_type(clf, TrainedClassifier)
    assert_type(clf.predict(["a text"]), list[str | int])
    assert_type(clf.predict_proba(["a text"]), NDArray[float32])
    assert_type(clf.accuracy(["a", "b"], clf.predict(["a", "b"])), float)
    assert_type(clf.config.bptt, int)
    assert_type(clf.history[0]["kind"], Any)
    assert_type(lm.perplexity(["a text"]), float)
    assert_type(lm.generate("The", 10, temperature=0.5, seed=1), str)
    assert_type(lm.model, uf.LanguageModel)
    assert_type(lm.path, Path | None)
    assert_type(uf.load("out", device=torch.device("cpu")), TrainedLM | TrainedClassifier)
    both = uf.ClassifierEnsemble([clf, clf])
    assert_type(both.predict(["a text"]), list[str | int])
    assert_type(both.predict_proba(["a text"]), NDArray[float32])


def checkpoints() -> None:
    checkpoint = uf.load_checkpoint("wt103-fwd.tgz", tokens=["xxunk"])
    assert_type(checkpoint, Checkpoint)
    assert_type(checkpoint.tokens, list[str] | None)
    assert_type(checkpoint.encoder(hidden_p=0.1), uf.AWDLSTM)
    assert_type(checkpoint.language_model(output_p=0.1, weight_p=0.2), uf.LanguageModel)
    assert_type(checkpoint.classifier(2, dropouts={"embed_p": 0.1}, bptt=70), uf.TextClassifier)
    assert_type(checkpoint.with_tokens(["a"]).known, int | None)
    uf.AWDLSTM(**checkpoint.config)
    uf.save_checkpoint(Path("lm.pth"), checkpoint, format="fastai")


def drop_ins(learn: Any, ids: Tensor) -> None:
    fastai.accelerate(learn).fit(1)
    fastai.restore(learn)
    encoder = fastai.AWD_LSTM(50, 12, 16, 3, bidir=True)
    assert_type(encoder(ids), Tensor)
    assert_type(encoder.hidden, list[State])
    assert_type(fastai.RNNDropout(0.4)(ids), Tensor)
    assert_type(fastai.EmbeddingDropout(encoder.encoder, 0.1)(ids), Tensor)
    assert_type(fastai.dropout_mask(ids, [3, 1], 0.5), Tensor)
    model = salesforce.RNNModel("LSTM", 50, 12, 16, 3, tie_weights=True)
    output, hidden = model(ids, model.init_hidden(4))
    assert_type(output, Tensor)
    assert_type(hidden, list[State])
    assert_type(model(ids, hidden, return_h=True), tuple[Tensor, list[State], list[Tensor], list[Tensor]])
    assert_type(salesforce.RNNModel.from_checkpoint("lm.pt", wdrop=0.5), salesforce.RNNModel)
    criterion = salesforce.SplitCrossEntropyLoss(16, splits=[10])
    assert_type(criterion(model.decoder.weight, model.decoder.bias, output, ids), Tensor)
    assert_type(salesforce.embedded_dropout(model.encoder, ids), Tensor)


def refused(x: Tensor) -> None:
    """Each of these is an error, of the kind that it names; mypy reports an ignore without one."""
    uf.pretrian_lm(["a text"], "out")  # type: ignore[attr-defined]
    uf.lstm(x, None, None, x, x, dropout_seed=1)  # type: ignore[call-overload]
    uf.linear_cross_entropy(x, x, None, x, reduction="max")  # type: ignore[arg-type]
    uf.AWDLSTM(50, n_hidden=3)  # type: ignore[call-arg]
    uf.load("out").predict(["a text"])  # type: ignore[union-attr]
