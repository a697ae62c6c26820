"""Scratch memory kept between calls: reused, bounded, given back, and safe with threads and after fork."""

import os
import threading

import pytest
import torch
from checks import lstm_case

import ulmfit_fast as uf

KEPT_AT_MOST = 1 << 30
pytestmark = pytest.mark.cpu_only("the CPU kernels' memory")


def step(batch=64, hidden=512):
    (x, h0, c0, *weights), _, _ = lstm_case(torch.float32, 6, batch, 20, hidden)
    leaves = [w.requires_grad_() for w in weights]
    y, _, _ = uf.lstm(x, h0, c0, *leaves, weight_p=0.5, seed=1)
    return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]


def test_is_kept_and_given_back():
    step()
    assert 1 << 20 <= uf.release_workspace() <= KEPT_AT_MOST
    assert uf.release_workspace() == 0


def test_stays_bounded():
    for batch in (1, 7, 64, 160, 300):
        step(batch, 300 + batch)
    assert uf.release_workspace() <= KEPT_AT_MOST


def test_a_block_without_room_pushes_none_out():
    uf.release_workspace()
    large, small, other = (
        torch.ops.ulmfit_fast.lent_like(torch.empty(n << 20, dtype=torch.uint8)) for n in (860, 60, 120)
    )
    del large, small  # kept; beside the large one there is no room for the other
    del other
    assert 920 << 20 <= uf.release_workspace() < 930 << 20


def test_what_is_left_in_it_does_not_matter():
    uf.release_workspace()
    fresh = step(16)
    step(64, 600)
    for a, b in zip(fresh, step(16), strict=True):
        assert torch.equal(a, b)


def test_what_is_saved_for_backward_is_kept_until_its_graph_is_freed():
    expected = step(hidden=600)
    (x, h0, c0, *weights), _, _ = lstm_case(torch.float32, 6, 64, 20, 600)
    leaves = [w.requires_grad_() for w in weights]
    y, _, _ = uf.lstm(x, h0, c0, *leaves, weight_p=0.5, seed=1)
    uf.release_workspace()
    step(hidden=600)  # takes, writes and gives back blocks of the same sizes
    for a, b in zip(expected[1:], torch.autograd.grad(y.sum(), leaves), strict=True):
        assert torch.equal(a, b)


def vocabulary_gradients(seed, retain_graph=False):
    """Of an embedding and a softmax, large enough for lent memory; the loss and the leaves come along."""
    generator = torch.Generator().manual_seed(seed)
    table, weight = (torch.randn(3000, 200, generator=generator).div(10).requires_grad_() for _ in range(2))
    ids, target = torch.randint(3000, (2, 300), generator=generator)
    h = uf.embedding_dropout(table, ids, p=0.1, seed=seed)
    loss = uf.linear_cross_entropy(h, weight, None, target)
    return loss, (table, weight), torch.autograd.grad(loss, (table, weight), retain_graph=retain_graph)


def test_gradients_outlive_later_calls_and_a_release():
    """A gradient may lie in the workspace's memory; nobody else may have that memory while it lives."""
    loss, leaves, gradients = vocabulary_gradients(0, retain_graph=True)
    copies = [g.clone() for g in gradients]
    uf.release_workspace()
    others = [vocabulary_gradients(seed)[2] for seed in (1, 2)]
    again = torch.autograd.grad(loss, leaves)  # what the graph saved is whole too
    for one, copy, other, second in zip(gradients, copies, others[1], again, strict=True):
        assert torch.equal(one, copy)
        assert torch.equal(second, copy)
        assert not torch.equal(other, copy)


def test_gradients_of_a_tied_weight_are_added_in_place():
    """The sum of the two would be a third piece of memory as large as the vocabulary."""
    weight = torch.randn(3000, 200).requires_grad_()
    ids = torch.randint(3000, (300,))
    loss = uf.linear_cross_entropy(uf.embedding_dropout(weight, ids, p=0.1, seed=0), weight, None, ids)
    with torch.profiler.profile(record_shapes=True) as profile:
        loss.backward()
    shape = list(weight.shape)
    sums = [e.name for e in profile.events() if e.input_shapes[:2] == [shape, shape] and "add" in e.name]
    assert sums == ["aten::add_"]


def test_threads_at_once():
    expected, failures = step(), []

    def work():
        for _ in range(3):
            if not all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True)):
                failures.append("differs")
            uf.release_workspace()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_fork():
    """The child computes the same with one thread: OpenMP's own pool does not survive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = step()
        child = os.fork()
        if child == 0:
            same = all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)
