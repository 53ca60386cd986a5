"""Two objects that share one state."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from olmoe.hf.view import view_as


class Doubled(nn.Linear):
    """A linear layer with doubled outputs."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_changes_through_either_view_show_in_both():
    original = nn.Linear(3, 2)
    view = view_as(Doubled, original)
    assert (type(original), type(view)) == (nn.Linear, Doubled)
    x = torch.randn(4, 3)
    for changed, value in ((view, torch.randn(2, 3)), (original, torch.randn(2, 3))):
        changed.weight = nn.Parameter(value)
        assert view.weight is original.weight
        assert torch.equal(view(x), 2 * original(x))
    original.to(torch.float64)
    assert view.bias.dtype == torch.float64
    view.eval()
    assert not original.training


def test_copies_of_a_view_have_their_own_state():
    view = view_as(Doubled, nn.Linear(3, 2))
    for copied in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert type(copied) is Doubled
        assert torch.equal(copied.weight, view.weight)
        assert copied.weight is not view.weight


def test_hooks_bound_to_a_module_keep_working_with_the_view():
    original, seen = nn.Linear(3, 2), []
    original.register_load_state_dict_pre_hook(lambda module, *rest: seen.append(module))
    view = view_as(Doubled, original)
    del original
    view.load_state_dict(view.state_dict())
    assert seen == [view]
    copy.deepcopy(view).load_state_dict(view.state_dict())
    assert len(seen) == 2
