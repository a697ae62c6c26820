"""Files as other programs write them, made from small models: for the tests of `load_checkpoint`."""

import io
import pickle
import sys
import tarfile
import types

import torch
from torch import nn

import ulmfit_fast as uf

WORDS = ["xxunk", "xxpad", "xxbos", "xxeos", "xxfld", "xxrep", "xxwrep", "xxup", "xxmaj"]
WORDS += ["the", "film", "was", "fine", "and", "dull", ".", "a", "great", "song", "book", "play", "xxfake"]


def language_model(n_hid=10, vocab=None, n_layers=2, **options):
    return uf.LanguageModel(uf.AWDLSTM(vocab or len(WORDS), 6, n_hid, n_layers, **options)).eval()


def classifier(n_classes=3):
    model = uf.TextClassifier(uf.AWDLSTM(len(WORDS), 6, 10, 2), n_classes)
    model(torch.randint(0, len(WORDS), (4, 5)))  # moves the running statistics
    return model.eval()


def as_fastai_1(state):
    """With the dropped copy of each recurrent weight, which fastai 1 saved."""
    old = {}
    for key, tensor in state.items():
        old[key] = tensor
        if key.endswith("weight_ih_l0"):
            old[key.replace("weight_ih", "weight_hh")] = torch.zeros(1)
    return old


def as_fastai_07(state):
    """Other names, no bias of the decoder."""
    old = {
        key.replace(".weight_hh_l0_raw", ".module.weight_hh_l0_raw"): tensor for key, tensor in state.items()
    }
    old["0.encoder_with_dropout.embed.weight"] = old.pop("0.encoder_dp.emb.weight")
    del old["1.decoder.bias"]
    return old


def packed(content, zipped=True):
    """What torch.save writes; zipped=False is its format before torch 1.6."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def published(path, model, words=WORDS, names=("lstm_fwd.pth", "itos_wt103.pkl")):
    """An archive in the layout of fastai's wt103-fwd.tgz, which is older than torch's zip files."""
    members = {names[0]: packed(as_fastai_1(model.state_dict()), zipped=False), names[1]: pickle.dumps(words)}
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


class WeightDrop(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.weights, self.dropout = module, ["weight_hh_l0"], 0.5
        raw = module._parameters.pop("weight_hh_l0")
        module.flatten_parameters = self.nothing  # a bound method, as theirs: pickled by way of getattr
        module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
        module.__dict__["weight_hh_l0"] = raw.data * 2  # a dropped copy, as a forward leaves it

    def nothing(self):
        pass


class RNNModel(nn.Module):
    def __init__(self, ntoken, ninp, nhid, nlayers):
        super().__init__()
        sizes = [ninp] + [nhid] * (nlayers - 1) + [ninp]
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnns = nn.ModuleList(WeightDrop(nn.LSTM(i, o)) for i, o in zip(sizes, sizes[1:], strict=False))
        self.decoder = nn.Linear(ninp, ntoken)
        self.decoder.weight = self.encoder.weight
        self.rnn_type = "LSTM"


class SplitCrossEntropyLoss(nn.Module):
    pass


def salesforce_pickle(monkeypatch, zipped):
    """(RNNModel, bytes) of a pickled [model, criterion, optimizer] whose modules exist here no more."""
    places = {"model": RNNModel, "weight_drop": WeightDrop, "splitcross": SplitCrossEntropyLoss}
    with monkeypatch.context() as patch:
        for name, cls in places.items():
            module = types.ModuleType(name)
            setattr(module, cls.__name__, cls)
            patch.setattr(cls, "__module__", name)
            patch.setitem(sys.modules, name, module)
        model = RNNModel(7, 6, 10, 3)
        optimizer = torch.optim.ASGD(model.parameters(), lr=0.1, t0=0, lambd=0.0)
        model.decoder(model.encoder.weight).sum().backward()
        optimizer.step()
        data = packed([model, SplitCrossEntropyLoss(), optimizer], zipped)
    return model, data
