"""AWDLSTM's carried state where parameters come and go, and where a forward is computed twice."""

import pytest
import torch
from checks import DEVICE
from torch.utils.checkpoint import checkpoint

import ulmfit_fast as uf

V, E, H = 30, 6, 10


def language_model():
    return uf.LanguageModel(uf.AWDLSTM(V, E, H, 2)).eval()


def tokens():
    return torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("assign", [True, False])
def test_a_model_from_the_meta_device_starts_from_zeros(assign):
    filled = language_model().to(DEVICE)
    with torch.device("meta"):
        lm = language_model()
    if not assign:
        lm.to_empty(device=DEVICE)
    lm.load_state_dict(filled.state_dict(), assign=assign)
    assert torch.equal(lm(tokens()), filled(tokens()))
    assert torch.equal(lm(tokens()), filled(tokens()))  # with the state of the first call


def test_to_empty_keeps_the_state():
    """It is no parameter that somebody will load, and unwritten memory must not become one."""
    encoder = language_model().to(DEVICE)[0]
    encoder(tokens())
    before = [t.clone() for layer in encoder.hidden for t in layer]
    encoder.to_empty(device=DEVICE)
    after = [t for layer in encoder.hidden for t in layer]
    assert all(map(torch.equal, after, before))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_function_may_begin_with_a_reset(reentrant):
    lm = language_model().to(DEVICE).eval()

    def read(embedded):
        lm.reset()
        return lm[0](embedded, from_embeds=True)

    gradients = []
    for call in (read, lambda x: checkpoint(read, x, use_reentrant=reentrant)):
        embedded = lm[0].encoder(tokens()).detach().requires_grad_()
        call(embedded).square().sum().backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_refused_and_run_is_not(reentrant):
    lm = language_model().to(DEVICE)
    loss = checkpoint(lambda x: lm(x.long()).square().sum(), tokens().float().requires_grad_(),
                      use_reentrant=reentrant)  # fmt: skip
    with pytest.raises(RuntimeError, match="AWDLSTM.forward was called inside a backward pass.*AWDLSTM.run"):
        loss.backward()

    def run(embedded, *states):
        hidden = list(zip(states[::2], states[1::2], strict=True))
        outputs, hidden = lm[0].run(embedded, hidden, from_embeds=True)
        return outputs[-1], *(t for layer in hidden for t in layer)

    states = [t for layer in lm[0].hidden for t in layer]
    gradients = []
    for call in (run, lambda *t: checkpoint(run, *t, use_reentrant=reentrant)):
        lm.zero_grad()
        sum(t.square().sum() for t in call(lm[0].encoder(tokens()), *states)).backward()
        gradients.append([p.grad.clone() for p in lm[0].parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_a_backward_hook_may_read_on_without_gradients():
    lm = language_model().to(DEVICE)
    output = lm(tokens())
    expected = uf.AWDLSTM.run(lm[0], tokens(), lm[0].hidden)[0][-1]
    seen = []
    output.register_hook(lambda grad: seen.append(lm[0](tokens())))
    output.sum().backward()
    assert torch.equal(seen[0], expected)
