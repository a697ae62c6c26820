"""What LanguageModel and TextClassifier share: an encoder and what stands on it, one after the other."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, Literal, TypeVar, overload

from torch import nn

_First = TypeVar("_First", bound=nn.Module)
_Second = TypeVar("_Second", bound=nn.Module)


class Stack(nn.Sequential, Generic[_First, _Second]):
    """An nn.Sequential of two, with a constructor of its own, which nn.Sequential's slices would call."""

    @overload
    def __getitem__(self, idx: Literal[0, -2]) -> _First: ...
    @overload
    def __getitem__(self, idx: Literal[1, -1]) -> _Second: ...
    @overload
    def __getitem__(self, idx: int) -> nn.Module: ...
    @overload
    def __getitem__(self, idx: slice) -> nn.Sequential: ...
    def __getitem__(self, idx: int | slice) -> nn.Module:
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


def unique_groups(groups: Sequence[Sequence[nn.Module]]) -> list[list[nn.Parameter]]:
    """The parameters of each group of modules, each once."""
    return [list(dict.fromkeys(p for module in group for p in module.parameters())) for group in groups]
